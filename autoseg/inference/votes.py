"""The weighted mean of the probabilities of several members, on the image's own grid, without holding any member whole.

Members have spacings, patches and streaming axes of their own, so nothing of them comes in one order but the voxels of
the image. Each member is predicted as if it were alone, slab by slab; the probabilities of finished rows are added to
one array of 16 bit a voxel and class. That array is in memory while it is small, else in a file.

Source: docs/decisions/0040.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import Temperature
from autoseg.domain.plan import PreprocessPlan
from autoseg.inference.columns import Column
from autoseg.inference.deciding import Deciding
from autoseg.inference.export import LabelMap, rows_per_chunk
from autoseg.inference.gather import Gathering
from autoseg.inference.ladder import if_it_fits
from autoseg.inference.members import divisor_of
from autoseg.inference.sliding_window import Slab
from autoseg.preprocessing.resample import SlabResampler
from autoseg.preprocessing.transform import Trail, to_network_axes

MOST_BYTES_IN_MEMORY = 2**30
"""Votes beyond this are in a file: as much as the sums of logits may take. Source: docs/decisions/0032."""

CERTAIN = 65_000
"""A probability of 1 in 16 bit. What is left above is room for the rounding of many members."""

_MOST_WORK_VALUES = 2**22
"""Of slices that are decided at a time: votes of every class in 32 bit."""


@dataclass(frozen=True, slots=True, eq=False)
class Ballot:
    """What a member needs to vote.

    Attributes:
        trail: How its prepared image came about.
        plan: The preprocessing that is undone.
        weight: Of its probabilities; those of all members sum to 1.
        temperature: Its logits are divided by this, see `domain.inference.Temperature`.
    """

    trail: Trail
    plan: PreprocessPlan
    weight: float
    temperature: Temperature


class Votes:
    """Adds up weighted probabilities and decides.

    Of ordinary classes the background is not stored: it has what the others leave of 1. So an image that a member
    crops needs nothing outside its crop, where there is background, or no region.

    Args:
        schema: Classes or regions.
        shape: Of the image (I, J, K).
        file: Holds the votes where memory should not; open for writing, empty.

    Raises:
        OSError: The file's disk has no room for them.
    """

    def __init__(self, schema: LabelSchema, shape: tuple[int, int, int], file: IO[bytes]) -> None:
        self._schema = schema
        # Of each class the slices one after the other, as they lie in a label map.
        stored = (len(schema.classes), *shape[::-1])
        num_bytes = prod(stored) * np.dtype(np.uint16).itemsize
        if num_bytes <= MOST_BYTES_IN_MEMORY:
            self._votes: NDArray[np.uint16] = np.zeros(stored, np.uint16)
        else:
            _reserve(file, num_bytes)
            self._votes = np.memmap(file, np.uint16, "r+", shape=stored)

    def add(self, column: Column, axis: int, stream: Iterator[Slab], ballot: Ballot) -> None:
        """Add what a member says of a part of the image.

        Args:
            column: The part of the image.
            axis: The streaming axis, in the member's network axis order.
            stream: Logits, see `labels_from_stream`.
            ballot: Of the member.
        """
        trail, num_outputs = ballot.trail, self._schema.num_outputs
        change = trail.change_back(ballot.plan)
        first = num_outputs - len(self._votes)
        cropped = to_network_axes(self._votes.transpose(0, 3, 2, 1), trail)[(slice(None), *trail.crop_box)]
        rows_of = np.moveaxis(cropped[(slice(None), *column.new_rows)], axis + 1, 1)
        resamplers = [SlabResampler(change, axis, part=(column.rows, column.new_rows)) for _ in range(num_outputs)]
        for _, _, slab in stream:
            num_rows = max(1, rows_per_chunk(change, column, axis, slab.device) // num_outputs)
            for logits in torch.split(slab, num_rows, dim=axis + 1):
                start, stop, votes = self._finished(resamplers, logits, ballot)
                if start < stop:
                    found = votes[first:].movedim(axis + 1, 1).cpu().numpy()
                    rows_of[:, start:stop] += found.astype(np.uint16)

    def _finished(self, resamplers: list[SlabResampler], logits: Tensor, ballot: Ballot) -> tuple[int, int, Tensor]:
        """On the logits' own device, or on the CPU where its memory runs out."""
        states = [resampler.state for resampler in resamplers]
        has_other_way = logits.device.type != "cpu"
        found = if_it_fits(lambda: self._weighted(resamplers, logits, ballot), has_other_way)
        if found is not None:
            return found
        for resampler, state in zip(resamplers, states, strict=True):
            resampler.state = state
        return self._weighted(resamplers, logits.cpu(), ballot)

    def _weighted(self, resamplers: list[SlabResampler], logits: Tensor, ballot: Ballot) -> tuple[int, int, Tensor]:
        """Finished rows and their votes (K, D, H, W), whole numbers in float32."""
        start, stop, rows = 0, 0, []
        for resampler, values in zip(resamplers, logits, strict=True):
            start, stop, finished = resampler.push(values.to(torch.float32))
            rows.append(finished)
        stacked, is_regions = torch.stack(rows), self._schema.has_regions
        stacked.div_(divisor_of(stacked, ballot.temperature, is_regions=is_regions))
        shares = stacked.sigmoid_() if is_regions else stacked.softmax(dim=0)
        return start, stop, shares.mul_(ballot.weight * CERTAIN).round_()

    def labels(self, deciding: Deciding | None = None) -> LabelMap:
        """What has most votes: (I, J, K) label values, in Fortran order; see `labels_from_stream`.

        Of equal classes the earlier one wins, background first; a region is predicted where it has more than half.

        Args:
            deciding: Decides by probabilities instead, see `Deciding`; None: the most votes decide.
        """
        table = self._schema.decode_table()
        labels: LabelMap = np.zeros(self._votes.shape[:0:-1], table.dtype, order="F")
        slices = labels.T
        for some in self._in_slices():
            votes = self._votes[:, some]
            if deciding is not None:
                numbers = deciding.take(some, self._shares(votes))
            else:
                numbers = _regions(votes) if self._schema.has_regions else _winners(votes)
            slices[some] = self._schema.decode_regions(numbers) if self._schema.has_regions else table[numbers]
        return labels

    def gather(self, gathering: Gathering) -> None:
        """Fill in the probabilities that were voted with."""
        for some in self._in_slices():
            gathering.take(some, self._shares(self._votes[:, some]))

    def _shares(self, votes: NDArray[np.uint16]) -> Tensor:
        """Probabilities (K, ...) of some voxels, the background's too."""
        values = votes.astype(np.int32) if self._schema.has_regions else _with_background(votes)
        return torch.from_numpy(values).to(torch.float32).div_(CERTAIN).clamp_(0, 1)

    def _in_slices(self) -> Iterator[slice]:
        """Parts of the image that are decided at a time."""
        _, depth, height, width = self._votes.shape
        step = max(1, _MOST_WORK_VALUES // (len(self._votes) * height * width))
        return (slice(start, min(start + step, depth)) for start in range(0, depth, step))


def _winners(votes: NDArray[np.uint16]) -> NDArray[np.intp]:
    """Class indices."""
    winners: NDArray[np.intp] = _with_background(votes).argmax(axis=0)
    return winners


def _with_background(votes: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Votes of all classes; the background, which is the first, has what the others leave."""
    background = CERTAIN - votes.sum(axis=0, dtype=np.int32)
    return np.concatenate([background[None], votes.astype(np.int32)])


def _regions(votes: NDArray[np.uint16]) -> NDArray[np.int64]:
    codes = np.zeros(votes.shape[1:], np.int64)
    for index, values in enumerate(votes):
        codes |= (values > CERTAIN // 2).astype(np.int64) << index
    return codes


def _reserve(file: IO[bytes], num_bytes: int) -> None:
    """Take the room now: a mapped file on a full disk would end the process without a word."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    else:
        file.truncate(num_bytes)
