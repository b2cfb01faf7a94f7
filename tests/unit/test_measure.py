"""Measurements of cases and their merging, against numpy on the pooled voxels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoseg.domain.fingerprint import CaseStats, Fingerprint
from autoseg.domain.geometry import Geometry, Volume
from autoseg.errors import DatasetError
from autoseg.preprocessing.measure import QUANTILE_LEVELS, measure_case, merge


def volume_of(array: NDArray[np.generic], affine: NDArray[np.float64] | None = None, is_2d: bool = False) -> Volume:
    i, j, k = array.shape[1:]
    return Volume(array, Geometry((i, j, k), np.eye(4) if affine is None else affine, is_2d=is_2d))


def case_of(values: NDArray[np.generic], case: str = "a") -> CaseStats:
    """A case whose foreground voxels are exactly `values`."""
    array = np.concatenate([np.asarray(values, np.float64), [1.0]])[None, :, None, None]
    labels = np.ones(array.shape[1:], np.int16)
    labels[-1] = 0
    return measure_case(volume_of(array), labels, case, 2)


def test_sketch_levels_ascend_and_hold_the_levels_that_plans_use() -> None:
    assert list(QUANTILE_LEVELS) == sorted(set(QUANTILE_LEVELS))
    assert {0.0, 0.005, 0.5, 0.995, 1.0} <= set(QUANTILE_LEVELS)
    assert np.allclose(np.asarray(QUANTILE_LEVELS) + np.asarray(QUANTILE_LEVELS)[::-1], 1.0)


def test_case_is_measured_in_canonical_z_y_x_order_after_cropping() -> None:
    array = np.zeros((1, 4, 6, 8), np.int16)
    array[0, 1:3, 1:6, 2:5] = 7
    labels = np.zeros((4, 6, 8), np.int16)
    labels[1, 1, 2:4] = 1
    labels[2, 2, 3] = 2
    labels[0, 0, 0] = -1
    # File axes I, J, K point to A, S, L with 2, 3 and 0.5 mm.
    affine = np.array([[0, 0, -0.5, 9], [2, 0, 0, 1], [0, 3, 0, 4], [0, 0, 0, 1]], float)
    found = measure_case(volume_of(array, affine), labels, "case", 4)
    assert found.spacing_mm == (3.0, 2.0, 0.5)
    assert found.shape_original == (6, 4, 8)
    assert found.shape == (5, 2, 3)
    assert found.relative_size_fraction == 30 / 192
    assert found.class_voxels == (2, 1, 0)
    assert found.intensities[0].count == 3
    assert (found.intensities[0].mean, found.intensities[0].std) == (7.0, 0.0)


def test_pictures_have_one_thick_slice() -> None:
    found = measure_case(volume_of(np.ones((3, 30, 20, 1), np.uint8), is_2d=True), np.ones((30, 20, 1), int), "p", 2)
    assert found.spacing_mm == (999.0, 1.0, 1.0)
    assert found.shape == (1, 20, 30)
    assert found.is_2d
    assert len(found.intensities) == 3


def test_foreground_outside_the_nonzero_box_counts_as_voxels_but_not_as_intensity() -> None:
    array = np.zeros((1, 10, 4, 4))
    array[0, :3] = 5.0
    labels = np.zeros((10, 4, 4), np.int16)
    labels[2:5, 0, 0] = 1
    found = measure_case(volume_of(array), labels, "case", 2)
    assert found.class_voxels == (3,)
    assert found.intensities[0].count == 1


def test_any_channel_keeps_a_voxel_and_an_empty_image_is_kept_whole() -> None:
    array = np.zeros((2, 8, 8, 8))
    labels = np.zeros((8, 8, 8), np.int16)
    assert measure_case(volume_of(array), labels, "empty", 2).shape == (8, 8, 8)
    array[0, 1, 1, 1] = array[1, 6, 5, 4] = -1
    assert measure_case(volume_of(array), labels, "two", 2).shape == (4, 5, 6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_labelled_voxels_must_be_finite(bad: float) -> None:
    array = np.ones((1, 4, 4, 4))
    array[0, 2, 2, 2] = bad
    labels = np.zeros((4, 4, 4), np.int16)
    measure_case(volume_of(array), labels, "fine where nothing is labelled", 2)
    labels[2, 2, 1:3] = 1
    with pytest.raises(DatasetError, match=r"case 7: channel 0 is NaN or infinite in 1 of 2 labelled voxels"):
        measure_case(volume_of(array), labels, "7", 2)


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(DatasetError, match=r"case 7: labels have shape \(4, 4, 5\), the image \(4, 4, 4\)"):
        measure_case(volume_of(np.ones((1, 4, 4, 4))), np.ones((4, 4, 5), int), "7", 2)


@settings(max_examples=25)
@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_pooled_statistics_equal_those_of_equally_many_draws_from_each_case(num_cases: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    voxels = 2000
    cases = [rng.gamma(2.0, 10 ** rng.uniform(0, 2), voxels) + rng.normal(0, 100) for _ in range(num_cases)]
    found = merge([case_of(values, str(index)) for index, values in enumerate(cases)], ["MRI"], 2).intensities[0]
    pooled = np.concatenate(cases)
    assert found.mean == pytest.approx(pooled.mean(), rel=1e-9)
    assert found.std == pytest.approx(pooled.std(), rel=1e-9)
    assert (found.minimum, found.maximum) == (pooled.min(), pooled.max())
    for level, value in ((0.005, found.percentile_00_5), (0.5, found.median), (0.995, found.percentile_99_5)):
        # The value splits the pooled voxels where it should, within what a sketch of one case resolves.
        assert (pooled <= value).mean() == pytest.approx(level, abs=0.001 if level != 0.5 else 0.01)


def test_every_case_counts_the_same_however_large() -> None:
    small, large = np.ones(10), np.full(1000, 11.0)
    found = merge([case_of(small, "a"), case_of(large, "b")], ["MRI"], 2).intensities[0]
    assert (found.mean, found.std) == (6.0, 5.0)
    assert (found.percentile_00_5, found.percentile_99_5) == (1.0, 11.0)


def test_merging_does_not_depend_on_the_order_and_round_trips() -> None:
    rng = np.random.default_rng(3)
    cases = [case_of(rng.normal(size=50), name) for name in "abcd"]
    merged = merge(cases, ["MRI"], 2)
    assert merge(cases[::-1], ["MRI"], 2) == merged
    assert Fingerprint.from_json(merged.to_json(), "fingerprint") == merged
    assert merged.digest() == merge(cases[::-1], ["MRI"], 2).digest()
    assert json.loads(merged.to_json())["num_training_cases"] == 4


def test_cases_without_foreground_count_for_shapes_only() -> None:
    empty = measure_case(volume_of(np.ones((1, 9, 9, 9))), np.zeros((9, 9, 9), int), "empty", 2)
    merged = merge([case_of(np.array([1.0, 3.0])), empty], ["MRI"], 2)
    assert merged.num_training_cases == 2
    assert merged.intensities[0].mean == 2.0
    with pytest.raises(DatasetError, match="none of the 1 cases has a labelled voxel"):
        merge([empty], ["MRI"], 2)


def test_missing_channels_are_named_all_at_once() -> None:
    cases = [case_of(np.ones(3), name) for name in "ab"]
    with pytest.raises(DatasetError, match=r"cases do not have 2 channels \(T1, T2\)\n  - a: 1\n  - b: 1"):
        merge(cases, ["T1", "T2"], 2)
    with pytest.raises(DatasetError, match="no case"):
        merge([], ["T1"], 2)
