"""Prediction tile by tile, with finished logits given out slab by slab along one axis.

Tiles lie on a regular grid and their weights are a product over the axes, so the sum of weights at a voxel is a product
too. It is known beforehand: each tile is weighted so that the weights of a voxel sum to 1, and a row is finished as
soon as no later tile covers it. Logits are kept for one patch depth along the streaming axis, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Shape = tuple[int, int, int]
Forward = Callable[[Tensor], Tensor]


def tile_starts(size: int, patch: int, overlap: float) -> tuple[int, ...]:
    """First voxels of the tiles along one axis: evenly spread, the first at 0, the last at the end.

    Args:
        size: Voxels of the image along the axis, at least `patch`.
        patch: Voxels of a tile.
        overlap: Least overlap of neighbours, as a fraction of the patch; tiles are at least one voxel apart.

    Source: nnU-Net v2.
    """
    free = size - patch
    count = ceil(free / max(1.0, patch * (1 - overlap))) + 1
    if count == 1:
        return (0,)
    return tuple(round(free / (count - 1) * number) for number in range(count))


def profile(patch: int, sigma_fraction: float) -> NDArray[np.float64]:
    """Weights of a tile along one axis: a Gaussian around voxel patch // 2, its largest value 1; all above 0.

    Args:
        patch: Voxels of the tile.
        sigma_fraction: Sigma as a fraction of the patch.

    Source: nnU-Net v2 (sigma 1/8).
    """
    distance = np.arange(patch) - patch // 2
    weights = np.exp(-0.5 * (distance / (sigma_fraction * patch)) ** 2)
    return np.maximum(weights, np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Where the tiles of an image lie.

    An image smaller than the patch is padded with zeros on both sides; `starts` count from the padding's first voxel.

    Attributes:
        shape: Voxels of the image (D, H, W).
        patch_size: Voxels of a tile; 1 along the first axis for 2D networks.
        padding: Voxels added in front, per axis.
        starts: Per axis.
        stream_axis: The axis with most tiles; slabs of logits are finished along it.
    """

    shape: Shape
    patch_size: Shape
    padding: Shape
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    stream_axis: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the whole image."""
        return len(self.starts[0]) * len(self.starts[1]) * len(self.starts[2])

    @property
    def padded_shape(self) -> Shape:
        """The image's shape, at least that of a tile."""
        sizes = [max(size, patch) for size, patch in zip(self.shape, self.patch_size, strict=True)]
        return (sizes[0], sizes[1], sizes[2])

    def tiles(self) -> Iterator[Shape]:
        """First voxel of every tile, ordered along the streaming axis."""
        others = [axis for axis in range(3) if axis != self.stream_axis]
        for along in self.starts[self.stream_axis]:
            for across in product(*(self.starts[axis] for axis in others)):
                start = dict(zip(others, across, strict=True)) | {self.stream_axis: along}
                yield (start[0], start[1], start[2])


