"""Reads the files of a case once and keeps what a repair decides by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.checking.contents import count_values
from autoseg.checking.repairs import RepairSettings
from autoseg.domain.dataset import Case
from autoseg.domain.endings import NIFTI_ENDINGS, split_ending
from autoseg.domain.geometry import IDENTITY_ORIENTATION, Geometry, Orientation, as_far_as_stated
from autoseg.domain.grids import canonical_orientation, carry_labels, overlap_fraction, reorder_grid, voxels_apart
from autoseg.errors import DatasetError
from autoseg.io.images import read_header, read_image, read_labels

HARMONISE_TOLERANCE_VOX = 0.5
"""Headers of one grid differ by less than this, in voxels along any axis, anywhere in the volume.

Below half a voxel the nearest voxel of the image is, for every voxel of the label map, the one with the same index; so
giving the label map its image's header is what resampling it to the nearest voxel would do, and loses nothing. From
half a voxel on (where programs that mean a voxel's corner meet those that mean its centre) it would be a guess.
"""

HEADER_ROUNDING_VOX = 1e-3
"""Below this, headers differ by rounding alone and are left as they are. Source: `domain.geometry`, the tolerance of
grids: float32 headers of different programs differ by up to 1e-3 of a voxel over a whole volume."""

MIN_OVERLAP_FRACTION = 0.5
"""A label map is resampled when at least this part of the smaller extent lies in the other one.

Exports of one scan overlap wholly or nearly so; with less than half, patient or coordinates are probably others.
"""


@dataclass(frozen=True, slots=True, eq=False)
class ImageFacts:
    """What a repair needs to know of an image file.

    Attributes:
        path: The file.
        num_channels: Channels taken from it.
        geometry: Its grid as it is in the file.
        orientation: How its voxels will be reordered.
        not_finite: For each channel the voxels with NaN or infinity.
        lowest: For each channel the lowest finite value, None when there is none.
        is_picture: Whether colours are stored together, as they should be.
    """

    path: str
    num_channels: int
    geometry: Geometry
    orientation: Orientation
    not_finite: tuple[int, ...]
    lowest: tuple[float | None, ...]
    is_picture: bool

    @property
    def grid(self) -> Geometry:
        """The grid in the new order."""
        return reorder_grid(self.geometry, self.orientation)


@dataclass(frozen=True, slots=True, eq=False)
class LabelFacts:
    """What a repair needs to know of a label map.

    Attributes:
        path: The file.
        geometry: Its grid as it is in the file.
        orientation: How its voxels will be reordered.
        dtype: The type of the stored numbers, in words.
        is_disguised: Whether integers are stored as floats or scaled.
        values: Voxels of each value.
        overlap_fraction: With the image's extent, where it is to be resampled; else None.
        carried_values: Voxels of each value after resampling, where it is to be resampled; else None.
    """

    path: str
    geometry: Geometry
    orientation: Orientation
    dtype: str
    is_disguised: bool
    values: dict[int, int]
    overlap_fraction: float | None = None
    carried_values: dict[int, int] | None = None

    @property
    def grid(self) -> Geometry:
        """The grid in the new order."""
        return reorder_grid(self.geometry, self.orientation)


@dataclass(frozen=True, slots=True, eq=False)
class CaseSurvey:
    """What a repair needs to know of a case.

    Attributes:
        case: The case.
        images: Its image files; empty when one cannot be read.
        label: Its label map, if it has one that can be read.
        problem: Why a file cannot be read; "" when all can.
    """

    case: Case
    images: tuple[ImageFacts, ...] = ()
    label: LabelFacts | None = None
    problem: str = ""


def survey_case(case: Case, num_channels: int, settings: RepairSettings) -> CaseSurvey:
    """Read every file of a case once.

    Args:
        case: A case whose files exist.
        num_channels: Of the data set.
        settings: What will be done.
    """
    per_file = case.channels_in_a_file(num_channels)
    try:
        images = tuple(_survey_image(file, per_file, settings) for file in case.images)
        label = None if case.labels is None else _survey_label(case.labels, images[0].grid, settings)
    except DatasetError as problem:
        return CaseSurvey(case, problem=problem.message)
    return CaseSurvey(case, images, label)


def _orientation(geometry: Geometry, settings: RepairSettings) -> Orientation:
    return IDENTITY_ORIENTATION if settings.keep_orientation else canonical_orientation(geometry)


def _survey_image(file: str, num_channels: int, settings: RepairSettings) -> ImageFacts:
    volume = read_image(file, num_channels)
    counts, lowest = [], []
    for channel in volume.array:
        finite = _finite_values(channel)
        counts.append(channel.size - finite.size)
        lowest.append(float(finite.min()) if finite.size else None)
    return ImageFacts(
        path=file,
        num_channels=num_channels,
        geometry=volume.geometry,
        orientation=_orientation(volume.geometry, settings),
        not_finite=tuple(counts),
        lowest=tuple(lowest),
        is_picture=volume.geometry.is_2d,
    )


def _finite_values(channel: NDArray[Any]) -> NDArray[Any]:
    return channel.reshape(-1) if channel.dtype.kind in "iu" else channel[np.isfinite(channel)]


def _survey_label(file: str, image_grid: Geometry, settings: RepairSettings) -> LabelFacts:
    labels, geometry = read_labels(file)
    header = read_header(file)
    orientation = _orientation(geometry, settings)
    facts = LabelFacts(
        path=file,
        geometry=geometry,
        orientation=orientation,
        dtype=header.dtype,
        is_disguised=_is_disguised(file, header.dtype, labels.dtype),
        values=count_values(labels),
    )
    if not settings.resample_labels or geometry.is_2d or not lies_elsewhere(facts.grid, image_grid):
        return facts
    overlap = overlap_fraction(facts.grid, image_grid)
    carried = count_values(carry_labels(labels, geometry, image_grid)) if overlap >= MIN_OVERLAP_FRACTION else None
    return replace(facts, overlap_fraction=overlap, carried_values=carried)


def _is_disguised(file: str, stored: str, read: np.dtype[Any]) -> bool:
    """Whether the file stores integers as floats, or scaled (which only NIfTI does)."""
    if "float" in stored:
        return True
    is_nifti = split_ending(file)[1].lower() in NIFTI_ENDINGS
    return is_nifti and np.dtype(stored).newbyteorder("=") != read


def lies_elsewhere(grid: Geometry, expected: Geometry) -> bool:
    """Whether a grid differs from another by more than a header may be off, as far as both files state it."""
    if grid.shape != expected.shape:
        return True
    grids = as_far_as_stated(grid, expected)
    return grids is not None and voxels_apart(*grids) >= HARMONISE_TOLERANCE_VOX


def same_but_for_header(grid: Geometry, expected: Geometry) -> bool:
    """Whether two grids are one, but their headers differ by more than rounding."""
    if lies_elsewhere(grid, expected):
        return False
    grids = as_far_as_stated(grid, expected)
    return grids is not None and voxels_apart(*grids) > HEADER_ROUNDING_VOX
