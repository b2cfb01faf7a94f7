"""Prediction tile by tile, with finished logits given out slab by slab along one axis.

Tiles lie on a regular grid and their weights are a product over the axes, so the sum of weights at a voxel is a product
too. It is known beforehand: each tile is weighted so that the weights of a voxel sum to 1, and a row is finished as
soon as no later tile covers it. Logits are kept for one patch depth along the streaming axis, whatever the length.

A voxel's tiles are added in the order of the grid, whatever the tile batch and however much of the image is summed at a
time: what is given out does not depend on either, bit for bit, where the network's outputs do not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autoseg.inference.ladder import Ladder
from autoseg.inference.sums import Sums
from autoseg.inference.tiles import (
    Forward,
    PlacedForward,
    Shape,
    TileGrid,
    make_grid,
    profile,
    tile_starts,
    touching,
)
from autoseg.preprocessing.crop import Box

__all__ = [
    "Forward",
    "PlacedForward",
    "Shape",
    "Slab",
    "TileGrid",
    "make_grid",
    "middle_tiles",
    "profile",
    "stream_logits",
    "stream_slabs",
    "tile_starts",
]

Slab = tuple[int, int, Tensor]
"""Rows [start, stop) along the streaming axis, and their logits."""


def stream_logits(
    forward: Forward,
    image: Tensor,
    grid: TileGrid,
    *,
    sigma_fraction: float = 0.125,
    tile_batch: int = 1,
    previous: Tensor | None = None,
) -> Iterator[Slab]:
    """Predict an image and give finished slabs of logits in order.

    Args:
        forward: (n, C, *patch) to (n, K, *patch), any device and floating type; n is at most `tile_batch`.
        image: (C, D, H, W) on any device.
        grid: Where the tiles lie.
        sigma_fraction: Of the tile weights.
        tile_batch: Tiles a forward pass.
        previous: (D, H, W) class indices of a cascade's previous stage: `forward` gets them as one more channel, the
            last, 0 where the image is padded.

    Yields:
        start, stop, logits: see `stream_slabs`; float32.
    """
    ladder = Ladder(lambda tiles, _: list(forward(tiles)), tile_batch)
    yield from stream_slabs(ladder, image, grid, sigma_fraction=sigma_fraction, previous=previous)


def stream_slabs(
    ladder: Ladder,
    image: Tensor,
    grid: TileGrid,
    *,
    sigma_fraction: float,
    previous: Tensor | None = None,
    box: Box | None = None,
    sums_dtype: torch.dtype = torch.float32,
) -> Iterator[Slab]:
    """Predict an image, or a part of its cross-section, and give finished slabs of logits in order.

    Args:
        ladder: The network, and what is done when memory runs out.
        image: (C, D, H, W) on any device.
        grid: Where the tiles lie.
        sigma_fraction: Of the tile weights.
        previous: See `stream_logits`.
        box: The part wanted, all of the image along the streaming axis; None is the whole image. Tiles that do not
            touch it are not predicted.
        sums_dtype: See `Sums`.

    Yields:
        start, stop, logits: rows [start, stop) of the image along `grid.stream_axis`; (K, D, H, W) with stop - start
        entries on that axis and the box on the others. Together they cover the box once. Each is a view of the sums
        that holds until the next is asked for: copy what is to be kept.
    """
    axis = grid.stream_axis
    sums = Sums(grid, sigma_fraction, box or grid.box, sums_dtype)
    starts = list(_tiles_in(grid, box or grid.box))
    cut = _Cutter(image, previous, grid)
    num_done = 0
    while num_done < len(starts):
        # Finished rows are used before the network runs, and its outputs go before it runs again: neither finds the
        # other's memory taken.
        yield from sums.finish(starts[num_done][axis])
        outputs = ladder.run(starts[num_done : num_done + ladder.tile_batch], cut)
        if ladder.sums_on_host:
            sums.move_to_host()
        if outputs is None:
            continue
        for start, logits in zip(starts[num_done : num_done + len(outputs)], outputs, strict=True):
            yield from sums.finish(start[axis])
            sums.add(start, logits)
        num_done += len(outputs)
        del outputs, logits
    yield from sums.finish(grid.padded_shape[axis])


def middle_tiles(image: Tensor, grid: TileGrid, number: int, previous: Tensor | None = None) -> Tensor:
    """Tiles around the middle of an image, in the grid's order: (n, C, *patch), as many as asked for or as there are.

    Args:
        image: (C, D, H, W).
        grid: Where the tiles lie.
        number: Wanted.
        previous: See `stream_logits`.
    """
    starts = list(grid.tiles())
    first = max(0, min(len(starts) // 2, len(starts) - number))
    cut = _Cutter(image, previous, grid)
    return torch.stack([cut(start) for start in starts[first : first + number]])


def _tiles_in(grid: TileGrid, box: Box) -> Iterator[Shape]:
    """The tiles that hold some of a part of the image, in the grid's order."""
    kept = [
        set(touching(starts, patch, part.start + padded, part.stop + padded))
        for starts, patch, part, padded in zip(grid.starts, grid.patch_size, box, grid.padding, strict=True)
    ]
    return (tile for tile in grid.tiles() if all(start in some for start, some in zip(tile, kept, strict=True)))


class _Cutter:
    """Cuts tiles out of an image, with zeros around it where it is smaller than a tile: never a padded copy of it."""

    def __init__(self, image: Tensor, previous: Tensor | None, grid: TileGrid) -> None:
        self._image, self._previous, self._grid = image, previous, grid

    def __call__(self, start: Shape) -> Tensor:
        box: list[slice] = []
        pads: list[int] = []
        for axis in (2, 1, 0):
            # The first voxel in the image's own count: below 0 where the image is padded.
            low = start[axis] - self._grid.padding[axis]
            high = low + self._grid.patch_size[axis]
            size = self._grid.shape[axis]
            box.insert(0, slice(max(0, low), min(high, size)))
            pads += [max(0, -low), max(0, high - size)]
        tile = self._image[(slice(None), *box)]
        if self._previous is not None:
            tile = torch.cat([tile, self._previous[tuple(box)][None].to(tile)])
        return torch.nn.functional.pad(tile, pads) if any(pads) else tile
