"""The doctor finds every defect at once, each with its case and file, and never stops at a broken file."""

import json
from pathlib import Path

import numpy as np
import pytest

from autoseg.checking.contents import count_values
from autoseg.checking.doctor import check_dataset
from autoseg.domain.geometry import Geometry
from autoseg.io.images import write_image
from autoseg.runtime import NoProgress

SHAPE = (14, 12, 8)
GRID = Geometry(SHAPE, np.diag([1.0, 1, 2, 1]))


class Recorder:
    def __init__(self) -> None:
        self.said: list[tuple[object, ...]] = []

    def start(self, description: str, total: int | None) -> None:
        self.said.append(("start", total))

    def advance(self, step: int = 1, note: str = "") -> None:
        self.said.append(("advance", step))

    def finish(self, note: str = "") -> None:
        self.said.append(("finish",))


def image_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE)


def labels_of(*values: int, place: int = 0) -> np.ndarray:
    """A block of 80 voxels for each value; `place`, 0 to 6, sets the label maps of cases apart."""
    labels = np.zeros(SHAPE, np.int16)
    for index, value in enumerate(values):
        labels[1 + 4 * index : 5 + 4 * index, place : place + 5, 1:5] = value
    return labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        write_image(tmp_path / f"imagesTr/c{number}_0000.nii.gz", image_of(number), GRID)
        write_image(tmp_path / f"labelsTr/c{number}.nii.gz", labels_of(1, 2, place=number), GRID)
    (tmp_path / "dataset.json").write_text(
        json.dumps({"name": "toy", "channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": 2}})
    )
    return tmp_path


def test_a_clean_set_has_no_findings(folder: Path) -> None:
    progress = Recorder()
    report = check_dataset(folder, workers=2, progress=progress)
    assert report.findings == ()
    assert not report.stops_training
    assert (report.num_cases, report.num_files) == (6, 12)
    assert report.headline() == "toy: 6 cases, 12 files read; nothing wrong was found."
    assert progress.said == [("start", 6), *[("advance", 1)] * 6, ("finish",)]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_defect_is_found_at_once(folder: Path, workers: int) -> None:
    nan = image_of(0)
    nan[0, 0, :2] = np.nan, np.inf
    write_image(folder / "imagesTr/c0_0000.nii.gz", nan, GRID)
    write_image(folder / "labelsTr/c1.nii.gz", labels_of(1, 7, 9), GRID)
    write_image(folder / "labelsTr/c2.nii.gz", labels_of(1)[:, :, :7], Geometry((14, 12, 7), GRID.affine))
    write_image(folder / "labelsTr/c3.nii.gz", labels_of(1) * 0.5, GRID)
    (folder / "imagesTr/c4_0000.nii.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "labelsTr/c5.nii.gz").unlink()
    (folder / "imagesTr/c6_0000.nii.gz").write_bytes((folder / "imagesTr/c5_0000.nii.gz").read_bytes())
    write_image(folder / "labelsTr/c6.nii.gz", labels_of(1), Geometry(SHAPE, GRID.affine + _shift(0.7)))
    write_image(folder / "imagesTr/c7_0000.nii.gz", np.ones((2, *SHAPE)), GRID)
    write_image(folder / "labelsTr/c7.nii.gz", labels_of(2), GRID)
    report = check_dataset(folder, workers=workers, progress=NoProgress())
    assert [(item.severity, item.case, item.code) for item in report.findings] == [
        ("error", "c0", "not-finite"),
        ("error", "c1", "undeclared-labels"),
        ("error", "c2", "label-grid"),
        ("error", "c3", "probability-map"),
        ("error", "c4", "unreadable-image"),
        ("error", "c5", "missing-label"),
        ("error", "c6", "label-grid"),
        ("error", "c7", "unreadable-image"),
        ("warning", "", "rare-class"),
    ]
    text = {item.case: str(item) for item in report.findings}
    assert "2 of 1,344 voxels" in text["c0"]
    assert "7 (80 voxels), 9 (80 voxels); declared are 0, 1, 2" in text["c1"]
    assert "14×12×7 against 14×12×8" in text["c2"]
    assert "Git LFS pointer" in text["c4"]
    assert "0.7 mm apart" in text["c6"]
    assert "expected 1 channel in this file, got 2" in text["c7"]
    assert all(item.file in str(item) for item in report.findings)
    assert report.stops_training
    assert "8 errors, 1 warning. Training is stopped" in report.headline()


def _shift(distance: float) -> np.ndarray:
    shift = np.zeros((4, 4))
    shift[1, 3] = distance
    return shift


def test_channels_on_other_grids_are_found(folder: Path) -> None:
    description = {"channel_names": {"0": "A", "1": "B"}, "labels": {"background": 0, "a": 1, "b": 2}}
    (folder / "dataset.json").write_text(json.dumps(description))
    for number in range(6):
        grid = Geometry(SHAPE, GRID.affine + _shift(0.0 if number else 3.0))
        write_image(folder / f"imagesTr/c{number}_0001.nii.gz", image_of(90 + number), grid)
    report = check_dataset(folder, workers=2, progress=NoProgress())
    assert [(item.case, item.code) for item in report.findings] == [("c0", "channel-grid")]
    assert "3 mm apart" in report.findings[0].message


def test_what_is_odd_but_stops_nothing(folder: Path) -> None:
    write_image(folder / "imagesTr/c0_0000.nii.gz", np.full(SHAPE, 7), GRID)
    for number in range(6):
        write_image(folder / f"labelsTr/c{number}.nii.gz", labels_of(1, place=number), GRID)
    write_image(folder / "labelsTr/c1.nii.gz", labels_of(), GRID)
    write_image(folder / "labelsTr/c2.nii.gz", labels_of(1, place=2).astype(np.float32), GRID)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(0.75), -np.sin(0.75)], [np.sin(0.75), np.cos(0.75)]]
    write_image(folder / "imagesTr/c3_0000.nii.gz", image_of(3), Geometry(SHAPE, turned))
    write_image(folder / "labelsTr/c3.nii.gz", labels_of(1, place=3), Geometry(SHAPE, turned))
    report = check_dataset(folder, workers=2, progress=NoProgress())
    assert [(item.severity, item.case, item.code) for item in report.findings] == [
        ("warning", "", "class-never-occurs"),
        ("warning", "c0", "constant-image"),
        ("warning", "c1", "empty-labels"),
        ("warning", "c3", "oblique"),
        ("note", "c2", "float-labels"),
    ]
    assert "'b' (value 2)" in report.findings[0].message
    assert "43 degrees" in report.findings[3].message
    assert not report.stops_training


