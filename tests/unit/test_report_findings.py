"""Findings in words: each trouble is named, the costliest first, and nothing is named where nothing is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import SCHEMA, make_run

from autoseg.domain.fingerprint import CaseStats
from autoseg.domain.inference import InferenceRecipe, Member
from autoseg.evaluation.metrics import ClassMetrics
from autoseg.evaluation.selection import CaseConfidence, Selection
from autoseg.evaluation.statistics import StatisticsRecord
from autoseg.evaluation.summaries import CaseMetrics, summarise
from autoseg.report.collect import CaseRow, ConfigurationResult, Curve, FoldResult, RunResults, collect
from autoseg.report.findings import MIN_LABEL_GAIN, find, outliers
from autoseg.report.shorts import in_short
from autoseg.report.tally import agreement, tally
from autoseg.training.records import EpochRecord

NUM_CASES = 30
VOXELS = 1000


def metrics(name: str, dice: float | None, volume_ratio: float = 1.0, presence: str = "both") -> ClassMetrics:
    return ClassMetrics(
        name=name,
        presence=presence,
        dice=dice,
        iou=dice,
        surface_dice=dice,
        hd95_mm=1.0 if presence == "both" else None,
        average_distance_mm=0.3 if presence == "both" else None,
        reference_mm3=0.0 if presence in ("spurious", "absent") else float(VOXELS),
        prediction_mm3=0.0 if presence in ("missed", "absent") else VOXELS * volume_ratio,
        reference_vox=0 if presence in ("spurious", "absent") else VOXELS,
        prediction_vox=0 if presence in ("missed", "absent") else round(VOXELS * volume_ratio),
        overlap_vox=0,
    )


def case(number: int, **changes: ClassMetrics) -> CaseMetrics:
    """A case in which both classes are well, except for what is given."""
    usual = 0.9 + 0.01 * np.sin(number)
    rows = [changes.get(name, metrics(name, usual)) for name in SCHEMA.names]
    return CaseMetrics(case=f"case_{number:02d}", classes=tuple(rows))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    return collect(make_run(tmp_path_factory.mktemp("findings"), num_cases=2, configurations=("3d_fullres",)))


def results_of(base: RunResults, cases: list[CaseMetrics], **update: object) -> RunResults:
    """A run of which these are the held-out cases."""
    fold = FoldResult(
        fold=0, num_cases=len(cases), mean_foreground_dice=None, class_dice={}, predict_s=None, training=None
    )
    one = ConfigurationResult(name="3d_fullres", folds=(fold,), summary=summarise(cases, SCHEMA.names))
    summary = base.summary.model_copy(
        update={"configurations": (one,), "best": "3d_fullres", "num_cases": len(cases), **update}
    )
    rows = tuple(CaseRow("3d_fullres", 0, item, Path("none")) for item in cases)
    return RunResults(base.dataset, base.plan, base.fingerprint, summary, rows, ())


def test_nothing_is_found_where_nothing_is_wrong(base: RunResults) -> None:
    assert find(results_of(base, [case(number) for number in range(NUM_CASES)])) == ()


def test_a_case_far_below_its_class_is_a_suspect_label(base: RunResults) -> None:
    cases = [case(number) for number in range(NUM_CASES)]
    cases[7] = case(7, Anterior=metrics("Anterior", 0.3))
    cases[9] = case(9, Anterior=metrics("Anterior", 0.5))
    (found,) = find(results_of(base, cases))
    assert (found.kind, found.cases) == ("labels", ("case_07", "case_09"))
    assert "case_07 (Anterior 0.30, median 0.90)" in found.text
    # Both cases at the median would give so much more mean foreground Dice.
    assert found.gain == pytest.approx((0.6 + 0.4) / NUM_CASES / 2, abs=0.001)


def test_near_perfect_classes_have_no_outliers_by_a_hair(base: RunResults) -> None:
    cases = [case(number, Anterior=metrics("Anterior", 0.999)) for number in range(NUM_CASES)]
    cases[3] = case(3, Anterior=metrics("Anterior", 0.95))
    (anterior, _) = tally(results_of(base, cases).cases, SCHEMA.names)
    assert outliers(anterior) == ()


def test_a_miss_and_a_false_alarm_are_told_as_such(base: RunResults) -> None:
    cases = [case(number) for number in range(NUM_CASES)]
    cases[4] = case(4, Posterior=metrics("Posterior", 0.0, presence="missed"))
    cases[5] = case(5, Posterior=metrics("Posterior", 0.0, presence="spurious"))
    (found,) = find(results_of(base, cases))
    assert (found.kind, found.about, found.cases) == ("detection", "Posterior", ("case_04",))
    assert "missed in 1 of 29 cases and it was predicted in 1 of 1 cases without it" in found.text


def test_a_rare_class_asks_for_labels(base: RunResults) -> None:
    absent = metrics("Posterior", None, presence="absent")
    cases = [case(number, **({"Posterior": absent} if number > 2 else {})) for number in range(NUM_CASES)]
    cases[:3] = [case(number, Posterior=metrics("Posterior", 0.6)) for number in range(3)]
    (found,) = find(results_of(base, cases))
    assert (found.kind, found.about) == ("rare", "Posterior")
    assert found.text.startswith("Only 3 of 30 cases contain Posterior; its mean Dice is 0.600.")


def test_the_weakest_class_is_named_with_a_reason(base: RunResults) -> None:
    spread = np.linspace(0.5, 0.8, NUM_CASES)
    cases = [case(number, Posterior=metrics("Posterior", float(spread[number]))) for number in range(NUM_CASES)]
    results = results_of(base, cases)
    (found,) = find(results)
    assert (found.kind, found.about) == ("class", "Posterior")
    assert found.cases[0] == "case_00"
    answers = {item.question: item for item in in_short(results)}
    assert answers["Which class is worst, and why?"].answer.startswith("Posterior, mean Dice 0.650 in 30 cases: ")
    assert answers["Which cases to look at?"].cases[0] == "case_00"


def test_volumes_that_lean_to_one_side_are_told_but_not_scatter(base: RunResults) -> None:
    leaning = [case(number, Anterior=metrics("Anterior", 0.9, 0.85)) for number in range(NUM_CASES)]
    (found,) = find(results_of(base, leaning))
    assert (found.kind, found.title) == ("volume", "Mind that Anterior is predicted too small")
    assert "15% too small" in found.text
    scatter = [
        case(number, Anterior=metrics("Anterior", 0.9, 1.5 if number % 2 else 0.6)) for number in range(NUM_CASES)
    ]
    assert find(results_of(base, scatter)) == ()


def test_bland_and_altmans_figures(base: RunResults) -> None:
    ratios = [1.1, 0.9, 1.2, 1.0]
    cases = [case(number, Anterior=metrics("Anterior", 0.9, ratio)) for number, ratio in enumerate(ratios)]
    (anterior, _) = tally(results_of(base, cases).cases, SCHEMA.names)
    found = agreement(anterior)
    spread = 1.96 * np.std([100, -100, 200, 0], ddof=1)
    assert (found.bias, found.low, found.high) == pytest.approx((50.0, 50 - spread, 50 + spread))
    assert found.relative_bias == pytest.approx(0.05)


def test_images_with_strange_spacings_are_named(base: RunResults) -> None:
    cases = [case(number) for number in range(NUM_CASES)]
    cases[2] = case(2, Anterior=metrics("Anterior", 0.85), Posterior=metrics("Posterior", 0.85))
    results = results_of(base, cases)
    stats = tuple(
        CaseStats(
            case=item.case,
            spacing_mm=(5.0, 1.0, 1.0) if number == 2 else (1.0, 1.0, 1.0),
            shape_original=(9, 9, 9),
            shape=(9, 9, 9),
            relative_size_fraction=1.0,
            class_voxels=(1, 1),
            intensities=(),
        )
        for number, item in enumerate(cases)
    )
    fingerprint = results.fingerprint.model_copy(update={"cases": stats})
    (found,) = find(dataclasses.replace(results, fingerprint=fingerprint))
    assert (found.kind, found.cases) == ("spacing", ("case_02",))
    assert "case_02 (5 × 1 × 1 mm)" in found.text
    assert "Their mean Dice is 0.850" in found.text


@pytest.mark.parametrize(("slope", "kinds"), [(0.03, ["training"]), (0.0, [])])
def test_a_training_that_still_rose_is_told(base: RunResults, slope: float, kinds: list[str]) -> None:
    results = results_of(base, [case(number) for number in range(NUM_CASES)])
    epochs = tuple(
        EpochRecord(
            epoch=number,
            step=number,
            seconds=float(number),
            seconds_per_step=1.0,
            learning_rate=0.01,
            train_loss=0.0,
            mean_pseudo_dice=0.5 + slope * number / 4,
        )
        for number in range(40)
    )
    curves = (Curve("3d_fullres", 0, epochs),)
    found = find(dataclasses.replace(results, curves=curves))
    assert [item.kind for item in found] == kinds
    if kinds:
        assert found[0].gain == pytest.approx(slope)


def test_folds_that_are_missing_are_told(base: RunResults) -> None:
    (found,) = find(results_of(base, [case(number) for number in range(12)], num_cases=60))
    assert found.kind == "folds"
    assert "12 of 60 labelled cases" in found.text


def test_confident_errors_make_a_label_the_first_suspect(base: RunResults) -> None:
    cases = [case(number) for number in range(NUM_CASES)]
    plain = results_of(base, cases)
    whole = plain.summary.configurations[0].summary
    members = (Member(configuration="3d_fullres"),)
    selection = Selection(
        inputs_digest="0",
        statistics=StatisticsRecord(num_patients=NUM_CASES),
        num_cases=NUM_CASES,
        candidates=(),
        comparisons=(),
        choice="3d_fullres",
        reason="it is the only one",
        recipe=InferenceRecipe(members=members),
        chosen=whole,
        final=whole,
        confidences=tuple(
            CaseConfidence(
                case=item.case,
                mean_entropy=0.1,
                expected_dice={},
                sure_errors_fraction=0.5 if item.case == "case_11" else 0.02,
            )
            for item in cases
        ),
    )
    (found,) = find(results_of(base, cases, selection=selection))
    assert (found.kind, found.cases, found.gain) == ("labels", ("case_11",), MIN_LABEL_GAIN)
    assert "sure of case_11" in found.text


def test_the_costliest_comes_first_and_a_class_has_one_finding(base: RunResults) -> None:
    cases = [case(number, Anterior=metrics("Anterior", 0.4 + 0.01 * number)) for number in range(NUM_CASES)]
    for number in (3, 4):
        cases[number] = case(number, Anterior=metrics("Anterior", 0.0, presence="missed"))
    cases[9] = case(9, Posterior=metrics("Posterior", 0.6), Anterior=metrics("Anterior", 0.5))
    found = find(results_of(base, cases))
    assert [(item.kind, item.about) for item in found] == [("class", "Anterior"), ("labels", "")]
    assert [item.gain for item in found] == sorted((item.gain for item in found), reverse=True)
    assert "it was missed altogether in 2 of 30 cases" in found[0].text.replace("It was", "it was")
