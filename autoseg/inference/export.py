"""From a stream of logits to the label map on the file's own grid, without ever holding classes x image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.plan import PreprocessPlan
from autoseg.inference.columns import Column, whole_column
from autoseg.inference.ladder import if_it_fits
from autoseg.preprocessing.crop import Box
from autoseg.preprocessing.resample import GridChange, SlabResampler
from autoseg.preprocessing.transform import Trail, to_network_axes

# Voxels of one class on the file's grid that are resampled at a time: 2 MiB in float32. With 16 MiB it took up to a
# third longer, and the rows that are kept for later lay so that the heap had gaps of 90 MB (40 classes).
_CHUNK_VOXELS = 2**19

# On other devices every chunk is work for the processor that starts it.
_CHUNK_VOXELS_ELSEWHERE = 2**22

LabelMap = NDArray[np.uint8] | NDArray[np.uint16]

# The smallest integers with a bit for every region; see `regions.MOST_REGIONS`.
_CODES = ((8, torch.uint8), (15, torch.int16), (31, torch.int32), (63, torch.int64))

Finished = tuple[int, int, Tensor | None, Sequence[Tensor], Sequence[Tensor]]
"""Output rows [start, stop), the classes found there, and what a judge and a collector want to keep of them; None and
nothing where no row was finished."""

# With a collector, or where probabilities decide, all values of a chunk are held at once: as many as of so many classes
# otherwise.
_CLASSES_COLLECTED = 8


class Collector(Protocol):
    """Takes more than labels from the values on the crop's own grid; see `Gathering`."""

    @property
    def num_values(self) -> int:
        """Outputs of the stream: those that decide labels, and any after them."""

    def compute(self, values: Tensor) -> Sequence[Tensor]:
        """What to keep of (num_values, D, H, W) float32; changes nothing."""

    def store(self, box: Box, found: Sequence[Tensor]) -> None:
        """Keep it, for a part of the crop in network axis order."""


