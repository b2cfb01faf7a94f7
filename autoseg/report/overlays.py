"""Pictures of single cases: the slice of greatest error in each plane, with reference and prediction as contours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import Case, LabelSchema
from autoseg.domain.geometry import closest_orientation
from autoseg.io.drawing import PICTURE, PLANES, Plane, cut_slice, data_address, grey_levels, outline, to_canonical
from autoseg.io.images import read_case, read_labels
from autoseg.report.collect import CaseRow

MAX_SIDE_PX = 288
"""Longest side of a picture: eight cases with three planes each stay under 2 MB."""

MARGIN_FRACTION = 0.3
MIN_MARGIN_VOX = 8
WINDOW_PERCENTILES = (0.5, 99.5)

_RGB = 3


@dataclass(frozen=True, slots=True)
class Contour:
    """The outline of one class as an SVG path, in half pixels of the picture."""

    kind: str
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class View:
    """One picture.

    Attributes:
        slice_number: From 1, along the canonical axis.
        width_px: Pixels of the image.
        height_px: The same.
        aspect: Height of a pixel divided by its width, in the world.
        png: The image as a data address.
    """

    plane: str
    letters: str
    slice_number: int
    num_slices: int
    num_wrong_vox: int
    width_px: int
    height_px: int
    aspect: float
    png: str
    contours: tuple[Contour, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """A case in canonical axes, cut to the neighbourhood of its labels.

    Attributes:
        image: float32 (C, R, A, S), C is 1 or 3.
        maps: Label values (R, A, S): reference, prediction.
        wrong: bool (R, A, S), where they disagree.
        start: First voxel of the cut.
        full_shape: Voxels before the cut.
    """

    image: NDArray[np.float32]
    maps: tuple[NDArray[np.integer], NDArray[np.integer]]
    wrong: NDArray[np.bool_]
    spacing_mm: tuple[float, ...]
    start: tuple[int, ...]
    full_shape: tuple[int, ...]
    is_2d: bool


def views(row: CaseRow, case: Case, schema: LabelSchema, num_channels: int) -> tuple[View, ...]:
    """The pictures of a case: three planes, or one where the image is a picture.

    Args:
        row: The case's result.
        case: Its files.
        schema: The classes.
        num_channels: Of the data set; three channels of a picture are shown as colours, otherwise the first one.

    Raises:
        DatasetError: A file is gone or cannot be read.
    """
    scene = _read_scene(row, case, schema, num_channels)
    planes = (PICTURE,) if scene.is_2d else PLANES
    shown = [plane for plane in planes if min(scene.full_shape[plane.across], scene.full_shape[plane.down]) > 1]
    return tuple(_view(scene, plane, schema) for plane in shown)


def _read_scene(row: CaseRow, case: Case, schema: LabelSchema, num_channels: int) -> _Scene:
    volume = read_case(case, num_channels)
    geometry = volume.geometry
    image = volume.array if geometry.is_2d and len(volume.array) == _RGB else volume.array[:1]
    reference = to_canonical(read_labels(case.labels or "", geometry)[0], geometry)
    prediction = to_canonical(read_labels(row.prediction, geometry)[0], geometry)
    channels = [to_canonical(channel, geometry) for channel in image]
    wrong = np.zeros(reference.shape, np.bool_)
    known = schema.annotated_row(case.annotated)
    for item in (item for item, is_known in zip(schema.classes, known, strict=True) if is_known):
        wrong |= np.isin(reference, item.values) != np.isin(prediction, item.values)
    if schema.ignore is not None:
        wrong &= reference != schema.ignore
    box = _neighbourhood((reference > 0) | (prediction > 0))
    axes = (0, 1, 2) if geometry.is_2d else closest_orientation(geometry.affine).axes
    return _Scene(
        image=np.stack([channel[box].astype(np.float32) for channel in channels]),
        maps=(reference[box], prediction[box]),
        wrong=wrong[box],
        spacing_mm=tuple(geometry.spacing_mm[axis] for axis in axes),
        start=tuple(part.start for part in box),
        full_shape=reference.shape,
        is_2d=geometry.is_2d,
    )


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


def _view(scene: _Scene, plane: Plane, schema: LabelSchema) -> View:
    others = (plane.across, plane.down)
    counts = np.count_nonzero(scene.wrong, axis=others)
    if not counts.any():
        counts = np.count_nonzero(scene.maps[0], axis=others)
    index = int(np.argmax(counts)) if counts.any() else scene.wrong.shape[plane.normal] // 2
    step = max(1, -(-max(scene.wrong.shape[axis] for axis in others) // MAX_SIDE_PX))
    picture = np.stack([cut_slice(channel, plane, index, step) for channel in scene.image], axis=-1)
    finite = scene.image[np.isfinite(scene.image)]
    low, high = np.percentile(finite, WINDOW_PERCENTILES) if finite.size else (0.0, 1.0)
    height, width = picture.shape[:2]
    contours = []
    for kind, labels in zip(("reference", "prediction"), scene.maps, strict=True):
        cut = cut_slice(labels, plane, index, step)
        for item in schema.classes:
            path = outline(np.isin(cut[step // 2 :: step, step // 2 :: step], item.values))
            contours += [Contour(kind, item.name, path)] if path else []
    return View(
        plane=plane.name,
        letters=plane.letters,
        slice_number=scene.start[plane.normal] + index + 1,
        num_slices=scene.full_shape[plane.normal],
        num_wrong_vox=int(np.count_nonzero(scene.wrong.take(index, axis=plane.normal))),
        width_px=max(1, width // step),
        height_px=max(1, height // step),
        aspect=scene.spacing_mm[plane.down] / scene.spacing_mm[plane.across],
        png=data_address(grey_levels(picture, low, high), step),
        contours=tuple(contours),
    )
