"""Rules found on made-up predictions, and their effect against the rules as prediction applies them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry
from autoseg.domain.inference import DropSmall, FillHoles, KeepLargest
from autoseg.evaluation.components import components_of
from autoseg.evaluation.counts import LabelTable
from autoseg.evaluation.crossval import evaluate_cases
from autoseg.evaluation.postprocess import apply_rules
from autoseg.evaluation.rules_search import Predicted, RuleSearch
from autoseg.io.images import read_labels, write_labels

ORGANS = LabelSchema(classes=(LabelClass(name="organ", values=(2,)), LabelClass(name="spots", values=(5,))))
REGIONS = LabelSchema(classes=(LabelClass(name="whole", values=(1, 2)), LabelClass(name="core", values=(2,))))
SPACING = (1.0, 2.0, 3.0)
GRID = Geometry((16, 12, 10), np.diag([*SPACING, 1.0]))
NUM_CASES = 8


def truth(number: int) -> np.ndarray:
    """An organ, and two spots apart from each other."""
    out = np.zeros(GRID.shape, np.uint8)
    out[2 : 8 + number % 3, 2:8, 2:6] = 2
    out[12:14, 1:3, 1:3] = out[12:14, 8:10, 6:8] = 5
    return out


def with_islands(number: int) -> np.ndarray:
    """Islands of the organ, and a hole in it; both spots as they are."""
    out = truth(number)
    out[14, 5, 5] = out[11 + number % 2, 10, 8] = 2
    out[5, 4, 4] = 0
    return out


def write_cases(folder: Path, predict) -> list[Predicted]:
    cases = []
    for number in range(NUM_CASES):
        paths = [folder / kind / f"case_{number}.nii.gz" for kind in ("predicted", "true")]
        for path, labels in zip(paths, (predict(number), truth(number)), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_labels(path, labels, GRID)
        cases.append(Predicted(f"case_{number}", *paths))
    return cases


def dice_after(cases: list[Predicted], rules, folder: Path, schema: LabelSchema = ORGANS) -> float:
    """Mean foreground Dice of the label maps that `apply_rules` gives."""
    pairs = []
    for case in cases:
        labels, geometry = read_labels(case.prediction, None)
        path = folder / "after" / f"{case.case}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_labels(path, apply_rules(labels, rules, schema, geometry.spacing_mm), geometry)
        pairs.append((case.case, path, case.reference))
    mean = evaluate_cases(pairs, schema, 1.0).summary.mean_foreground_dice
    assert mean is not None
    return mean


def test_islands_and_holes_are_found_and_two_spots_are_left_alone(tmp_path: Path) -> None:
    cases = write_cases(tmp_path, with_islands)
    found = RuleSearch(cases, ORGANS, {}).run()
    assert [(type(rule), rule.classes) for rule in found.rules] == [
        (KeepLargest, ("organ",)),
        (FillHoles, ("organ",)),
    ]
    joined = next(item for item in found.tried if item.rule.classes == ("organ", "spots"))
    assert not joined.is_kept  # spots would go
    kept = [item for item in found.tried if item.is_kept]
    assert kept[0].dice_after == pytest.approx(dice_after(cases, found.rules[:1], tmp_path))
    assert kept[1].dice_after == pytest.approx(dice_after(cases, found.rules, tmp_path)) == 1.0
    assert kept[0].interval.low > 0
    assert kept[0].class_gains["spots"] == 0.0
    lone = [item for item in found.tried if item.rule.classes == ("spots",)]
    assert not any(item.is_kept for item in lone)


def test_small_components_are_dropped_where_several_large_ones_stay(tmp_path: Path) -> None:
    def predict(number: int) -> np.ndarray:
        out = truth(number)
        for place in range(4 + number % 2):
            out[15, 2 * place, 9] = 5
        return out

    cases = write_cases(tmp_path, predict)
    found = RuleSearch(cases, ORGANS, {}).run()
    assert len(found.rules) == 1
    (rule,) = found.rules
    # Either keeps the two spots; both are right, and nothing is left for the other.
    assert rule == KeepLargest(classes=("spots",), count=2) or isinstance(rule, DropSmall)
    assert dice_after(cases, found.rules, tmp_path) == 1.0


def test_a_gain_of_few_patients_is_not_kept(tmp_path: Path) -> None:
    """One case of eight with islands: some resamples do not draw it, so the interval reaches 0."""
    cases = write_cases(tmp_path, lambda number: with_islands(number) if number == 3 else truth(number))
    found = RuleSearch(cases, ORGANS, {}).run()
    assert found.rules == ()
    tried = next(item for item in found.tried if item.rule == KeepLargest(classes=("organ",)))
    assert tried.dice_after > tried.dice_before
    assert "interval" in tried.reason
    together = RuleSearch(cases, ORGANS, dict.fromkeys((case.case for case in cases), "one patient")).run()
    assert all("too few patients" in item.reason for item in together.tried if item.dice_after > item.dice_before)


def test_a_rule_that_costs_a_class_is_not_kept(tmp_path: Path) -> None:
    """Where two spots are true, keeping one costs the class, whatever the organ gains."""

    def predict(number: int) -> np.ndarray:
        out = truth(number)
        out[14, 5, 5] = out[14, 9, 9] = 5
        return out

    found = RuleSearch(write_cases(tmp_path, predict), ORGANS, {}).run()
    assert KeepLargest(classes=("spots",), count=1) not in found.rules


@pytest.mark.parametrize("schema", [ORGANS, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("seed", range(4))
def test_counts_without_components_are_those_of_the_applied_rule(schema: LabelSchema, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.array([0, *schema.label_values], np.uint8)  # background twice as often
    prediction, reference = (values[rng.integers(0, len(values), (9, 8, 7))] for _ in range(2))
    table = LabelTable(schema)
    actual = table.encode_reference(reference)
    before = table.count(actual, table.encode(prediction))
    rules = [
        KeepLargest(classes=schema.names[:1]),
        KeepLargest(classes=schema.names[1:], count=3),
        DropSmall(classes=schema.names[1:], min_ml=0.02),
        KeepLargest(classes=schema.names, joined=True),
    ]
    for rule in rules:
        components = components_of(rule.classes, prediction, actual, schema, table)
        leaving = components.leaving(rule, float(np.prod(SPACING)) / 1000)
        after = apply_rules(prediction, (rule,), schema, SPACING)
        expected = table.count(actual, table.encode(after))
        np.testing.assert_array_equal(components.without(leaving, before), expected)


def test_nothing_predicted_and_nothing_to_do(tmp_path: Path) -> None:
    found = RuleSearch(write_cases(tmp_path, lambda _: np.zeros(GRID.shape, np.uint8)), ORGANS, {}).run()
    assert (found.rules, found.tried) == ((), ())
    perfect = RuleSearch(write_cases(tmp_path / "perfect", truth), ORGANS, {}).run()
    assert perfect.rules == ()