def make_grid(shape: Sequence[int], patch_size: Sequence[int], overlap: float) -> TileGrid:
    """Lay tiles over an image.

    Args:
        shape: Voxels of the image (D, H, W).
        patch_size: Of the network: three entries, or two for a 2D network, which goes slice by slice.
        overlap: See `tile_starts`.
    """
    patch = (1,) * (3 - len(patch_size)) + tuple(patch_size)
    starts = [tile_starts(max(size, side), side, overlap) for size, side in zip(shape, patch, strict=True)]
    padding = [max(0, side - size) // 2 for size, side in zip(shape, patch, strict=True)]
    return TileGrid(
        shape=(shape[0], shape[1], shape[2]),
        patch_size=(patch[0], patch[1], patch[2]),
        padding=(padding[0], padding[1], padding[2]),
        starts=(starts[0], starts[1], starts[2]),
        stream_axis=max(range(3), key=lambda axis: len(starts[axis])),
    )


def stream_logits(
    forward: Forward,
    image: Tensor,
    grid: TileGrid,
    *,
    sigma_fraction: float = 0.125,
    tile_batch: int = 1,
    previous: Tensor | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
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
        start, stop, logits: rows [start, stop) of the image along `grid.stream_axis`; (K, D, H, W) float32 with
        stop - start entries on that axis and the whole image on the others. Together they cover the image once.
        Each is a view of the sums that holds until the next is asked for: copy what is to be kept.
    """
    accumulator = _Accumulator(grid, sigma_fraction)
    padded = _padded(image, grid)
    padded_previous = None if previous is None else _padded(previous[None], grid)

    def cut(start: Shape) -> Tensor:
        box = (slice(None), *_box(start, grid))
        if padded_previous is None:
            return padded[box]
        return torch.cat([padded[box], padded_previous[box].to(padded)])

    tiles = list(grid.tiles())
    for first in range(0, len(tiles), tile_batch):
        batch = tiles[first : first + tile_batch]
        # Finished rows are used before the network runs, and its outputs go before it runs again: neither finds the
        # other's memory taken.
        yield from accumulator.finish(batch[0][grid.stream_axis])
        outputs = forward(torch.stack([cut(start) for start in batch]))
        for start, logits in zip(batch, outputs, strict=True):
            yield from accumulator.finish(start[grid.stream_axis])
            accumulator.add(start, logits)
        del outputs, logits
    yield from accumulator.finish(grid.padded_shape[grid.stream_axis])


class _Accumulator:
    """The slab of logits that is still being summed: one patch depth along the streaming axis, float32."""

    def __init__(self, grid: TileGrid, sigma_fraction: float) -> None:
        self._grid = grid
        self._weights = [_normalised_weights(grid, axis, sigma_fraction) for axis in range(3)]
        self._sums: Tensor | None = None
        self._first_row = 0

    def add(self, start: Shape, logits: Tensor) -> None:
        """Add one tile (K, *patch); every row before its own must be finished."""
        grid, axis = self._grid, self._grid.stream_axis
        if self._sums is None:
            shape = list(grid.padded_shape)
            shape[axis] = grid.patch_size[axis]
            self._sums = torch.zeros((len(logits), *shape), device=logits.device)
        depth, height, width = (
            torch.from_numpy(self._weights[number][start[number]]).to(logits.device) for number in range(3)
        )
        weights = depth[:, None, None] * height[:, None] * width
        place = list(start)
        place[axis] -= self._first_row
        target = self._sums[(slice(None), *_box((place[0], place[1], place[2]), grid))]
        target.addcmul_(logits.to(torch.float32), weights)

    def finish(self, next_row: int) -> Iterator[tuple[int, int, Tensor]]:
        """Give out the rows before `next_row`, the padding cut off; nothing if there are none."""
        grid, axis = self._grid, self._grid.stream_axis
        count = next_row - self._first_row
        if self._sums is None or count <= 0:
            return
        low = max(self._first_row, grid.padding[axis])
        high = min(next_row, grid.padding[axis] + grid.shape[axis])
        if low < high:
            done = self._sums.narrow(axis + 1, low - self._first_row, high - low)
            for other in range(3):
                if other != axis:
                    done = done.narrow(other + 1, grid.padding[other], grid.shape[other])
            yield low - grid.padding[axis], high - grid.padding[axis], done
        self._move_up(count)
        self._first_row = next_row

    def _move_up(self, count: int) -> None:
        """Drop the first rows, in place: the others take their room, and zeros the room that becomes free."""
        if self._sums is None:
            return
        dim = self._grid.stream_axis + 1
        kept = self._sums.shape[dim] - count
        # At most `count` rows at a time, so that no copy reads where it writes.
        for first in range(0, kept, count):
            rows = min(count, kept - first)
            self._sums.narrow(dim, first, rows).copy_(self._sums.narrow(dim, first + count, rows))
        self._sums.narrow(dim, kept, count).zero_()


def _normalised_weights(grid: TileGrid, axis: int, sigma_fraction: float) -> dict[int, NDArray[np.float32]]:
    """Weights of every tile along one axis, by its first voxel: those of a voxel sum to 1."""
    patch = grid.patch_size[axis]
    weights = profile(patch, sigma_fraction)
    total = np.zeros(grid.padded_shape[axis])
    for start in grid.starts[axis]:
        total[start : start + patch] += weights
    return {start: (weights / total[start : start + patch]).astype(np.float32) for start in grid.starts[axis]}


def _padded(image: Tensor, grid: TileGrid) -> Tensor:
    pads: list[int] = []
    for axis in (2, 1, 0):
        missing = grid.padded_shape[axis] - grid.shape[axis]
        pads += [grid.padding[axis], missing - grid.padding[axis]]
    return torch.nn.functional.pad(image, pads) if any(pads) else image


def _box(start: Shape, grid: TileGrid) -> tuple[slice, slice, slice]:
    low, size = start, grid.patch_size
    return (slice(low[0], low[0] + size[0]), slice(low[1], low[1] + size[1]), slice(low[2], low[2] + size[2]))
