"""A repaired copy: every repair does what it says, nothing else changes, and the original is never touched."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.checking import repair as repair_module
from autoseg.checking import repair_writing
from autoseg.checking.doctor import check_dataset
from autoseg.checking.repair import repair_dataset
from autoseg.checking.repair_description import kept_splits
from autoseg.checking.repair_rules import consecutive_values, mapped_schema
from autoseg.checking.repairs import Ledger, RepairSettings
from autoseg.domain.dataset import Fold, Splits
from autoseg.domain.geometry import Geometry
from autoseg.domain.layouts import load_dataset, resolve_dataset
from autoseg.errors import ConfigError, DatasetError
from autoseg.io.files import Lock
from autoseg.io.images import read_image, read_labels, write_image
from autoseg.runtime import NoProgress

SHAPE = (6, 5, 4)
GRID = Geometry(SHAPE, np.array([[1.5, 0, 0, -7], [0, 1, 0, 3], [0, 0, 2, 11], [0, 0, 0, 1]]))
LABELS = {"background": 0, "a": 1, "b": 3}


def image_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def labels_of(*values: int, kind: Any = np.uint8) -> np.ndarray:
    labels = np.zeros(SHAPE, kind)
    for index, value in enumerate(values):
        labels[index, 1:3, 1:3] = value
    return labels


def describe(folder: Path, channels: int = 1, **more: Any) -> None:
    names = {str(number): f"ch{number}" for number in range(channels)}
    (folder / "dataset.json").write_text(json.dumps({"name": "toy", "channel_names": names, "labels": LABELS} | more))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cases on an RAS grid, with labels without gaps."""
    source = tmp_path / "set"
    for number in range(2):
        write_image(source / f"imagesTr/c{number}_0000.nii.gz", image_of(number), GRID)
        write_image(source / f"labelsTr/c{number}.nii.gz", labels_of(1, 2), GRID)
    describe(source, labels={"background": 0, "a": 1, "b": 2})
    return source


def repaired(source: Path, out: Path | None = None, **settings: bool) -> tuple[Ledger, Path]:
    root = source if source.is_dir() else source.parent
    out = out or root.with_name("fixed")
    before = {item: (item.stat().st_mtime_ns, item.read_bytes()) for item in root.rglob("*") if item.is_file()}
    ledger = repair_dataset(source, out, RepairSettings(**settings), workers=2, progress=NoProgress())
    assert {item: (item.stat().st_mtime_ns, item.read_bytes()) for item in before} == before
    assert Ledger.from_json((out / "repairs.json").read_text(), "here") == ledger
    return ledger, out


def errors_of(out: Path) -> list[tuple[str, str]]:
    report = check_dataset(out, workers=1, progress=NoProgress())
    return [(item.case, item.code) for item in report.findings if item.severity == "error"]


def kinds(ledger: Ledger) -> list[tuple[str, str]]:
    return [(item.file, item.kind) for item in ledger.repairs]


def test_nothing_to_repair_is_all_hard_links(folder: Path) -> None:
    ledger, out = repaired(folder)
    assert (ledger.repairs, ledger.set_aside, ledger.left_wrong, ledger.label_values) == ((), (), (), ())
    assert (ledger.num_cases, ledger.num_linked, ledger.num_copied, ledger.num_written) == (2, 4, 0, 0)
    for name in ("imagesTr/c0_0000.nii.gz", "labelsTr/c1.nii.gz"):
        assert (out / name).stat().st_ino == (folder / name).stat().st_ino
    assert load_dataset(out).labels == load_dataset(folder).labels
    assert sorted(item.name for item in out.iterdir()) == [
        "dataset.json",
        "imagesTr",
        "labelsTr",
        "repairs.json",
        "repairs.md",
    ]


