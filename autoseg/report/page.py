"""Write the report of a run: `index.html`, `summary.json` and `cases.csv`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from autoseg.errors import AutosegError
from autoseg.evaluation.metrics import METRIC_NAMES, METRIC_TITLES
from autoseg.io.files import write_text
from autoseg.io.run_folder import RunFolder
from autoseg.report.collect import SUMMARY_FILE, CaseRow, RunResults, cases_csv, collect
from autoseg.report.overlays import View, views
from autoseg.report.templating import environment_of_pages, trusted_part

NUM_WORST = 6
"""Cases shown in pictures from the bottom of the list; the median and the best one are shown too."""

MAX_CLASSES_IN_FULL = 3
"""Up to so many classes, the table of cases shows three metrics a class, above it the Dice alone."""

CASE_METRICS = ("dice", "surface_dice", "hd95_mm")

_BYTES_PER_GB = 1e9
_SECONDS_PER_MINUTE = 60.0
_PARTS = {"d3": "d3.min.js", "plot": "plot.umd.min.js"}


@dataclass(frozen=True, slots=True)
class Shown:
    """A case in pictures.

    Attributes:
        rank: Why it is shown: "worst 1", "median", "best".
        problem: Why there are no pictures; empty otherwise.
    """

    rank: str
    row: CaseRow
    views: tuple[View, ...]
    problem: str = ""


def write_report(run: RunFolder) -> Path:
    """Write the report of every finished fold of every configuration; returns the page.

    Raises:
        ConfigError: The folder is not a run, no fold is finished, or a file in it is not valid.
    """
    results = collect(run)
    folder = run.report_folder
    write_text(folder / SUMMARY_FILE, results.summary.to_json())
    write_text(folder / "cases.csv", cases_csv(results))
    page = folder / "index.html"
    write_text(page, render(results))
    return page


def render(results: RunResults) -> str:
    """The page: one self-contained document that asks the network for nothing."""
    environment = environment_of_pages()
    environment.filters |= {"number": _number, "minutes": _minutes, "gigabytes": _gigabytes, "times": _times}
    rows = worst_first(results.cases)
    vendor = resources.files("autoseg.report") / "vendor"
    names = results.plan.labels.names
    return environment.get_template("page.html.j2").render(
        summary=results.summary,
        dataset=results.dataset,
        plan=results.plan,
        data_facts=tuple(_data_facts(results)),
        class_presence=_class_presence(results),
        rows=rows,
        shown=_shown(results, rows),
        metric_names=METRIC_NAMES,
        metric_titles=METRIC_TITLES,
        case_metrics=CASE_METRICS if len(names) <= MAX_CLASSES_IN_FULL else CASE_METRICS[:1],
        chart_data=_chart_data(results, rows),
        tolerance=_tolerance_in_words(results.summary.tolerance_mm),
        # Our own files and the vendored libraries are trusted; everything else is escaped.
        style=trusted_part("page.css"),
        script=trusted_part("page.js"),
        libraries=[Markup((vendor / name).read_text("utf-8")) for name in _PARTS.values()],
    )


def worst_first(rows: Sequence[CaseRow]) -> tuple[CaseRow, ...]:
    """Rows by mean Dice, the lowest first; cases without any class last."""

    def key(row: CaseRow) -> tuple[float, str, str]:
        mean = row.metrics.mean_dice
        return (np.inf if mean is None else mean, row.metrics.case, row.configuration)

    return tuple(sorted(rows, key=key))


def _shown(results: RunResults, rows: Sequence[CaseRow]) -> tuple[Shown, ...]:
    """The worst, the median and the best case of the best configuration, with pictures."""
    ranked = [row for row in rows if row.configuration == results.summary.best and row.metrics.mean_dice is not None]
    chosen = {index: f"worst {index + 1}" for index in range(min(NUM_WORST, len(ranked)))}
    if ranked:
        chosen = {len(ranked) // 2: "median", len(ranked) - 1: "best"} | chosen
    return tuple(_with_views(results, ranked[index], chosen[index]) for index in sorted(chosen))


def _with_views(results: RunResults, row: CaseRow, rank: str) -> Shown:
    dataset = results.dataset
    try:
        found = views(row, dataset.case(row.metrics.case), dataset.labels, len(dataset.channels))
    except AutosegError as problem:
        # Images may have moved since the training; the numbers are worth a report without them.
        return Shown(rank, row, (), str(problem))
    except KeyError:
        return Shown(rank, row, (), f"case {row.metrics.case} is not in the run's dataset.json")
    return Shown(rank, row, found)


def _chart_data(results: RunResults, rows: Sequence[CaseRow]) -> dict[str, Any]:
    """What the charts draw, as plain JSON."""
    points = [
        {
            "row": index,
            "configuration": row.configuration,
            "fold": str(row.fold),
            "case": row.metrics.case,
            "class": item.name,
            "dice": item.dice,
            "reference": item.reference_mm3,
            "prediction": item.prediction_mm3,
        }
        for index, row in enumerate(rows)
        for item in row.metrics.classes
        if item.reference_vox > 0
    ]
    epochs = [
        {
            "configuration": curve.configuration,
            "fold": str(curve.fold),
            "minutes": epoch.seconds / _SECONDS_PER_MINUTE,
            "epoch": epoch.epoch + 1,
            "training": epoch.train_loss,
            "validation": epoch.validation_loss,
            "dice": epoch.mean_pseudo_dice,
            "rate": epoch.learning_rate,
        }
        for curve in results.curves
        for epoch in curve.epochs
    ]
    return {"classes": list(results.plan.labels.names), "points": points, "epochs": epochs}


def _data_facts(results: RunResults) -> Iterator[tuple[str, str]]:
    """The data set at a glance, as title and value."""
    fingerprint, dataset = results.fingerprint, results.dataset
    spacings, shapes = np.array(fingerprint.spacings_mm), np.array(fingerprint.shapes)
    patients = {case.patient for case in dataset.cases if case.patient is not None}
    yield "Labelled cases", f"{len(dataset.cases)}" + (f" of {len(patients)} patients" if patients else "")
    yield "Channels", ", ".join(channel.name for channel in dataset.channels)
    yield "Median size (voxels, Z × Y × X)", _times(np.median(shapes, axis=0).round().astype(int))
    yield "Range of sizes", f"{_times(shapes.min(axis=0))} to {_times(shapes.max(axis=0))}"
    yield "Median spacing (mm, Z × Y × X)", _times(np.median(spacings, axis=0))
    yield "Range of spacings", f"{_times(spacings.min(axis=0))} to {_times(spacings.max(axis=0))}"
    yield "Size after cropping to non-zero", f"{fingerprint.median_relative_size_fraction:.0%} of the image (median)"
    for name, stats in zip(fingerprint.channels, fingerprint.intensities, strict=True):
        if stats is None:
            yield f"Intensity in the foreground, {name}", "not measured"
            continue
        yield (
            f"Intensity in the foreground, {name}",
            f"{stats.mean:.4g} ± {stats.std:.4g} (0.5 to 99.5 %: {stats.percentile_00_5:.4g} to "
            f"{stats.percentile_99_5:.4g})",
        )


def _class_presence(results: RunResults) -> tuple[tuple[str, str, str], ...]:
    """Per class: its name, its label values, and in how many of the measured cases it occurs."""
    cases = results.fingerprint.cases
    rows = []
    for index, item in enumerate(results.plan.labels.classes):
        count = sum(1 for case in cases if index < len(case.class_voxels) and case.class_voxels[index] > 0)
        values = ", ".join(str(value) for value in item.values)
        rows.append((item.name, values, f"{count} of {len(cases)}" if cases else "not measured"))
    return tuple(rows)


def _tolerance_in_words(tolerance_mm: dict[str, float]) -> str:
    if len(set(tolerance_mm.values())) == 1:
        return f"{next(iter(tolerance_mm.values())):g} mm"
    return ", ".join(f"{name} {value:g} mm" for name, value in tolerance_mm.items())


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _minutes(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds / _SECONDS_PER_MINUTE:.1f}"


def _gigabytes(count: int | None) -> str:
    return "–" if not count else f"{count / _BYTES_PER_GB:.2f}"


def _times(values: Sequence[float]) -> str:
    return " × ".join(f"{value:g}" for value in values)
