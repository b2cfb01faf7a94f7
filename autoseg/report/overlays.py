"""Pictures of single cases: the slice of greatest error in each plane, with reference and prediction as contours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoseg.domain.dataset import LabelSchema
from autoseg.io.drawing import PICTURE, PLANES, Plane, cut_slice, data_address, grey_levels, outline
from autoseg.report.scene import Predicted, Scene

MAX_SIDE_PX = 288
"""Longest side of a picture: eight cases with three planes each stay under 2 MB."""

WINDOW_PERCENTILES = (0.5, 99.5)
"""Of the image's values: below it is black, above it is white."""


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


def views(scene: Scene, configuration: str, schema: LabelSchema) -> tuple[View, ...]:
    """The pictures of a case: three planes, or one where the image is a picture.

    Args:
        scene: The case; the colours of a picture are shown as they are, otherwise the first channel.
        configuration: Whose prediction is shown.
        schema: The classes.
    """
    planes = (PICTURE,) if scene.is_2d else PLANES
    shown = [plane for plane in planes if min(scene.full_shape[plane.across], scene.full_shape[plane.down]) > 1]
    return tuple(_view(scene, scene.predicted[configuration], plane, schema) for plane in shown)


def _view(scene: Scene, predicted: Predicted, plane: Plane, schema: LabelSchema) -> View:
    others = (plane.across, plane.down)
    counts = np.count_nonzero(predicted.wrong, axis=others)
    if not counts.any():
        counts = np.count_nonzero(scene.reference, axis=others)
    index = int(np.argmax(counts)) if counts.any() else predicted.wrong.shape[plane.normal] // 2
    step = max(1, -(-max(predicted.wrong.shape[axis] for axis in others) // MAX_SIDE_PX))
    image = scene.image if scene.is_colour else scene.image[:1]
    picture = np.stack([cut_slice(channel, plane, index, step) for channel in image], axis=-1)
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, WINDOW_PERCENTILES) if finite.size else (0.0, 1.0)
    height, width = picture.shape[:2]
    contours = []
    for kind, labels in (("reference", scene.reference), ("prediction", predicted.labels)):
        cut = cut_slice(labels, plane, index, step)
        for item in schema.classes:
            path = outline(np.isin(cut[step // 2 :: step, step // 2 :: step], item.values))
            contours += [Contour(kind, item.name, path)] if path else []
    return View(
        plane=plane.name,
        letters=plane.letters,
        slice_number=scene.start[plane.normal] + index + 1,
        num_slices=scene.full_shape[plane.normal],
        num_wrong_vox=int(np.count_nonzero(predicted.wrong.take(index, axis=plane.normal))),
        width_px=max(1, width // step),
        height_px=max(1, height // step),
        aspect=scene.spacing_mm[plane.down] / scene.spacing_mm[plane.across],
        png=data_address(grey_levels(picture, low, high), step),
        contours=tuple(contours),
    )
