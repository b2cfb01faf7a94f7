"""What the page's scripts draw and download, as one block of plain JSON.

Figures are rounded to what a picture can show, and rows are lists, so that many cases of many classes stay small; the
whole figures are in summary.json and cases.csv.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from autoseg.evaluation.metrics import METRIC_NAMES, METRIC_TITLES, ClassMetrics
from autoseg.report.collect import CaseRow, ConfigurationResult, ReportSummary, RunResults
from autoseg.report.tally import agreement, rows_of, tally

DIGITS = 4
"""Significant digits of every figure."""

MAX_FIGURES = 100_000
CORE_METRICS = ("dice", "surface_dice", "hd95_mm")
"""Above so many figures only these metrics are in the page: the others would take more room than all the rest."""

PRESENCES = ("both", "missed", "spurious", "absent", "unannotated")
"""Rows hold their places in this list."""

_SECONDS_PER_MINUTE = 60.0
_BYTES_PER_GB = 1e9


def chart_data(results: RunResults, rows: Sequence[CaseRow]) -> dict[str, Any]:
    """Everything that is drawn.

    Args:
        results: Of the run.
        rows: In the order of the table, by whose places the charts name them.
    """
    names = results.plan.labels.names
    configurations = [item.name for item in results.summary.configurations]
    metrics = metrics_in_page(results, rows)
    best = next((item for item in results.summary.configurations if item.name == results.summary.best), None)
    return {
        "dataset": results.dataset.name,
        "classes": list(names),
        "configurations": configurations,
        "shown": shown_names(results.summary),
        "best": results.summary.best,
        "metrics": list(metrics),
        "presences": list(PRESENCES),
        "titles": dict(METRIC_TITLES),
        "rows": [
            {
                "case": row.metrics.case,
                "configuration": configurations.index(row.configuration),
                "fold": str(row.fold),
                "mean": rounded(row.metrics.mean_dice),
                "classes": [_class_figures(item, metrics) for item in row.metrics.classes],
            }
            for row in rows
        ],
        "epochs": _epochs(results),
        "agreement": [
            {"class": item.name, "bias": item.bias, "low": item.low, "high": item.high}
            for item in map(agreement, tally(rows_of(results, results.summary.best), names))
            if item is not None
        ],
        "confusions": _confusions(best),
        "calibration": _calibration(results),
        "confidences": _confidences(results),
    }


def shown_names(summary: ReportSummary) -> dict[str, str]:
    """What the page calls each configuration: "final" says nothing to a reader."""
    return {
        item.name: f"{summary.best}, post-processed" if item.kind == "final" else item.name
        for item in summary.configurations
    }


def rounded(value: float | None) -> float | None:
    """To `DIGITS` significant digits."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


def defined_metrics(results: RunResults) -> tuple[str, ...]:
    """Those that any class of any configuration has: folds scored by an earlier version lack the newer ones."""
    summaries = [item.summary for item in results.summary.configurations if item.summary is not None]
    found = {one.metric for summary in summaries for row in summary.classes for one in row.metrics if one.num_defined}
    return tuple(name for name in METRIC_NAMES if name in found)


def metrics_in_page(results: RunResults, rows: Sequence[CaseRow]) -> tuple[str, ...]:
    """Those whose figures of every case and class have room in the page."""
    names = defined_metrics(results)
    has_room = len(rows) * len(results.plan.labels.names) * len(names) <= MAX_FIGURES
    return tuple(name for name in names if has_room or name in CORE_METRICS)


def _class_figures(item: ClassMetrics, metrics: Sequence[str]) -> list[Any]:
    """Place of the presence, volumes in reference and prediction, then the metrics in order."""
    figures = (rounded(getattr(item, name)) for name in metrics)
    return [PRESENCES.index(item.presence), rounded(item.reference_mm3), rounded(item.prediction_mm3), *figures]


def _epochs(results: RunResults) -> list[dict[str, Any]]:
    found = []
    for curve in results.curves:
        before = 0.0
        for epoch in curve.epochs:
            found.append(
                {
                    "configuration": curve.configuration,
                    "fold": str(curve.fold),
                    "epoch": epoch.epoch + 1,
                    "minutes": rounded(epoch.seconds / _SECONDS_PER_MINUTE),
                    "training": rounded(epoch.train_loss),
                    "validation": rounded(epoch.validation_loss),
                    "dice": rounded(epoch.mean_pseudo_dice),
                    "whole": rounded(epoch.mean_whole_dice),
                    "seconds": rounded(max(0.0, epoch.seconds - before)),
                    "gigabytes": rounded(epoch.memory_bytes / _BYTES_PER_GB) if epoch.memory_bytes else None,
                }
            )
            before = epoch.seconds
    return _thinned(found)


MAX_EPOCH_POINTS = 3000
"""Points of all learning curves together: more cannot be seen, and would make the page large."""


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every n-th epoch, and the last of each curve, so that no more than `MAX_EPOCH_POINTS` stay."""
    step = -(-len(points) // MAX_EPOCH_POINTS) or 1
    if step == 1:
        return points
    last = {(point["configuration"], point["fold"]): index for index, point in enumerate(points)}
    ends = set(last.values())
    return [point for index, point in enumerate(points) if index in ends or point["epoch"] % step == 0]


def _confusions(best: ConfigurationResult | None) -> list[dict[str, Any]]:
    if best is None or best.summary is None:
        return []
    return [
        {"reference": one.reference, "prediction": one.prediction, "voxels": one.voxels}
        for one in best.summary.confusions
    ]


def _calibration(results: RunResults) -> list[dict[str, Any]]:
    selection = results.summary.selection
    if selection is None:
        return []
    points = []
    for item in selection.calibrations:
        for one in item.classes:
            for when, bins in (("before", one.bins_before), ("after", one.bins_after)):
                points += [
                    {
                        "configuration": item.configuration,
                        "class": one.name,
                        "when": when,
                        "confidence": rounded(point.confidence),
                        "frequency": rounded(point.frequency),
                        "voxels": point.voxels,
                    }
                    for point in bins
                ]
    return points


def _confidences(results: RunResults) -> list[dict[str, Any]]:
    selection = results.summary.selection
    if selection is None:
        return []
    return [
        {
            "case": item.case,
            "entropy": rounded(item.mean_entropy),
            "expected": rounded(_mean(item.expected_dice.values())),
            "sure": rounded(item.sure_errors_fraction),
        }
        for item in selection.confidences
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