class Judge(Protocol):
    """Decides what voxels are where logits alone do not; see `StreamJudge`."""

    def decide(self, logits: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Of (K, D, H, W) float32: class indices or numbers with a bit for each region, and what to keep."""

    def store(self, box: Box, kept: Sequence[Tensor]) -> None:
        """Keep it, for a part of the crop in network axis order."""


def labels_from_stream(
    stream: Iterator[tuple[int, int, Tensor]],
    axis: int,
    trail: Trail,
    plan: PreprocessPlan,
    schema: LabelSchema,
    *,
    column: Column | None = None,
    into: LabelMap | None = None,
    collector: Collector | None = None,
    judge: Judge | None = None,
) -> LabelMap:
    """Resample logits to the crop's own grid and keep what wins there, slab by slab and class by class.

    Args:
        stream: Start, stop and logits (K, D, H, W) of consecutive rows along `axis` of the prepared grid, in any
            floating type; resampled in float32, on their own device as long as its memory suffices.
        axis: The streaming axis, in network axis order.
        trail: How the prepared image came about.
        plan: The preprocessing that is undone.
        schema: Which label value each class has.
        column: The part of the image that the logits are of; None is the whole.
        into: A map that this was given before for another column: it is filled in. None makes one.
        collector: Gets the resampled values; the stream may then have further outputs for it.
        judge: Says of resampled logits what voxels are; None: the largest logit does, or the sign of each region's.

    Returns:
        (I, J, K) label values on the file's grid, 0 outside the crop and in columns that are still to come; uint8 where
        all values fit, else uint16. Where two classes are equal the earlier one wins. A region is predicted where its
        logit is above 0 (a probability of one half); which value a combination of regions has, the schema says.
    """
    change = trail.change_back(plan)
    column = column or whole_column(change)
    table = schema.decode_table()
    # Fortran order is how NIfTI lies on disk, and makes rows of Z, Y, X contiguous.
    labels: LabelMap = np.zeros(trail.geometry.shape, table.dtype, order="F") if into is None else into
    rows_of = np.moveaxis(to_network_axes(labels, trail)[trail.crop_box][column.new_rows], axis, 0)
    num_values = schema.num_outputs if collector is None else collector.num_values
    resamplers = [_resampler(change, column, axis) for _ in range(num_values)]
    step = partial(_decide, resamplers, schema, collector, judge, axis)
    holds_all = collector is not None or judge is not None
    num_together = ceil(num_values / _CLASSES_COLLECTED) if holds_all else 1
    for _, _, slab in stream:
        num_rows = max(1, rows_per_chunk(change, column, axis, slab.device) // num_together)
        for logits in torch.split(slab, num_rows, dim=axis + 1):
            start, stop, found, weighed, kept = _finished(
                step, resamplers, logits, has_other_way=logits.device.type != "cpu"
            )
            if found is None:
                continue
            numbers = found.cpu().numpy()
            rows_of[start:stop] = schema.decode_regions(numbers) if schema.has_regions else table[numbers]
            box = _rows_of_crop(column, axis, start, stop)
            if judge is not None:
                judge.store(box, weighed)
            if collector is not None:
                collector.store(box, kept)
    return labels


def _resampler(change: GridChange, column: Column, axis: int) -> SlabResampler:
    """Resamples a column whose streaming axis comes first, see `_Rows`."""
    order = _streaming_first(axis)
    rows, new_rows = (_in_order(box, order) for box in (column.rows, column.new_rows))
    return SlabResampler(change.in_order(order), part=(rows, new_rows))


def _streaming_first(axis: int) -> tuple[int, int, int]:
    first, second = (other for other in range(3) if other != axis)
    return axis, first, second


def _in_order(box: Box, order: tuple[int, int, int]) -> Box:
    return box[order[0]], box[order[1]], box[order[2]]


def rows_per_chunk(change: GridChange, column: Column, axis: int, device: torch.device) -> int:
    """How many rows of one class are resampled at a time."""
    most, voxels = _CHUNK_VOXELS if device.type == "cpu" else _CHUNK_VOXELS_ELSEWHERE, 1.0
    for other, (rows, new_rows) in enumerate(zip(column.rows, column.new_rows, strict=True)):
        size, new_size = rows.stop - rows.start, new_rows.stop - new_rows.start
        voxels *= change.new_shape[axis] / change.shape[axis] if other == axis else max(size, new_size)
    return max(1, int(most / ceil(voxels)))


def _rows_of_crop(column: Column, axis: int, start: int, stop: int) -> Box:
    """Rows of a column as a part of the crop."""
    box = list(column.new_rows)
    first = box[axis].start
    box[axis] = slice(first + start, first + stop)
    return (box[0], box[1], box[2])


def _finished(
    decide: Callable[[Tensor], Finished],
    resamplers: Sequence[SlabResampler],
    logits: Tensor,
    *,
    has_other_way: bool,
) -> Finished:
    """Decide on the logits' own device, or on the CPU where its memory runs out."""
    states = [resampler.state for resampler in resamplers]
    found = if_it_fits(lambda: decide(logits), has_other_way)
    if found is not None:
        return found
    for resampler, state in zip(resamplers, states, strict=True):
        resampler.state = state
    return decide(logits.cpu())


def _decide(
    resamplers: Sequence[SlabResampler],
    schema: LabelSchema,
    collector: Collector | None,
    judge: Judge | None,
    axis: int,
    logits: Tensor,
) -> Finished:
    """What the output rows hold that these input rows finish; of labels, the streaming axis comes first."""
    rows = _Rows(resamplers, logits, axis)
    by_logits = _regions if schema.has_regions else _winning_classes
    if collector is None and judge is None:
        found = by_logits(iter(rows), len(resamplers))
        return rows.start, rows.stop, found if rows.start < rows.stop else None, (), ()
    values = list(rows)
    if rows.start == rows.stop:
        return rows.start, rows.stop, None, (), ()
    own = values[: schema.num_outputs]
    weighed: Sequence[Tensor] = ()
    if judge is None:
        found = by_logits(iter(own), len(own))
    else:
        found, weighed = judge.decide(torch.stack(own).movedim(1, axis + 1))
        found = found.movedim(axis, 0)
    kept = () if collector is None else collector.compute(torch.stack(values).movedim(1, axis + 1))
    return rows.start, rows.stop, found, weighed, kept


class _Rows:
    """The resampled rows of one output after the other, in float32, the streaming axis first.

    A chunk holds a few rows along the streaming axis. If these lay innermost, all that is done with them would be done
    in pieces of a few voxels: 13 instead of 5 ns a voxel and class (logits of 133 x 341 voxels to 200 x 512, one core).

    Attributes:
        start: First row that was finished.
        stop: One past the last.
    """

    def __init__(self, resamplers: Sequence[SlabResampler], logits: Tensor, axis: int) -> None:
        self._resamplers, self._logits = resamplers, logits.movedim(axis + 1, 1)
        self.start = self.stop = 0

    def __iter__(self) -> Iterator[Tensor]:
        for resampler, logits in zip(self._resamplers, self._logits, strict=True):
            self.start, self.stop, values = resampler.push(logits.contiguous().to(torch.float32))
            yield values


def _winning_classes(rows: Iterator[Tensor], num_outputs: int) -> Tensor:
    """Index of the largest logit; where two are equal, of the first."""
    best = next(rows)
    dtype = torch.uint8 if num_outputs <= 2**8 else torch.int16
    winners = torch.zeros(best.shape, dtype=dtype, device=best.device)
    for index, values in enumerate(rows, start=1):
        # A later class has the higher index. Writing it through the mask would take 10 times as long, 100 times where
        # neighbours differ: a branch for each voxel.
        torch.maximum(winners, (values > best).to(dtype).mul_(index), out=winners)
        best = torch.maximum(best, values)
    return winners


def _regions(rows: Iterator[Tensor], num_outputs: int) -> Tensor:
    """The same of regions: bit i is set where the logit of region i is above 0."""
    dtype = next(dtype for bits, dtype in _CODES if num_outputs <= bits)
    codes = (next(rows) > 0).to(dtype)
    for index, values in enumerate(rows, start=1):
        codes |= (values > 0).to(dtype) << index
    return codes
