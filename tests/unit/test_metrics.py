"""Values worked out by hand, and what is defined for empty classes."""

from __future__ import annotations

import numpy as np
import pytest

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.errors import DatasetError, GeometryError
from autoseg.evaluation.metrics import case_metrics, undeclared_values
from autoseg.evaluation.surfaces import surfaces

ONE = LabelSchema(classes=(LabelClass(name="it", values=(1,)),))
UNIT = (1.0, 1.0, 1.0)


def cube(shape=(20, 20, 20), start=5, size=8, shift=(0, 0, 0), value=1, dtype=np.uint8):
    out = np.zeros(shape, dtype)
    out[tuple(slice(start + move, start + move + size) for move in shift)] = value
    return out


def test_a_shifted_cube() -> None:
    (row,) = case_metrics(cube(shift=(0, 2, 0)), cube(), ONE, (1.0, 3.0, 1.0), {"it": 5.9})
    assert row.presence == "both"
    assert row.dice == pytest.approx(6 / 8)
    assert row.iou == pytest.approx(6 / 10)
    assert row.hd95_mm == pytest.approx(6.0)  # two voxels of 3 mm
    assert row.reference_mm3 == 8**3 * 3
    assert row.surface_dice < 1.0
    (row,) = case_metrics(cube(shift=(0, 2, 0)), cube(), ONE, (1.0, 3.0, 1.0), {"it": 6.0})
    assert row.surface_dice == 1.0


def test_the_surface_of_a_box_has_its_area() -> None:
    """Faces count in full; edges and corners are bevelled, which takes at most a voxel from each side."""
    box = np.zeros((40, 50, 60), np.bool_)
    box[5:35, 5:45, 5:55] = True
    surface, _ = surfaces(box, box, (2.0, 1.0, 0.5))
    sides = (60.0, 40.0, 25.0)
    area = 2 * (sides[0] * sides[1] + sides[0] * sides[2] + sides[1] * sides[2])
    assert surface.areas.sum() == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize(
    ("predicted", "actual", "presence", "dice"),
    [(True, False, "spurious", 0.0), (False, True, "missed", 0.0), (False, False, "absent", None)],
)
def test_empty_classes(predicted: bool, actual: bool, presence: str, dice: float | None) -> None:
    maps = [cube() * np.uint8(full) for full in (predicted, actual)]
    (row,) = case_metrics(maps[0], maps[1], ONE, UNIT, {"it": 1.0})
    assert row.presence == presence
    assert (row.dice, row.iou, row.surface_dice) == (dice, dice, dice)
    assert row.hd95_mm is None
    assert row.average_distance_mm is None


def test_a_picture_is_compared_by_its_contour() -> None:
    """With a surface across the single slice, half of all elements would agree whatever the contours do."""
    first, second = (np.zeros((40, 40, 1), np.uint8) for _ in range(2))
    first[5:15, 5:15], second[25:35, 25:35] = 1, 1
    (row,) = case_metrics(first, second, ONE, (0.5, 0.5, 7.0), {"it": 2.0})
    assert row.surface_dice == 0.0
    # The farthest corner is sqrt(200) mm away; a twentieth of the contour lies beyond the 95th part.
    assert 10.0 < row.hd95_mm < np.hypot(10, 10)


def test_single_voxels() -> None:
    first, second = (np.zeros((9, 9, 9), np.uint8) for _ in range(2))
    first[0, 4, 4], second[8, 4, 4] = 1, 1
    (row,) = case_metrics(first, second, ONE, (1.0, 1.0, 1.0), {"it": 1.0})
    assert row.hd95_mm == pytest.approx(8.0, abs=1.0)
    assert row.dice == 0.0


def test_regions_join_values_and_may_overlap() -> None:
    schema = LabelSchema(
        classes=(LabelClass(name="whole", values=(1, 2, 300)), LabelClass(name="core", values=(2,))),
    )
    reference = np.zeros((10, 10, 10), np.uint16)
    reference[2:8, 2:8, 2:8] = 1
    reference[4:6, 4:6, 4:6] = 2
    reference[2, 2, 2] = 300
    prediction = np.where(reference == 1, 2, reference)
    whole, core = case_metrics(prediction, reference, schema, UNIT, {"whole": 1.0, "core": 1.0})
    assert (whole.dice, whole.reference_vox) == (1.0, 216)
    assert (core.overlap_vox, core.prediction_vox) == (8, 215)


def test_ignored_voxels_count_nowhere() -> None:
    schema = LabelSchema(classes=ONE.classes, ignore=9)
    reference, prediction = cube(), cube()
    reference[0:3], prediction[0:3] = 9, 1
    (row,) = case_metrics(prediction, reference, schema, UNIT, {"it": 1.0})
    assert (row.dice, row.hd95_mm, row.prediction_vox) == (1.0, 0.0, 512)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_every_integer_type_gives_the_same(dtype) -> None:
    (row,) = case_metrics(cube(shift=(1, 0, 0), dtype=dtype), cube(dtype=dtype), ONE, UNIT, {"it": 1.0})
    (same,) = case_metrics(cube(shift=(1, 0, 0)), cube(), ONE, UNIT, {"it": 1.0})
    assert row == same


def test_values_that_mean_nothing_are_found() -> None:
    labels = cube(dtype=np.int32)
    labels[0, 0, 0], labels[1, 1, 1] = -4, 70_000
    assert undeclared_values(labels, ONE) == (-4, 70_000)
    assert undeclared_values(cube(value=7), ONE) == (7,)
    (row,) = case_metrics(labels, cube(), ONE, UNIT, {"it": 1.0})
    assert row.dice == 1.0


def test_other_shapes_are_refused() -> None:
    with pytest.raises(GeometryError, match="20, 20, 21"):
        case_metrics(cube((20, 20, 21)), cube(), ONE, UNIT, {"it": 1.0})
    assert issubclass(GeometryError, DatasetError)


def test_the_order_in_memory_changes_nothing() -> None:
    spacing = (1.0, 2.0, 0.5)
    maps = (cube((20, 24, 28), shift=(0, 2, 1)), cube((20, 24, 28)))
    (row,) = case_metrics(*maps, ONE, spacing, {"it": 1.0})
    (other,) = case_metrics(*(np.asfortranarray(item) for item in maps), ONE, spacing, {"it": 1.0})
    assert other.model_dump() == pytest.approx(row.model_dump())
