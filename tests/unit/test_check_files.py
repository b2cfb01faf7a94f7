"""What the check of single files finds, what findings cost, and that memory bounds the work at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from checked_cases import GRID, SHAPE, image_of, labels_of, set_of

from autoseg.checking.catalogue import KINDS, Costs
from autoseg.checking.contents import check_case
from autoseg.checking.doctor import check_dataset
from autoseg.checking.findings import CheckReport
from autoseg.checking.structures import measure_structures
from autoseg.domain.dataset import Case, Channel, Dataset, LabelClass, LabelSchema
from autoseg.domain.findings import Finding
from autoseg.domain.geometry import Geometry, degrees_between, grid_mismatch
from autoseg.io.images import write_image
from autoseg.machine import MemoryGate
from autoseg.runtime import NoProgress

CLASSES = LabelSchema(classes=(LabelClass(name="a", values=(1,)), LabelClass(name="b", values=(3, 4))))


def check(folder: Path) -> CheckReport:
    return check_dataset(folder, workers=2, progress=NoProgress())


def found_in(folder: Path) -> list[tuple[str, str, str]]:
    return [(item.severity, item.case, item.code) for item in check(folder).findings]


@pytest.mark.parametrize(
    ("labels", "code", "words"),
    [
        (labels_of() * 0.8, "probability-map", "cut at 0.5, 180 voxels are left"),
        (image_of(9), "image-as-labels", "most of them not whole"),
        (np.arange(3600).reshape(SHAPE) % 200, "image-as-labels", "200 different values from 0 to 199"),
        (labels_of() * 2.5, "labels-not-whole", "such as 2.5"),
        (labels_of() * np.nan, "labels-not-whole", "NaN or infinite values"),
        (labels_of() * 7, "undeclared-labels", "7 (180 voxels)"),
    ],
)
def test_what_is_in_a_label_file_is_recognised(tmp_path: Path, labels: np.ndarray, code: str, words: str) -> None:
    folder = set_of(tmp_path)
    write_image(folder / "labelsTr/c2.nii.gz", labels, GRID)
    (item,) = [item for item in check(folder).findings if item.case == "c2"]
    assert (item.severity, item.code) == ("error", code)
    assert words in item.message
    assert item.cost.startswith("1 of 6 cases lost")


def test_headers_with_two_places_are_a_note(tmp_path: Path) -> None:
    folder = set_of(tmp_path)
    path = folder / "imagesTr/c1_0000.nii.gz"
    image = nib.load(path)
    other = GRID.affine.copy()
    other[0, 3] = 7
    image.set_qform(other, 1)
    image.set_sform(GRID.affine, 1)
    nib.save(image, path)
    assert found_in(folder) == [("note", "c1", "two-affines")]
    image.set_qform(GRID.affine, 1)
    nib.save(image, path)
    assert found_in(folder) == []


def test_broken_test_cases_stop_nothing_and_are_read_too(tmp_path: Path) -> None:
    folder = set_of(tmp_path)
    write_image(folder / "imagesTs/t0_0000.nii.gz", image_of(50), GRID)
    (folder / "imagesTs/t1_0000.nii.gz").write_bytes(b"not an image")
    write_image(folder / "imagesTs/t2_0000.nii.gz", image_of(3), GRID)
    report = check(folder)
    assert [(item.severity, item.all_cases, item.code) for item in report.findings] == [
        ("warning", ("c3", "t2"), "duplicates"),
        ("warning", ("t1",), "unreadable-image"),
    ]
    assert report.findings[0].cost == "scores on test cases (t2) are too good"
    assert (report.num_cases, report.num_files) == (6, 15)


def test_grids_that_disagree_are_told_with_size_order_and_angle() -> None:
    angle = np.radians(3)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ GRID.affine[:3, :3]
    turned = Geometry(SHAPE, affine)
    assert degrees_between(turned, GRID) == pytest.approx(3)
    assert "turned by 3 degrees" in grid_mismatch(turned, GRID)
    swapped = Geometry((18, 20, 10), np.array([[0, 1.0, 0, 0], [-1, 0, 0, 17], [0, 0, 2, 0], [0, 0, 0, 1]]))
    assert degrees_between(swapped, GRID) == pytest.approx(0, abs=1e-5)
    assert grid_mismatch(swapped, GRID) == "shape 18×20×10 against 20×18×10; axes PRS against RAS"


def test_structures_are_measured_in_pieces_and_in_the_world() -> None:
    labels = np.zeros(SHAPE, np.int32)
    labels[4:8, 5, 6] = 1
    labels[8, 6, 7] = 1  # touches at a corner, so it is one piece
    labels[2:4, 2:4, 2:4] = 3
    labels[2:4, 2:4, 4] = 4  # of the same region
    labels[18, 15, 8] = 4
    labels[0, 0, 0] = -5
    labels[0, 0, 1] = 90_000
    values = {int(value): int((labels == value).sum()) for value in np.unique(labels)}
    found = measure_structures(labels, values, GRID, CLASSES)
    assert (found["a"].voxels, found["a"].pieces, found["a"].stray_voxels) == (5, 1, 0)
    assert found["a"].centre_mm == pytest.approx((6.0, 5.2, 12.4))
    assert (found["b"].voxels, found["b"].pieces, found["b"].stray_voxels) == (13, 2, 1)
    assert measure_structures(np.zeros(SHAPE, np.int16), {0: 1}, GRID, CLASSES) == {}


def test_a_case_that_does_not_fit_into_memory_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = set_of(tmp_path, 1)

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("autoseg.checking.contents.read_image", no_memory)
    case = Case(id="c0", images=(str(folder / "imagesTr/c0_0000.nii.gz"),))
    dataset = Dataset(name="toy", channels=(Channel(name="MR"),), labels=CLASSES, cases=(case,))
    assert [item.code for item in check_case(case, dataset).findings] == ["too-large"]


# --- Costs ----------------------------------------------------------------------------------------------------------


def test_findings_of_one_kind_are_told_together_with_what_they_cost(tmp_path: Path) -> None:
    folder = set_of(tmp_path)
    (folder / "imagesTr/c1_0000.nii.gz").write_bytes(b"")
    (folder / "imagesTr/c4_0000.nii.gz").write_bytes(b"")
    first, *_ = check(folder).kinds
    assert (first.code, first.count, first.cases) == ("unreadable-image", 2, ("c1", "c4"))
    assert first.title == "Images that cannot be read"
    assert first.cost == "2 of 6 cases lost, with 33 % of the labelled voxels"


def test_costs_of_findings_that_say_their_own() -> None:
    costs = Costs((), 8)
    one = Finding(severity="note", code="stray-islands", case="c1", message="", voxels=4)
    assert costs.of("stray-islands", [one, one]) == "8 voxels, 0.0 % of the labelled ones"
    own = one.model_copy(update={"cost": "much"})
    assert costs.of("stray-islands", [own]) == "much"
    unknown = Finding(severity="note", code="something-new", message="")
    assert costs.kinds([unknown])[0].title == "Something new"


# --- Memory ---------------------------------------------------------------------------------------------------------


def test_the_gate_lets_in_what_fits_and_what_is_too_large_alone() -> None:
    gate = MemoryGate(100)
    order: list[str] = []
    second_is_in = threading.Event()

    def second() -> None:
        with gate.room(60):
            order.append("second")
            second_is_in.set()

    with gate.room(60):
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        with gate.room(40):
            assert not second_is_in.wait(0.05)
        order.append("first")
    assert second_is_in.wait(10)
    thread.join(10)
    assert order == ["first", "second"]
    with gate.room(1000):
        pass
    with MemoryGate(None).room(10**15), MemoryGate(0).room(1):
        pass


# --- The catalogue --------------------------------------------------------------------------------------------------


def test_every_kind_of_finding_is_in_the_catalogue_and_in_the_reference() -> None:
    import re

    root = Path(__file__).resolve().parents[2]
    sources = [*(root / "autoseg/checking").glob("*.py"), *(root / "autoseg/domain").glob("*.py")]
    used = {code for path in sources for code in re.findall(r'\.add\(\s*"([a-z-]+)"', path.read_text("utf-8"))}
    used |= {"probability-map", "image-as-labels", "labels-not-whole", "bad-affine", "unreadable-image"}  # by variables
    used |= {f"{what}-{how}" for what in ("size", "spacing") for how in ("outlier", "varies")}
    assert used - set(KINDS) == set()
    reference = (root / "docs/reference/findings.md").read_text("utf-8")
    assert {code for code in KINDS if f"`{code}`" not in reference} == set()
