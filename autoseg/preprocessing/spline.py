"""Resampling along one axis as a banded matrix, the spline's prefilter included.

Voxel centres: output row o lies at input position (o + 0.5) * n_in / n_out - 0.5, so that the extent is kept.

Source: design, section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

# SciPy repeats the edge this often before it filters (scipy.ndimage, mode "nearest"), so the oracle does.
_EDGE_VOXELS = 12

# A spline's prefilter falls by 0.27 a voxel; weights below this are less than float32 can add to the others.
_NEGLIGIBLE_WEIGHT = 1e-8

# Output rows of one matrix product: the band is then wider than the block's own input by the filter's reach only.
_BLOCK_ROWS = 64

_ORDERS = (0, 1, 3)


@dataclass(frozen=True, slots=True, eq=False)
class AxisOperator:
    """Resampling along one axis as a banded matrix.

    Attributes:
        num_in: Input rows.
        num_out: Output rows.
        order: Spline order: 0, 1 or 3.
        first: (num_out,) first input row that each output row needs; never falls.
        stop: (num_out,) one past the last; never falls.
        matrix: (num_out, num_in) float32, zero outside the band, each row sums to 1.
    """

    num_in: int
    num_out: int
    order: int
    first: NDArray[np.int64]
    stop: NDArray[np.int64]
    matrix: NDArray[np.float32]

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes (then input is passed on bit for bit)."""
        return self.num_in == self.num_out

    def rows_needed(self, start: int, stop: int) -> tuple[int, int]:
        """Input rows [low, high) that output rows [start, stop) are made of; start < stop."""
        return int(self.first[start]), int(self.stop[stop - 1])

    def rows_ready(self, num_rows: int) -> int:
        """Output rows that the first `num_rows` input rows suffice for."""
        return int(np.searchsorted(self.stop, num_rows, side="right"))

    def apply(self, rows: torch.Tensor, axis: int, start: int, stop: int, first_row: int = 0) -> torch.Tensor:
        """Output rows [start, stop) along an axis.

        Args:
            rows: float32, any dimension; along `axis` input rows from `first_row`, at least those needed.
            axis: Not negative.
            start: First output row.
            stop: One past the last.
            first_row: Number of the first input row given.
        """
        if self.is_identity:
            return rows.narrow(axis, start - first_row, stop - start)
        if self.order == 0:
            index = torch.from_numpy(self.first[start:stop] - first_row).to(rows.device)
            return rows.index_select(axis, index)
        # Mixed precision, should the caller have switched it on, is not for coordinates and intensities.
        with torch.autocast(rows.device.type, enabled=False):
            blocks = [
                self._block(rows, axis, low, min(low + _BLOCK_ROWS, stop), first_row)
                for low in range(start, stop, _BLOCK_ROWS)
            ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=axis)

    def _block(self, rows: torch.Tensor, axis: int, start: int, stop: int, first_row: int) -> torch.Tensor:
        low, high = self.rows_needed(start, stop)
        weights = torch.from_numpy(self.matrix[start:stop, low:high]).to(rows.device)
        used = rows.narrow(axis, low - first_row, high - low)
        if axis == rows.ndim - 1:
            return torch.matmul(used, weights.T)
        shape = used.shape
        flat = used.reshape(*shape[: axis + 1], -1)
        return torch.matmul(weights, flat).reshape(*shape[:axis], stop - start, *shape[axis + 1 :])


@lru_cache(maxsize=64)
def axis_operator(num_in: int, num_out: int, order: int) -> AxisOperator:
    """The operator that takes `num_in` rows to `num_out`.

    Args:
        num_in: At least 1.
        num_out: At least 1.
        order: 0 (nearest), 1 (linear) or 3 (cubic spline with its prefilter).

    Raises:
        ValueError: Another order.
    """
    if order not in _ORDERS:
        raise ValueError(f"spline order must be one of {_ORDERS}, got {order}")
    # In this very order of operations, so that ties of order 0 fall as they do in the oracle.
    positions = (np.arange(num_out, dtype=np.float64) + 0.5) * (num_in / num_out) - 0.5
    matrix = _cubic_matrix(positions, num_in) if order == 3 else _linear_matrix(positions, num_in, order)
    is_used = np.abs(matrix) > _NEGLIGIBLE_WEIGHT
    matrix[~is_used] = 0
    matrix /= matrix.sum(axis=1, keepdims=True)
    first = is_used.argmax(axis=1)
    stop = num_in - is_used[:, ::-1].argmax(axis=1)
    # A small weight here and there must not make the band jump back.
    first = np.minimum.accumulate(first[::-1])[::-1].copy()
    return AxisOperator(num_in, num_out, order, first, np.maximum.accumulate(stop), matrix.astype(np.float32))


def _linear_matrix(positions: NDArray[np.float64], num_in: int, order: int) -> NDArray[np.float64]:
    """Weights of order 0 or 1; beyond the first and last voxel centre the edge goes on."""
    inside = np.clip(positions, 0, num_in - 1)
    below = np.floor(inside + 0.5 if order == 0 else inside).astype(np.int64)
    fraction = np.zeros(len(positions)) if order == 0 else inside - below
    rows = np.arange(len(positions))
    matrix = np.zeros((len(positions), num_in))
    np.add.at(matrix, (rows, np.minimum(below, num_in - 1)), 1 - fraction)
    np.add.at(matrix, (rows, np.minimum(below + 1, num_in - 1)), fraction)
    return matrix


def _cubic_matrix(positions: NDArray[np.float64], num_in: int) -> NDArray[np.float64]:
    """Cubic B-spline weights times the prefilter that turns values into spline coefficients."""
    padded = np.pad(np.eye(num_in), ((_EDGE_VOXELS, _EDGE_VOXELS), (0, 0)), mode="edge")
    prefilter = ndimage.spline_filter1d(padded, order=3, axis=0, output=np.float64, mode="nearest")
    shifted = positions + _EDGE_VOXELS
    below = np.floor(shifted).astype(np.int64)
    t = (shifted - below)[:, None]
    # Values of the cubic B-spline at distances 1 + t, t, 1 - t and 2 - t.
    weights = ((1 - t) ** 3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, (1 + 3 * t + 3 * t**2 - 3 * t**3) / 6, t**3 / 6)
    matrix = np.zeros((len(positions), num_in))
    for offset, weight in enumerate(weights, start=-1):
        matrix += weight * prefilter[below + offset]
    return matrix