def test_a_set_that_is_none_is_one_finding(tmp_path: Path) -> None:
    report = check_dataset(tmp_path, workers=2, progress=NoProgress())
    assert [item.code for item in report.findings] == ["no-description"]
    assert report.stops_training
    assert type(report).from_json(report.to_json(), "here") == report


@pytest.mark.parametrize("offset", [0, -3, 70000])
def test_values_are_counted(offset: int) -> None:
    labels = np.random.default_rng(1).integers(0, 4, (5, 6, 7)) + offset
    values, counts = np.unique(labels, return_counts=True)
    assert count_values(labels) == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_what_contradicts_the_annotated_classes_is_found(folder: Path) -> None:
    """And a map that holds nothing but background and voxels to ignore is empty."""
    labels = {"background": 0, "a": 1, "b": 2, "ignore": 9}
    description = {
        "name": "toy",
        "channel_names": {"0": "MR"},
        "labels": labels,
        "annotated": {"c1": ["a"], "c2": ["a"]},
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    write_image(folder / "labelsTr/c2.nii.gz", labels_of(1), GRID)
    write_image(folder / "labelsTr/c3.nii.gz", labels_of(9), GRID)
    found = check_dataset(folder, workers=1, progress=Recorder()).findings
    assert {(item.code, item.case) for item in found} == {
        ("stray-labels", "c1"),
        ("empty-labels", "c3"),
        ("rare-class", ""),
    }
    messages = {item.code: item.message for item in found}
    assert messages["stray-labels"].endswith("in its label map: b (80 voxels)")
    assert "voxels to ignore" in messages["empty-labels"]
