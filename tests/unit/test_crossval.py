"""Summaries of metrics: who counts where, values worked out by hand, and folders compared by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError
from autoseg.evaluation.crossval import Evaluation, default_tolerance_mm, evaluate_cases, table
from autoseg.evaluation.folders import evaluate_folder
from autoseg.io.images import write_labels

SCHEMA = LabelSchema(classes=(LabelClass(name="big", values=(1,)), LabelClass(name="rare", values=(2,))))
GRID = Geometry((12, 10, 8), np.diag([1.0, 1.0, 2.0, 1.0]))


def label_map(big: int, rare: int = 0) -> np.ndarray:
    """`big` and `rare` voxels along one line each."""
    out = np.zeros(GRID.shape, np.uint8)
    out[:big, 2, 3] = 1
    out[:rare, 7, 3] = 2
    return out


def write(path: Path, labels: np.ndarray, geometry: Geometry = GRID) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(path, labels, geometry)
    return path


@pytest.fixture
def pairs(tmp_path: Path):
    """Dice of `big`: 1, 0.5 and 1; of `rare`: absent, missed, falsely predicted."""
    content = {
        "a": (label_map(4), label_map(4)),
        "b": (label_map(2), label_map(6, 3)),
        "c": (label_map(4, 5), label_map(4)),
    }
    return [
        (
            case,
            write(tmp_path / "predicted" / f"{case}.nii.gz", predicted),
            write(tmp_path / "true" / f"{case}.nii.gz", true),
        )
        for case, (predicted, true) in content.items()
    ]


def test_means_are_over_the_cases_that_contain_the_class(pairs) -> None:
    evaluation = evaluate_cases(reversed(pairs), SCHEMA, 1.0, workers=2)
    big, rare = evaluation.summary.classes
    assert big.metric("dice").mean == pytest.approx((1 + 0.5 + 1) / 3)
    assert (big.num_present, big.num_missed, big.num_absent) == (3, 0, 0)
    assert (rare.num_present, rare.num_missed, rare.num_absent, rare.num_spurious) == (1, 1, 2, 1)
    assert rare.metric("dice").mean == 0.0
    assert (rare.metric("hd95_mm").mean, rare.metric("hd95_mm").num_undefined) == (None, 1)
    assert evaluation.summary.mean_foreground_dice == pytest.approx((2.5 / 3 + 0) / 2)
    assert [case.case for case in evaluation.cases] == ["a", "b", "c"]
    assert [case.mean_dice for case in evaluation.cases] == [1.0, 0.25, 1.0]


def test_round_trip_through_json_without_nan(pairs) -> None:
    evaluation = evaluate_cases(pairs, SCHEMA, {"big": 1.0, "rare": 3.0})
    text = json.dumps(evaluation.model_dump(mode="json"), allow_nan=False)
    assert Evaluation.model_validate_json(text) == evaluation
    assert evaluation.tolerance_mm == {"big": 1.0, "rare": 3.0}


def test_the_table_says_what_is_undefined(pairs) -> None:
    header, rows = table(evaluate_cases(pairs, SCHEMA, 1.0))
    assert len(header) == len(rows[0])
    assert rows[1][0] == "rare"
    assert rows[1][4] == "–"
    assert rows[1][-1] == "1 of 2"


def test_every_problem_is_listed_and_the_other_cases_still_run(pairs, tmp_path: Path) -> None:
    undeclared = write(tmp_path / "undeclared.nii.gz", np.full(GRID.shape, 9, np.uint8))
    other_grid = write(tmp_path / "other.nii.gz", np.zeros((5, 5, 5), np.uint8), Geometry((5, 5, 5), np.eye(4)))
    broken = [
        ("d", undeclared, pairs[0][2]),
        ("e", other_grid, pairs[0][2]),
        ("f", tmp_path / "no.nii.gz", pairs[0][2]),
    ]
    with pytest.raises(DatasetError) as caught:
        evaluate_cases([*pairs, *broken], SCHEMA, 1.0)
    assert [text[0] for text in caught.value.problems] == ["d", "e", "f"]
    assert "[9]" in caught.value.problems[0]


def test_every_class_needs_a_tolerance(pairs) -> None:
    with pytest.raises(DatasetError, match="rare"):
        evaluate_cases(pairs, SCHEMA, {"big": 1.0})
    with pytest.raises(DatasetError, match="-1"):
        evaluate_cases(pairs, SCHEMA, -1.0)


def test_the_default_tolerance_ignores_axes_of_one_voxel() -> None:
    assert default_tolerance_mm([(1.0, 1.0, 3.0), (0.5, 0.5, 5.0), (1.0, 4.0, 1.0)], [(9, 9, 9)] * 3) == 4.0
    assert default_tolerance_mm([(999.0, 0.5, 0.25)], [(1, 64, 64)]) == 0.5
    assert default_tolerance_mm([(2.0, 1.0, 1.0)], [(1, 1, 1)]) == 2.0


def test_folders_are_paired_by_stem_and_named_by_the_data_set_above(pairs, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "MRI"}, "labels": {"background": 0, "big": 1, "rare": 2}, "numTraining": 3})
    )
    (tmp_path / "predicted" / "notes.txt").write_text("not a label map")
    (tmp_path / "predicted" / "c.nii.gz").unlink()
    write(tmp_path / "predicted" / "a.nrrd", label_map(4))
    (tmp_path / "predicted" / "a.nii.gz").unlink()
    evaluation = evaluate_folder(tmp_path / "predicted", tmp_path / "true")
    assert evaluation.labels.names == ("big", "rare")
    assert evaluation.tolerance_mm == {"big": 2.0, "rare": 2.0}
    assert [case.case for case in evaluation.cases] == ["a", "b"]
    assert evaluation.not_predicted == ("c",)


def test_without_a_data_set_the_values_name_the_classes(pairs, tmp_path: Path) -> None:
    evaluation = evaluate_folder(tmp_path / "predicted", tmp_path / "true", tolerance_mm=1.0)
    assert evaluation.labels.names == ("label 1", "label 2")
    one = evaluate_folder(pairs[1][1], pairs[1][2])
    assert [case.mean_dice for case in one.cases] == [0.25]


def test_two_files_are_compared_whatever_their_names(pairs) -> None:
    evaluation = evaluate_folder(pairs[0][1], pairs[1][2])
    assert [case.case for case in evaluation.cases] == ["a"]


def test_predictions_without_a_reference_are_listed(pairs, tmp_path: Path) -> None:
    write(tmp_path / "predicted" / "stranger.nii.gz", label_map(1))
    with pytest.raises(DatasetError, match="1 of 4") as caught:
        evaluate_folder(tmp_path / "predicted", tmp_path / "true")
    assert caught.value.problems == ("stranger",)


def test_names_that_differ_only_in_their_ending_are_refused(pairs, tmp_path: Path) -> None:
    write(tmp_path / "predicted" / "a.nrrd", label_map(4))
    with pytest.raises(DatasetError, match="only in their ending"):
        evaluate_folder(tmp_path / "predicted", tmp_path / "true")


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_nothing_to_compare(name: str, pairs, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=name):
        evaluate_folder(tmp_path / name, tmp_path / "true")


def test_a_class_counts_only_in_cases_that_were_annotated_for_it(tmp_path: Path) -> None:
    """Neither as absent nor as a false alarm, whatever was predicted there."""
    geometry = Geometry((8, 8, 8), np.eye(4))
    schema = LabelSchema(classes=(LabelClass(name="a", values=(1,)), LabelClass(name="b", values=(2,))))
    pairs = []
    for case, is_hidden in (("x", False), ("y", True)):
        reference = np.zeros((8, 8, 8), np.uint8)
        reference[:2], reference[4:6] = 1, 0 if is_hidden else 2
        prediction = np.zeros_like(reference)
        prediction[:2], prediction[4:7] = 1, 2
        for kind, labels in (("p", prediction), ("r", reference)):
            write_labels(tmp_path / f"{case}{kind}.nii.gz", labels, geometry)
        pairs.append((case, tmp_path / f"{case}p.nii.gz", tmp_path / f"{case}r.nii.gz"))
    found = evaluate_cases(pairs, schema, 1.0, annotated={"y": ("a",)})
    a, b = found.summary.classes
    assert (a.num_present, a.num_unannotated) == (2, 0)
    assert (b.num_present, b.num_absent, b.num_spurious, b.num_unannotated) == (1, 0, 0, 1)
    assert b.metric("dice").mean == pytest.approx(2 * 128 / (128 + 192))
    assert found.cases[1].classes[1].presence == "unannotated"
    assert found.cases[1].classes[1].dice is None
    assert Evaluation.from_json(found.to_json(), "here") == found
    naive = evaluate_cases(pairs, schema, 1.0).summary.classes[1]
    assert (naive.num_absent, naive.num_spurious) == (1, 1)
