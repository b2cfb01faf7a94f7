"""The page of a run of which everything was chosen, its size with many cases, and the files that go with it."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
from importlib import resources
from pathlib import Path

import pytest
from chosen_run import PAIR, SURE_CASE, make_chosen_run
from synthetic_run import make_run

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.evaluation.metrics import METRIC_NAMES
from autoseg.evaluation.summaries import CaseMetrics, summarise
from autoseg.pipeline import results as pipeline
from autoseg.report.card import plain
from autoseg.report.chart_data import CORE_METRICS
from autoseg.report.collect import ConfigurationResult, RunResults, collect
from autoseg.report.gallery import Gallery, make_gallery
from autoseg.report.method import describe
from autoseg.report.page import MAX_PAGE_BYTES, render, write_report

NUM_CASES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_chosen_run(tmp_path_factory.mktemp("chosen"), NUM_CASES)).parent


@pytest.fixture(scope="module")
def results(folder: Path) -> RunResults:
    from autoseg.io.run_folder import RunFolder

    return collect(RunFolder(folder.parent))


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    body = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_the_choice_and_its_reasons_are_on_the_page(folder: Path, results: RunResults) -> None:
    text = text_of((folder / "index.html").read_text("utf-8"))
    selection = results.summary.selection
    assert f"{PAIR} was chosen: its mean foreground Dice is the highest." in text
    assert f"The mean foreground Dice of {PAIR} is {selection.chosen.mean_foreground_dice:.3f}, " in text
    assert f"with its post-processing {selection.final.mean_foreground_dice:.3f}" in text
    for words in (
        "&lt; 0.001",
        "0.0100 to 0.0700",
        "keep largest Posterior 0.8500 +0.010000 +0.002000 to +0.020000 yes",
        "Anterior 1.50 0.0800 0.0100",
    ):
        assert words in text
    assert f"The models are sure of {SURE_CASE}" in text
    assert "Not drawn" not in text


def test_what_predict_gives_comes_first_and_has_a_name(folder: Path) -> None:
    page = (folder / "index.html").read_text("utf-8")
    tiles = [text_of(part) for part in page.split('class="tile')[2:]]
    assert f"{PAIR}, post-processed, as predict gives it" in tiles[0]
    assert f"{PAIR} (chosen)" in tiles[1]
    assert "<td>final</td>" not in page
    assert f'<option value="{PAIR}" data-chosen>' in page


def test_what_is_not_there_is_left_out_with_a_reason(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, num_cases=4, configurations=("3d_fullres",))).read_text("utf-8")
    text = text_of(page)
    assert "Not drawn: probabilities are calibrated once every fold of a configuration is finished." in text
    assert "Not drawn: how sure the models are is measured once" in text
    assert 'id="chart-calibration"' not in page
    assert 'id="chart-uncertainty"' not in page
    assert 'id="chart-confusion"' in page


def test_the_method_has_this_runs_numbers_and_cites_what_it_names(results: RunResults) -> None:
    method = describe(results, "1.5 mm")
    text = " ".join(method.paragraphs)
    marks = [int(number) for found in re.findall(r"\[([\d, ]+)\]", text) for number in found.split(",")]
    assert sorted(set(marks)) == list(range(1, len(method.references) + 1))
    first = list(dict.fromkeys(marks))
    assert first == sorted(first)
    assert "12 labelled cases (MRI) with 2 classes: Anterior, Posterior" in text
    assert "patches of 16 × 24 × 16 voxels of images resampled to 1.5 × 1 × 1 mm, in batches of 2" in text
    assert "2 folds of 120 steps and 3.0 minutes on average" in text
    assert (
        f"{PAIR} reached a mean foreground Dice of {results.summary.selection.final.mean_foreground_dice:.3f}" in text
    )
    assert "the largest component of Posterior was kept" in text
    assert "2d and 3d_fullres were trained by" in text
    assert "and random rotation, scaling, noise, blur" in text


def test_the_card_has_the_figures_and_is_safe_markdown(folder: Path, results: RunResults) -> None:
    card = (folder / "model_card.md").read_text("utf-8")
    final = results.summary.selection.final
    assert f"Mean foreground Dice **{final.mean_foreground_dice:.3f}**" in card
    for item in final.classes:
        assert f"| {item.name} | {item.metric('dice').mean:.3f} |" in card
    assert "# Balls \\<b\\>& noise\\</b\\>: segmentation by autoseg" in card
    assert plain("a|b\n# c") == "a\\|b \\# c"


def test_volumes_lie_in_the_page_or_beside_it_for_every_case(folder: Path) -> None:
    page = (folder / "index.html").read_text("utf-8")
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL).group(1))
    embedded = dict(re.findall(r'id="volumes-(case-\d+)">(.*?)</script>', page))
    beside = {path.stem: path.read_text("utf-8") for path in (folder / "volumes").glob("*.js")}
    assert len(data["volumes"]) == NUM_CASES
    assert set(data["volumes"].values()) == set(embedded) | set(beside)
    assert not set(embedded) & set(beside)
    assert len(embedded) == 8
    for case, key in data["volumes"].items():
        found = embedded.get(key) or beside[key].removeprefix(f'autosegVolumes("{key}",').removesuffix(");\n")
        content = json.loads(found)
        assert content["case"] == case
        assert set(content["predictions"]) == {"2d", "3d_fullres", PAIR, "final"}
        assert "uncertainty" in content["predictions"][PAIR]


def test_without_room_volumes_go_beside_the_page_and_pictures_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_cases=4, configurations=("3d_fullres",))
    results = collect(run)
    gallery = make_gallery(run, results, results.cases, 0)
    assert (len(gallery.keys), gallery.num_beside) == (4, 4)
    assert all(item.views == () and "no room" in item.problem for item in gallery.shown)
    assert len(list((run.report_folder / "volumes").glob("*.js"))) == 4


def test_an_older_reports_volumes_are_taken_away(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_cases=2, configurations=("3d_fullres",))
    old = run.report_folder / "volumes" / "case-99.js"
    old.parent.mkdir(parents=True)
    old.write_text("")
    write_report(run)
    assert not old.exists()


def many(results: RunResults, num_cases: int, num_classes: int) -> RunResults:
    """The same run with so many cases and classes, and without images."""
    names = [f"structure number {number}" for number in range(num_classes)]
    schema = LabelSchema(classes=tuple(LabelClass(name=name, values=(place + 1,)) for place, name in enumerate(names)))
    pattern = next(row for row in results.cases if row.metrics.classes[0].presence == "both")
    figure = 0.123456789
    one = pattern.metrics.classes[0].model_copy(update=dict.fromkeys(METRIC_NAMES, figure))
    rows, configurations = [], []
    for name in ("2d", "3d_fullres", PAIR, "final"):
        cases = [
            CaseMetrics(case=f"hospital_{case:04d}", classes=tuple(one.model_copy(update={"name": n}) for n in names))
            for case in range(num_cases)
        ]
        rows += [dataclasses.replace(pattern, configuration=name, metrics=case) for case in cases]
        configurations.append(ConfigurationResult(name=name, folds=(), summary=summarise(cases, names)))
    summary = results.summary.model_copy(update={"configurations": tuple(configurations), "selection": None})
    plan = results.plan.model_copy(update={"labels": schema})
    fingerprint = results.fingerprint.model_copy(update={"cases": ()})
    return dataclasses.replace(
        results, plan=plan, fingerprint=fingerprint, summary=summary, cases=tuple(rows), curves=results.curves
    )


@pytest.mark.parametrize(("num_classes", "metrics"), [(2, METRIC_NAMES), (40, CORE_METRICS)])
def test_the_page_of_two_hundred_cases_leaves_room_for_pictures(
    results: RunResults, num_classes: int, metrics: tuple[str, ...]
) -> None:
    gallery = Gallery((), {}, {"": ""})
    page = render(many(results, 200, num_classes), gallery)
    assert len(page.encode()) < MAX_PAGE_BYTES - 1_000_000
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL).group(1))
    assert data["metrics"] == list(metrics)
    assert len(data["rows"]) == 4 * 200


def test_foreseen_costs_come_from_the_forecast_of_the_same_plan(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_cases=2, configurations=("3d_fullres",))
    memory = dict.fromkeys(
        ("weights", "optimiser", "running_mean", "gradients", "batch", "activations", "workspace"), 1
    )
    prediction = dict.fromkeys(("weights", "features", "logits", "images"), 1)
    forecast = {
        "plan_digest": run.read_plan().digest(),
        "device": "cpu",
        "device_name": "a processor",
        "precision": "bf16",
        "num_threads": 2,
        "budget_gb": 8.0,
        "planned_gb": 8.0,
        "memory_free_bytes": None,
        "memory_total_bytes": None,
        "disk_free_bytes": 1,
        "cache_bytes": 1,
        "flops_per_second": None,
        "configurations": {
            "3d_fullres": {
                "training": memory | {"total": 7_770_000_000},
                "prediction": prediction | {"total": 1_230_000_000},
                "cache_bytes": 450_000_000,
                "training_seconds": 3600.0,
            }
        },
    }
    run.forecast_file.write_text(json.dumps(forecast))
    text = text_of(pipeline.report(run.root).read_text("utf-8"))
    assert "3d_fullres Memory of training (GB) 7.77 2.10 (whole process)" in text
    assert "3d_fullres Minutes of training a fold 60.0 3.0" in text
    assert "3d_fullres Memory of prediction (GB) 1.23 –" in text
    run.forecast_file.write_text(json.dumps(forecast | {"plan_digest": "another"}))
    assert "3d_fullres Memory of training (GB) – 2.10" in text_of(pipeline.report(run.root).read_text("utf-8"))


def test_vendored_files_are_those_that_the_list_names() -> None:
    vendor = resources.files("autoseg.report") / "vendor"
    row = re.compile(r"^\| (\S+) \| \S+ \S+ \| \S+ \| .*?, (\S+) \| ([0-9a-f]{64}) \|$", re.MULTILINE)
    listed = row.findall((vendor / "README.md").read_text("utf-8"))
    assert {name for name, _, _ in listed} == {"d3.min.js", "plot.umd.min.js", "niivue.umd.js.gz"}
    for name, licence, digest in listed:
        content = (vendor / name).read_bytes()
        content = gzip.decompress(content) if name.endswith(".gz") else content
        assert hashlib.sha256(content).hexdigest() == digest
        assert "copyright" in (vendor / licence).read_text("utf-8").lower()
