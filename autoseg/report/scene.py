"""A case as the page shows it: image, reference and predictions in canonical axes, cut to where the labels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.beside import ENTROPY
from autoseg.domain.dataset import Case, LabelSchema
from autoseg.domain.endings import split_ending
from autoseg.domain.geometry import Geometry, closest_orientation
from autoseg.errors import AutosegError
from autoseg.io.drawing import to_canonical
from autoseg.io.images import read_case, read_image, read_labels
from autoseg.report.collect import CaseRow

MARGIN_FRACTION = 0.3
MIN_MARGIN_VOX = 8
"""Of the neighbourhood that is shown around the labels, on each side."""

NOTHING_KNOWN: Mapping[str, NDArray[np.float32]] = MappingProxyType({})

_RGB = 3


@dataclass(frozen=True, slots=True, eq=False)
class Predicted:
    """What one configuration says of a case.

    Attributes:
        labels: Label values (R, A, S).
        uncertainty: float32 (R, A, S); None where there is none.
        wrong: bool (R, A, S), where a class that was annotated differs from the reference.
    """

    labels: NDArray[np.integer]
    uncertainty: NDArray[np.float32] | None
    wrong: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A case in canonical axes, cut to the neighbourhood of its labels.

    Attributes:
        image: float32 (C, R, A, S).
        channels: Names, as many as the image has.
        is_colour: Whether the three channels are the colours of a picture.
        reference: Label values (R, A, S).
        predicted: By configuration.
        affine: Voxel centres of the cut to millimetres.
        spacing_mm: Along R, A, S.
        start: First voxel of the cut.
        full_shape: Voxels before the cut.
        is_2d: Whether it is a picture.
    """

    image: NDArray[np.float32]
    channels: tuple[str, ...]
    is_colour: bool
    reference: NDArray[np.integer]
    predicted: Mapping[str, Predicted]
    affine: NDArray[np.float64]
    spacing_mm: tuple[float, ...]
    start: tuple[int, ...]
    full_shape: tuple[int, ...]
    is_2d: bool


def read_scene(
    case: Case,
    rows: Sequence[CaseRow],
    schema: LabelSchema,
    channels: Sequence[str],
    uncertainty: Mapping[str, NDArray[np.float32]] = NOTHING_KNOWN,
) -> Scene:
    """Read a case with its predictions.

    Args:
        case: Its files.
        rows: Its results, one a configuration, at least one.
        schema: The classes.
        channels: Names of the channels of the data set.
        uncertainty: (I, J, K) on the case's grid, by configuration; of others what lies beside the label map.

    Raises:
        DatasetError: A file is gone or cannot be read.
    """
    volume = read_case(case, len(channels))
    geometry = volume.geometry
    reference = to_canonical(read_labels(case.labels or "", geometry)[0], geometry)
    maps = {row.configuration: to_canonical(read_labels(row.prediction, geometry)[0], geometry) for row in rows}
    box = _neighbourhood(np.logical_or.reduce([reference > 0, *(labels > 0 for labels in maps.values())]))
    known = schema.annotated_row(case.annotated)
    reference_cut = reference[box]
    predicted = {}
    for row in rows:
        labels = maps[row.configuration][box]
        kept = uncertainty.get(row.configuration)
        doubt = _read_uncertainty(row.prediction, geometry) if kept is None else to_canonical(kept, geometry)
        predicted[row.configuration] = Predicted(
            labels=labels,
            uncertainty=None if doubt is None else doubt[box],
            wrong=_wrong(reference_cut, labels, schema, known),
        )
    image = np.stack([to_canonical(channel, geometry)[box].astype(np.float32) for channel in volume.array])
    return Scene(
        image=image,
        channels=tuple(channels[number] for number in volume.channels),
        is_colour=geometry.is_2d and len(image) == _RGB,
        reference=reference_cut,
        predicted=predicted,
        affine=_affine_of_cut(geometry, [part.start for part in box]),
        spacing_mm=tuple(geometry.spacing_mm[axis] for axis in _axes(geometry)),
        start=tuple(part.start for part in box),
        full_shape=reference.shape,
        is_2d=geometry.is_2d,
    )


def _axes(geometry: Geometry) -> tuple[int, ...]:
    return (0, 1, 2) if geometry.is_2d else closest_orientation(geometry.affine).axes


def _affine_of_cut(geometry: Geometry, start: Sequence[int]) -> NDArray[np.float64]:
    """Of the canonical array whose first voxels were cut away."""
    flips = (False,) * 3 if geometry.is_2d else closest_orientation(geometry.affine).flips
    change = np.zeros((4, 4))
    change[3, 3] = 1.0
    for axis, (source, is_flipped, first) in enumerate(zip(_axes(geometry), flips, start, strict=True)):
        change[source, axis] = -1.0 if is_flipped else 1.0
        change[source, 3] = geometry.shape[source] - 1 - first if is_flipped else first
    out: NDArray[np.float64] = geometry.affine @ change
    return out


def _wrong(
    reference: NDArray[np.integer], labels: NDArray[np.integer], schema: LabelSchema, known: Sequence[bool]
) -> NDArray[np.bool_]:
    wrong = np.zeros(reference.shape, np.bool_)
    for item in (item for item, is_known in zip(schema.classes, known, strict=True) if is_known):
        wrong |= np.isin(reference, item.values) != np.isin(labels, item.values)
    if schema.ignore is not None:
        wrong &= reference != schema.ignore
    return wrong


def _read_uncertainty(prediction: Path, geometry: Geometry) -> NDArray[np.float32] | None:
    """What lies beside a prediction, in canonical axes; None where there is none or it does not fit."""
    path = prediction.with_name(split_ending(prediction)[0] + ENTROPY)
    if not path.is_file():
        return None
    try:
        volume = read_image(path, 1)
    except AutosegError:
        return None
    if volume.geometry.shape != geometry.shape:
        return None
    return to_canonical(volume.array[0].astype(np.float32), geometry)


def _neighbourhood(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The box around the mask with a margin; everything when the mask is empty."""
    parts = []
    for axis, size in enumerate(mask.shape):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        inside = np.flatnonzero(mask.any(axis=others))
        start, stop = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, size)
        margin = max(MIN_MARGIN_VOX, round((stop - start) * MARGIN_FRACTION))
        parts.append(slice(max(0, start - margin), min(size, stop + margin)))
    return parts[0], parts[1], parts[2]
