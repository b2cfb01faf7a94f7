"""The page of a check: self-contained, the odd cases first, small."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from checked_cases import GRID, SHAPE, dataset_of, image_of, labels_of, set_of

from autoseg.checking.doctor import Examination, examine_dataset
from autoseg.checking.facts import Picture
from autoseg.checking.findings import CaseSummary, CheckReport
from autoseg.checking.pictures import MAX_SIDE_PX, draw_pictures
from autoseg.cli.app import main
from autoseg.domain.findings import Finding
from autoseg.domain.geometry import Geometry
from autoseg.io.images import write_image
from autoseg.report.check_page import MAX_ROWS_A_KIND, PICTURES_BYTES, render_check
from autoseg.runtime import NoProgress


def test_pictures_show_the_middle_of_the_labels() -> None:
    """A bright cross of voxels through the labels' centre is in every plane; the outline lies around the label."""
    image = np.zeros((1, *SHAPE))
    labels = np.zeros(SHAPE, np.uint8)
    labels[12:15, 4:7, 5] = 1
    image[0, 12:15, 4:7, 5] = 1
    pictures = draw_pictures(image, [(0.0, 1.0)], labels, GRID, dataset_of(1).labels)
    assert [item.plane for item in pictures] == ["axial", "coronal", "sagittal"]
    assert [(item.width_px, item.height_px) for item in pictures] == [(20, 18), (20, 10), (18, 10)]
    assert [item.aspect for item in pictures] == [1.0, 2.0, 2.0]
    assert all(item.image.startswith("data:image/jpeg;base64,") for item in pictures)
    ((number, path),) = pictures[0].contours
    assert number == 0
    # Axial pictures hang with the right at the left and the front at the top: columns 5-7, rows 11-13, in half pixels.
    x, y = (int(word) for word in re.match(r"M(\d+) (\d+)", path).groups())
    assert 10 <= x <= 16
    assert 22 <= y <= 28


def test_large_pictures_are_made_small_and_busy_outlines_coarse() -> None:
    grid = Geometry((900, 700, 1), np.eye(4), is_2d=True)
    labels = (np.random.default_rng(0).random((900, 700, 1)) > 0.5).astype(np.uint8)
    (picture,) = draw_pictures(np.ones((3, 900, 700, 1)), [(0, 1)] * 3, labels, grid, dataset_of(1).labels)
    assert max(picture.width_px, picture.height_px) <= 2 * MAX_SIDE_PX
    assert sum(len(path) for _, path in picture.contours) <= 6000


def test_the_page_of_a_set_names_everything_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    folder = set_of(tmp_path)
    (folder / "imagesTr/c4_0000.nii.gz").write_bytes(b"")
    nan = image_of(2)
    nan[3, 3, 3] = np.nan
    write_image(folder / "imagesTr/c2_0000.nii.gz", nan, GRID)
    found = examine_dataset(folder, workers=1, progress=NoProgress(), with_pictures=True)
    page = render_check(found)
    order = re.findall(r"<h3>(c\d)", page)
    assert order == ["c2", "c4", "c0", "c1", "c3", "c5"]
    assert page.count("data:image/jpeg") == 5 * 3
    assert not re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?https?:', page)
    assert "1 of 3,600 voxels" in page
    assert 'id="case-5"' in page
    assert found.report == examine_dataset(folder, workers=3, progress=NoProgress()).report
    assert render_check(found) == page


def test_names_cannot_bring_markup_into_the_page() -> None:
    evil = "<script>alert(1)</script>"
    finding = Finding(severity="error", case=evil, code="not-finite", message=evil, file=evil)
    report = CheckReport(dataset=evil, name=evil, findings=(finding,), cases=(CaseSummary(id=evil),))
    page = render_check(Examination(report))
    assert evil not in page


def test_the_page_stays_small_however_many_cases_and_findings_there_are() -> None:
    findings = tuple(
        Finding(severity="note", case=f"c{number}", code="float-labels", message="m") for number in range(2000)
    )
    cases = tuple(CaseSummary(id=f"c{number}", shape=(9, 9, 9), spacing_mm=(1.0, 1.0, 1.0)) for number in range(400))
    picture = Picture("axial", "RLAP", 10, 10, 1.0, "data:image/jpeg;base64," + "A" * 40_000, ())
    report = CheckReport(dataset="d", findings=findings, cases=cases)
    page = render_check(Examination(report, {case.id: (picture,) for case in cases}))
    assert page.count("data-severity") == MAX_ROWS_A_KIND
    assert f"{2000 - MAX_ROWS_A_KIND} more findings" in page
    assert page.count("data:image/jpeg") == PICTURES_BYTES // len(picture.image)
    assert len(page) < 5_000_000


def test_check_writes_the_page_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = set_of(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(folder), "--html"]) == 0
    assert "Page: autoseg-check.html" in capsys.readouterr().out
    assert "nothing wrong was found" in (tmp_path / "autoseg-check.html").read_text("utf-8")
    write_image(folder / "labelsTr/c2.nii.gz", labels_of() * 7, GRID)
    assert main(["check", str(folder), "--html", "other.html", "--json", "found.json"]) == 3
    assert "undeclared-labels" in capsys.readouterr().out
    assert "undeclared-labels" in (tmp_path / "other.html").read_text("utf-8")
