"""From a stream of logits to the label map on the file's own grid, without ever holding classes x image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.plan import PreprocessPlan
from autoseg.inference.columns import Column, whole_column
from autoseg.inference.ladder import if_it_fits
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

Finished = tuple[int, int, Tensor | None]
"""Output rows [start, stop) and what was found there; None where no row was finished."""


def labels_from_stream(
    stream: Iterator[tuple[int, int, Tensor]],
    axis: int,
    trail: Trail,
    plan: PreprocessPlan,
    schema: LabelSchema,
    *,
    column: Column | None = None,
    into: LabelMap | None = None,
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
    part = (column.rows, column.new_rows)
    resamplers = [SlabResampler(change, axis, part=part) for _ in range(schema.num_outputs)]
    decide = _regions if schema.has_regions else _winning_classes
    for _, _, slab in stream:
        for logits in torch.split(slab, rows_per_chunk(change, column, axis, slab.device), dim=axis + 1):
            start, stop, found = _finished(decide, resamplers, logits, has_other_way=logits.device.type != "cpu")
            if found is not None:
                numbers = found.cpu().numpy()
                values = schema.decode_regions(numbers) if schema.has_regions else table[numbers]
                rows_of[start:stop] = np.moveaxis(values, axis, 0)
    return labels


def rows_per_chunk(change: GridChange, column: Column, axis: int, device: torch.device) -> int:
    """How many rows of one class are resampled at a time."""
    most, voxels = _CHUNK_VOXELS if device.type == "cpu" else _CHUNK_VOXELS_ELSEWHERE, 1.0
    for other, (rows, new_rows) in enumerate(zip(column.rows, column.new_rows, strict=True)):
        size, new_size = rows.stop - rows.start, new_rows.stop - new_rows.start
        voxels *= change.new_shape[axis] / change.shape[axis] if other == axis else max(size, new_size)
    return max(1, int(most / ceil(voxels)))


def _finished(
    decide: Callable[[Sequence[SlabResampler], Tensor], Finished],
    resamplers: Sequence[SlabResampler],
    logits: Tensor,
    *,
    has_other_way: bool,
) -> Finished:
    """Decide on the logits' own device, or on the CPU where its memory runs out."""
    states = [resampler.state for resampler in resamplers]
    found = if_it_fits(lambda: decide(resamplers, logits), has_other_way)
    if found is not None:
        return found
    for resampler, state in zip(resamplers, states, strict=True):
        resampler.state = state
    return decide(resamplers, logits.cpu())


def _winning_classes(resamplers: Sequence[SlabResampler], logits: Tensor) -> Finished:
    """Index of the largest logit of the output rows that these input rows finish; None when they finish none."""
    start, stop, best = resamplers[0].push(logits[0].to(torch.float32))
    winners = torch.zeros(best.shape, dtype=torch.uint8 if len(resamplers) <= 2**8 else torch.int16, device=best.device)
    for index, resampler in enumerate(resamplers[1:], start=1):
        start, stop, values = resampler.push(logits[index].to(torch.float32))
        winners.masked_fill_(values > best, index)
        best = torch.maximum(best, values)
    return start, stop, winners if start < stop else None


def _regions(resamplers: Sequence[SlabResampler], logits: Tensor) -> Finished:
    """The same of regions: bit i is set where the logit of region i is above 0."""
    start, stop, values = resamplers[0].push(logits[0].to(torch.float32))
    dtype = next(dtype for bits, dtype in _CODES if len(resamplers) <= bits)
    codes = (values > 0).to(dtype)
    for index, resampler in enumerate(resamplers[1:], start=1):
        start, stop, values = resampler.push(logits[index].to(torch.float32))
        codes |= (values > 0).to(dtype) << index
    return start, stop, codes if start < stop else None
