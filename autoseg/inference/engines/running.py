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
from autoseg.inference.ladder import if_it_fits
from autoseg.inference.sliding_window import middle_tiles
from autoseg.inference.tiles import Forward, TileGrid
from autoseg.io.maps import IndexMap
from autoseg.io.model import Model
from autoseg.preprocessing.transform import Prepared

log = logging.getLogger("autoseg")

_CPU = torch.device("cpu")

_MOST_TOLD = 8
"""Tiles on which int8 is held against float32."""

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
        seen: Tiles,
    ) -> None:
        """Find the engine, if it was left open and this is the first volume; make networks int8 if that was asked for.

        Args:
            prepared: The volume.
            previous: Of a cascade: what the previous stage found.
            grid: Where its tiles lie.
            passes_ahead: Passes of a tile, of this volume and those that come.
            seen: For int8: tiles that show the ranges of features.
        """
        if self._quantising is not None:
            # Tried again with the next volume where it fails with this one.
            self._use(self._quantising.load(seen, is_regions=self._is_regions))
            self._quantising = None
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

        def noted(model: Model) -> Sequence[Tensor]:
            found = tiles(model)
            shown.extend(found)
            return found

        loaded = Loaded(self._models, self._settings, self._way, _CPU, self._batch, noted)
        loaded.keep()
        if shown:
            # It only informs.
            if_it_fits(partial(self._tell, loaded, shown[:_MOST_TOLD], is_regions))
        return loaded

    def _tell(self, loaded: Loaded, tiles: Sequence[Tensor], is_regions: bool) -> None:
        exact = Loaded(self._models, self._settings, Way("torch", "fp32"), _CPU, self._batch)
        logits = [[each.forward(tile) for tile in tiles] for each in (loaded, exact)]
        parity = compare(torch.cat(logits[0]), torch.cat(logits[1]), is_regions=is_regions)
        found = f"int8, on {len(tiles)} of the tiles that it was calibrated with: "
        if parity.num_foreground == 0:
            found += "no foreground"
        else:
            found += (
                f"{parity.same_labels:.1%} of the foreground labels are as in float32, and probabilities differ by "
                f"{parity.mean_difference:.3f} in the mean"
            )
        if parity.num_foreground and parity.is_met(INT8):
            log.info("%s", found)
        else:
            log.warning("%s (compare its label maps with references before you rely on them)", found)
