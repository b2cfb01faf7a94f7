"""What there is to count and measure in a label map: volumes, pieces, intensities, class by class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.outside import Outside
from autoseg.domain.values import Value
from autoseg.inference.gather import VoxelCounts

MM3_PER_ML = 1000.0


class Intensities(Value):
    """Of one channel in the voxels of a class, in the units of the file.

    Attributes:
        channel: Its name.
        mean: Of the voxels.
        sd: Their standard deviation (divided by their number).
        median: Of the voxels.
        minimum: Of the voxels.
        maximum: Of the voxels.
    """

    channel: str
    mean: float
    sd: float
    median: float
    minimum: float
    maximum: float


class ClassStatistics(Value):
    """A class or region in one case.

    Attributes:
        name: Of the class.
        values: Label values that belong to it.
        voxels: In the label map.
        volume_ml: None for pictures, as all volumes.
        volume_low_ml: With `--uncertainty`: the volume is less in 5 of 100 cases; see docs/decisions/0037.
        volume_high_ml: The same: it is more in 5 of 100.
        volume_expected_ml: The same: the sum of the probabilities.
        pieces: Connected components, neighbours by face, edge or corner; None where they were not asked for.
        touches_border: Whether it reaches the edge of the image, along an axis of more than one voxel; the same.
        intensities: Of each channel that is there; none where the class has no voxel or where they were not asked for.
    """

    name: str
    values: tuple[int, ...]
    voxels: int
    volume_ml: float | None = None
    volume_low_ml: float | None = None
    volume_high_ml: float | None = None
    volume_expected_ml: float | None = None
    pieces: int | None = None
    touches_border: bool | None = None
    intensities: tuple[Intensities, ...] = ()


class CaseStatistics(Value):
    """A case.

    Attributes:
        case: Its id.
        label_map: Name of the file.
        certainty: Whose probabilities the intervals come from, in words; None without `--uncertainty`.
        outside: In what the image is unlike those of the training.
        classes: Every class or region of the labels.
    """

    case: str
    label_map: str
    certainty: str | None = None
    outside: tuple[Outside, ...] = ()
    classes: tuple[ClassStatistics, ...]


def class_statistics(
    labels: NDArray[np.integer],
    geometry: Geometry,
    schema: LabelSchema,
    *,
    counts: Sequence[VoxelCounts] | None = None,
    image: Volume | None = None,
    channels: Sequence[str] = (),
) -> tuple[ClassStatistics, ...]:
    """Measure every class or region of a label map.

    Args:
        labels: (I, J, K) label values.
        geometry: Its grid.
        schema: The classes or regions; a region's voxels are those of all its values.
        counts: What probabilities say of each, for the intervals.
        image: On the same grid: then pieces, border and intensities are measured too.
        channels: Names of all channels, those that the image lacks included.
    """
    highest = max(value for item in schema.classes for value in item.values)
    boxes = ndimage.find_objects(labels, max_label=highest)
    voxel_ml = None if geometry.is_2d else abs(float(np.linalg.det(geometry.affine[:3, :3]))) / MM3_PER_ML
    rows = []
    for number, item in enumerate(schema.classes):
        box = _union([boxes[value - 1] for value in item.values if boxes[value - 1] is not None])
        mask = None if box is None else np.isin(labels[box], item.values)
        voxels = 0 if mask is None else int(np.count_nonzero(mask))
        row = ClassStatistics(name=item.name, values=item.values, voxels=voxels)
        if voxel_ml is not None:
            row = row.model_copy(update=_volumes(voxels, voxel_ml, None if counts is None else counts[number]))
        if image is not None:
            row = row.model_copy(update=_measured(mask, box, image, channels))
        rows.append(row)
    return tuple(rows)


def _union(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...] | None:
    if not boxes:
        return None
    by_axis = zip(*boxes, strict=True)
    return tuple(slice(min(part.start for part in parts), max(part.stop for part in parts)) for parts in by_axis)


def _volumes(voxels: int, voxel_ml: float, counts: VoxelCounts | None) -> dict[str, float]:
    """Volumes in ml; the interval always holds the volume of the label map."""
    found = {"volume_ml": voxels * voxel_ml}
    if counts is not None:
        found["volume_low_ml"] = min(voxels, counts.low) * voxel_ml
        found["volume_high_ml"] = max(voxels, counts.high) * voxel_ml
        found["volume_expected_ml"] = counts.expected * voxel_ml
    return found


def _measured(
    mask: NDArray[np.bool_] | None, box: tuple[slice, ...] | None, image: Volume, channels: Sequence[str]
) -> dict[str, object]:
    if mask is None or box is None or not mask.any():
        return {"pieces": 0, "touches_border": False}
    _, pieces = ndimage.label(mask, np.ones((3,) * mask.ndim))
    # The box is as tight as the mask of all values together, so that it reaches the edge where the mask does.
    touches = any(
        size > 1 and (part.start == 0 or part.stop == size)
        for part, size in zip(box, image.geometry.shape, strict=True)
    )
    intensities = tuple(
        _intensities(channels[number], array[box][mask])
        for number, array in zip(image.channels, image.array, strict=True)
    )
    return {"pieces": int(pieces), "touches_border": touches, "intensities": intensities}


def _intensities(name: str, found: NDArray[np.generic]) -> Intensities:
    values = found.astype(np.float64)
    return Intensities(
        channel=name,
        mean=float(values.mean()),
        sd=float(values.std()),
        median=float(np.median(values)),
        minimum=float(values.min()),
        maximum=float(values.max()),
    )
