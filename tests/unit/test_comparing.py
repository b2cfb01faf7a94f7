"""Which candidate is chosen, and by which numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.inference import Member
from autoseg.evaluation.comparing import choose_candidate, compare_all
from autoseg.evaluation.metrics import case_metrics
from autoseg.evaluation.selection import Candidate
from autoseg.evaluation.summaries import CaseMetrics, summarise
from autoseg.pipeline.candidates import learned_weight

ONE = LabelSchema(classes=(LabelClass(name="it", values=(1,)),))
NUM = 16


def cases_with(overlaps: np.ndarray) -> tuple[CaseMetrics, ...]:
    """Cases in which so many of 40 voxels are right and none is wrong."""
    found = []
    for number, count in enumerate(overlaps):
        reference, prediction = (np.zeros((60, 3, 3), np.uint8) for _ in range(2))
        reference[:40, 1, 1], prediction[: int(count), 1, 1] = 1, 1
        rows = case_metrics(prediction, reference, ONE, (1.0, 1.0, 1.0), {"it": 1.0})
        found.append(CaseMetrics(case=f"case {number:02d}", classes=rows))
    return tuple(found)


def dice(overlaps: np.ndarray) -> np.ndarray:
    return 2 * overlaps / (overlaps + 40)


def candidate(name: str, cases: tuple[CaseMetrics, ...]) -> Candidate:
    members = tuple(Member(configuration=one) for one in name.split(" + "))
    score = summarise(cases, ("it",)).mean_foreground_dice
    return Candidate(name=name, members=members, mean_foreground_dice=score)


@pytest.fixture
def found():
    rng = np.random.default_rng(0)
    low = rng.integers(20, 30, NUM)
    overlaps = {"2d": low, "3d": low + rng.integers(0, 3, NUM), "2d + 3d": low + rng.integers(3, 9, NUM)}
    return overlaps, {name: cases_with(item) for name, item in overlaps.items()}


def test_a_pair_is_taken_where_it_is_clearly_better(found) -> None:
    _, cases = found
    comparisons = compare_all(cases, ("it",), {})
    chosen, reason = choose_candidate([candidate(name, item) for name, item in cases.items()], comparisons)
    assert chosen.name == "2d + 3d"
    assert "clearly more than 3d alone" in reason


def test_a_pair_is_left_where_the_gain_may_be_an_accident(found) -> None:
    overlaps, _ = found
    noise = np.where(np.arange(NUM) % 2 == 0, 2, -1)
    cases = {"3d": cases_with(overlaps["3d"]), "2d + 3d": cases_with(overlaps["3d"] + noise)}
    cases = {"2d": cases_with(overlaps["2d"]), **cases}
    candidates = [candidate(name, item) for name, item in cases.items()]
    assert candidates[2].mean_foreground_dice > candidates[1].mean_foreground_dice
    chosen, reason = choose_candidate(candidates, compare_all(cases, ("it",), {}))
    assert chosen.name == "3d"
    assert "not clearly more" in reason


def test_the_numbers_are_those_of_scipy_over_patients(found) -> None:
    overlaps, cases = found
    patients = {f"case {number:02d}": f"patient {number // 2}" for number in range(NUM)}
    rows = compare_all(cases, ("it",), patients)
    row = next(item for item in rows if (item.first, item.second, item.metric) == ("2d", "2d + 3d", "dice"))
    first, second = (dice(overlaps[name]).reshape(-1, 2).mean(1) for name in ("2d", "2d + 3d"))
    assert row.num_patients == NUM // 2
    assert row.p_value == pytest.approx(stats.wilcoxon(first, second).pvalue)
    assert row.difference == pytest.approx((first - second).mean())
    assert row.rank_biserial == -1.0
    assert row.interval.low < row.difference < row.interval.high < 0
    three = sorted(item.p_value for item in rows if item.metric == "dice" and item.class_name is None)
    adjusted = sorted(item.p_adjusted for item in rows if item.metric == "dice" and item.class_name is None)
    assert adjusted[0] == pytest.approx(min(1.0, 3 * three[0]))
    assert [item.metric for item in rows if item.class_name == "it"] == ["dice"] * 3
    assert len([item for item in rows if item.class_name is None]) == 3 * 3


def test_without_a_test_nothing_is_sure(found) -> None:
    _, cases = found
    candidates = [candidate(name, item) for name, item in cases.items()]
    untested = [item.model_copy(update={"p_value": None}) for item in compare_all(cases, ("it",), {})]
    assert choose_candidate(candidates, untested)[0].name == "3d"
    assert choose_candidate(candidates, ())[0].name == "3d"


def test_a_single_configuration_is_chosen_without_comparisons(found) -> None:
    _, cases = found
    chosen, reason = choose_candidate([candidate("2d", cases["2d"])], ())
    assert chosen.name == "2d"
    assert "only configuration" in reason


def test_a_learned_share_must_be_better_on_other_folds() -> None:
    """(cases, weights, classes): the third share is better everywhere, or only in one fold."""
    folds = np.arange(10) % 5
    everywhere = np.full((10, 5, 1), 0.8)
    everywhere[:, 2] = 0.85
    assert learned_weight(everywhere, folds) == (0.65, pytest.approx(0.85))
    once = np.full((10, 5, 1), 0.8)
    once[folds == 0, 2], once[folds != 0, 2] = 0.9, 0.79
    assert learned_weight(once, folds) == (0.5, None)
    assert learned_weight(np.full((10, 5, 1), np.nan), folds) == (0.5, None)
