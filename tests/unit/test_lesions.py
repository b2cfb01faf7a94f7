"""Lesions: values worked out by hand, laws, and another library's components."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import measure

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.evaluation.lesions import Lesions, count_lesions
from autoseg.evaluation.metrics import ClassMetrics, case_metrics

ONE = LabelSchema(classes=(LabelClass(name="it", values=(1,)),))
NUM_PAIRS = 15


def row_of(predicted: np.ndarray, actual: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> ClassMetrics:
    maps = [np.asarray(item).astype(np.uint8) for item in (predicted, actual)]
    return case_metrics(maps[0], maps[1], ONE, spacing, {"it": 1.0})[0]


def lines(*ranges: tuple[int, int]) -> np.ndarray:
    """Bars along one axis, each on a line of its own, two voxels apart."""
    out = np.zeros((24, 20, 5), np.bool_)
    for place, (start, stop) in enumerate(ranges):
        out[start:stop, 2 * place, 2] = True
    return out


def test_a_tenth_of_a_lesion_is_enough_to_find_it() -> None:
    actual = lines((0, 20), (0, 20), (0, 20))
    predicted = lines((18, 22), (19, 22), (0, 0))
    found = count_lesions(predicted, actual)
    # 2 of 20 voxels are found, 1 of 20 are not; both predicted bars are covered by more than a tenth.
    assert found == Lesions(reference=3, found=1, predicted=2, true=2)
    assert (found.precision, found.recall, found.f1) == (1.0, pytest.approx(1 / 3), pytest.approx(0.5))


def test_exactly_a_tenth_counts_whatever_the_size() -> None:
    """In floating point, 0.1 · 30 is more than 3."""
    for tenth in range(1, 8):
        actual, predicted = np.zeros((10 * tenth, 1, 1), np.bool_), np.zeros((10 * tenth, 1, 1), np.bool_)
        actual[:], predicted[:tenth] = True, True
        assert count_lesions(predicted, actual).found == 1


def test_voxels_that_meet_at_a_corner_are_one_lesion() -> None:
    mask = np.zeros((4, 4, 4), np.bool_)
    mask[1, 1, 1] = mask[2, 2, 2] = True
    assert count_lesions(mask, mask).reference == 1
    mask[2, 2, 2], mask[3, 3, 3] = False, True
    assert count_lesions(mask, mask).reference == 2


def test_one_large_prediction_may_find_several() -> None:
    actual = lines((0, 3), (0, 3), (0, 3))
    predicted = np.zeros_like(actual)
    predicted[:3, :6, 2] = True
    assert count_lesions(predicted, actual) == Lesions(reference=3, found=3, predicted=1, true=1)


@pytest.mark.parametrize(
    ("predicted", "actual", "expected"),
    [
        (True, True, (1.0, 1.0, 1.0)),
        (False, True, (None, 0.0, 0.0)),
        (True, False, (0.0, None, 0.0)),
        (False, False, (None, None, None)),
    ],
)
def test_empty_maps(predicted: bool, actual: bool, expected: tuple[float | None, ...]) -> None:
    bar = lines((2, 8))
    row = row_of(bar & predicted, bar & actual)
    assert (row.lesion_precision, row.lesion_recall, row.lesion_f1) == expected
    assert (row.predicted_lesions, row.reference_lesions) == (int(predicted), int(actual))


@pytest.mark.parametrize(
    ("predicted", "actual", "error", "relative"),
    [
        ((0, 4), (0, 8), -24.0, -0.5),
        ((0, 0), (0, 8), -48.0, -1.0),
        ((0, 4), (0, 0), 24.0, None),
        ((0, 0),) * 2 + (None,) * 2,
    ],
)
def test_volume_errors_are_signed(predicted, actual, error: float | None, relative: float | None) -> None:
    row = row_of(lines(predicted), lines(actual), (1.0, 2.0, 3.0))
    assert (row.volume_error_mm3, row.relative_volume_error) == (error, relative)


@pytest.mark.parametrize("seed", range(NUM_PAIRS))
def test_equal_to_another_implementation_and_exchangeable(seed: int) -> None:
    """skimage's components, compared one by one."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(5, 12, 3))
    predicted, actual = (rng.random(shape) < rng.uniform(0.02, 0.25) for _ in range(2))
    found = count_lesions(predicted, actual)
    sides = []
    for mask, other in ((actual, predicted), (predicted, actual)):
        parts = measure.label(mask, connectivity=3)
        covered = [bool(other[parts == number].mean() >= 0.1) for number in range(1, parts.max() + 1)]
        sides += [len(covered), sum(covered)]
    assert found == Lesions(*sides)
    swapped = count_lesions(actual, predicted)
    assert (swapped.precision, swapped.recall, swapped.f1) == (found.recall, found.precision, found.f1)
