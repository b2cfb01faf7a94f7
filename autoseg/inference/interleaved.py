"""Test-time mirroring that is nearly free: tiles overlap, and each is predicted under a mirror combination of its own.

A voxel in the middle of an image lies in two tiles along each axis, eight in all. Where these are flipped differently,
the mean over them is one over mirror combinations too. At the edges of an image, and where tiles hardly overlap, voxels
lie in fewer tiles; there tiles are predicted under more combinations, unless they show clear background.

Source: docs/decisions/0033.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil, prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.inference.ladder import AtATime
from autoseg.inference.tiles import Forward, PlacedForward, Shape, TileGrid
from autoseg.inference.tta import Mirrors

MOST_PASSES = 4
"""Predictions that a voxel should be the mean of, where there are as many combinations: with three axes half of them,
which can still be balanced over the axes. Source: docs/decisions/0033."""

CLEAR_LEAD = 4.0
"""Logits by which background leads where nobody expects a mirrored prediction to say otherwise (odds of 55 to 1).
Source: docs/decisions/0033."""

# A combination is a set of bits: bit i flips axes[i]. A tile whose number along axis a is odd is flipped by the a-th of
# these. Two neighbours along any axis differ; of the four tiles around a line along any axis, and so of those at a face
# of the image, each axis is flipped in two; of the eight around a point, each combination occurs once (three axes),
# twice (two) or four times (one).
_FLIPS_OF_ODD = {1: (0b1, 0b1, 0b1), 2: (0b01, 0b10, 0b11), 3: (0b011, 0b110, 0b111)}

# Further combinations relative to the first. The first three make, with none, the four in which each axis is flipped
# twice and each pair of axes in all four ways.
_FURTHER = (0b101, 0b110, 0b011, 0b111, 0b100, 0b010, 0b001)


@dataclass(frozen=True)
class Interleaving:
    """Which combinations each tile of an image is predicted under.

    Attributes:
        grid: Where the tiles lie.
        axes: Spatial axes that may be flipped, at least one.
    """

    grid: TileGrid
    axes: tuple[int, ...]

    @cached_property
    def _coverage(self) -> tuple[NDArray[np.int64], ...]:
        """How many tiles hold each voxel, along each axis."""
        counts = []
        for axis, starts in enumerate(self.grid.starts):
            count = np.zeros(self.grid.padded_shape[axis], np.int64)
            for start in starts:
                count[start : start + self.grid.patch_size[axis]] += 1
            counts.append(count)
        return tuple(counts)

    @property
    def wanted(self) -> int:
        """Predictions that each voxel should be the mean of."""
        return min(MOST_PASSES, 1 << len(self.axes))

    def flips(self, start: Shape) -> tuple[tuple[int, ...], ...]:
        """The combinations of a tile: the first always, the others where `thin` voxels ask for them.

        Args:
            start: Its first voxel.
        """
        odd = _FLIPS_OF_ODD[len(self.axes)]
        first = 0
        for axis in range(3):
            if self.grid.starts[axis].index(start[axis]) % 2:
                first ^= odd[axis]
        least = self._least_coverage(start)
        # What the tiles that share its thinnest voxels begin with would add nothing there.
        shared = {0}
        for axis in range(3):
            shared |= {item ^ odd[axis] for item in shared} if least[axis] > 1 else set()
        further = [item for item in _FURTHER if item < 1 << len(self.axes)]
        further.sort(key=lambda item: item in shared)
        count = 1 if self._is_spared(start, least) else ceil(self.wanted / prod(least))
        return tuple(self._axes_of(first ^ item) for item in (0, *further)[:count])

    def _is_spared(self, start: Shape, least: Shape) -> bool:
        """Whether it is the middle one of three tiles, whose two others hold all its voxels and suffice alone."""
        for axis, starts in enumerate(self.grid.starts):
            if len(starts) == 3 and start[axis] == starts[1] and least[axis] > 1:
                ends = [(*start[:axis], end, *start[axis + 1 :]) for end in (starts[0], starts[2])]
                if all(prod(self._least_coverage(end)) == 1 for end in ends):
                    return True
        return False

    def num_passes(self) -> int:
        """How many passes all tiles take at most: those of clear background take fewer."""
        return sum(len(self.flips(start)) for start in self.grid.tiles())

    def thin(self, start: Shape) -> Tensor:
        """(*patch) bool: voxels of the image that fewer tiles hold than `wanted`.

        Args:
            start: First voxel of the tile.
        """
        counts = self._counts(start)
        covered = counts[0][:, None, None] * counts[1][:, None] * counts[2]
        return torch.from_numpy((covered > 0) & (covered < self.wanted))

    def _counts(self, start: Sequence[int]) -> list[NDArray[np.int64]]:
        """Tiles that hold each row of a tile, along each axis; 0 where it is padding."""
        counts = []
        for axis, first in enumerate(start):
            count = self._coverage[axis].copy()
            low = self.grid.padding[axis]
            count[:low] = 0
            count[low + self.grid.shape[axis] :] = 0
            counts.append(count[first : first + self.grid.patch_size[axis]])
        return counts

    def _least_coverage(self, start: Sequence[int]) -> Shape:
        first, second, third = (int(count[count > 0].min()) for count in self._counts(start))
        return first, second, third

    def _axes_of(self, bits: int) -> tuple[int, ...]:
        return tuple(axis for number, axis in enumerate(self.axes) if bits >> number & 1)


def interleaved(
    forward: Forward,
    mirrors: Mirrors,
    grid: TileGrid,
    *,
    is_regions: bool = False,
    num_logits: int | None = None,
    at_a_time: AtATime | None = None,
) -> PlacedForward:
    """The network, with each tile flipped its own way and its output flipped back; the mean where there are several.

    Args:
        forward: (n, C, *spatial) to (n, K, *spatial).
        mirrors: What may be flipped.
        grid: Where the tiles lie.
        is_regions: Whether outputs are regions: background is then where all are below 0.
        num_logits: How many of the outputs are logits, the first; None: all.
        at_a_time: How many tiles `forward` gets at a time where a tile has further mirror images; None: one.
    """
    several = at_a_time or AtATime()
    plan = Interleaving(grid, mirrors.axes)

    def passes(tiles: Tensor, jobs: Sequence[tuple[int, tuple[int, ...]]]) -> list[Tensor]:
        flipped = torch.cat([mirrors.forth(tiles[index : index + 1], flip) for index, flip in jobs])
        outputs = forward(flipped)
        return [mirrors.back(outputs[row : row + 1], flip)[0] for row, (_, flip) in enumerate(jobs)]

    def run(tiles: Tensor, starts: Sequence[Shape]) -> list[Tensor]:
        flips = [plan.flips(start) for start in starts]
        totals = passes(tiles, [(index, ways[0]) for index, ways in enumerate(flips)])
        jobs = [
            (index, flip)
            for index, (start, ways) in enumerate(zip(starts, flips, strict=True))
            if len(ways) > 1 and not _is_clear(totals[index][:num_logits], plan.thin(start), is_regions)
            for flip in ways[1:]
        ]
        for (index, _), logits in zip(jobs, several.run(jobs, partial(passes, tiles)), strict=True):
            totals[index] = totals[index].to(torch.float32) + logits
        for index in {index for index, _ in jobs}:
            totals[index] = totals[index].div_(len(flips[index]))
        return totals

    return run


def _is_clear(logits: Tensor, voxels: Tensor, is_regions: bool) -> bool:
    """Whether those voxels of a tile (K, *patch) are background by far."""
    rest = logits if is_regions else logits[1:]
    best = rest.amax(dim=0)
    lead = -best if is_regions else logits[0] - best
    # Written so that what is not a number is not clear.
    return bool(((lead >= CLEAR_LEAD) | ~voxels.to(logits.device)).all())
