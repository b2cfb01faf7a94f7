"""Scores as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from autoseg.evaluation.crossval import Evaluation, table
from autoseg.evaluation.selection import Calibration, Candidate, CandidateComparison, Selection
from autoseg.evaluation.statistics import Interval
from autoseg.evaluation.summaries import Summary
from autoseg.report.collect import ReportSummary


def evaluation_table(evaluation: Evaluation) -> Table:
    """A row a class with the means over the cases, and the mean foreground Dice below."""
    summary = evaluation.summary
    header, rows = table(evaluation)
    shown = Table(title=f"{summary.num_cases} cases", caption=f"Mean foreground Dice: {_mean_dice(summary)}")
    for title in header:
        shown.add_column(title, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def report_tables(summary: ReportSummary) -> Iterator[Table | Text]:
    """Configurations, classes of the best one, and what was chosen."""
    scored = [item for item in summary.configurations if item.summary is not None]
    if not scored:
        yield Text("No fold with held-out cases is finished: there are no scores yet.")
        return
    yield _configurations(summary)
    best = next((item for item in scored if item.name == summary.best), scored[0])
    assert best.summary is not None
    yield _classes(best.name, best.summary)
    if summary.selection is not None:
        yield _comparisons(summary.selection)
        yield _choice(summary.selection)


def _configurations(summary: ReportSummary) -> Table:
    shown = _compact(f"{summary.dataset}: {summary.num_cases} cases, {summary.num_patients} patients")
    for title in ("configuration", "folds", "cases", "mean foreground Dice", "95 % interval", "s a case"):
        shown.add_column(title, overflow="fold")
    candidates = {} if summary.selection is None else {item.name: item for item in summary.selection.candidates}
    for item in summary.configurations:
        if item.summary is None:
            continue
        name = f"{item.name} (chosen)" if summary.selection and item.name == summary.selection.choice else item.name
        folds = ", ".join(str(fold.fold) for fold in item.folds) or "–"
        dice, interval = _number(item.summary.mean_foreground_dice), _interval(item.summary.interval)
        shown.add_row(name, folds, str(item.summary.num_cases), dice, interval, _seconds(candidates.get(item.name)))
    return shown


def _seconds(candidate: Candidate | None) -> str:
    return "–" if candidate is None or candidate.seconds_per_case is None else f"{candidate.seconds_per_case:.2f}"


def _classes(name: str, summary: Summary) -> Table:
    """Narrow enough for a terminal of 80 columns; all figures are in the page and in summary.json."""
    shown = _compact(
        f"Classes, {name}",
        "Means over the cases that contain the class: Dice, surface Dice (NSD), distance, relative volume error.\n"
        "Lesions: F1 over all cases.",
    )
    for title in ("class", "Dice", "95 % interval", "NSD", "HD95 mm", "volume", "lesions", "missed", "false"):
        shown.add_column(title, overflow="fold")
    for item in summary.classes:
        dice = item.metric("dice")
        relative = item.metric("relative_volume_error").mean
        shown.add_row(
            item.name,
            _number(dice.mean, 3),
            _interval(dice.interval),
            _number(item.metric("surface_dice").mean, 3),
            _number(item.metric("hd95_mm").mean, 2),
            "–" if relative is None else f"{relative:+.1%}",
            "–" if item.lesions is None else _number(item.lesions.f1, 2),
            f"{item.num_missed}/{item.num_present}",
            f"{item.num_spurious}/{item.num_absent}",
        )
    return shown


def _compact(title: str, caption: str | None = None) -> Table:
    return Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _comparisons(selection: Selection) -> Table | Text:
    """Every pair of candidates by their Dice."""
    rows = [row for row in selection.comparisons if row.metric == "dice" and row.class_name is None]
    if not rows:
        return Text("")
    test = f"p by {selection.statistics.test}, over {selection.statistics.num_patients} patients"
    shown = _compact("Dice compared", test)
    for title in ("first", "second", "difference", "95 % interval", "p", "adjusted", "effect"):
        shown.add_column(title, overflow="fold")
    for row in rows:
        shown.add_row(row.first, row.second, *_figures(row))
    return shown


def _figures(row: CandidateComparison) -> tuple[str, ...]:
    difference = "–" if row.difference is None else f"{row.difference:+.4f}"
    p_values = ("–" if value is None else f"{value:.2g}" for value in (row.p_value, row.p_adjusted))
    return difference, _interval(row.interval), *p_values, _number(row.rank_biserial, 2)


def _choice(selection: Selection) -> Text:
    rules = [item for item in selection.tried_rules if item.is_kept]
    shown = Text.assemble("Chosen: ", (selection.choice, "bold"), f". {selection.reason}.\n")
    if rules:
        names = ", ".join(f"{item.rule.in_short} ({', '.join(item.rule.classes)})" for item in rules)
        gained = (selection.final.mean_foreground_dice or 0.0) - (selection.chosen.mean_foreground_dice or 0.0)
        shown.append(f"Post-processing: {names}; mean foreground Dice {gained:+.4f}.\n")
    else:
        shown.append(f"Post-processing: none; of {len(selection.tried_rules)} rules none helps surely.\n")
    for item in selection.calibrations:
        errors = f"calibration error {item.error_before:.4f} before, {item.error_after:.4f} after"
        shown.append(f"Temperatures of {item.configuration}: {_temperatures(item)}; {errors}.\n")
    return shown


def _temperatures(calibration: Calibration) -> str:
    """Of every class, or of all where a file has no others."""
    background = calibration.background_temperature
    named = {} if background is None else {"background": background}
    named |= {item.name: item.temperature for item in calibration.classes if item.temperature is not None}
    return ", ".join(f"{name} {value:g}" for name, value in named.items()) or f"{calibration.temperature:g}"


def _mean_dice(summary: Summary) -> str:
    mean = summary.mean_foreground_dice
    if mean is None:
        return "undefined"
    interval = _interval(summary.interval)
    return (
        f"{mean:.4f}" if interval == "–" else f"{mean:.4f} (95 % interval {interval}, {summary.num_patients} patients)"
    )


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    # A dash beside a minus sign cannot be read.
    return f"{interval.low:.3f}{'–' if interval.low >= 0 else ' to '}{interval.high:.3f}"
