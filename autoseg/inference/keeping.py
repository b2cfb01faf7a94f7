"""From a stream of logits to probabilities in 8 bit on the image's own grid; see `io.probabilities` for the levels."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.plan import PreprocessPlan
from autoseg.inference.columns import Column
from autoseg.inference.export import rows_per_chunk
from autoseg.inference.sliding_window import Slab
from autoseg.io.probabilities import LAST_CODE, Codes
from autoseg.preprocessing.resample import SlabResampler
from autoseg.preprocessing.transform import Trail, to_network_axes

MOST_BYTES_IN_MEMORY = 2**29
"""Larger maps are filled in a file without a name, which the system writes to disk as it sees fit."""


class Keeper:
    """Collects the probabilities of one image.

    Args:
        trail: Of the prepared image.
        plan: The preprocessing that is undone.
        schema: Classes or regions.
        folder: For what is too large for memory; must exist.

    Attributes:
        codes: uint8 (K, Z, Y, X), on the reversed axes of the file's grid. What a crop left out is background, or no
            region.
    """

    def __init__(self, trail: Trail, plan: PreprocessPlan, schema: LabelSchema, folder: Path) -> None:
        self._trail, self._plan, self._schema = trail, plan, schema
        shape = (schema.num_outputs, *trail.geometry.shape[::-1])
        self.codes: Codes
        if prod(shape) <= MOST_BYTES_IN_MEMORY:
            self.codes = np.zeros(shape, np.uint8)
        else:
            with tempfile.TemporaryFile(prefix=".tmp-", dir=folder) as file:
                file.truncate(prod(shape))
                self.codes = np.memmap(file, np.uint8, "r+", shape=shape)
        if not schema.has_regions:
            self.codes[0] = LAST_CODE

    def add(self, column: Column, axis: int, stream: Iterator[Slab]) -> None:
        """Take the logits of a part of the image; see `Predictor.each_column`."""
        change = self._trail.change_back(self._plan)
        # The file's axes are reversed in the array.
        on_file_axes = self.codes.transpose(0, 3, 2, 1)
        cropped = to_network_axes(on_file_axes, self._trail)[(slice(None), *self._trail.crop_box)]
        rows_of = np.moveaxis(cropped[(slice(None), *column.new_rows)], axis + 1, 1)
        resampler = SlabResampler(change, axis, part=(column.rows, column.new_rows))
        for _, _, slab in stream:
            rows = max(1, rows_per_chunk(change, column, axis, slab.device) // self._schema.num_outputs)
            for logits in torch.split(slab, rows, dim=axis + 1):
                start, stop, finished = resampler.push(logits.to(torch.float32))
                if start < stop:
                    codes = to_codes(finished, is_regions=self._schema.has_regions)
                    rows_of[:, start:stop] = codes.movedim(axis + 1, 1).cpu().numpy()


def to_codes(logits: Tensor, *, is_regions: bool) -> Tensor:
    """The codes of what logits say.

    Args:
        logits: (K, ...) float32.
        is_regions: Whether each output is on its own.
    """
    shares = torch.sigmoid(logits) if is_regions else torch.softmax(logits, dim=0)
    angles = torch.asin(shares.clamp_(0, 1).sqrt_())
    return angles.mul_(LAST_CODE * 2 / math.pi).round_().to(torch.uint8)
