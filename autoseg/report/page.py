"""Write the report of a run: the page, the model card, and the numbers as JSON and CSV beside them."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from autoseg.evaluation.metrics import METRIC_TITLES
from autoseg.io.files import write_text
from autoseg.io.run_folder import RunFolder
from autoseg.report import wording
from autoseg.report.card import model_card
from autoseg.report.chart_data import chart_data, defined_metrics, shown_names
from autoseg.report.collect import (
    SUMMARY_FILE,
    CaseRow,
    ConfigurationResult,
    ReportSummary,
    RunResults,
    cases_csv,
    collect,
    knows_patients,
)
from autoseg.report.facts import (
    PlannedCost,
    class_presence,
    cost_rows,
    data_facts,
    is_flat,
    provenance,
    total_training,
)
from autoseg.report.findings import NUM_SHOWN, find
from autoseg.report.gallery import SIDE_FOLDER, Gallery, make_gallery
from autoseg.report.method import describe
from autoseg.report.shorts import in_short
from autoseg.report.tally import fold_rows, rows_of
from autoseg.report.templating import environment_of_pages, trusted_part

PAGE_FILE = "index.html"
CARD_FILE = "model_card.md"

MAX_PAGE_BYTES = 4_900_000
"""Of the page with its pictures and volumes; what does not fit lies beside it."""

MAX_CLASSES_IN_FULL = 3
"""Up to so many classes, the table of cases shows three metrics a class ..."""

MAX_CLASSES_IN_TABLE = 12
"""... up to so many the Dice of each, and beyond the class of the lowest Dice."""

CASE_METRICS = ("dice", "surface_dice", "hd95_mm")

NO_COSTS: Mapping[str, PlannedCost] = MappingProxyType({})

_STYLES = ("page.css", "viewer.css")
_SCRIPTS = ("page.js", "tables.js", "charts.js", "viewer.js", "start.js")
_LIBRARIES = ("d3.min.js", "plot.umd.min.js")
_VIEWER = "niivue.umd.js.gz"
_VOLUMES_MARK = "<!-- volumes -->"
_NO_GALLERY = Gallery((), MappingProxyType({}), MappingProxyType({"": ""}))
# Names one case, so that the viewer is there when the room beside it is measured.


def write_report(run: RunFolder, planned: Mapping[str, PlannedCost] = NO_COSTS) -> Path:
    """Write the report of every finished fold of every configuration; returns the page.

    Args:
        run: With at least one finished fold.
        planned: What was foreseen, by configuration.

    Raises:
        ConfigError: The folder is not a run, no fold is finished, or a file in it is not valid.
    """
    results = collect(run)
    folder = run.report_folder
    write_text(folder / SUMMARY_FILE, results.summary.to_json())
    write_text(folder / "cases.csv", cases_csv(results))
    write_text(folder / CARD_FILE, model_card(results))
    shutil.rmtree(folder / SIDE_FOLDER, ignore_errors=True)
    room = MAX_PAGE_BYTES - len(render(results, _NO_GALLERY, planned).encode())
    ranked = [row for row in worst_first(rows_of(results, results.summary.best)) if row.metrics.mean_dice is not None]
    gallery = make_gallery(run, results, ranked, room)
    page = folder / PAGE_FILE
    write_text(page, render(results, gallery, planned))
    return page


def render(results: RunResults, gallery: Gallery, planned: Mapping[str, PlannedCost] = NO_COSTS) -> str:
    """The page: one document that asks the network for nothing.

    Args:
        results: Of the run.
        gallery: Pictures and volumes.
        planned: What was foreseen, by configuration.
    """
    rows = worst_first(results.cases)
    names = results.plan.labels.names
    summary = results.summary
    tolerance = wording.tolerance_in_words(summary.tolerance_mm)
    seconds, peak = total_training(results)
    scored = best_first(summary)
    page = (
        environment_of_reports()
        .get_template("page.html.j2")
        .render(
            summary=summary,
            scored=scored,
            shown=shown_names(summary),
            main=scored[0].name if scored else None,
            fold_rows=fold_rows(results, scored),
            knows_patients=knows_patients(results),
            best=_named(summary.configurations, summary.best),
            selection=summary.selection,
            dataset=results.dataset,
            plan=results.plan,
            names=names,
            is_flat=is_flat(results),
            shorts=in_short(results),
            findings=find(results)[:NUM_SHOWN],
            first_row={
                row.metrics.case: index for index, row in reversed(list(enumerate(rows))) if _is_best(results, row)
            },
            data_facts=tuple(data_facts(results)),
            class_presence=class_presence(results),
            costs=cost_rows(results, planned),
            provenance=tuple(provenance(results)),
            total_seconds=seconds,
            peak_bytes=peak,
            rows=rows,
            gallery=gallery,
            defined_metrics=defined_metrics(results),
            metric_titles=METRIC_TITLES,
            case_metrics=CASE_METRICS if len(names) <= MAX_CLASSES_IN_FULL else CASE_METRICS[:1],
            has_class_columns=len(names) <= MAX_CLASSES_IN_TABLE,
            data=chart_data(results, rows) | {"volumes": dict(gallery.keys)},
            tolerance=tolerance,
            method=describe(results, tolerance),
            # Our own files and the vendored libraries are trusted; everything else is escaped.
            style=Markup("").join(trusted_part(name) for name in _STYLES),
            scripts=[trusted_part(name) for name in _SCRIPTS],
            libraries=[Markup(_vendored(name).decode()) for name in _LIBRARIES],
            viewer=Markup(base64.b64encode(_vendored(_VIEWER)).decode("ascii")) if gallery.keys else "",
            volumes_mark=Markup(_VOLUMES_MARK),
        )
    )
    # Not through the template: megabytes of base64 that need no escaping.
    volumes = (f'<script type="application/json" id="volumes-{key}">{text}</script>' for key, text in _items(gallery))
    return page.replace(_VOLUMES_MARK, "\n".join(volumes), 1)


def _items(gallery: Gallery) -> list[tuple[str, str]]:
    return list(gallery.embedded.items())


def environment_of_reports() -> Environment:
    """Templates with the ways in which reports write numbers."""
    environment = environment_of_pages()
    environment.filters |= {
        "number": wording.number,
        "minutes": wording.minutes,
        "seconds": wording.seconds,
        "gain": wording.gain,
        "gigabytes": wording.gigabytes,
        "times": wording.times,
        "p_value": wording.p_value,
    }
    return environment


def worst_first(rows: Sequence[CaseRow]) -> tuple[CaseRow, ...]:
    """Rows by mean Dice, the lowest first; cases without any class last."""

    def key(row: CaseRow) -> tuple[float, str, str]:
        mean = row.metrics.mean_dice
        return (np.inf if mean is None else mean, row.metrics.case, row.configuration)

    return tuple(sorted(rows, key=key))


def best_first(summary: ReportSummary) -> list[ConfigurationResult]:
    """What was scored: what `predict` gives, then what was chosen, then the others by their mean foreground Dice."""

    def key(item: ConfigurationResult) -> tuple[bool, bool, float]:
        dice = None if item.summary is None else item.summary.mean_foreground_dice
        return item.kind != "final", item.name != summary.best, np.inf if dice is None else -dice

    return sorted((item for item in summary.configurations if item.summary is not None), key=key)


def _is_best(results: RunResults, row: CaseRow) -> bool:
    return row.configuration == results.summary.best


def _named(configurations: Sequence[ConfigurationResult], name: str | None) -> ConfigurationResult | None:
    return next((item for item in configurations if item.name == name), None)


def _vendored(name: str) -> bytes:
    found: Any = resources.files("autoseg.report") / "vendor" / name
    content: bytes = found.read_bytes()
    return content