def everything_wrong(folder: Path) -> None:
    """Gaps, floats, another orientation, a header that is off, a 4D file, an empty, a broken and a lonely case."""
    describe(folder, channels=2, reference="kept", numTraining=7, patients={"c0": "P", "gone": "Q"})
    turned = Geometry((4, 6, 5), GRID.affine[:, [2, 0, 1, 3]] * [-1, 1, 1, 1])
    for number in range(6):
        for channel in range(2):
            write_image(folder / f"imagesTr/c{number}_000{channel}.nii.gz", image_of(number + 10 * channel), GRID)
        write_image(folder / f"labelsTr/c{number}.nii.gz", labels_of(1, 3), GRID)
    write_image(folder / "labelsTr/c0.nii.gz", labels_of(1, 3, kind=np.float32), GRID)
    for channel in range(2):
        write_image(folder / f"imagesTr/c1_000{channel}.nii.gz", np.ones(turned.shape, np.int16) + channel, turned)
    write_image(folder / "labelsTr/c1.nii.gz", labels_of(1).transpose(2, 0, 1), turned)
    write_image(folder / "labelsTr/c2.nii.gz", labels_of(1), Geometry(SHAPE, GRID.affine + shift(0.3)))
    write_image(folder / "labelsTr/c3.nii.gz", labels_of(), GRID)
    (folder / "imagesTr/c4_0001.nii.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "labelsTr/c5.nii.gz").unlink()


def shift(distance: float) -> np.ndarray:
    out = np.zeros((4, 4))
    out[1, 3] = distance
    return out


def test_everything_at_once_then_nothing_more(folder: Path) -> None:
    everything_wrong(folder)
    ledger, out = repaired(folder)
    assert errors_of(out) == []
    assert [(item.case, item.files) for item in ledger.set_aside] == [
        (
            "c3",
            tuple(
                f"set_aside/c3/{n}"
                for n in ("imagesTr/c3_0000.nii.gz", "imagesTr/c3_0001.nii.gz", "labelsTr/c3.nii.gz")
            ),
        ),
        (
            "c4",
            tuple(
                f"set_aside/c4/{n}"
                for n in ("imagesTr/c4_0000.nii.gz", "imagesTr/c4_0001.nii.gz", "labelsTr/c4.nii.gz")
            ),
        ),
        ("c5", ("set_aside/c5/imagesTr/c5_0000.nii.gz",)),
    ]
    assert all((out / file).is_file() for item in ledger.set_aside for file in item.files)
    assert "background only" in ledger.set_aside[0].reason
    assert "Git LFS pointer" in ledger.set_aside[1].reason
    assert kinds(ledger) == [
        ("labelsTr/c0.nii.gz", "label-type"),
        ("labelsTr/c0.nii.gz", "label-values"),
        ("imagesTr/c1_0000.nii.gz", "orientation"),
        ("imagesTr/c1_0001.nii.gz", "orientation"),
        ("labelsTr/c1.nii.gz", "orientation"),
        ("labelsTr/c2.nii.gz", "header"),
    ]
    assert [(item.name, item.original, item.now) for item in ledger.label_values] == [("a", 1, 1), ("b", 3, 2)]
    described = json.loads((out / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "a": 1, "b": 2}
    assert (described["reference"], described["numTraining"], described["patients"]) == ("kept", 3, {"c0": "P"})
    text = (out / "repairs.md").read_text()
    for word in ("| b | 3 | 2 |", "background only", "up to 0.3 voxels off", str(folder)):
        assert word in text

    again, twice = repaired(out, out.with_name("twice"))
    assert (again.repairs, again.set_aside, again.left_wrong, again.label_values) == ((), (), (), ())
    assert again.num_written == 0
    for item in (*out.glob("*Tr/*"), out / "dataset.json"):
        other = twice / item.relative_to(out)
        assert other.read_bytes() == item.read_bytes()
        assert item.name == "dataset.json" or other.stat().st_ino == item.stat().st_ino


@pytest.mark.parametrize(("values", "kind"), [((1, 3), np.uint8), ((1, 700), np.uint16)])
def test_float_labels_become_integers(folder: Path, values: tuple[int, int], kind: type) -> None:
    describe(folder, labels={"background": 0, "a": values[0], "b": values[1]})
    noisy = labels_of(*values, kind=np.float32)
    noisy[noisy > 0] += 2e-4
    for number in range(2):
        write_image(folder / f"labelsTr/c{number}.nii.gz", noisy, GRID)
    ledger, out = repaired(folder, keep_values=True)
    stored = nib.load(out / "labelsTr/c0.nii.gz")
    assert stored.get_data_dtype() == kind
    np.testing.assert_array_equal(np.asanyarray(stored.dataobj), labels_of(*values, kind=kind))
    assert [item.after for item in ledger.repairs] == [np.dtype(kind).name] * 2
    assert ledger.label_values == ()


def test_values_that_nobody_declared_are_not_guessed_and_stop_the_mapping(folder: Path) -> None:
    describe(folder)
    for number, values in enumerate(((1, 3), (1, 2))):  # 2 would be taken for b once 3 has become 2
        write_image(folder / f"labelsTr/c{number}.nii.gz", labels_of(*values), GRID)
    ledger, out = repaired(folder)
    assert ledger.repairs == ()
    assert [(item.case, item.file) for item in ledger.left_wrong] == [("", ""), ("c1", "labelsTr/c1.nii.gz")]
    assert "first c1" in ledger.left_wrong[0].what
    assert errors_of(out) == [("c1", "undeclared-labels")]
    assert json.loads((out / "dataset.json").read_text())["labels"] == LABELS


@pytest.mark.parametrize(
    ("distance", "what"), [(5e-4, "same"), (0.04, "header"), (0.49, "header"), (0.51, "left"), (30.0, "left")]
)
def test_headers_are_harmonised_below_half_a_voxel(folder: Path, distance: float, what: str) -> None:
    off = Geometry(SHAPE, GRID.affine + shift(distance))
    write_image(folder / "labelsTr/c0.nii.gz", labels_of(1, 2), off)
    ledger, out = repaired(folder)
    grid = read_labels(out / "labelsTr/c0.nii.gz")[1]
    assert [item.kind for item in ledger.repairs] == (["header"] if what == "header" else [])
    assert [item.case for item in ledger.left_wrong] == (["c0"] if what == "left" else [])
    assert errors_of(out) == ([("c0", "label-grid")] if what == "left" else [])
    np.testing.assert_allclose(grid.affine, GRID.affine if what == "header" else off.affine, atol=1e-6)
    np.testing.assert_array_equal(read_labels(out / "labelsTr/c0.nii.gz")[0], labels_of(1, 2))


def test_channels_get_the_header_of_the_first_or_are_left(folder: Path) -> None:
    describe(folder, channels=2, labels={"background": 0, "a": 1, "b": 2})
    for number, distance in enumerate((0.2, 2.0)):
        off = Geometry(SHAPE, GRID.affine + shift(distance))
        write_image(folder / f"imagesTr/c{number}_0001.nii.gz", image_of(5), off)
    ledger, out = repaired(folder)
    assert kinds(ledger) == [("imagesTr/c0_0001.nii.gz", "header")]
    assert [(item.case, item.file) for item in ledger.left_wrong] == [("c1", "imagesTr/c1_0001.nii.gz")]
    np.testing.assert_array_equal(read_image(out / "imagesTr/c0_0001.nii.gz").array[0], image_of(5))
    assert errors_of(out) == [("c1", "channel-grid")]


@pytest.mark.parametrize("code", ["LPS", "PSR", "ILA", "SAL"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_reordering_moves_no_voxel_in_the_world(tmp_path: Path, code: str, ending: str) -> None:
    source = tmp_path / "set"
    rotation = np.array([[np.cos(0.2), -np.sin(0.2), 0], [np.sin(0.2), np.cos(0.2), 0], [0, 0, 1]])
    directions = {"L": (-1, 0, 0), "R": (1, 0, 0), "P": (0, -1, 0), "A": (0, 1, 0), "I": (0, 0, -1), "S": (0, 0, 1)}
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.array([directions[letter] for letter in code]).T * [1.5, 1, 2]
    affine[:3, 3] = (5, -6, 7)
    grid = Geometry(SHAPE, affine)
    image = np.arange(120, dtype=np.int16).reshape(SHAPE)
    labels = (image == 77).astype(np.uint8) + 2 * (image == 3).astype(np.uint8)
    write_image(source / f"imagesTr/c_0000{ending}", image, grid)
    write_image(source / f"labelsTr/c{ending}", labels, grid)
    describe(source, labels={"background": 0, "a": 1, "b": 2})
    ledger, out = repaired(source)
    assert [(item.before, item.after) for item in ledger.repairs] == [(code, "RAS")] * 2
    volume = read_image(out / f"imagesTr/c_0000{ending}")
    new_labels, label_grid = read_labels(out / f"labelsTr/c{ending}", volume.geometry)
    assert volume.array.dtype == np.int16
    for value in (0, 3, 77, 119):
        old, new = np.argwhere(image == value)[0], np.argwhere(volume.array[0] == value)[0]
        np.testing.assert_allclose(volume.geometry.affine @ [*new, 1], affine @ [*old, 1], atol=1e-4)
    np.testing.assert_array_equal(volume.array[0][new_labels == 1], [77])
    np.testing.assert_array_equal(volume.array[0][new_labels == 2], [3])
    assert np.argmax(np.abs(label_grid.affine[:3, :3]), axis=0).tolist() == [0, 1, 2]
    assert (np.diag(label_grid.affine)[:3] > 0).all()
    assert errors_of(out) == []
    assert repaired(source, tmp_path / "kept", keep_orientation=True)[0].repairs == ()


def scaled_nifti(path: Path, stored: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(stored, affine)
    image.header["descrip"] = b"made by hand"
    image.header.set_dim_info(0, 1, 2)
    image.header.set_slope_inter(0.5, -1024)
    image.set_qform(affine @ np.diag([1, 1, 1, 1]), 1)
    image.set_sform(affine, 2)
    nib.save(image, path)


def test_4d_files_are_split_as_they_are_stored(folder: Path) -> None:
    affine = np.diag([-2.0, 1, 3, 1])
    stored = np.random.default_rng(0).integers(-999, 999, (*SHAPE, 3)).astype(np.int16)
    for number in range(2):
        (folder / f"imagesTr/c{number}_0000.nii.gz").unlink()
        scaled_nifti(folder / f"imagesTr/c{number}.nii.gz", stored, affine)
        write_image(folder / f"labelsTr/c{number}.nii.gz", labels_of(1, 2), Geometry(SHAPE, affine))
    describe(folder, channels=3, labels={"background": 0, "a": 1, "b": 2})
    ledger, out = repaired(folder)
    for channel in range(3):
        image = nib.load(out / f"imagesTr/c0_000{channel}.nii.gz")
        np.testing.assert_array_equal(np.asanyarray(image.dataobj.get_unscaled()), stored[::-1, :, :, channel])
        assert image.get_data_dtype() == np.int16
        assert (image.dataobj.slope, image.dataobj.inter) == (0.5, -1024)
        assert bytes(image.header["descrip"]).startswith(b"made by hand")
        assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 2)
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-5)
        np.testing.assert_allclose(image.affine, np.array([[2, 0, 0, -10], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]))
    assert [item.kind for item in ledger.repairs if item.file == "imagesTr/c1_0002.nii.gz"] == [
        "channels",
        "orientation",
    ]
    assert load_dataset(out).cases[0].images[2].endswith("c0_0002.nii.gz")
    assert errors_of(out) == []


def test_labels_resampled_equal_simpleitks_nearest(folder: Path) -> None:
    fine = np.diag([0.7, 0.6, 0.9, 1.0])
    fine[:3, 3] = (-6.4, 2.7, 10.3)
    labels = np.random.default_rng(3).integers(0, 3, (14, 9, 8)).astype(np.uint8)
    write_image(folder / "labelsTr/c0.nii.gz", labels, Geometry(labels.shape, fine))
    left, _ = repaired(folder)
    assert [item.case for item in left.left_wrong] == ["c0"]
    ledger, out = repaired(folder, folder.with_name("asked"), resample_labels=True)
    assert kinds(ledger) == [("labelsTr/c0.nii.gz", "resampled")]
    assert errors_of(out) == []
    expected = sitk.Resample(
        sitk.ReadImage(str(folder / "labelsTr/c0.nii.gz")),
        sitk.ReadImage(str(folder / "imagesTr/c0_0000.nii.gz")),
        sitk.Transform(),
        sitk.sitkNearestNeighbor,
        0,
    )
    found, grid = read_labels(out / "labelsTr/c0.nii.gz")
    np.testing.assert_array_equal(found, sitk.GetArrayFromImage(expected).T)
    np.testing.assert_allclose(grid.affine, GRID.affine, atol=1e-6)
    assert len(np.unique(found)) == 3


def test_labels_that_hardly_overlap_are_set_aside(folder: Path) -> None:
    away = GRID.affine.copy()
    away[0, 3] += 0.6 * 6 * 1.5
    write_image(folder / "labelsTr/c0.nii.gz", labels_of(1, 2), Geometry(SHAPE, away))
    ledger, out = repaired(folder, resample_labels=True)
    assert [item.case for item in ledger.set_aside] == ["c0"]
    assert "33% only" in ledger.set_aside[0].reason
    assert [case.id for case in load_dataset(out).cases] == ["c1"]


def test_not_finite_voxels_are_replaced_only_when_asked(folder: Path) -> None:
    image = image_of(0)
    image[0, 0, :2] = np.nan, np.inf
    write_image(folder / "imagesTr/c0_0000.nii.gz", image, GRID)
    ledger, out = repaired(folder)
    assert [(item.case, item.file) for item in ledger.left_wrong] == [("c0", "imagesTr/c0_0000.nii.gz")]
    assert errors_of(out) == [("c0", "not-finite")]
    ledger, out = repaired(folder, folder.with_name("asked"), replace_non_finite=True)
    assert kinds(ledger) == [("imagesTr/c0_0000.nii.gz", "not-finite")]
    lowest = image[np.isfinite(image)].min()
    expected = np.where(np.isfinite(image), image, lowest)
    np.testing.assert_array_equal(read_image(out / "imagesTr/c0_0000.nii.gz").array[0], expected)
    assert errors_of(out) == []


def test_empty_cases_may_be_kept(folder: Path) -> None:
    write_image(folder / "labelsTr/c0.nii.gz", labels_of(), GRID)
    assert repaired(folder)[0].num_cases == 1
    assert repaired(folder, folder.with_name("kept"), keep_empty=True)[0].num_cases == 2


def test_pictures_keep_their_colours_and_detached_headers_get_their_voxels(tmp_path: Path) -> None:
    source = tmp_path / "set"
    flat = Geometry((7, 5, 1), np.eye(4), is_2d=True)
    colours = np.random.default_rng(0).integers(0, 255, (3, 7, 5, 1)).astype(np.uint8)
    write_image(source / "imagesTr/p_0000.png", colours, flat)
    cells = np.zeros((7, 5, 1), np.uint8)
    cells[2:4] = 255
    write_image(source / "labelsTr/p.png", cells, flat)
    describe(source, channels=3, labels={"background": 0, "cell": 255})
    ledger, out = repaired(source)
    assert kinds(ledger) == [("labelsTr/p.png", "label-values")]
    assert (out / "imagesTr/p_0000.png").stat().st_ino == (source / "imagesTr/p_0000.png").stat().st_ino
    np.testing.assert_array_equal(read_labels(out / "labelsTr/p.png")[0], cells // 255)
    assert errors_of(out) == []

    other = tmp_path / "detached"
    write_image(other / "imagesTr/d_0000.nhdr", image_of(1), GRID)
    write_image(other / "labelsTr/d.mhd", labels_of(1, 3), GRID)
    describe(other)
    ledger, out = repaired(other, tmp_path / "attached", keep_values=True)
    assert kinds(ledger) == [("imagesTr/d_0000.nrrd", "format"), ("labelsTr/d.mha", "format")]
    np.testing.assert_array_equal(read_image(out / "imagesTr/d_0000.nrrd").array[0], image_of(1))
    np.testing.assert_array_equal(read_labels(out / "labelsTr/d.mha")[0], labels_of(1, 3))


def test_regions_their_order_and_the_ignore_value_are_mapped_too(folder: Path) -> None:
    labels = {"background": 0, "whole": [2, 4, 9], "core": [9, 4], "ignore": 255}
    annotated = {"c1": ["core"]}
    describe(folder, labels=labels, regions_class_order=[2, 9], annotated=annotated)
    for number in range(2):
        write_image(folder / f"labelsTr/c{number}.nii.gz", labels_of(2, 4, 9, 255), GRID)
    schema = load_dataset(folder).labels
    assert consecutive_values(schema) == {2: 1, 4: 2, 9: 3, 255: 4}
    assert consecutive_values(mapped_schema(schema, consecutive_values(schema))) == {1: 1, 2: 2, 3: 3, 4: 4}
    _, out = repaired(folder)
    np.testing.assert_array_equal(read_labels(out / "labelsTr/c0.nii.gz")[0], labels_of(1, 2, 3, 4))
    dataset = load_dataset(out)
    assert [(item.name, item.values) for item in dataset.labels.classes] == [("whole", (1, 2, 3)), ("core", (3, 2))]
    assert (dataset.labels.ignore, dataset.labels.regions_class_order) == (4, (1, 3))
    assert [case.annotated for case in dataset.cases] == [None, ("core",)]


def test_missing_channels_and_declared_pairs_come_along(folder: Path) -> None:
    labels = {"background": 0, "a": 1, "b": 4}
    describe(folder, channels=3, labels=labels, missing_channels={"c0": [0], "t": [1]}, pairs=[["a", "b"]])
    (folder / "imagesTr/c0_0000.nii.gz").unlink()
    for name in ("Tr/c0_0001", "Tr/c0_0002", "Tr/c1_0001", "Tr/c1_0002", "Ts/t_0000", "Ts/t_0002"):
        write_image(folder / f"images{name}.nii.gz", image_of(5), GRID)
    for number in range(2):
        write_image(folder / f"labelsTr/c{number}.nii.gz", labels_of(1, 4), GRID)
    ledger, out = repaired(folder)
    assert {item.kind for item in ledger.repairs} == {"label-values"}
    before, after = load_dataset(folder), load_dataset(out)
    assert [case.missing for case in (*after.cases, *after.test_cases)] == [(0,), (), (1,)]
    assert [Path(file).name for file in after.cases[0].images] == ["c0_0001.nii.gz", "c0_0002.nii.gz"]
    assert after.channels == before.channels
    assert after.labels.pairs == (("a", "b"),)
    assert errors_of(out) == []


def test_patients_strata_folds_and_test_cases_come_along(tmp_path: Path) -> None:
    source = tmp_path / "files"
    cases: list[dict[str, Any]] = []
    for number in range(4):
        write_image(source / f"x/{number}.nii.gz", image_of(number), GRID)
        write_image(source / f"y/{number}.nii.gz", labels_of(2) if number else labels_of(), GRID)
        case = {
            "id": f"k{number}",
            "image": f"x/{number}.nii.gz",
            "labels": f"y/{number}.nii.gz",
            "patient": f"p{number}",
        }
        cases.append(case | {"strata": {"site": "AB"[number % 2]}})
    cases[3].pop("labels")
    manifest = source / "knees.json"
    labels = [{"name": "femur", "value": 2}]
    manifest.write_text(json.dumps({"name": "Knees", "channels": ["T1"], "labels": labels, "cases": cases}))
    folds = [{"train": ["k0", "k1"], "val": ["k2"]}, {"train": ["k0", "k2"], "val": ["k1"]}]
    (source / "splits_final.json").write_text(json.dumps(folds))
    ledger, out = repaired(manifest, tmp_path / "fixed")
    assert [item.case for item in ledger.set_aside] == ["k0"]
    dataset = load_dataset(out)
    assert (dataset.name, dataset.channels[0].name, dataset.labels.classes[0].values) == ("Knees", "T1", (1,))
    assert [(case.id, case.patient, case.strata) for case in dataset.cases] == [
        ("k1", "p1", {"site": "B"}),
        ("k2", "p2", {"site": "A"}),
    ]
    assert [case.id for case in dataset.test_cases] == ["k3"]
    assert dataset.splits is not None
    assert [(fold.train, fold.validation) for fold in dataset.splits.folds] == [(("k1",), ("k2",)), (("k2",), ("k1",))]
    assert kept_splits(Splits(rule="x", folds=(Fold(train=("a",), validation=("b",)),)), {"a"}) is None


def test_msd_becomes_nnunets_layout(tmp_path: Path) -> None:
    source = tmp_path / "set"
    for name in ("x_1", "x_2"):
        write_image(source / f"imagesTr/{name}.nii.gz", image_of(1), GRID)
        write_image(source / f"labelsTr/{name}.nii.gz", labels_of(1), GRID)
    write_image(source / "imagesTs/x_9.nii.gz", image_of(2), GRID)
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("x_1", "x_2")]
    described = {"name": "M", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}, "training": training}
    (source / "dataset.json").write_text(json.dumps(described | {"test": ["./imagesTs/x_9.nii.gz"], "licence": "CC0"}))
    ledger, out = repaired(source)
    assert (ledger.num_cases, ledger.num_test_cases, ledger.num_linked) == (2, 1, 5)
    assert json.loads((out / "dataset.json").read_text()) == {
        "name": "M",
        "labels": {"background": 0, "a": 1},
        "licence": "CC0",
        "channel_names": {"0": "CT"},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    assert [case.id for case in load_dataset(out).test_cases] == ["x_9"]


# --- Where to, and what if it goes wrong ------------------------------------------------------------------------------


def test_a_copy_never_goes_into_its_original_or_onto_anything(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, folder / "inside", tmp_path / "link" / "inside", folder.parent):
        with pytest.raises(ConfigError):
            repaired(folder, out)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty \(it holds thesis.txt\)"):
        repaired(folder, full)
    assert (full / "thesis.txt").read_text() == "mine"
    repaired(folder)
    with pytest.raises(ConfigError, match="not empty"):
        repaired(folder)


def test_an_interrupted_copy_is_no_data_set_and_is_started_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything_wrong(folder)
    whole = {item.name: item.read_bytes() for item in repaired(folder, folder.with_name("whole"))[1].glob("*Tr/*")}
    write, out = repair_module.write_file, folder.with_name("fixed")
    for last in ("labelsTr/c0.nii.gz", "imagesTr/c1_0001.nii.gz", "labelsTr/c2.nii.gz"):

        def stop(file: Any, root: Path, last: str = last) -> str:
            if file.target == last:
                raise KeyboardInterrupt
            return write(file, root)

        monkeypatch.setattr(repair_module, "write_file", stop)
        with pytest.raises(KeyboardInterrupt):
            repaired(folder)
        assert resolve_dataset(out)[0] is None
    monkeypatch.setattr(repair_module, "write_file", write)
    with pytest.raises(ConfigError, match="not empty"):
        repaired(out.with_name("whole"), out)  # of another data set
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds notes"):
        repaired(folder)
    (out / "notes.txt").unlink()
    repaired(folder)
    assert {item.name: item.read_bytes() for item in out.glob("*Tr/*")} == whole


def test_two_at_once_are_refused(folder: Path) -> None:
    out = folder.with_name("fixed")
    with Lock(out / ".repair.lock", "the copy"), pytest.raises(ConfigError, match="in use by process"):
        repaired(folder)


def test_without_hard_links_files_are_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "other disk")

    monkeypatch.setattr(os, "link", refuse)
    ledger, out = repaired(folder)
    assert (ledger.num_linked, ledger.num_copied) == (0, 4)
    assert (out / "labelsTr/c1.nii.gz").read_bytes() == (folder / "labelsTr/c1.nii.gz").read_bytes()
    assert errors_of(out) == []


def test_a_full_disk_says_so_and_leaves_no_data_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(repair_writing.shutil, "copy2", full)
    with pytest.raises(DatasetError, match=r"disk of .*fixed is full") as caught:
        repaired(folder)
    assert "same command again" in caught.value.hint
    assert resolve_dataset(folder.with_name("fixed"))[0] is None
    monkeypatch.undo()
    assert repaired(folder)[0].num_linked == 4


def test_a_set_of_which_nothing_can_be_kept_says_why(folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_image(folder / f"labelsTr/c{number}.nii.gz", labels_of(), GRID)
    with pytest.raises(DatasetError) as caught:
        repaired(folder)
    assert caught.value.problems == tuple(f"case c{n}: the label map holds background only" for n in range(2))
    with pytest.raises(DatasetError, match="not clear what it is"):
        repaired(tmp_path / "set" / "imagesTr", tmp_path / "elsewhere")
