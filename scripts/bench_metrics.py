"""The metrics against other libraries, on random label maps with random anisotropic spacings.

    python scripts/bench_metrics.py --out OUT.json [--pairs 200] [--classes 3]

Each pair is two label maps of several classes, one of them now and then without a class. autoseg compares them as
`autoseg evaluate` does. Held against it, class by class:

    Dice, IoU                         MONAI, and SimpleITK's overlap filter
    volumes                           SimpleITK
    surface Dice                      MONAI (sub-voxel surfaces) and the package surface-distance
    HD95, average surface distance    surface-distance
    lesions                           scikit-image's components

Writes the largest absolute difference of each comparison, with how many values it is over, and exits with 1 when one is
above its tolerance: that of float32 arithmetic in the other library.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from skimage import measure

from autoseg import runtime
from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.evaluation.metrics import ClassMetrics, case_metrics

SEED = 20240229
SHAPES = (6, 22)
SPACINGS_MM = (0.3, 6.0)
TOLERANCES_MM = (0.0, 5.0)
PART_WITHOUT_A_CLASS = 0.15

TOLERANCES = {
    "dice, MONAI": 1e-6,
    "dice, SimpleITK": 1e-9,
    "iou, MONAI": 1e-6,
    "volumes in mm3 (relative), SimpleITK": 1e-9,
    "surface_dice, surface-distance": 1e-5,
    "surface_dice, MONAI": 1e-5,
    "hd95_mm, surface-distance": 1e-4,
    "average_distance_mm, surface-distance": 1e-4,
    "lesions, scikit-image": 0.0,
}

Labels = NDArray[np.uint8]


def label_map(rng: np.random.Generator, shape: tuple[int, ...], num_classes: int) -> Labels:
    """A few balls of each class, some touching the border; a class may be absent."""
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    out = np.zeros(shape, np.uint8)
    for value in range(1, num_classes + 1):
        if rng.random() < PART_WITHOUT_A_CLASS:
            continue
        for _ in range(int(rng.integers(1, 4))):
            centre = rng.uniform(0, np.array(shape) - 1)
            out[((grid - centre) ** 2).sum(-1) <= rng.uniform(1.0, max(shape) / 3) ** 2] = value
    return out


def pairs(count: int, num_classes: int) -> Iterator[tuple[Labels, Labels, tuple[float, ...], float]]:
    """Prediction, reference, spacing and tolerance; the prediction is now and then the reference, moved."""
    for number in range(count):
        rng = np.random.default_rng([SEED, number])
        shape = tuple(int(size) for size in rng.integers(*SHAPES, size=3))
        spacing = tuple(float(value) for value in np.round(rng.uniform(*SPACINGS_MM, size=3), 3))
        reference = label_map(rng, shape, num_classes)
        moved = np.roll(reference, tuple(rng.integers(-1, 2, size=3)), (0, 1, 2))
        prediction = moved if number % 2 else label_map(rng, shape, num_classes)
        yield prediction, reference, spacing, float(rng.uniform(*TOLERANCES_MM))


class Differences:
    """The largest difference of each comparison."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def note(self, name: str, ours: float | None, theirs: float) -> None:
        """Where one of the two is not defined and the other is, they differ by infinity."""
        is_undefined = theirs is None or not np.isfinite(theirs)
        if ours is None or is_undefined:
            difference = 0.0 if (ours is None) == is_undefined else float("inf")
        else:
            difference = abs(ours - theirs)
        self.largest[name] = max(self.largest.get(name, 0.0), difference)
        self.counts[name] = self.counts.get(name, 0) + 1


def compare_overlap(found: Differences, row: ClassMetrics, masks: tuple[NDArray[Any], NDArray[Any]]) -> None:
    from monai.metrics import compute_dice, compute_iou

    tensors = [torch.from_numpy(mask)[None, None].float() for mask in masks]
    found.note("dice, MONAI", row.dice, float(compute_dice(*tensors, ignore_empty=row.presence == "absent")))
    if row.reference_vox:  # without a reference MONAI leaves IoU undefined
        found.note("iou, MONAI", row.iou, float(compute_iou(*tensors)))


