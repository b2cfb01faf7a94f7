"""Intervals and tests over patients: laws, values worked out by hand, SciPy as the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from autoseg.evaluation.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Bootstrap,
    holm,
    interval_of,
    mean_of_means,
    paired_test,
    patient_means,
    patient_numbers,
)

IDS = tuple(f"case {number}" for number in range(30))
ALONE: dict[str, str] = {}


def values(num: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.8, 0.1, (num, 1))


def test_the_interval_agrees_with_scipy() -> None:
    sample = values()
    (own,) = Bootstrap.of(IDS, ALONE).intervals(sample)
    theirs = stats.bootstrap(
        (sample[:, 0],), np.mean, confidence_level=CONFIDENCE, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    # Both are draws: their ends differ by a fraction of the standard error.
    tolerance = 0.2 * sample.std() / np.sqrt(len(sample))
    assert own is not None
    assert (own.low, own.high) == pytest.approx((theirs.low, theirs.high), abs=tolerance)
    assert own.low < sample.mean() < own.high


def test_the_same_cases_give_the_same_interval() -> None:
    first, second = (Bootstrap.of(IDS, ALONE).intervals(values()) for _ in range(2))
    assert first == second


def test_cases_of_a_patient_are_drawn_together() -> None:
    """Every case four times, as of one patient: nothing new is known, so the interval stays as wide."""
    sample = np.repeat(values(8), 4, axis=0)
    ids = (*IDS, "case 30", "case 31")
    patients = {case: f"patient {number // 4}" for number, case in enumerate(ids)}
    (by_patient,) = Bootstrap.of(ids, patients).intervals(sample)
    (once,) = Bootstrap.of(IDS[:8], ALONE).intervals(sample[::4])
    (by_case,) = Bootstrap.of(ids, ALONE).intervals(sample)
    assert by_patient == once
    assert by_case is not None
    assert by_patient is not None
    assert (by_case.high - by_case.low) < 0.7 * (by_patient.high - by_patient.low)


def test_a_patient_is_never_mistaken_for_a_case_of_that_name() -> None:
    assert patient_numbers(["a", "b", "c"], {"a": "b"}).tolist() == [0, 1, 2]
    assert patient_numbers(["a", "b", "c"], {"a": "p", "c": "p"}).tolist() == [0, 1, 0]


def test_undefined_values_do_not_count() -> None:
    sample = values()
    sample[7:] = np.nan
    bootstrap = Bootstrap.of(IDS, ALONE)
    means = bootstrap.means(sample)
    drawn = bootstrap.counts[:, :7]
    some = drawn.sum(axis=1) > 0
    expected = (drawn @ sample[:7, 0])[some] / drawn.sum(axis=1)[some]
    np.testing.assert_allclose(means[some, 0], expected)
    assert np.isnan(means[~some]).all()
    sample[1:] = np.nan
    assert bootstrap.intervals(sample) == (None,)


def test_no_cases_and_equal_values() -> None:
    assert Bootstrap.of((), ALONE).intervals(np.zeros((0, 2))) == (None, None)
    (same,) = Bootstrap.of(IDS, ALONE).intervals(np.full((30, 1), 0.5))
    assert same is not None
    assert (same.low, same.high) == pytest.approx((0.5, 0.5))


def test_the_mean_over_classes_takes_those_that_were_drawn() -> None:
    means = np.array([[0.5, 1.0], [np.nan, 1.0], [np.nan, np.nan]])
    assert mean_of_means(means).tolist()[:2] == [0.75, 1.0]
    assert interval_of(mean_of_means(means)).high == pytest.approx(1.0, abs=0.01)  # type: ignore[union-attr]
    assert len(Bootstrap.of(IDS, ALONE).counts) == NUM_RESAMPLES


def test_the_paired_test_is_wilcoxons_with_the_rank_biserial_correlation() -> None:
    first = np.array([0.9, 0.8, 0.7, 0.6, 0.5, np.nan, 0.4])
    second = np.array([0.8, 0.6, 0.4, 0.65, 0.5, 0.3, 0.4])
    found = paired_test(first, second)
    # Differences 0.1, 0.2, 0.3, -0.05: ranks 2, 3, 4 up and 1 down; two pairs are equal, one is undefined.
    assert found.num_pairs == 6
    assert found.rank_biserial == pytest.approx((9 - 1) / 10)
    assert found.p_value == pytest.approx(stats.wilcoxon([0.1, 0.2, 0.3, -0.05]).pvalue)
    back = paired_test(second, first)
    assert (back.p_value, back.rank_biserial) == (found.p_value, pytest.approx(-0.8))


def test_pairs_without_a_difference_and_no_pairs() -> None:
    same = np.array([0.5, 0.6])
    assert (paired_test(same, same).p_value, paired_test(same, same).rank_biserial) == (1.0, 0.0)
    none = paired_test(np.array([np.nan]), np.array([1.0]))
    assert (none.p_value, none.rank_biserial, none.num_pairs) == (None, None, 0)


def test_means_of_patients() -> None:
    found = patient_means(np.array([1.0, 0.0, np.nan, np.nan, 0.5]), np.array([0, 0, 0, 1, 2]))
    np.testing.assert_array_equal(found, [0.5, np.nan, 0.5])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.5, 0.6]) == pytest.approx((1.0, 1.0))
    assert holm([]) == ()
