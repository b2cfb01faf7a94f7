"""Networks as they run: by the engine that was asked for, or by one that is found with the first volume."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor

from autoseg import runtime
from autoseg.domain.plan import Configuration
from autoseg.errors import ConfigError
from autoseg.inference.engines import ENGINES, INT8, Loaded, WantedEngine, Way, pick_way
from autoseg.inference.engines.base import Network, Tiles
from autoseg.inference.engines.choice import Choosing
from autoseg.inference.engines.openvino import OpenVino
from autoseg.inference.engines.parity import compare
from autoseg.inference.sliding_window import middle_tiles
from autoseg.inference.tiles import Forward, TileGrid
from autoseg.io.maps import IndexMap
from autoseg.io.model import Model
from autoseg.preprocessing.transform import Prepared

log = logging.getLogger("autoseg")

_CPU = torch.device("cpu")

CALIBRATION_TILES = 16
"""Tiles that show the ranges of features, for int8. Source: docs/decisions/0053."""

T = TypeVar("T")


def in_one_thread(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made while PyTorch computes in one thread; whoever uses them has all threads."""
    while True:
        with runtime.one_thread():
            item = next(items, _END)
        if item is _END:
            return
        yield cast(T, item)


_END = object()


class Running:
    """Models of one configuration on a device.

    Args:
        models: Their logits are averaged.
        engine: Asked for; "auto" is found with the first volume where that pays, see `Choosing`.
        precision: Asked for; "auto" is what the plan says, where it says anything.
        device: From `pick_device_for`.
        batch: How many tiles they mostly get at a time.
        wrap: Put around each network, if given.

    Raises:
        ConfigError: The device or the engine does not have the precision.
        ModelError: The engine cannot take the networks.
    """

    def __init__(
        self,
        models: Sequence[Model],
        engine: WantedEngine,
        precision: str,
        device: torch.device,
        batch: int,
        wrap: Callable[[Network], Network] | None = None,
    ) -> None:
        self._settings = models[0].card.settings
        way = pick_way(engine, precision, self._settings.inference.precision, device)
        self._wrap = wrap
        self._way, self._batch = way, batch
        self._is_regions = models[0].card.plan.labels.has_regions
        self._choosing: Choosing | None = None
        self._quantising: _Quantising | None = None
        if way.precision == INT8:
            self._quantising = _Quantising(models, self._settings, way, batch)
            return
        self._use(Loaded(models, self._settings, way, device, batch))
        if engine == "auto":
            self._choosing = Choosing(
                models,
                self._settings,
                self._loaded,
                device,
                precision,
                batch,
                is_regions=self._is_regions,
            )
        else:
            self._loaded.keep()
        # For the case that the device cannot hold a tile.
        self._models = () if device.type == "cpu" else tuple(models)

    def _use(self, loaded: Loaded) -> None:
        self._loaded, self._forward, self._way = loaded, self._wrapped(loaded), loaded.way

    def _wrapped(self, loaded: Loaded) -> Forward:
        return loaded.forward if self._wrap is None else loaded.wrapped(self._wrap)

    @property
    def way(self) -> Way:
        """Engine and precision."""
        return self._way

    @property
    def has_own_threads(self) -> bool:
        """See `Engine`."""
        return ENGINES[self._way.engine].has_own_threads

    def __call__(self, tiles: Tensor) -> Tensor:
        """Mean logits; see `Forward`."""
        return self._forward(tiles)

    def settle(
        self,
        prepared: Prepared,
        previous: IndexMap | None,
        grid: TileGrid,
        passes_ahead: int,
        seen: Tiles | None = None,
    ) -> None:
        """Find the engine, if it was left open and this is the first volume; make networks int8 if that was asked for.

        Args:
            prepared: The volume.
            previous: Of a cascade: what the previous stage found.
            grid: Where its tiles lie.
            passes_ahead: Passes of a tile, of this volume and those that come.
            seen: Tiles of images that the models were trained with; None: those of the volume serve.
        """
        if self._quantising is not None:
            quantising, self._quantising = self._quantising, None
            image = torch.from_numpy(prepared.image)
            of_volume = partial(torch.split, middle_tiles(image, grid, CALIBRATION_TILES), 1)
            self._use(quantising.load(seen or of_volume, is_regions=self._is_regions))
            return
        if self._choosing is None:
            return
        choosing, self._choosing = self._choosing, None
        map_ = None if previous is None else torch.from_numpy(previous)
        tiles = middle_tiles(torch.from_numpy(prepared.image), grid, self._batch, map_)
        self._use(choosing.choose(tiles, passes_ahead))

    def on_cpu(self) -> Forward:
        """The networks on the CPU, by PyTorch."""
        way = pick_way("torch", "fp32" if self.way.precision == "fp32" else "auto", "auto", _CPU)
        return self._wrapped(Loaded(self._models, self._settings, way, _CPU, 1))


class _Quantising:
    """Models that are to run in int8, which needs tiles first.

    Raises:
        ConfigError: They are a cascade, or nncf is not installed.
    """

    def __init__(self, models: Sequence[Model], settings: Configuration, way: Way, batch: int) -> None:
        if settings.previous_stage is not None:
            raise ConfigError("int8 is not offered for cascades", hint="Use --precision bf16 or fp32.")
        engine = ENGINES[way.engine]
        assert isinstance(engine, OpenVino)
        for model in models:
            engine.require_int8(model)
        self._models, self._settings, self._way, self._batch = models, settings, way, batch

    def load(self, tiles: Tiles, *, is_regions: bool) -> Loaded:
        """The models in int8; tells how near they are to float32."""
        shown: list[Tensor] = []

        def once() -> Sequence[Tensor]:
            shown.extend(shown or tiles())
            return shown

        loaded = Loaded(self._models, self._settings, self._way, _CPU, self._batch, once)
        loaded.keep()
        if shown:
            self._tell(loaded, torch.cat(shown[: self._batch]), is_regions)
        return loaded

    def _tell(self, loaded: Loaded, tiles: Tensor, is_regions: bool) -> None:
        exact = Loaded(self._models, self._settings, Way("torch", "fp32"), _CPU, self._batch)
        parity = compare(loaded.forward(tiles), exact.forward(tiles), is_regions=is_regions)
        tell = log.info if parity.is_met(INT8) else log.warning
        tell(
            "int8: %.1f%% of foreground labels as in float32 on %d of the tiles that it was calibrated with%s",
            100 * parity.same_labels,
            len(tiles),
            "" if parity.is_met(INT8) else ": compare it with references before you use it",
        )
