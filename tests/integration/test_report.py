"""The report of a made-up run: its numbers, its safety, its pictures."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from synthetic_run import AFFINE, BAD_CASE, SCHEMA, SHAPE, make_run

from autoseg.domain.geometry import Geometry
from autoseg.errors import ConfigError
from autoseg.io.drawing import PLANES, cut_slice, outline, to_canonical
from autoseg.io.run_folder import RunFolder
from autoseg.report.collect import ReportSummary, collect
from autoseg.report.overlays import views
from autoseg.report.page import worst_first, write_report
from autoseg.report.scene import read_scene


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(run: RunFolder) -> str:
    return write_report(run).read_text("utf-8")


def test_the_numbers_equal_those_recomputed_from_the_label_maps(run: RunFolder, page: str) -> None:
    dataset = run.read_dataset()
    dice: dict[int, list[float]] = {1: [], 2: []}
    for path in sorted(run.models_folder.glob("3d_fullres/fold_*/validation/*.nii.gz")):
        predicted = np.asarray(nib.load(path).dataobj)
        actual = np.asarray(nib.load(dataset.case(path.name.removesuffix(".nii.gz")).labels).dataobj)
        for value, found in dice.items():
            one, other = predicted == value, actual == value
            if other.any():
                found.append(2 * (one & other).sum() / (one.sum() + other.sum()))
    means = {value: float(np.mean(found)) for value, found in dice.items()}
    summary = ReportSummary.model_validate_json((run.report_folder / "summary.json").read_text())
    result = {item.name: item for item in summary.configurations}["3d_fullres"]
    assert summary.best == "3d_fullres"
    assert result.summary.mean_foreground_dice == pytest.approx(np.mean(list(means.values())))
    assert [item.metric("dice").mean for item in result.summary.classes] == pytest.approx(list(means.values()))
    assert f'<span class="value">{np.mean(list(means.values())):.3f}</span>' in page


def test_every_case_and_class_is_in_the_csv(run: RunFolder, page: str) -> None:
    rows = list(csv.DictReader((run.report_folder / "cases.csv").read_text().splitlines()))
    assert len(rows) == 2 * 6 * 2
    spurious = [row for row in rows if row["presence"] == "spurious"]
    assert {row["class"] for row in spurious} == {"Posterior"}
    assert {row["hd95_mm"] for row in spurious} == {""}
    assert {row["fold"] for row in rows} == {"0", "1"}


def test_the_page_asks_the_network_for_nothing(page: str) -> None:
    class Links(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]

    parser = Links()
    parser.feed(page)
    outside = [link for link in parser.found if not link.startswith(("#", "data:image/png;base64,"))]
    assert set(outside) == {"cases.csv", "summary.json", "model_card.md", "data:,"}
    assert "default-src 'none'" in page
    assert len(page) < 5_000_000


def test_names_from_the_data_set_are_escaped(page: str) -> None:
    assert "<h1>Balls &lt;b&gt;&amp; noise&lt;/b&gt;</h1>" in page
    assert "<b>& noise" not in page


def test_charts_have_their_data(page: str) -> None:
    text = re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text.group(1))
    assert len(data["epochs"]) == 2 * 2 * 12
    assert len(data["rows"]) == 2 * 6
    presence = [data["presences"][item[0]] for row in data["rows"] for item in row["classes"]]
    assert (presence.count("both"), presence.count("spurious")) == (2 * (6 + 5), 2)
    assert [f'id="row-{index}"' in page for index in range(13)] == [True] * 12 + [False]


def test_the_worst_case_comes_first(run: RunFolder, page: str) -> None:
    rows = worst_first(collect(run).cases)
    assert rows[0].metrics.case == BAD_CASE
    scores = [row.metrics.mean_dice for row in rows]
    assert scores == sorted(scores)
    assert page.index(f"<h3>{BAD_CASE} ") < page.index("<h3>case_03 ")


def test_a_report_without_images_still_has_its_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_cases=4, configurations=("3d_fullres",))
    (tmp_path / "data" / "images" / f"{BAD_CASE}.nii.gz").unlink()
    page = write_report(run).read_text("utf-8")
    assert "No pictures" in page
    assert BAD_CASE in page


def test_a_run_with_only_the_fold_all_has_curves_and_no_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_cases=2, configurations=("3d_fullres",))
    models = run.models_folder / "3d_fullres"
    (models / "fold_0").rename(models / "fold_all")
    (models / "fold_all" / "validation" / "summary.json").unlink()
    (models / "fold_1" / "weights.json").unlink()
    page = write_report(run).read_text("utf-8")
    assert "there are no scores yet" in page
    assert 'id="chart-loss"' in page


def test_scores_of_other_weights_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, num_cases=4, configurations=("3d_fullres",))
    (run.fold_folder("3d_fullres", 0) / "weights.json").write_text('{"weights_sha256": "1"}')
    results = collect(run)
    assert {row.fold for row in results.cases} == {1}
    first, second = results.summary.configurations[0].folds
    assert (first.num_cases, first.mean_foreground_dice) == (0, None)
    assert second.num_cases == 2
    assert "other weights" in caplog.text


def test_a_run_without_a_finished_fold_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_cases=2, configurations=("3d_fullres",))
    for path in run.models_folder.glob("*/*/weights.json"):
        path.unlink()
    with pytest.raises(ConfigError, match="no finished fold"):
        write_report(run)


def test_pictures_hang_as_in_radiology() -> None:
    """A marker at the patient's right, front and top is at the picture's left and top in every plane."""
    marker = np.zeros(SHAPE, np.uint8)
    marker[-1, 0, -1] = 1  # the file's axes run to the left, back and top: low x is right, so take the far end
    marker = marker[::-1]
    geometry = Geometry(SHAPE, AFFINE)
    canonical = to_canonical(marker, geometry)
    assert canonical[-1, -1, -1] == 1
    for plane in PLANES:
        cut = cut_slice(canonical, plane, -1, 1)
        assert np.argwhere(cut).tolist() == [[0, 0]]


def test_the_slice_with_most_errors_is_shown(run: RunFolder) -> None:
    results = collect(run)
    row = worst_first(results.cases)[0]
    dataset = results.dataset
    scene = read_scene(dataset.case(row.metrics.case), [row], SCHEMA, ["MRI"])
    found = views(scene, row.configuration, SCHEMA)
    assert [view.plane for view in found] == ["axial", "coronal", "sagittal"]
    geometry = Geometry(SHAPE, AFFINE)
    maps = [
        to_canonical(np.asarray(nib.load(path).dataobj), geometry)
        for path in (row.prediction, dataset.case(row.metrics.case).labels)
    ]
    wrong = (maps[0] != maps[1]).sum(axis=(0, 1))
    assert found[0].slice_number == int(np.argmax(wrong)) + 1
    assert found[0].num_wrong_vox == int(wrong.max())
    assert found[0].aspect == 1.0
    assert found[1].aspect == pytest.approx(1.5)
    assert {contour.kind for contour in found[0].contours} == {"reference", "prediction"}


def corners_of(path: str) -> list[tuple[int, int]]:
    """The corners of a path of one ring, by following its steps."""
    numbers = np.array([int(number) for number in re.findall(r"-?\d+", path)]).reshape(-1, 2)
    return [tuple(point) for point in np.cumsum(numbers, axis=0).tolist()]


def test_an_outline_runs_around_its_pixels() -> None:
    """In half pixels: the middles of the four edges of a pixel; long straight edges are one step."""
    mask = np.zeros((4, 5), np.bool_)
    mask[1, 2] = True
    assert set(corners_of(outline(mask))) == {(4, 3), (6, 3), (5, 2), (5, 4)}
    bar = np.zeros((3, 40), np.bool_)
    bar[1, 5:35] = True
    assert set(corners_of(outline(bar))) >= {(10, 3), (11, 2), (69, 2), (70, 3), (69, 4), (11, 4)}
    assert len(corners_of(outline(bar))) <= 7
    assert outline(np.zeros((3, 3), np.bool_)) == ""
