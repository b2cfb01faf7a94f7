"""How well a predicted label map agrees with a reference, class by class.

Definitions, for a class with voxels P in the prediction and R in the reference:

=======================  ============================================================================================
Dice                     2 |P and R| / (|P| + |R|)
IoU                      |P and R| / |P or R|
HD95                     95 % of either surface lies within this distance (mm) of the other (the larger direction)
surface Dice (NSD)       part of both surfaces that lies within the tolerance of the other
average distance         mean distance (mm) over both surfaces
volume error             volume of P minus volume of R (mm3); relative: divided by the volume of R
lesion precision, ...    recall and F1 of connected components, see `lesions`
=======================  ============================================================================================

Surfaces run between voxel centres and count by area. What is not defined is None:

===================  ==============================  =========================  ============  ==========================
class is in          Dice, IoU, surface Dice, F1     HD95, average distance     volume error  of lesions
===================  ==============================  =========================  ============  ==========================
both                 defined                         defined                    defined       all defined
only the reference   0                               None                       defined       recall 0, precision None
only the prediction  0                               None                       not relative  precision 0, recall None
neither              None                            None                       None          None
===================  ==============================  =========================  ============  ==========================

Means over cases take the cases whose reference contains the class. Where a class was not annotated in a case nothing of
it is defined there. Regions are compared as regions: a voxel is in one when its value is one of the region's. Voxels
with the ignore value in the reference are emptied in both maps. An axis of one voxel (a picture) has no surface across
it: contours are compared there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.values import Value
from autoseg.errors import GeometryError
from autoseg.evaluation.lesions import Lesions, count_lesions
from autoseg.evaluation.surfaces import compare, surfaces

METRICS_VERSION = 2
"""Of the definitions and of what is computed: 1 had no lesions, volume errors and confusions."""

BACKGROUND = "background"
"""What is no class, among confusions."""

Presence = Literal["both", "missed", "spurious", "absent", "unannotated"]
Box = tuple[slice, ...]

_MIN_SURFACE_AXES = 2
_TABLE_SIZE = 1 << 16
# Label files hold at most 16 bits, see `LabelSchema.decode_table`.


class ClassMetrics(Value):
    """Agreement on one class in one case; None where a metric is not defined (see the module).

    Attributes:
        name: The class.
        presence: "both"; "missed": only in the reference; "spurious": only in the prediction; "absent": in neither;
            "unannotated": the reference says nothing about the class, so no metric is defined.
        dice: 0 ... 1.
        iou: 0 ... 1.
        surface_dice: 0 ... 1, at the tolerance.
        hd95_mm: Millimetres (pixels where a picture has no spacing), at least 0.
        average_distance_mm: As above.
        reference_mm3: Volume in the reference.
        prediction_mm3: Volume in the prediction.
        reference_vox: Voxels in the reference.
        prediction_vox: Voxels in the prediction.
        overlap_vox: Voxels in both.
        volume_error_mm3: Predicted minus reference volume; None where the class is in neither.
        relative_volume_error: That over the reference volume; None where the reference is empty.
        lesion_precision: 0 ... 1; None where nothing is predicted.
        lesion_recall: 0 ... 1; None where the reference is empty.
        lesion_f1: 0 ... 1; None where the class is in neither.
        reference_lesions: Components of the reference.
        found_lesions: Those of them that were found.
        predicted_lesions: Components of the prediction.
        true_lesions: Those of them that are true.
    """

    name: str
    presence: Presence
    dice: float | None
    iou: float | None
    surface_dice: float | None
    hd95_mm: float | None
    average_distance_mm: float | None
    reference_mm3: float
    prediction_mm3: float
    reference_vox: int
    prediction_vox: int
    overlap_vox: int
    volume_error_mm3: float | None = None
    relative_volume_error: float | None = None
    lesion_precision: float | None = None
    lesion_recall: float | None = None
    lesion_f1: float | None = None
    reference_lesions: int = 0
    found_lesions: int = 0
    predicted_lesions: int = 0
    true_lesions: int = 0

    @property
    def lesions(self) -> Lesions:
        """The counts together."""
        return Lesions(self.reference_lesions, self.found_lesions, self.predicted_lesions, self.true_lesions)


class Confusion(Value):
    """Voxels of one class that were taken for another, or rightly for itself.

    Attributes:
        reference: A class, or `BACKGROUND`.
        prediction: The same; background taken for background is never listed.
        voxels: How many.
    """

    reference: str
    prediction: str
    voxels: int


METRIC_TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "surface_dice": "Surface Dice",
    "hd95_mm": "HD95 (mm)",
    "average_distance_mm": "Average distance (mm)",
    "volume_error_mm3": "Volume error (mm³)",
    "relative_volume_error": "Relative volume error",
    "lesion_precision": "Lesion precision",
    "lesion_recall": "Lesion recall",
    "lesion_f1": "Lesion F1",
}
"""What people call the metrics."""

METRIC_NAMES = tuple(METRIC_TITLES)
"""Fields of `ClassMetrics` that are summarised over cases."""


@dataclass(frozen=True, slots=True)
class MapComparison:
    """Two label maps compared.

    Attributes:
        classes: In the order of the schema.
        confusions: Which class was taken for which; empty for regions.
    """

    classes: tuple[ClassMetrics, ...]
    confusions: tuple[Confusion, ...]


def case_metrics(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    schema: LabelSchema,
    spacing_mm: Sequence[float],
    tolerance_mm: Mapping[str, float],
    annotated: Collection[str] | None = None,
) -> tuple[ClassMetrics, ...]:
    """The metrics of every class of the schema in its order; see `compare_maps`."""
    return compare_maps(prediction, reference, schema, spacing_mm, tolerance_mm, annotated).classes


def compare_maps(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    schema: LabelSchema,
    spacing_mm: Sequence[float],
    tolerance_mm: Mapping[str, float],
    annotated: Collection[str] | None = None,
) -> MapComparison:
    """Compare two label maps on one grid.

    Args:
        prediction: Integer (I, J, K), label values of files; values of no class count as background.
        reference: The same shape.
        schema: The classes.
        spacing_mm: Voxel size along I, J, K.
        tolerance_mm: For the surface Dice, by class name; every class needs an entry.
        annotated: Names of the classes that the reference annotates; None: all.

    Raises:
        GeometryError: The shapes differ.
    """
    if prediction.shape != reference.shape:
        raise GeometryError(f"the prediction has {prediction.shape} voxels, the reference {reference.shape}")
    if reference.flags.f_contiguous:
        # NIfTI files are read this way; finding boxes and surfaces against the order in memory takes ten times as long.
        prediction, reference, spacing_mm = prediction.T, reference.T, spacing_mm[::-1]
    values = sorted(schema.declared_values - {0, schema.ignore})
    maps = (_compact(prediction, values), _compact(reference, values))
    if schema.ignore is not None:
        maps[0][reference == schema.ignore] = 0
    boxes = tuple(ndimage.find_objects(item, max_label=len(values)) for item in maps)
    axes = _surface_axes(reference.shape)
    rows = []
    for item in schema.classes:
        if annotated is not None and item.name not in annotated:
            rows.append(_unannotated(item.name))
            continue
        codes = [values.index(value) + 1 for value in item.values]
        box = _union([found[code - 1] for found in boxes for code in codes])
        predicted, actual = (_mask(labels[box], codes) for labels in maps)
        rows.append(_class_metrics(item.name, predicted, actual, axes, spacing_mm, tolerance_mm[item.name]))
    if schema.has_regions:
        return MapComparison(tuple(rows), ())
    by_code = {values.index(item.values[0]) + 1: item.name for item in schema.classes}
    box = _union([found for part in boxes for found in part])
    return MapComparison(tuple(rows), _confusions(maps[0][box], maps[1][box], by_code, annotated))


def _confusions(
    predicted: NDArray[np.int16],
    actual: NDArray[np.int16],
    names: Mapping[int, str],
    annotated: Collection[str] | None,
) -> tuple[Confusion, ...]:
    """Count the pairs of classes; what was predicted of a class that is not annotated says nothing."""
    count = len(names) + 1
    pairs = actual.astype(np.int64) * count + predicted
    counts = np.bincount(pairs.ravel(), minlength=count * count)
    all_names = {0: BACKGROUND, **names}
    found = []
    for pair in np.flatnonzero(counts):
        reference, prediction = all_names[int(pair) // count], all_names[int(pair) % count]
        if reference == prediction == BACKGROUND:
            continue
        if annotated is not None and not {reference, prediction} <= {BACKGROUND, *annotated}:
            continue
        found.append(Confusion(reference=reference, prediction=prediction, voxels=int(counts[pair])))
    return tuple(found)


def undeclared_values(labels: NDArray[np.integer], schema: LabelSchema) -> tuple[int, ...]:
    """Values in a label map that the schema does not know, ascending."""
    if labels.dtype in (np.uint8, np.uint16):
        seen = np.zeros(_TABLE_SIZE, np.bool_)
        seen[labels] = True  # a hundred times faster than sorting the voxels
        found = np.flatnonzero(seen)
    else:
        found = np.unique(labels)
    return tuple(int(value) for value in found if int(value) not in schema.declared_values)


def _compact(labels: NDArray[np.integer], values: Sequence[int]) -> NDArray[np.int16]:
    """Label values to their place in `values` + 1; anything else to 0."""
    table = np.zeros(_TABLE_SIZE, np.int16)
    table[list(values)] = np.arange(1, len(values) + 1)
    if labels.dtype not in (np.uint8, np.uint16):
        labels = np.where((labels >= 0) & (labels < _TABLE_SIZE), labels, 0).astype(np.uint16)
    places: NDArray[np.int16] = table[labels]
    return places


def _mask(labels: NDArray[np.int16], codes: Sequence[int]) -> NDArray[np.bool_]:
    return labels == codes[0] if len(codes) == 1 else np.isin(labels, codes)


def _union(boxes: Sequence[Box | None]) -> Box:
    """The smallest box around all; an empty one when there is none."""
    present = [box for box in boxes if box is not None]
    if not present:
        return (slice(0, 0),) * 3
    return tuple(
        slice(min(box[axis].start for box in present), max(box[axis].stop for box in present))
        for axis in range(len(present[0]))
    )


def _class_metrics(
    name: str,
    predicted: NDArray[np.bool_],
    actual: NDArray[np.bool_],
    axes: Sequence[int],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> ClassMetrics:
    num_predicted, num_actual = int(np.count_nonzero(predicted)), int(np.count_nonzero(actual))
    overlap = int(np.count_nonzero(predicted & actual))
    presence = _presence(num_predicted, num_actual)
    voxel_mm3 = float(np.prod(spacing_mm))
    one_sided = None if presence == "absent" else 0.0
    dice, iou, surface_dice, hd95, average = one_sided, one_sided, one_sided, None, None
    if presence == "both":
        dice = 2 * overlap / (num_predicted + num_actual)
        iou = overlap / (num_predicted + num_actual - overlap)
        shape = [predicted.shape[axis] for axis in axes]
        first, second = surfaces(predicted.reshape(shape), actual.reshape(shape), [spacing_mm[axis] for axis in axes])
        distances = compare(first, second, tolerance_mm)
        surface_dice, hd95, average = distances.surface_dice, distances.hd95_mm, distances.average_mm
    lesions = count_lesions(predicted, actual)
    error = None if presence == "absent" else (num_predicted - num_actual) * voxel_mm3
    return ClassMetrics(
        name=name,
        presence=presence,
        dice=dice,
        iou=iou,
        surface_dice=surface_dice,
        hd95_mm=hd95,
        average_distance_mm=average,
        reference_mm3=num_actual * voxel_mm3,
        prediction_mm3=num_predicted * voxel_mm3,
        reference_vox=num_actual,
        prediction_vox=num_predicted,
        overlap_vox=overlap,
        volume_error_mm3=error,
        relative_volume_error=(num_predicted - num_actual) / num_actual if num_actual else None,
        lesion_precision=lesions.precision,
        lesion_recall=lesions.recall,
        lesion_f1=lesions.f1,
        reference_lesions=lesions.reference,
        found_lesions=lesions.found,
        predicted_lesions=lesions.predicted,
        true_lesions=lesions.true,
    )


def _unannotated(name: str) -> ClassMetrics:
    return ClassMetrics(
        name=name,
        presence="unannotated",
        dice=None,
        iou=None,
        surface_dice=None,
        hd95_mm=None,
        average_distance_mm=None,
        reference_mm3=0.0,
        prediction_mm3=0.0,
        reference_vox=0,
        prediction_vox=0,
        overlap_vox=0,
    )


def _presence(num_predicted: int, num_actual: int) -> Presence:
    if num_actual:
        return "both" if num_predicted else "missed"
    return "spurious" if num_predicted else "absent"


def _surface_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes across which a surface can be told: those of more than one voxel, but at least two."""
    longest_first = sorted(range(len(shape)), key=lambda axis: -shape[axis])
    num_axes = max(_MIN_SURFACE_AXES, sum(size > 1 for size in shape))
    return tuple(sorted(longest_first[:num_axes]))
