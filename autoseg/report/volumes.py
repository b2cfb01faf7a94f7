"""What the viewer draws: small volumes of a case as compressed NIfTI files, in the page or in a file beside it.

A page that was opened from a disk may not read other files, but it may run scripts that lie beside it. So a side file
is a script of one line that hands its volumes to the page.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import LabelSchema
from autoseg.io.viewing import nifti_gz
from autoseg.report.overlays import WINDOW_PERCENTILES
from autoseg.report.scene import Predicted, Scene

MAX_SIDE_VOX = 128
"""Longest side of a volume; longer ones are reduced by a whole number, blocks of the image to their mean."""

MAX_FLAT_SIDE_VOX = 384
"""The same of a picture, which has one slice only."""

MAX_CHANNELS = 4
"""Image channels that are kept."""

MISSED, ADDED, CONFUSED = 1, 2, 3
"""Values of the error map: foreground that was missed, background that was taken for it, one class for another."""

_BYTE_MAX = 255

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class CaseVolumes:
    """The volumes of one case: base64 of compressed NIfTI files.

    Attributes:
        case: Its id.
        images: By channel, in order.
        reference: The classes by number, from 1 in the order of the schema.
        predictions: By configuration: "prediction", "error", and "uncertainty" where there is one.
        focus: By configuration, the place to look at first: where the three slices with most wrong voxels cross, as
            parts of the volume's sides.
        is_reduced: Whether voxels were joined.
        is_flat: Whether it is a picture.
    """

    case: str
    images: Mapping[str, str]
    reference: str
    predictions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    focus: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    is_reduced: bool = False
    is_flat: bool = False

    def to_json(self) -> str:
        """As the page reads it; safe inside a script element."""
        content = {
            "case": self.case,
            "images": dict(self.images),
            "reference": self.reference,
            "predictions": {name: dict(layers) for name, layers in self.predictions.items()},
            "focus": {name: list(place) for name, place in self.focus.items()},
            "reduced": self.is_reduced,
            "flat": self.is_flat,
        }
        return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def make_volumes(case: str, scene: Scene, schema: LabelSchema) -> CaseVolumes:
    """The volumes of a case, no side longer than `MAX_SIDE_VOX`; of a picture `MAX_FLAT_SIDE_VOX`."""
    most = MAX_FLAT_SIDE_VOX if scene.is_2d else MAX_SIDE_VOX
    step = tuple(-(-size // most) for size in scene.reference.shape)
    affine = _affine_for_viewer(scene, step)
    table = _class_table(schema)
    reference = _middles(scene.reference, step)
    return CaseVolumes(
        case=case,
        images=_images(scene, step, affine),
        reference=_encode(table[reference], affine),
        predictions={
            name: _layers(item, reference, step, affine, table, schema) for name, item in scene.predicted.items()
        },
        focus={name: _focus(scene, item) for name, item in scene.predicted.items()},
        is_reduced=any(size > 1 for size in step),
        is_flat=scene.is_2d,
    )


def _layers(
    predicted: Predicted,
    reference: NDArray[np.integer],
    step: tuple[int, ...],
    affine: NDArray[np.float64],
    table: NDArray[np.uint8],
    schema: LabelSchema,
) -> dict[str, str]:
    labels = _middles(predicted.labels, step)
    layers = {
        "prediction": _encode(table[labels], affine),
        "error": _encode(error_map(labels, reference, _middles(predicted.wrong, step), schema), affine),
    }
    if predicted.uncertainty is not None:
        layers["uncertainty"] = _encode_values(_means(predicted.uncertainty, step), affine, (0.0, 100.0))
    return layers


def _focus(scene: Scene, predicted: Predicted) -> tuple[float, ...]:
    """The middle of the reference where nothing is wrong, else the slice with most wrong voxels along each axis."""
    mask = predicted.wrong if predicted.wrong.any() else scene.reference > 0
    parts = []
    for axis, size in enumerate(mask.shape):
        counts = np.count_nonzero(mask, axis=tuple(other for other in range(mask.ndim) if other != axis))
        place = int(np.argmax(counts)) if counts.any() else size // 2
        parts.append(round((place + 0.5) / size, 4))
    return (parts[0], 1 - parts[1], parts[2]) if scene.is_2d else tuple(parts)


def error_map(
    labels: NDArray[np.integer], reference: NDArray[np.integer], wrong: NDArray[np.bool_], schema: LabelSchema
) -> NDArray[np.uint8]:
    """What kind of error each voxel is; 0 where there is none.

    Args:
        labels: Predicted label values.
        reference: Label values.
        wrong: Where they differ and it counts.
        schema: The classes.
    """
    foreground = sorted({value for item in schema.classes for value in item.values})
    is_found, is_there = np.isin(labels, foreground), np.isin(reference, foreground)
    kind = np.where(is_there, np.where(is_found, CONFUSED, MISSED), ADDED)
    return np.where(wrong, kind, 0).astype(np.uint8)


def _class_table(schema: LabelSchema) -> NDArray[np.uint8]:
    """Label values to numbers of classes; of regions the last, smallest one that holds the value."""
    table = np.zeros(1 << 16, np.uint8)
    for number, item in enumerate(schema.classes, start=1):
        table[list(item.values)] = min(number, _BYTE_MAX)
    return table


def _affine_for_viewer(scene: Scene, step: tuple[int, ...]) -> NDArray[np.float64]:
    """Of the reduced volume; a picture is laid out with its rows downwards."""
    affine = np.diag([scene.spacing_mm[0], -scene.spacing_mm[1], 1.0, 1.0]) if scene.is_2d else scene.affine
    change = np.diag([*map(float, step), 1.0])
    change[:3, 3] = [(size - 1) / 2 for size in step]
    out: NDArray[np.float64] = affine @ change
    return out


def _images(scene: Scene, step: tuple[int, ...], affine: NDArray[np.float64]) -> dict[str, str]:
    if scene.is_colour:
        # One window for all three, so that colours stay what they are.
        values = np.stack([_means(channel, step) for channel in scene.image], axis=-1)
        return {"image": _encode(_levels(values, (0.0, 100.0))[0], affine)}
    pairs = list(zip(scene.channels, scene.image, strict=True))[:MAX_CHANNELS]
    return {name: _encode_values(_means(channel, step), affine, WINDOW_PERCENTILES) for name, channel in pairs}


def _encode_values(values: NDArray[np.float32], affine: NDArray[np.float64], window: tuple[float, float]) -> str:
    """In 256 levels between two percentiles, with the scale that gives the values back."""
    levels, low, high = _levels(values, window)
    return _encode(levels, affine, (high - low) / _BYTE_MAX, low)


def _levels(values: NDArray[np.float32], window: tuple[float, float]) -> tuple[NDArray[np.uint8], float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(item) for item in np.percentile(finite, window)) if finite.size else (0.0, 1.0)
    if not high > low:
        high = low + 1.0
    scaled = np.clip((np.nan_to_num(values.astype(np.float64), nan=low) - low) / (high - low), 0.0, 1.0)
    return np.round(scaled * _BYTE_MAX).astype(np.uint8), low, high


def _encode(array: NDArray[np.uint8], affine: NDArray[np.float64], slope: float = 1.0, intercept: float = 0.0) -> str:
    return base64.b64encode(nifti_gz(array, affine, slope=slope, intercept=intercept)).decode("ascii")


def _middles(array: NDArray[T], step: tuple[int, ...]) -> NDArray[T]:
    """One voxel of each whole block."""
    return _whole_blocks(array, step)[tuple(slice(size // 2, None, size) for size in step)]


def _means(array: NDArray[np.float32], step: tuple[int, ...]) -> NDArray[np.float32]:
    """The mean of each whole block."""
    for axis, size in enumerate(step):
        if size > 1:
            whole = _whole_blocks(array, step)
            array = whole.reshape(*whole.shape[:axis], -1, size, *whole.shape[axis + 1 :]).mean(axis=axis + 1)
            step = (*step[:axis], 1, *step[axis + 1 :])
    return array


def _whole_blocks(array: NDArray[T], step: tuple[int, ...]) -> NDArray[T]:
    return array[tuple(slice(0, length // size * size) for length, size in zip(array.shape, step, strict=True))]
