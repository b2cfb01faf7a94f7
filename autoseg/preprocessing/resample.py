"""Separable spline resampling in torch, slab by slab, equal to scikit-image's `resize`.

One banded matrix an axis (see `spline`); on the way only a few slabs are held besides input and output.
Where spacing is anisotropic the coarse axis is resampled on its own with order 0, and the planes across it one by one.

Source: design, section 7. Oracle: skimage.transform.resize(order, mode="edge", anti_aliasing=False, clip=True).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.domain.preprocess_plan import LabelDecision
from autoseg.preprocessing.crop import Box
from autoseg.preprocessing.largest_label import axis_neighbours, take_largest
from autoseg.preprocessing.spline import AxisOperator, axis_operator

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]

SEPARATE_AXIS_RATIO = 3.0
"""Spacing ratio above which the coarse axis is resampled with order 0. Source: nnU-Net v2."""

LABEL_THRESHOLD = 0.5
"""Part of an output voxel that a class must fill to take it. Source: nnU-Net v2 with older batchgenerators."""

# Spacings this close are one: an oblique affine gives them with rounding errors of float32.
_SAME_SPACING_FRACTION = 1e-6

# Products of three float32 weights: a class that fills exactly half of a voxel may come out this much less.
_LABEL_TOLERANCE = 1e-6

# One slab after resampling within its planes. Smaller ones cost time, larger ones memory: 200x256x256 to 260x333x333
# takes 0.48, 0.39, 0.34 s on one core and 82, 93, 117 MB besides input and output with 2, 4, 8 MiB.
_SLAB_BYTES = 4 * 2**20


def output_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> Shape:
    """Voxels after resampling: round(old / new * n) along each axis, at least 1.

    In this very order of operations, so that halves are rounded as in nnU-Net.

    Args:
        shape: Voxels now.
        spacing: Millimetres now, same axis order.
        target: Millimetres wanted.
    """
    sizes = [max(1, round(old / new * n)) for n, old, new in zip(shape, spacing, target, strict=True)]
    return (sizes[0], sizes[1], sizes[2])


def coarse_axis(spacing: Sequence[float], target: Sequence[float], ratio: float = SEPARATE_AXIS_RATIO) -> int | None:
    """The axis that is resampled on its own, or None.

    It is the single coarsest axis of the image's spacing where that is anisotropic, else of the target's.

    Args:
        spacing: Millimetres of the image.
        target: Millimetres wanted.
        ratio: Largest / smallest spacing above which a spacing counts as anisotropic.

    Source: nnU-Net v2.
    """
    for candidate in (spacing, target):
        largest = max(candidate)
        if largest / min(candidate) > ratio:
            axes = [axis for axis, value in enumerate(candidate) if value >= largest * (1 - _SAME_SPACING_FRACTION)]
            return axes[0] if len(axes) == 1 else None
    return None


@dataclass(frozen=True, slots=True)
class GridChange:
    """From one grid to another of the same extent: which operator each axis gets.

    Attributes:
        shape: Voxels before.
        new_shape: Voxels after.
        order: Spline order along all axes but the coarse one.
        coarse_axis: The axis that is resampled on its own, or None.
        coarse_order: Spline order along that axis.
    """

    shape: Shape
    new_shape: Shape
    order: int
    coarse_axis: int | None = None
    coarse_order: int = 0

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.shape == self.new_shape

    def in_order(self, axes: tuple[int, int, int]) -> GridChange:
        """The same change of arrays whose axes are in another order.

        Args:
            axes: Which of the axes comes first, second and third.
        """
        old, new = ((shape[axes[0]], shape[axes[1]], shape[axes[2]]) for shape in (self.shape, self.new_shape))
        coarse = None if self.coarse_axis is None else axes.index(self.coarse_axis)
        return GridChange(old, new, self.order, coarse, self.coarse_order)

    def order_along(self, axis: int) -> int:
        """Spline order along one axis."""
        return self.coarse_order if axis == self.coarse_axis else self.order

    def operator(self, axis: int) -> AxisOperator:
        """The operator along one axis."""
        return axis_operator(self.shape[axis], self.new_shape[axis], self.order_along(axis))


def grid_change(
    shape: Sequence[int],
    new_shape: Sequence[int],
    spacing: Sequence[float],
    target: Sequence[float] | None = None,
    *,
    order: int,
    separate_axis_ratio: float = SEPARATE_AXIS_RATIO,
    coarse_order: int = 0,
) -> GridChange:
    """The change from one grid to another.

    Args:
        shape: Voxels before.
        new_shape: Voxels after.
        spacing: Millimetres before.
        target: Millimetres wanted after; by default those that follow from the shapes.
        order: Spline order.
        separate_axis_ratio: See `coarse_axis`.
        coarse_order: Spline order along the coarse axis.
    """
    old, new = tuple(int(size) for size in shape), tuple(int(size) for size in new_shape)
    if target is None:
        target = [mm * n / m for mm, n, m in zip(spacing, old, new, strict=True)]
    coarse = coarse_axis(spacing, target, separate_axis_ratio)
    return GridChange((old[0], old[1], old[2]), (new[0], new[1], new[2]), order, coarse, coarse_order)


class SlabResampler:
    """Resamples an array that arrives slab by slab along one axis, and gives finished output slabs in order.

    Holds only the input rows that later output rows still need, already resampled along the two other axes.

    Args:
        change: From which grid to which.
        axis: Spatial axis along which slabs arrive.
        clip_rows: Whether every row is clipped to the range of the input row it was made of. Of use where the rows are
            resampled one by one (order 0 along `axis`).
        part: The rows that slabs hold and those of the output that are wanted, as two boxes; whole along `axis`. The
            first must hold what the second is made of. None is the whole grid.
    """

    def __init__(
        self, change: GridChange, axis: int = 0, *, clip_rows: bool = False, part: tuple[Box, Box] | None = None
    ) -> None:
        self._axis = axis
        self._part = part
        self._along = change.operator(axis)
        # The axis that shrinks most goes first: less is left for the other.
        others = sorted(
            (other for other in range(3) if other != axis),
            key=lambda other: change.new_shape[other] / change.shape[other],
        )
        self._across = [(other, change.operator(other)) for other in others if not change.operator(other).is_identity]
        self._clip_rows = clip_rows
        self._buffer: torch.Tensor | None = None
        self._first_row = 0
        self._num_pushed = 0
        self._num_done = 0

    @property
    def state(self) -> tuple[torch.Tensor | None, int, int, int]:
        """What it remembers of the rows so far: put back, they count as the only ones pushed."""
        return self._buffer, self._first_row, self._num_pushed, self._num_done

    @state.setter
    def state(self, state: tuple[torch.Tensor | None, int, int, int]) -> None:
        self._buffer, self._first_row, self._num_pushed, self._num_done = state

    def push(self, slab: torch.Tensor) -> tuple[int, int, torch.Tensor]:
        """Take the next input rows.

        Args:
            slab: (..., D, H, W) float32 with any leading axes, the next rows along the slab axis, the others whole.
                What later rows need of it is copied: the caller may change it once the rows returned are used.

        Returns:
            start, stop, rows: the output rows that became finished (perhaps a view of the slab); start == stop when
            none did.
        """
        leading = slab.ndim - 3
        axis = leading + self._axis
        self._num_pushed += slab.shape[axis]
        rows = self._resample_across(slab, leading)
        if self._buffer is not None:
            # The slabs may leave their device on the way.
            rows = torch.cat((self._buffer.to(rows.device), rows), dim=axis)
        start, stop = self._num_done, self._along.rows_ready(self._num_pushed)
        if start == stop:
            self._buffer = rows.clone() if rows is slab else rows
            return start, stop, rows.narrow(axis, 0, 0)
        out = self._along.apply(rows, axis, start, stop, self._first_row)
        self._num_done = stop
        self._keep_needed(rows, axis)
        return start, stop, out

    def _keep_needed(self, rows: torch.Tensor, axis: int) -> None:
        """Drop the rows that no later output row needs."""
        if self._num_done == self._along.num_out:
            self._buffer = None
            return
        needed = min(int(self._along.first[self._num_done]), self._num_pushed)
        # A copy, so that the rest of the slab is freed.
        kept = rows.narrow(axis, needed - self._first_row, self._num_pushed - needed).clone()
        self._buffer, self._first_row = kept, needed

    def _resample_across(self, slab: torch.Tensor, leading: int) -> torch.Tensor:
        rows = slab
        for other, operator in self._across:
            if self._part is None:
                rows = operator.apply(rows, leading + other, 0, operator.num_out)
            else:
                held, wanted = self._part[0][other], self._part[1][other]
                rows = operator.apply(rows, leading + other, wanted.start, wanted.stop, held.start)
        if not self._clip_rows or not self._across:
            return rows
        dims = [leading + other for other in range(3) if other != self._axis]
        return rows.clamp_(slab.amin(dims, keepdim=True), slab.amax(dims, keepdim=True))


def resample_image(
    array: NDArray[np.float32],
    new_shape: Sequence[int],
    spacing: Sequence[float],
    target: Sequence[float] | None = None,
    *,
    order: int = 3,
    separate_axis_ratio: float = SEPARATE_AXIS_RATIO,
    device: str | torch.device = "cpu",
) -> NDArray[np.float32]:
    """Resample an image; the result stays inside the range of the input (of its slice, where slices are apart).

    Args:
        array: (C, D, H, W) float32, finite.
        new_shape: Voxels wanted (D, H, W); the extent is kept.
        spacing: Millimetres of the input, (D, H, W): decides whether an axis is coarse.
        target: Millimetres wanted, which decide it too; by default those that follow from the shapes.
        order: Spline order.
        separate_axis_ratio: See `coarse_axis`.
        device: Where the products are computed; input and output stay in main memory.

    Returns:
        (C, *new_shape) float32; a copy of the input, bit for bit, where the shape does not change.
    """
    change = grid_change(
        array.shape[1:], new_shape, spacing, target, order=order, separate_axis_ratio=separate_axis_ratio
    )
    if change.is_identity:
        return array.copy()
    out = np.empty((len(array), *change.new_shape), np.float32)
    for source, filled in zip(array, out, strict=True):
        resample_channel(source, filled, change, device)
    return out


@torch.inference_mode()
def resample_channel(
    source: NDArray[np.float32], out: NDArray[np.float32], change: GridChange, device: str | torch.device = "cpu"
) -> None:
    """Fill `out` with the resampled `source`, one slab after the other along the coarse (else the first) axis.

    Args:
        source: (D, H, W) of shape `change.shape`.
        out: (D, H, W) of shape `change.new_shape`, written.
        change: From which grid to which.
        device: Where the products are computed.
    """
    if change.is_identity:
        out[...] = source
        return
    axis = change.coarse_axis or 0
    is_apart = change.coarse_axis is not None
    resampler = SlabResampler(change, axis, clip_rows=is_apart)
    low, high = float(source.min()), float(source.max())
    num_rows = max(1, _SLAB_BYTES * change.new_shape[axis] // out.nbytes)
    for first in range(0, change.shape[axis], num_rows):
        rows = np.moveaxis(source, axis, 0)[first : first + num_rows]
        slab = torch.tensor(np.ascontiguousarray(np.moveaxis(rows, 0, axis)), device=device)
        start, stop, done = resampler.push(slab)
        if not is_apart:
            done.clamp_(low, high)
        np.moveaxis(out, axis, 0)[start:stop] = np.moveaxis(done.cpu().numpy(), axis, 0)


def resample_labels(
    labels: NDArray[np.int16],
    new_shape: Sequence[int],
    spacing: Sequence[float],
    target: Sequence[float] | None = None,
    *,
    order: int = 1,
    separate_axis_ratio: float = SEPARATE_AXIS_RATIO,
    decision: LabelDecision = "half",
    device: str | torch.device = "cpu",
) -> NDArray[np.int16]:
    """Resample class indices.

    "half": each class on its own, in ascending order, takes the voxels it fills at least half. Voxels that no class
    fills half become the first class present (background, as a rule). The ignore index comes last. Only the box that a
    class may reach is computed. "largest": see `largest_label`.

    Args:
        labels: (D, H, W) class indices.
        new_shape: Voxels wanted.
        spacing: Millimetres of the input.
        target: Millimetres wanted.
        order: Spline order of the class masks; 0 gives the nearest label.
        separate_axis_ratio: See `coarse_axis`.
        decision: Which class takes a voxel that several fill in part.
        device: Where the products of "half" are computed; "largest" is computed in main memory.

    Returns:
        new_shape, int16; every value occurs in the input.

    Raises:
        ValueError: An order that the decision cannot be had with.

    Source: nnU-Net v2; "half" (threshold 0.5, ascending) with older batchgenerators, "largest" with 0.25.5.
    """
    change = grid_change(labels.shape, new_shape, spacing, target, order=order, separate_axis_ratio=separate_axis_ratio)
    if change.is_identity:
        return labels.copy()
    if decision == "largest":
        first, second, third = (
            axis_neighbours(change.shape[axis], change.new_shape[axis], change.order_along(axis)) for axis in range(3)
        )
        return take_largest(labels, (first, second, third))
    lowest = int(labels.min())
    present = [int(value) for value in np.flatnonzero(np.bincount((labels - lowest).reshape(-1))) + lowest]
    if present[0] == IGNORE_INDEX:
        present = [*present[1:], IGNORE_INDEX]
    out = np.full(change.new_shape, present[0], np.int16)
    for index, box in _boxes(labels, present[1:]):
        _paint_class(out, labels, index, box, change, torch.device(device))
    return out


def _boxes(labels: NDArray[np.int16], classes: Sequence[int]) -> list[tuple[int, Box]]:
    """The bounding box of each class."""
    if not classes:
        return []
    # find_objects counts from 1; the ignore index takes the number after the last class.
    last = max(*classes, 0) + 1
    numbered = np.where(labels == IGNORE_INDEX, np.int16(last), labels) if IGNORE_INDEX in classes else labels
    boxes = ndimage.find_objects(numbered, max_label=last)
    found = []
    for index in classes:
        depth, height, width = boxes[(last if index == IGNORE_INDEX else index) - 1]
        found.append((index, (depth, height, width)))
    return found


@torch.inference_mode()
def _paint_class(
    out: NDArray[np.int16],
    labels: NDArray[np.int16],
    index: int,
    box: Box,
    change: GridChange,
    device: torch.device,
) -> None:
    """Write one class into `out` wherever it fills at least half of a voxel."""
    # One voxel around the box: a linear weight reaches no farther, and the rows beyond hold none of the class.
    values = torch.from_numpy((labels[box] == index).astype(np.float32)).to(device)
    reached = []
    for axis in range(3):
        operator = change.operator(axis)
        low, high = box[axis].start, box[axis].stop
        rows = np.flatnonzero((operator.stop > low) & (operator.first < high))
        if not len(rows):
            return
        start, stop = int(rows[0]), int(rows[-1]) + 1
        need_low, need_high = operator.rows_needed(start, stop)
        before, after = max(0, low - need_low), max(0, need_high - high)
        pad = [0, 0] * (2 - axis) + [before, after]
        values = operator.apply(torch.nn.functional.pad(values, pad), axis, start, stop, min(low, need_low))
        reached.append(slice(start, stop))
    is_taken = (values >= LABEL_THRESHOLD - _LABEL_TOLERANCE).cpu().numpy()
    out[tuple(reached)][is_taken] = index
