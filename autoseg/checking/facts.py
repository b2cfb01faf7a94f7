"""What the check of a data set remembers of each case once its files are closed: numbers, never voxels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.findings import Finding
from autoseg.domain.geometry import Geometry, closest_orientation

QUANTILES = (0.0, 0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995, 1.0)
"""Shares of the voxels below; the first and the last are the exact minimum and maximum."""

T = TypeVar("T", int, float)

LOW, MEDIAN, HIGH = 1, 4, 7
"""Places in `QUANTILES` of 0.5, 50 and 99.5 %."""


@dataclass(frozen=True, slots=True, eq=False)
class ChannelFacts:
    """One channel of a case.

    Attributes:
        number: Of the channel.
        file: Where it lies.
        dtype: Of the voxels as they are read (scaled ones are float32).
        digest: Of shape and voxels; equal for equal images, whatever the type they are stored in.
        detail: int8, its `prints.detail_print`.
        quantiles: Of the finite voxels, at `QUANTILES`.
        foreground: The same inside the labels; None where there are none.
        lowest_fraction: Share of the voxels that have the lowest value: background, air, padding.
    """

    number: int
    file: str
    dtype: str
    digest: bytes
    detail: NDArray[np.int8]
    quantiles: NDArray[np.float64]
    foreground: NDArray[np.float64] | None
    lowest_fraction: float

    @property
    def spread(self) -> float:
        """Between 0.5 and 99.5 % of the voxels."""
        return float(self.quantiles[HIGH] - self.quantiles[LOW])


@dataclass(frozen=True, slots=True)
class Structure:
    """One class in one case.

    Attributes:
        voxels: Of the class.
        pieces: Connected components (corners touch); None where it was too large to count.
        stray_voxels: Voxels outside the largest piece.
        centre_mm: Centre of mass in the world (right, anterior, superior).
    """

    voxels: int
    pieces: int | None
    stray_voxels: int
    centre_mm: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class LabelFacts:
    """The label map of a case.

    Attributes:
        digest: As of a channel.
        values: Voxels of every value.
        foreground_voxels: Voxels of any value but background and the one to ignore.
        structures: By the name of each class that occurs.
    """

    digest: bytes
    values: Mapping[int, int]
    foreground_voxels: int
    structures: Mapping[str, Structure]


@dataclass(frozen=True, slots=True)
class Picture:
    """A slice of a case with the outlines of its classes.

    Attributes:
        plane: Its name.
        letters: What lies at the left, right, top and bottom; "" for pictures.
        aspect: Height of a pixel divided by its width, in the world.
        image: A data address.
        contours: Number of the class in the schema and SVG path in half pixels.
    """

    plane: str
    letters: str
    width_px: int
    height_px: int
    aspect: float
    image: str
    contours: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, eq=False)
class CaseFacts:
    """What the check of one case gave.

    Attributes:
        case: Its id.
        num_files: Files opened.
        is_test: Whether it is a test case, which nothing is learnt from.
        geometry: The grid of the first image that could be read; None without any.
        channels: Those that could be read.
        labels: None where the label map could not be read, or there is none.
        findings: What is wrong or worth knowing.
        pictures: Slices, where they were asked for.
    """

    case: str
    num_files: int
    is_test: bool = False
    geometry: Geometry | None = None
    channels: tuple[ChannelFacts, ...] = ()
    labels: LabelFacts | None = None
    findings: tuple[Finding, ...] = field(default=())
    pictures: tuple[Picture, ...] = ()

    def channel(self, number: int) -> ChannelFacts | None:
        """The channel of that number, where it could be read."""
        return next((item for item in self.channels if item.number == number), None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels from left to right, back to front, feet to head; a picture's columns, rows and 1."""
        return self._in_world_order(self.geometry.shape) if self.geometry else ()

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size in the same order."""
        return self._in_world_order(self.geometry.spacing_mm) if self.geometry else ()

    def _in_world_order(self, values: tuple[T, ...]) -> tuple[T, ...]:
        if self.geometry is None or self.geometry.is_2d:
            return values
        return tuple(values[axis] for axis in closest_orientation(self.geometry.affine).axes)