def compare_itk(
    found: Differences, row: ClassMetrics, masks: tuple[NDArray[Any], NDArray[Any]], spacing: tuple[float, ...]
) -> None:
    images = [sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in masks]
    for image in images:
        image.SetSpacing(spacing[::-1])
    if row.presence == "absent":
        return
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    found.note("dice, SimpleITK", row.dice, overlap.GetDiceCoefficient())
    for image, ours in zip(images, (row.prediction_mm3, row.reference_mm3), strict=True):
        shapes = sitk.LabelShapeStatisticsImageFilter()
        shapes.Execute(image)
        if shapes.HasLabel(1):
            found.note("volumes in mm3 (relative), SimpleITK", 1.0, shapes.GetPhysicalSize(1) / ours)


def compare_surfaces(
    found: Differences,
    row: ClassMetrics,
    masks: tuple[NDArray[Any], NDArray[Any]],
    spacing: tuple[float, ...],
    tolerance: float,
) -> None:
    import surface_distance.metrics as oracle
    from monai.metrics import compute_surface_dice

    if row.presence != "both":
        return
    predicted, actual = masks
    theirs = oracle.compute_surface_distances(actual, predicted, spacing)
    found.note("hd95_mm, surface-distance", row.hd95_mm, oracle.compute_robust_hausdorff(theirs, 95))
    nsd = oracle.compute_surface_dice_at_tolerance(theirs, tolerance)
    found.note("surface_dice, surface-distance", row.surface_dice, nsd)
    sides = (("gt_to_pred", "gt"), ("pred_to_gt", "pred"))
    total = sum(float((theirs[f"distances_{way}"] * theirs[f"surfel_areas_{side}"]).sum()) for way, side in sides)
    area = sum(float(theirs[f"surfel_areas_{side}"].sum()) for _, side in sides)
    found.note("average_distance_mm, surface-distance", row.average_distance_mm, total / area)
    tensors = [torch.from_numpy(mask)[None, None].float() for mask in masks]
    monai = compute_surface_dice(*tensors, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True)
    found.note("surface_dice, MONAI", row.surface_dice, float(monai))


def compare_lesions(found: Differences, row: ClassMetrics, masks: tuple[NDArray[Any], NDArray[Any]]) -> None:
    predicted, actual = masks
    ours = ((row.reference_lesions, row.found_lesions), (row.predicted_lesions, row.true_lesions))
    for (count, confirmed), mask, other in ((ours[0], actual, predicted), (ours[1], predicted, actual)):
        parts = measure.label(mask, connectivity=3)
        theirs = [
            np.count_nonzero(other[parts == n]) * 10 >= np.count_nonzero(parts == n) for n in range(1, parts.max() + 1)
        ]
        found.note("lesions, scikit-image", count, len(theirs))
        found.note("lesions, scikit-image", confirmed, sum(theirs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--classes", type=int, default=3)
    wanted = parser.parse_args()
    warnings.simplefilter("ignore")  # surface-distance and MONAI use what SciPy and themselves deprecate
    classes = tuple(LabelClass(name=f"class {value}", values=(value,)) for value in range(1, wanted.classes + 1))
    found, presences = Differences(), {}
    for prediction, reference, spacing, tolerance in pairs(wanted.pairs, wanted.classes):
        names = [item.name for item in classes]
        rows = case_metrics(
            prediction, reference, LabelSchema(classes=classes), spacing, dict.fromkeys(names, tolerance)
        )
        for value, row in enumerate(rows, start=1):
            masks = (prediction == value, reference == value)
            presences[row.presence] = presences.get(row.presence, 0) + 1
            compare_overlap(found, row, masks)
            compare_itk(found, row, masks, spacing)
            compare_surfaces(found, row, masks, spacing, tolerance)
            compare_lesions(found, row, masks)
    rows_out = [
        {
            "comparison": name,
            "largest_difference": found.largest[name],
            "values": found.counts[name],
            "tolerance": limit,
        }
        for name, limit in TOLERANCES.items()
    ]
    failed = [row["comparison"] for row in rows_out if not row["largest_difference"] <= row["tolerance"]]
    result = {
        "pairs": wanted.pairs,
        "classes": wanted.classes,
        "presences": presences,
        "rows": rows_out,
        "failed": failed,
        "versions": runtime.versions(),
    }
    wanted.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows_out:
        print(
            f"{row['comparison']:40} {row['largest_difference']:.2e} over {row['values']} values "
            f"(at most {row['tolerance']:.0e})"
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
