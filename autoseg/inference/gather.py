"""What is wanted of a prediction besides its label map, collected slab by slab on the image's own grid.

Probabilities are those of the logits that decide the labels, after resampling. Certainty is taken from the mean
probability over networks and mirror images, where there are several (see `members`).

Source: docs/decisions/0037.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.domain.dataset import LabelSchema
from autoseg.errors import ConfigError
from autoseg.inference.members import probabilities
from autoseg.io.fractions import LEVELS
from autoseg.io.scratch import Scratch
from autoseg.preprocessing.crop import Box
from autoseg.preprocessing.transform import Trail, to_network_axes

INTERVAL = 0.9
"""Part of the distribution of a volume that lies between its two bounds."""

_SURE, _POSSIBLE = (1 + INTERVAL) / 2, (1 - INTERVAL) / 2

SideFile = Literal["slicer", "itksnap", "bids"]
"""Files that viewers read beside a label map."""

SIDE_FILES: tuple[SideFile, ...] = ("slicer", "itksnap", "bids")


def parse_side_files(text: str) -> tuple[SideFile, ...]:
    """Kinds of side files, separated by commas, each once and in a fixed order.

    Raises:
        ConfigError: One is not known.
    """
    named = {part.strip() for part in text.split(",") if part.strip()}
    unknown = sorted(named - set(SIDE_FILES))
    if unknown:
        raise ConfigError(
            f"no side files are known as {', '.join(unknown)}", hint=f"Choose among {', '.join(SIDE_FILES)}."
        )
    return tuple(kind for kind in SIDE_FILES if kind in named)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is written besides label maps.

    Attributes:
        probabilities: Of every class or region.
        uncertainty: Entropy of the mean probability, and an interval for each volume.
        statistics: Volumes, pieces, and intensities of each class.
        side_files: For viewers.
    """

    probabilities: bool = False
    uncertainty: bool = False
    statistics: bool = False
    side_files: tuple[SideFile, ...] = ()

    @property
    def gathers(self) -> bool:
        """Whether more than labels is needed of the logits."""
        return self.probabilities or self.uncertainty

    @property
    def has_table(self) -> bool:
        """Whether there is a table of all cases."""
        return self.statistics or self.uncertainty


@dataclass(frozen=True, slots=True)
class VoxelCounts:
    """How many voxels a class or region has, as probabilities see it.

    Attributes:
        expected: The sum of its probabilities.
        low: Voxels whose probability is above 0.95: fewer in 5 of 100 cases, if voxels are right and wrong together.
        high: Voxels whose probability is above 0.05: more in 5 of 100.
    """

    expected: float
    low: int
    high: int


class Gathering:
    """Collects what is wanted of one image.

    Args:
        trail: Of the prepared image.
        schema: Its classes or regions.
        wanted: What to collect.
        folder: For what is too large for memory; must exist.
        has_means: Whether mean probabilities come after the logits (see `WithProbabilities`).

    Attributes:
        num_values: Values a voxel that `compute` takes: logits, and mean probabilities where there are any.
    """

    def __init__(
        self, trail: Trail, schema: LabelSchema, wanted: Wanted, folder: Path, *, has_means: bool = False
    ) -> None:
        self._num_outputs = schema.num_outputs
        self._is_regions = schema.has_regions
        self._trail = trail
        self._wanted = wanted
        self.num_values = self._num_outputs * (2 if has_means else 1)
        # As NIfTI lies on disk: the first axis of the file's grid varies fastest, and classes are apart.
        spatial = trail.geometry.shape[::-1]
        self._levels = Scratch((self._num_outputs, *spatial), folder) if wanted.probabilities else None
        if self._levels is not None and not self._is_regions:
            # What was cropped away is background for certain.
            self._levels.array[0] = LEVELS
        self._entropy: NDArray[np.uint8] | None = np.zeros(spatial, np.uint8) if wanted.uncertainty else None
        self._expected = np.zeros(self._num_outputs)
        self._low = np.zeros(self._num_outputs, np.int64)
        self._high = np.zeros(self._num_outputs, np.int64)

    def compute(self, values: Tensor) -> tuple[Tensor, ...]:
        """What is to be kept of some rows; changes nothing, so that it can be tried again elsewhere.

        Args:
            values: (num_values, D, H, W) float32 on the crop's own grid, on any device.
        """
        own = probabilities(values[: self._num_outputs], is_regions=self._is_regions)
        found: list[Tensor] = []
        if self._wanted.probabilities:
            found.append(_to_levels(own))
        if self._wanted.uncertainty:
            mean = self._mean(values[self._num_outputs :]) if len(values) > self._num_outputs else own
            flat = mean.flatten(1)
            counts = [flat.sum(1), (flat > _SURE).sum(1), (flat > _POSSIBLE).sum(1)]
            found += [_to_levels(entropy(mean, is_regions=self._is_regions)), *counts]
        return tuple(found)

    def _mean(self, values: Tensor) -> Tensor:
        """Mean probabilities without what rounding has added."""
        mean = values.clamp(0, 1)
        return mean if self._is_regions else mean / mean.sum(0).clamp_min(torch.finfo(mean.dtype).tiny)

    def store(self, box: Box, found: Sequence[Tensor]) -> None:
        """Keep what `compute` gave of a part of the crop; each part comes once.

        Args:
            box: The part, in network axis order.
            found: What `compute` gave.
        """
        kept = [item.cpu().numpy() for item in found]
        if self._levels is not None:
            levels = kept.pop(0)
            self._on_network_axes(self._levels.array)[(slice(None), *box)] = levels
            self._levels.written(levels.size)
        if self._entropy is not None:
            self._on_network_axes(self._entropy)[box] = kept[0]
            self._expected += kept[1].astype(np.float64)
            self._low += kept[2]
            self._high += kept[3]

    def _on_network_axes(self, array: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A view of the crop, with network axes last."""
        turned = array.transpose(*range(array.ndim - 3), *range(array.ndim - 1, array.ndim - 4, -1))
        return to_network_axes(turned, self._trail)[(..., *self._trail.crop_box)]

    @property
    def levels(self) -> Scratch | None:
        """Probabilities (K, Z, Y, X) in 255ths, the reverse of the file's axes; None where they are not wanted."""
        return self._levels

    @property
    def entropy(self) -> NDArray[np.uint8] | None:
        """Entropy (Z, Y, X) in 255ths, the reverse of the file's axes; None where it is not wanted."""
        return self._entropy

    def voxel_counts(self) -> tuple[VoxelCounts, ...]:
        """Of each foreground class or region; see `VoxelCounts`."""
        first = 0 if self._is_regions else 1
        rows = zip(self._expected[first:], self._low[first:], self._high[first:], strict=True)
        return tuple(VoxelCounts(float(expected), int(low), int(high)) for expected, low, high in rows)


def entropy(fractions: Tensor, *, is_regions: bool) -> Tensor:
    """How uncertain a voxel is, from 0 (sure) to 1 (anything is possible).

    Of classes the entropy over their number's logarithm; of regions the sum of each one's entropy over that of as many
    coins.

    Args:
        fractions: (K, ...) probabilities.
        is_regions: Whether they are of regions.
    """
    if is_regions:
        return (torch.special.entr(fractions) + torch.special.entr(1 - fractions)).sum(0) / (len(fractions) * log(2))
    return torch.special.entr(fractions).sum(0) / log(len(fractions))


def _to_levels(fractions: Tensor) -> Tensor:
    return (fractions * LEVELS).round_().clamp_(0, LEVELS).to(torch.uint8)
