"""The slab of logits that is still being summed: one patch deep along the streaming axis."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.inference.ladder import if_it_fits
from autoseg.inference.tiles import Shape, TileGrid, profile
from autoseg.preprocessing.crop import Box

# Values of a tile that are weighted at a time: 1 MiB in float32, which stays in the processor's cache. With 16 MiB the
# heap was left with gaps of 100 MB (40 classes, tiles of 64^3), and bfloat16 took 3 times as long.
_BLOCK_VALUES = 2**18

# On other devices every block is work for the processor that starts it; these take 64 MiB.
_BLOCK_VALUES_ELSEWHERE = 2**24

# Sums in 16 bit go up to 65,504; logits beyond this are as certain as can be, and stay finite.
_LARGEST_HALF = 6e4


class Sums:
    """Adds up weighted tiles and gives out the rows that are finished.

    The weights of a voxel sum to 1, so that sums are means. In float16 every addition is made in float32 and rounded
    once: 8 times finer than the bfloat16 outputs that are added.

    Args:
        grid: Where the tiles lie.
        sigma_fraction: Of the tile weights.
        box: What of the image is summed: the whole of it along the streaming axis.
        dtype: float32 or float16.
    """

    def __init__(self, grid: TileGrid, sigma_fraction: float, box: Box, dtype: torch.dtype = torch.float32) -> None:
        self._grid = grid
        self._dtype = dtype
        self._weights = [_normalised_weights(grid, axis, sigma_fraction) for axis in range(3)]
        self._low = [part.start + padded for part, padded in zip(box, grid.padding, strict=True)]
        self._high = [part.stop + padded for part, padded in zip(box, grid.padding, strict=True)]
        self._sums: Tensor | None = None
        self._is_on_host = False
        self._first_row = 0

    def move_to_host(self) -> None:
        """Leave the memory of the device for that of the host, for good."""
        self._is_on_host = True
        if self._sums is not None:
            self._sums = self._sums.cpu()

    def add(self, start: Shape, logits: Tensor) -> None:
        """Add one tile (K, *patch); every row before its own must be finished."""
        device = self._allocated(logits).device
        into, of = self._overlap(start)
        parts = [torch.from_numpy(self._weights[axis][start[axis]][of[axis]]).to(device) for axis in range(3)]
        plane = parts[1][:, None] * parts[2]
        block = _BLOCK_VALUES if device.type == "cpu" else _BLOCK_VALUES_ELSEWHERE
        num_rows = max(1, block // plane.numel())
        num_classes = max(1, block // (num_rows * plane.numel()))
        for row in range(0, len(parts[0]), num_rows):
            rows = slice(row, row + num_rows)
            weights = parts[0][rows, None, None] * plane
            for index in range(0, len(logits), num_classes):
                classes = slice(index, index + num_classes)
                target, values = (classes, *into), logits[(classes, *of)][:, rows]
                step = partial(self._add_block, target, rows, values, weights)
                if if_it_fits(step, has_other_way=device.type != "cpu") is None:
                    self.move_to_host()
                    step()

    def _add_block(self, target: tuple[slice, ...], rows: slice, values: Tensor, weights: Tensor) -> Tensor:
        """Add some rows and classes of a tile: all of them, or none where memory runs out."""
        assert self._sums is not None
        sums = self._sums[target][:, rows]
        there, weights = values.to(sums.device), weights.to(sums.device)
        if self._dtype == torch.float32:
            return sums.addcmul_(there.to(torch.float32), weights)
        # Cut off before they are weighted: then their weighted sum is no larger either.
        return sums.add_(there.clamp(-_LARGEST_HALF, _LARGEST_HALF) * weights)

    def _allocated(self, logits: Tensor) -> Tensor:
        if self._sums is None:
            axis = self._grid.stream_axis
            shape = [high - low for low, high in zip(self._low, self._high, strict=True)]
            shape[axis] = self._grid.patch_size[axis]

            def zeros(device: torch.device) -> Tensor:
                return torch.zeros((len(logits), *shape), dtype=self._dtype, device=device)

            host = torch.device("cpu")
            there = None if self._is_on_host else if_it_fits(lambda: zeros(logits.device), logits.device != host)
            self._is_on_host = there is None
            self._sums = zeros(host) if there is None else there
        return self._sums

    def _overlap(self, start: Shape) -> tuple[Box, Box]:
        """Where a tile lies in the sums, and which part of it that is."""
        into, of = [], []
        for axis, first in enumerate(start):
            stop = first + self._grid.patch_size[axis]
            if axis == self._grid.stream_axis:
                into.append(slice(first - self._first_row, stop - self._first_row))
                of.append(slice(0, stop - first))
                continue
            low, high = max(first, self._low[axis]), min(stop, self._high[axis])
            into.append(slice(low - self._low[axis], high - self._low[axis]))
            of.append(slice(low - first, high - first))
        return (into[0], into[1], into[2]), (of[0], of[1], of[2])

    def finish(self, next_row: int) -> Iterator[tuple[int, int, Tensor]]:
        """Give out the rows before `next_row`, the padding cut off; nothing if there are none."""
        grid, axis = self._grid, self._grid.stream_axis
        count = next_row - self._first_row
        if self._sums is None or count <= 0:
            return
        low = max(self._first_row, self._low[axis])
        high = min(next_row, self._high[axis])
        if low < high:
            done = self._sums.narrow(axis + 1, low - self._first_row, high - low)
            yield low - grid.padding[axis], high - grid.padding[axis], done
        self._move_up(count)
        self._first_row = next_row

    def _move_up(self, count: int) -> None:
        """Drop the first rows, in place: the others take their room, and zeros the room that becomes free."""
        if self._sums is None:
            return
        dim = self._grid.stream_axis + 1
        kept = max(0, self._sums.shape[dim] - count)
        # At most `count` rows at a time, so that no copy reads where it writes.
        for first in range(0, kept, count):
            rows = min(count, kept - first)
            self._sums.narrow(dim, first, rows).copy_(self._sums.narrow(dim, first + count, rows))
        self._sums.narrow(dim, kept, self._sums.shape[dim] - kept).zero_()


def _normalised_weights(grid: TileGrid, axis: int, sigma_fraction: float) -> dict[int, NDArray[np.float32]]:
    """Weights of every tile along one axis, by its first voxel: those of a voxel sum to 1."""
    patch = grid.patch_size[axis]
    weights = profile(patch, sigma_fraction)
    total = np.zeros(grid.padded_shape[axis])
    for start in grid.starts[axis]:
        total[start : start + patch] += weights
    return {start: (weights / total[start : start + patch]).astype(np.float32) for start in grid.starts[axis]}
