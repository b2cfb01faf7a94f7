"""`autoseg check --repair`: exit codes, what is printed, and that the copy can be planned."""

import json
from pathlib import Path

import numpy as np
import pytest

from autoseg.cli import main
from autoseg.domain.geometry import Geometry
from autoseg.io.images import write_image

GRID = Geometry((8, 8, 8), np.diag([-1.0, -1, 1, 1]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(5):
        labels = np.zeros(GRID.shape, np.float32)
        labels[2:5, 2:5, 2:5] = 4
        image = np.random.default_rng(number).normal(size=GRID.shape)
        write_image(tmp_path / f"set/imagesTr/c{number}_0000.nii.gz", image, GRID)
        write_image(tmp_path / f"set/labelsTr/c{number}.nii.gz", labels, GRID)
    described = {"name": "toy", "channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 4}}
    (tmp_path / "set/dataset.json").write_text(json.dumps(described))
    return tmp_path / "set"


def test_a_repaired_copy_is_checked_and_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "fixed"
    assert main(["check", str(folder), "--repair", str(out)]) == 0
    said = capsys.readouterr().out
    for words in ("5 cases: 0 files unchanged", "10 files repaired", "Nothing stops training", "LPS", "repairs.md"):
        assert words in said.replace("\n", " ")
    assert main(["plan", str(out), "--out", str(folder.parent / "run")]) == 0
    plan = json.loads((folder.parent / "run/plan.json").read_text())
    assert plan["labels"]["classes"] == [{"name": "a", "values": [1]}]


def test_what_stays_wrong_exits_3_and_json_is_of_the_copy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(folder / "labelsTr/c1.nii.gz", np.full(GRID.shape, 9, np.uint8), GRID)
    out = folder.parent / "fixed"
    assert main(["check", str(folder), "--repair", str(out), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["dataset"] == str(out)
    assert [item["code"] for item in report["findings"] if item["severity"] == "error"] == ["undeclared-labels"]
    assert main(["check", str(folder), "--repair", str(folder.parent / "again")]) == 3
    assert "Not repaired" in capsys.readouterr().out


def test_what_a_repair_may_do_needs_a_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder), "--resample-labels"]) == 2
    assert "--repair OUT" in capsys.readouterr().err
    assert main(["check", str(folder), "--repair", str(folder)]) == 2


def test_folds_edited_by_hand_are_kept_and_their_leaks_stop_planning_and_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(described | {"patients": {"c0": "P", "c1": "P"}}))
    run = folder.parent / "run"
    plan = ["plan", str(folder), "--out", str(run)]
    assert main(plan) == 0
    assert "by patient" in json.loads((run / "splits.json").read_text())["rule"]
    edited = {"schema_version": 1, "rule": "mine", "folds": [{"train": ["c2", "c3"], "validation": ["c0", "c1"]}]}
    (run / "splits.json").write_text(json.dumps(edited))
    assert main(plan) == 0
    assert json.loads((run / "splits.json").read_text()) == edited
    edited["folds"] = [{"train": ["c0", "c2"], "validation": ["c1", "c7"]}]
    (run / "splits.json").write_text(json.dumps(edited))
    for command in (plan, ["train", str(run), "--epochs", "1"]):
        capsys.readouterr()
        assert main(command) == 3
        said = capsys.readouterr().err
        assert "fold 0 names 1 case not in the data set: c7" in said
        assert "same patient: P (c0 and c1)" in said
    assert json.loads((run / "splits.json").read_text()) == edited
