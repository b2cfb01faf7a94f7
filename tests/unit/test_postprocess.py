"""Rules about components: what goes, what stays, what is filled; held against scikit-image."""

import numpy as np
import pytest
from skimage import measure, morphology

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.inference import DropSmall, FillHoles, KeepLargest
from autoseg.errors import ConfigError
from autoseg.evaluation.postprocess import apply_rules

SCHEMA = LabelSchema(classes=(LabelClass(name="low", values=(7,)), LabelClass(name="high", values=(9,))))
NESTED = LabelSchema(classes=(LabelClass(name="whole", values=(1, 2)), LabelClass(name="core", values=(2,))))
MM = (1.0, 1.0, 1.0)


def _speckled(seed: int, shape: tuple[int, ...] = (14, 11, 9)) -> np.ndarray:
    return np.asfortranarray(np.random.default_rng(seed).choice([0, 7, 9], shape, p=[0.6, 0.25, 0.15]).astype(np.uint8))


@pytest.mark.parametrize(("connectivity", "rank"), [("faces", 1), ("edges", 2), ("corners", 3)])
@pytest.mark.parametrize("seed", range(3))
def test_small_components_go_as_scikit_image_removes_them(connectivity: str, rank: int, seed: int) -> None:
    labels = _speckled(seed)
    # Voxels of 0.5 ml: what has fewer than 4 goes.
    rule = DropSmall(classes=("low",), min_ml=2.0, connectivity=connectivity)  # type: ignore[arg-type]
    found = apply_rules(labels, [rule], SCHEMA, (10.0, 10.0, 5.0))
    components = measure.label(labels == 7, connectivity=rank)
    stays = np.isin(components, np.flatnonzero(np.bincount(components.ravel()) >= 4)) & (labels == 7)
    assert (labels == 7).sum() > stays.sum() > 0
    np.testing.assert_array_equal(found == 7, stays)
    np.testing.assert_array_equal(found == 9, labels == 9)
    assert found.dtype == labels.dtype
    assert found.flags.f_contiguous


@pytest.mark.parametrize("shape", [(14, 11, 9), (14, 11, 1)])
def test_holes_are_filled_as_scikit_image_fills_them_but_for_other_classes(shape: tuple[int, ...]) -> None:
    labels = np.random.default_rng(5).choice([0, 7, 9], shape, p=[0.3, 0.65, 0.05]).astype(np.uint8)
    found = apply_rules(labels, [FillHoles(classes=("low",))], SCHEMA, MM)
    squeezed = labels.squeeze()
    # A hole is what no path over faces leads out of.
    outside = measure.label(np.pad(squeezed != 7, 1, constant_values=True), connectivity=1)
    holes = (outside != outside.flat[0])[(slice(1, -1),) * squeezed.ndim] & (squeezed != 7)
    # In the plane of a picture, and not through it, there are holes too.
    assert holes.any()
    expected = np.where(holes & (squeezed == 0), 7, squeezed)
    np.testing.assert_array_equal(found.squeeze(), expected)
    assert (found == 9).sum() == (labels == 9).sum()


def test_holes_above_a_volume_stay_and_an_open_one_is_none() -> None:
    labels = np.zeros((12, 8, 8), np.uint8)
    labels[:, 1:7, 1:7] = 7
    labels[2, 3, 3] = labels[5:9, 3, 3] = 0
    labels[11, 5, 5] = 0
    found = apply_rules(labels, [FillHoles(classes=("low",), max_ml=0.003)], SCHEMA, MM)
    assert found[2, 3, 3] == 7
    assert not found[5:9, 3, 3].any()
    assert found[11, 5, 5] == 0
    whole = apply_rules(labels, [FillHoles(classes=("low",))], SCHEMA, MM)
    assert whole[5:9, 3, 3].all()
    assert whole[11, 5, 5] == 0


def test_the_largest_components_stay_alone_or_together() -> None:
    labels = np.zeros((20, 6, 6), np.uint8)
    labels[0:3, :2, :2] = 7  # 12 voxels
    labels[5:7, :2, :2] = 7  # 8
    labels[9:10, :2, :2] = 7  # 4
    labels[12:18, :, :] = 9  # 216, and touching nothing
    alone = apply_rules(labels, [KeepLargest(classes=("low", "high"), count=2)], SCHEMA, MM)
    assert (alone[0:3] == labels[0:3]).all()
    assert (alone[5:7] == labels[5:7]).all()
    assert not alone[9:10].any()
    assert (alone[12:18] == 9).all()
    together = apply_rules(labels, [KeepLargest(classes=("low", "high"), joined=True)], SCHEMA, MM)
    assert set(np.unique(together)) == {0, 9}
    largest = morphology.remove_small_objects(measure.label(labels > 0), max_size=12)
    np.testing.assert_array_equal(together > 0, largest > 0)


def test_rules_follow_each_other_and_leave_their_input_alone() -> None:
    labels = np.zeros((30, 2, 2), np.uint8)
    labels[0:3] = 9  # 12 voxels, with a speck of the other class 15
    labels[3, 0] = 7
    labels[3, 1, 0] = 7
    labels[10:13, :, :] = 7
    labels[13, 0, :] = 7  # 14 voxels
    before = labels.copy()
    rules = [DropSmall(classes=("low",), min_ml=0.004), KeepLargest(classes=("low", "high"), joined=True)]
    one_by_one = apply_rules(apply_rules(labels, rules[:1], SCHEMA, MM), rules[1:], SCHEMA, MM)
    np.testing.assert_array_equal(apply_rules(labels, rules, SCHEMA, MM), one_by_one)
    assert set(np.unique(one_by_one)) == {0, 7}
    assert set(np.unique(apply_rules(labels, rules[::-1], SCHEMA, MM))) == {0, 9}
    np.testing.assert_array_equal(labels, before)


def test_a_region_is_all_of_its_values_and_what_goes_may_become_another_value() -> None:
    labels = np.zeros((9, 5, 5), np.uint8)
    labels[:6, 1:4, 1:4] = 1
    labels[1:3, 2, 2] = 2
    labels[4, 2, 2] = 2
    core = apply_rules(labels, [KeepLargest(classes=("core",), becomes=1)], NESTED, MM)
    assert (core[1:3, 2, 2] == 2).all()
    assert core[4, 2, 2] == 1
    # Around the core the whole has no hole: the core is a part of it.
    np.testing.assert_array_equal(apply_rules(labels, [FillHoles(classes=("whole",))], NESTED, MM), labels)
    labels[2, 2, 2] = 0
    assert apply_rules(labels, [FillHoles(classes=("whole",))], NESTED, MM)[2, 2, 2] == 1


def test_an_absent_class_and_a_lone_voxel_change_nothing() -> None:
    rules = [KeepLargest(classes=("low",)), FillHoles(classes=("low",)), DropSmall(classes=("low",), min_ml=0.001)]
    for labels in (np.zeros((4, 4, 4), np.uint8), np.full((1, 1, 1), 7, np.uint8)):
        np.testing.assert_array_equal(apply_rules(labels, rules, SCHEMA, MM), labels)


def test_rules_that_do_not_fit_the_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="liver"):
        apply_rules(np.zeros((2, 2, 2), np.uint8), [KeepLargest(classes=("liver",))], SCHEMA, MM)
