"""Pictures of single cases: the slice of greatest error in each plane, with reference and prediction as contours."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import find_contours

from autoseg.domain.dataset import Case, LabelSchema
from autoseg.domain.geometry import Geometry, closest_orientation
from autoseg.io.images import read_case, read_labels
from autoseg.report.collect import CaseRow

MAX_SIDE_PX = 288
"""Longest side of a picture: eight cases with three planes each stay under 2 MB."""

MARGIN_FRACTION = 0.3
MIN_MARGIN_VOX = 8
WINDOW_PERCENTILES = (0.5, 99.5)

_RGB = 3

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Plane:
    """How one plane of a canonical (right, anterior, superior) array is shown.

    Attributes:
        normal: The axis that is sliced.
        across: The axis from left to right of the picture.
        down: The axis from top to bottom.
        flip_across: Show the axis from its end to its start.
        flip_down: The same for the other.
        letters: What lies at the left, right, top and bottom.
    """

    name: str
    normal: int
    across: int
    down: int
    flip_across: bool
    flip_down: bool
    letters: str


# As radiologists hang images: the patient's right at the picture's left.
PLANES = (
    Plane("axial", 2, 0, 1, True, True, "RLAP"),
    Plane("coronal", 1, 0, 2, True, True, "RLSI"),
    Plane("sagittal", 0, 1, 2, True, True, "APSI"),
)
PICTURE = Plane("picture", 2, 0, 1, False, False, "")


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
    reference = _canonical(read_labels(case.labels or "", geometry)[0], geometry)
    prediction = _canonical(read_labels(row.prediction, geometry)[0], geometry)
    channels = [_canonical(channel, geometry) for channel in image]
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


def _canonical(array: NDArray[T], geometry: Geometry) -> NDArray[T]:
    """(I, J, K) to (right, anterior, superior); a picture stays as it is."""
    if geometry.is_2d:
        return array
    orientation = closest_orientation(geometry.affine)
    flips = tuple(axis for axis, flip in enumerate(orientation.flips) if flip)
    return np.flip(array.transpose(orientation.axes), flips)


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
    picture = np.stack([_cut(channel, plane, index, step) for channel in scene.image], axis=-1)
    height, width = picture.shape[:2]
    contours = []
    for kind, labels in zip(("reference", "prediction"), scene.maps, strict=True):
        cut = _cut(labels, plane, index, step)
        for item in schema.classes:
            path = _outline(np.isin(cut[step // 2 :: step, step // 2 :: step], item.values))
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
        png=_png(picture, scene.image, step),
        contours=tuple(contours),
    )


def _cut(array: NDArray[T], plane: Plane, index: int, step: int) -> NDArray[T]:
    """One slice as rows and columns of the picture, both a multiple of `step` where they are longer than that."""
    taken: NDArray[T] = np.moveaxis(array, plane.normal, 0)[index]
    # Every plane has `across` before `down`, so what is left of the axes is (across, down).
    cut: NDArray[T] = taken.T[:: -1 if plane.flip_down else 1, :: -1 if plane.flip_across else 1]
    rows, columns = (max(step, size // step * step) for size in cut.shape)
    return cut[:rows, :columns]


def _png(picture: NDArray[np.float32], image: NDArray[np.float32], step: int) -> str:
    """A slice (rows, columns, 1 or 3) as a PNG data address; bright and dark as in the whole neighbourhood."""
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, WINDOW_PERCENTILES) if finite.size else (0.0, 1.0)
    scaled = np.clip((np.nan_to_num(picture.astype(np.float64)) - low) / max(high - low, 1e-12), 0.0, 1.0)
    grey = np.round(scaled * 255).astype(np.uint8)
    drawn = Image.fromarray(grey if grey.shape[-1] == _RGB else grey[..., 0])
    buffer = io.BytesIO()
    drawn.reduce(step).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _outline(mask: NDArray[np.bool_]) -> str:
    """The outline of a mask as an SVG path in half pixels; pixel (0, 0) reaches from 0 to 2.

    Outlines run through the middles of pixel edges, so half pixels are whole numbers; with steps instead of places, and
    straight runs as one step, the text of a dense picture is a fifth as long.
    """
    if not mask.any():
        return ""
    padded = np.pad(mask, 1).astype(np.float64)
    rings: Sequence[NDArray[np.float64]] = find_contours(padded, 0.5)  # type: ignore[no-untyped-call]
    parts = []
    for ring in rings:
        # Rows and columns of the padded mask to x and y: minus one for the padding, plus half to a pixel's middle.
        points = np.round(ring[:, ::-1] * 2 - 1).astype(int)
        steps = np.diff(points, axis=0)
        turns = np.flatnonzero((steps[1:] != steps[:-1]).any(axis=1)) + 1
        corners = points[[0, *turns]]
        moves = " ".join(f"{x} {y}" for x, y in np.diff(corners, axis=0).tolist())
        parts.append(f"M{corners[0][0]} {corners[0][1]}l{moves}z")
    return "".join(parts)
