"""Networks as they run: by the engine that was asked for, or by one that is found with the first volume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from autoseg import runtime
from autoseg.inference.engines import Loaded, WantedEngine, Way, pick_way
from autoseg.inference.engines.base import Network
from autoseg.inference.engines.choice import Choosing
from autoseg.inference.sliding_window import middle_tiles
from autoseg.inference.tiles import Forward, TileGrid
from autoseg.io.maps import IndexMap
from autoseg.io.model import Model
from autoseg.preprocessing.transform import Prepared

_CPU = torch.device("cpu")

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
        self._use(Loaded(models, self._settings, way, device, batch))
        self._choosing: Choosing | None = None
        if engine == "auto":
            self._choosing = Choosing(
                models,
                self._settings,
                self._loaded,
                device,
                precision,
                batch,
                is_regions=models[0].card.plan.labels.has_regions,
            )
        else:
            self._loaded.keep()
        self._batch = batch
        # For the case that the device cannot hold a tile.
        self._models = () if device.type == "cpu" else tuple(models)

    def _use(self, loaded: Loaded) -> None:
        self._loaded, self._forward = loaded, self._wrapped(loaded)

    def _wrapped(self, loaded: Loaded) -> Forward:
        return loaded.forward if self._wrap is None else loaded.wrapped(self._wrap)

    @property
    def way(self) -> Way:
        """Engine and precision."""
        return self._loaded.way

    @property
    def has_own_threads(self) -> bool:
        """See `Engine`."""
        return self._loaded.has_own_threads

    def __call__(self, tiles: Tensor) -> Tensor:
        """Mean logits; see `Forward`."""
        return self._forward(tiles)

    def settle(self, prepared: Prepared, previous: IndexMap | None, grid: TileGrid, passes_ahead: int) -> None:
        """Find the engine, if it was left open and this is the first volume.

        Args:
            prepared: The volume.
            previous: Of a cascade: what the previous stage found.
            grid: Where its tiles lie.
            passes_ahead: Passes of a tile, of this volume and those that come.
        """
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
