"""Labels on another grid: of each new voxel the label that fills most of it, linearly interpolated.

All labels that a new voxel sees lie at the (up to eight) old voxels around it. So no mask of a class is made: the work
does not grow with the number of classes, and only voxels whose neighbours differ cost more than a look.

Source: batchgenerators 0.25.5, resize_segmentation, which nnU-Net 2.8.1 resamples label maps with.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.preprocessing.crop import Box

# New voxels looked at together. At a border each of them takes about 300 bytes for its neighbours, weights and sums.
_SLAB_VOXELS = 2**18

_LAST = np.int16(np.iinfo(np.int16).max)
"""Stands for the ignore index while labels are compared: of several with the same part it comes last."""


@dataclass(frozen=True, slots=True, eq=False)
class AxisNeighbours:
    """The old rows between which each new row of an axis lies.

    Attributes:
        below: (num_out,) the row before, or the only one.
        above: (num_out,) the row after.
        weight: (2, num_out) float64: of the row before and of the row after.
        nearest: (num_out,) 0 or 1: which of them is nearer; the row after where they are equally near.
        is_single: Whether every new row lies on one old row.
    """

    below: NDArray[np.int64]
    above: NDArray[np.int64]
    weight: NDArray[np.float64]
    nearest: NDArray[np.int64]
    is_single: bool


def axis_neighbours(num_in: int, num_out: int, order: int) -> AxisNeighbours:
    """Where the new rows of an axis lie among the old ones.

    Args:
        num_in: Old rows, at least 1.
        num_out: New rows, at least 1.
        order: 1 (between two rows) or 0 (on the nearest).

    Raises:
        ValueError: Another order.
    """
    if order not in (0, 1):
        raise ValueError(f"the order of a label map's largest part must be 0 or 1, got {order}")
    # Positions and weights in this very order of operations, as in SciPy: whether two labels have the same part is
    # decided to the last bit.
    positions = (np.arange(num_out, dtype=np.float64) + 0.5) * (num_in / num_out) - 0.5
    rounded = np.clip(np.floor(positions + 0.5).astype(np.int64), 0, num_in - 1)
    if order == 0 or num_in == num_out:
        weight = np.stack((np.ones(num_out), np.zeros(num_out)))
        return AxisNeighbours(rounded, rounded, weight, np.zeros(num_out, np.int64), is_single=True)
    below = np.floor(positions).astype(np.int64)
    before = 1 - (positions - below)
    # Beyond the first and the last centre both are the row at the edge.
    return AxisNeighbours(
        below=np.maximum(below, 0),
        above=np.minimum(below + 1, num_in - 1),
        weight=np.stack((before, 1 - before)),
        nearest=rounded - np.maximum(below, 0),
        is_single=False,
    )


def take_largest(
    labels: NDArray[np.int16], axes: tuple[AxisNeighbours, AxisNeighbours, AxisNeighbours]
) -> NDArray[np.int16]:
    """Of each new voxel the label with the largest interpolated part.

    Of several with exactly the same part (in float64) it is that of the nearest old voxel, if that is among them, else
    the smallest; the ignore index counts as the largest.

    Args:
        labels: (D, H, W) class indices.
        axes: Of each axis.

    Returns:
        One entry a new row of each axis, int16.
    """
    sizes = [len(axis.below) for axis in axes]
    out = np.empty(sizes, np.int16)
    rows = max(1, _SLAB_VOXELS // prod(sizes[1:]))
    for start in range(0, sizes[0], rows):
        box = (slice(start, min(start + rows, sizes[0])), slice(0, sizes[1]), slice(0, sizes[2]))
        out[box] = _decide(labels, axes, box)
    return out


def _decide(labels: NDArray[np.int16], axes: tuple[AxisNeighbours, ...], box: Box) -> NDArray[np.int16]:
    """Some new voxels."""
    corners = list(product(*((0,) if axis.is_single else (0, 1) for axis in axes)))
    neighbours = [_at_corner(labels, axes, box, corner) for corner in corners]
    out = neighbours[0]
    is_border = np.zeros(out.shape, bool)
    for other in neighbours[1:]:
        is_border |= other != out
    where = np.nonzero(is_border)
    if not len(where[0]):
        return out
    found = np.stack([values[where] for values in neighbours])
    rows = [index + part.start for index, part in zip(where, box, strict=True)]
    weights = np.stack([_weight(axes, rows, corner) for corner in corners])
    nearest = sum(
        (corner_at * axis.nearest[row] for axis, row, corner_at in zip(axes, rows, _places(axes), strict=True)),
        start=np.zeros(len(rows[0]), np.int64),
    )
    out[where] = _vote(found, weights, np.take_along_axis(found, nearest[None], axis=0)[0])
    return out


def _places(axes: tuple[AxisNeighbours, ...]) -> list[int]:
    """How far the number of a corner grows where it lies above instead of below, along each axis."""
    steps = [1 if axis.is_single else 2 for axis in axes]
    return [prod(steps[number + 1 :]) for number in range(len(axes))]


def _weight(
    axes: tuple[AxisNeighbours, ...], rows: list[NDArray[np.int64]], corner: tuple[int, ...]
) -> NDArray[np.float64]:
    """Of one corner, multiplied in the order of the axes, as in SciPy: so it is rounded alike."""
    weight = np.ones(len(rows[0]))
    for axis, row, side in zip(axes, rows, corner, strict=True):
        weight *= axis.weight[side][row]
    return weight


def _at_corner(
    labels: NDArray[np.int16], axes: tuple[AxisNeighbours, ...], box: Box, corner: tuple[int, ...]
) -> NDArray[np.int16]:
    """The old voxels below or above the new ones, a new array."""
    values = labels
    for number, (axis, part, side) in enumerate(zip(axes, box, corner, strict=True)):
        values = values.take((axis.above if side else axis.below)[part], axis=number)
    return values


def _vote(found: NDArray[np.int16], weights: NDArray[np.float64], nearest: NDArray[np.int16]) -> NDArray[np.int16]:
    """The winner of each new voxel.

    Args:
        found: (corners, N) labels around it.
        weights: (corners, N) their weights.
        nearest: (N,) label of the nearest old voxel.
    """
    parts = np.zeros(found.shape)
    # One corner after the other, so that sums are rounded as in SciPy, which adds zeros for other labels.
    for other, weight in zip(found, weights, strict=True):
        parts += np.where(found == other, weight, 0)
    is_largest = parts == parts.max(axis=0)
    ranked = np.where(found == IGNORE_INDEX, _LAST, found)
    smallest = np.where(is_largest, ranked, _LAST).min(axis=0)
    winner = np.where(smallest == _LAST, np.int16(IGNORE_INDEX), smallest)
    nearest_wins = (is_largest & (found == nearest)).any(axis=0)
    return np.where(nearest_wins, nearest, winner)
