"""What is wanted of a prediction besides its label map, collected slab by slab on the image's own grid.

Probabilities are those of the logits that decide the labels, after resampling. Certainty is taken from the mean
probability over networks and mirror images, where there are several (see `members`).

Source: docs/decisions/0037.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import Temperature
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
    def names(self) -> tuple[str, ...]:
        """What is wanted, in words that `of` reads."""
        flags = ("probabilities", "uncertainty", "statistics")
        return (*(name for name in flags if getattr(self, name)), *self.side_files)

    @classmethod
    def of(cls, names: Collection[str]) -> Wanted:
        """What such names say; others are left alone."""
        kinds = tuple(kind for kind in SIDE_FILES if kind in names)
        return cls("probabilities" in names, "uncertainty" in names, "statistics" in names, kinds)

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
    """Collects what is wanted of one image, on its own grid.

    Args:
        shape: Of the image (I, J, K).
        schema: Its classes or regions.
        wanted: What to collect.
        folder: For what is too large for memory; made when missing.

    Raises:
        OSError: The disk has no room.
    """

    def __init__(self, shape: tuple[int, int, int], schema: LabelSchema, wanted: Wanted, folder: Path) -> None:
        self.wanted = wanted
        self.num_outputs = schema.num_outputs
        self.is_regions = schema.has_regions
        # As NIfTI lies on disk: the first axis of the file's grid varies fastest, and classes are apart.
        spatial = shape[::-1]
        folder.mkdir(parents=True, exist_ok=True)
        self._levels = Scratch((self.num_outputs, *spatial), folder) if wanted.probabilities else None
        if self._levels is not None and not self.is_regions:
            # What is cropped away is background for certain.
            self._levels.array[0] = LEVELS
        self._entropy: NDArray[np.uint8] | None = np.zeros(spatial, np.uint8) if wanted.uncertainty else None
        self._expected = np.zeros(self.num_outputs)
        self._low = np.zeros(self.num_outputs, np.int64)
        self._high = np.zeros(self.num_outputs, np.int64)

    def of_stream(self, trail: Trail, *, has_means: bool = False, temperature: Temperature = 1.0) -> StreamCollector:
        """Takes the logits of a prepared image; see `labels_from_stream`.

        Args:
            trail: Of the image.
            has_means: Whether mean probabilities come after the logits (see `WithProbabilities`).
            temperature: Logits are divided by it, see `domain.inference.Temperature`.
        """
        return StreamCollector(self, trail, has_means=has_means, temperature=temperature)

    def measure(self, own: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
        """What is to be kept of some voxels; changes nothing.

        Args:
            own: (K, ...) probabilities that decide the labels.
            mean: (K, ...) mean probabilities, from which certainty is taken.
        """
        found: list[Tensor] = []
        if self.wanted.probabilities:
            found.append(to_levels(own))
        if self.wanted.uncertainty:
            flat = mean.flatten(1)
            counts = [flat.sum(1), (flat > _SURE).sum(1), (flat > _POSSIBLE).sum(1)]
            found += [to_levels(entropy(mean, is_regions=self.is_regions)), *counts]
        return tuple(found)

    def keep(self, view: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], found: Sequence[Tensor]) -> None:
        """Keep what `measure` gave of some voxels; each voxel comes once.

        Args:
            view: Of an array (..., Z, Y, X) those voxels, in the order of what was found.
            found: See `measure`.
        """
        kept = [item.cpu().numpy() for item in found]
        if self._levels is not None:
            levels = kept.pop(0)
            view(self._levels.array)[...] = levels
            self._levels.written(levels.size)
        if self._entropy is not None:
            view(self._entropy)[...] = kept[0]
            self._expected += kept[1].astype(np.float64)
            self._low += kept[2]
            self._high += kept[3]

    def take(self, slices: slice, fractions: Tensor) -> None:
        """Keep probabilities that are on the image's grid already.

        Args:
            slices: Along the last axis of the file's grid.
            fractions: (K, Z, Y, X) float32, the reverse of the file's axes.
        """
        self.keep(lambda array: array[..., slices, :, :], self.measure(fractions, fractions))

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
        first = 0 if self.is_regions else 1
        rows = zip(self._expected[first:], self._low[first:], self._high[first:], strict=True)
        return tuple(VoxelCounts(float(expected), int(low), int(high)) for expected, low, high in rows)


class StreamCollector:
    """Collects from logits that come slab by slab; a `Collector`.

    Args:
        gathering: What is filled in.
        trail: Of the prepared image.
        has_means: See `Gathering.of_stream`.
        temperature: The same.
    """

    def __init__(self, gathering: Gathering, trail: Trail, *, has_means: bool, temperature: Temperature) -> None:
        self._gathering = gathering
        self._trail = trail
        self._temperature = temperature
        self._num_values = gathering.num_outputs * (2 if has_means else 1)

    @property
    def num_values(self) -> int:
        """Logits of a voxel, and its mean probabilities where there are any."""
        return self._num_values

    def compute(self, values: Tensor) -> tuple[Tensor, ...]:
        """What is to be kept of some rows; changes nothing, so that it can be tried again elsewhere.

        Args:
            values: (num_values, D, H, W) float32 on the crop's own grid, on any device.
        """
        count, is_regions = self._gathering.num_outputs, self._gathering.is_regions
        own = probabilities(values[:count], is_regions=is_regions, temperature=self._temperature)
        return self._gathering.measure(own, own if len(values) == count else self._mean(values[count:]))

    def _mean(self, values: Tensor) -> Tensor:
        """Mean probabilities without what rounding has added."""
        mean = values.clamp(0, 1)
        if self._gathering.is_regions:
            return mean
        return mean / mean.sum(0).clamp_min(torch.finfo(mean.dtype).tiny)

    def store(self, box: Box, found: Sequence[Tensor]) -> None:
        """Keep what `compute` gave of a part of the crop; each part comes once.

        Args:
            box: The part, in network axis order.
            found: What `compute` gave.
        """
        self._gathering.keep(lambda array: view_of_crop(array, self._trail, box), found)


def view_of_crop(array: NDArray[np.uint8], trail: Trail, box: Box) -> NDArray[np.uint8]:
    """A part of a crop in an array on the file's grid.

    Args:
        array: (..., Z, Y, X), the reverse of the file's axes.
        trail: Of the case.
        box: The part, in network axis order.
    """
    leading = array.ndim - 3
    of_file = array.transpose(*range(leading), leading + 2, leading + 1, leading)
    return to_network_axes(of_file, trail)[(..., *trail.crop_box)][(..., *box)]


def entropy(fractions: Tensor, *, is_regions: bool) -> Tensor:
    """How uncertain a voxel is, from 0 (sure) to 1 (anything is possible).

    Of classes the entropy over their number's logarithm; of regions the sum of each one's entropy over that of as many
    coins.

    Args:
        fractions: (K, ...) probabilities.
        is_regions: Whether they are of regions.
    """
    of_each: Tensor = torch.special.entr(fractions)
    if is_regions:
        of_each = of_each + torch.special.entr(1 - fractions)
    return of_each.sum(0) / (len(fractions) * log(2) if is_regions else log(len(fractions)))


def to_levels(fractions: Tensor) -> Tensor:
    """Numbers from 0 to 1 in 255ths, uint8."""
    return (fractions * LEVELS).round_().clamp_(0, LEVELS).to(torch.uint8)
