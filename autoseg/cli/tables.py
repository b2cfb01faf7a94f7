"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autoseg.checking.findings import CheckReport, Finding
from autoseg.checking.wording import listed
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import Plan

if TYPE_CHECKING:
    from autoseg.pipeline.forecast import ConfigurationForecast, Forecast

_SEVERITY_STYLE = {"error": "bold red", "warning": "yellow", "note": "dim"}

_MOST_ERRORS, _MOST_OTHERS = 10, 3
"""Findings of one kind that are told one by one: errors have to be put right, the others are examples."""


_INDENT = (0, 0, 0, 2)
"""Of the words about a decision: two columns on the left, also where a line is wrapped."""

_INTRODUCTION = (
    "A plan holds one or more configurations: each is a network of its own with the way its images are prepared. For "
    "every decision you see its rule, the numbers that were used, and what would change it. Axes are called Z (from "
    "the feet to the head), Y (from back to front) and X (from left to right). Training takes the configuration "
    "3d_fullres where there is one, another with --config."
)


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _repeated(rows: Sequence[Sequence[int]]) -> str:
    """Rows one after the other, equal neighbours counted."""
    counted = [("x".join(map(str, row)), len(list(group))) for row, group in groupby(rows)]
    return ", ".join(text if count == 1 else f"{count} times {text}" for text, count in counted)


def _blocks(network: NetworkPlan) -> str:
    down, up = (
        "-".join(map(str, blocks if len(set(blocks)) > 1 else blocks[:1]))
        for blocks in (network.blocks_per_stage_encoder, network.blocks_per_stage_decoder)
    )
    return f"{down} {network.encoder_block} down, {up or 'none'} up"


def plan_table(plan: Plan) -> Table:
    """The plan's figures, a column a configuration."""
    table = Table(title=f"Plan {plan.digest()} for {plan.dataset} (preset {plan.preset}, {plan.vram_gb:g} GB)")
    table.add_column("", overflow="fold")
    for name in plan.configurations:
        table.add_column(f"{name}\n(added by hand)" if name in plan.added_names else name, overflow="fold")
    members = tuple(plan.configurations.values())
    rows = (
        ("target spacing (mm)", [_times(item.preprocess.target_spacing) for item in members]),
        ("patch size (voxels)", [_times(item.network.patch_size) for item in members]),
        ("batch size", [str(item.training.batch_size) for item in members]),
        ("channels per stage", ["-".join(map(str, item.network.features_per_stage)) for item in members]),
        ("strides", [_repeated(item.network.strides) for item in members]),
        ("kernel sizes", [_repeated(item.network.kernel_sizes) for item in members]),
        ("blocks a stage", [_blocks(item.network) for item in members]),
        (
            "normalisation",
            [
                ", ".join(one.scheme + (" in mask" if one.use_mask else "") for one in item.preprocess.normalization)
                for item in members
            ],
        ),
    )
    for title, cells in rows:
        table.add_row(title, *cells)
    if any(item.previous_stage for item in members):
        table.add_row("also sees the result of", *(item.previous_stage or "" for item in members))
    return table


def _gigabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e9:.2f} GB"


def _duration(seconds: float | None) -> str:
    """Two units at most; a dash for what was not measured."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


def _training_length(item: ConfigurationForecast) -> str:
    steps = "" if item.training_steps is None else f"{item.training_steps:,} steps"
    seconds = "" if item.training_seconds is None else _duration(item.training_seconds)
    return ", about ".join(part for part in (seconds, steps) if part)


def forecast_table(forecast: Forecast) -> Table:
    """What training and prediction will cost on this machine, a column a configuration."""
    table = Table(title=f"Forecast for {forecast.device_name} ({forecast.device}, {forecast.precision})")
    table.add_column("")
    for name in forecast.configurations:
        table.add_column(name)
    members = tuple(forecast.configurations.values())
    steps = [item.measured for item in members]
    rows = [("memory of training, predicted", [_gigabytes(item.training.total) for item in members])]
    if any(steps):
        rows += [
            ("memory of training, measured", [_gigabytes(step.memory_bytes) if step else "–" for step in steps]),
            ("time of a step, measured", [_duration(step.step_seconds if step else None) for step in steps]),
            ("time of an epoch", [_duration(item.epoch_seconds) for item in members]),
        ]
    rows += [
        ("memory of prediction, predicted", [_gigabytes(item.prediction.total) for item in members]),
        ("disk for its preprocessed cases, at most", [_gigabytes(item.cache_bytes) for item in members]),
        ("default length of training a fold", [_training_length(item) for item in members]),
    ]
    for title, cells in rows:
        table.add_row(title, *cells)
    return table


def forecast_notes(forecast: Forecast) -> Iterator[Text]:
    """What somebody should know before training: memory that exceeds the budget or the machine, disk that is full."""
    free, disk_free = forecast.memory_free_bytes, forecast.disk_free_bytes
    above_budget, above_free = [], []
    for name, item in forecast.configurations.items():
        taken = item.training.total
        if item.measured is not None and item.measured.memory_bytes is not None:
            taken = item.measured.memory_bytes
        elif taken > forecast.budget_gb * 1e9:
            above_budget.append(name)
        if free is not None and taken > free:
            above_free.append(f"{name} needs {_gigabytes(taken)}")
    if above_budget:
        yield Text(
            f"{', '.join(above_budget)}: more than the {forecast.budget_gb:g} GB asked for is expected in "
            f"{forecast.precision} on {forecast.device}. --measure finds out and plans for less; so does a smaller "
            "--vram.",
            style="yellow",
        )
    if above_free:
        yield Text(
            f"Training {', '.join(above_free)}; {_gigabytes(free)} are free here. Plan with a smaller --vram, or train "
            "where there is more.",
            style="yellow",
        )
    if forecast.cache_bytes > disk_free:
        yield Text(
            f"The preprocessed cases of all configurations need up to {_gigabytes(forecast.cache_bytes)} of disk, "
            f"{_gigabytes(disk_free)} are free.",
            style="yellow",
        )


def decision_lines(plan: Plan) -> Iterator[Text | Padding]:
    """Every decision in words: rule, numbers, result, what would change it. A rule is told once."""
    yield Text(f"\n{_INTRODUCTION}")
    heading = None
    told: dict[str, str] = {}
    # Together by configuration, in the order in which these first appear.
    order = list(dict.fromkeys(decision.configuration for decision in plan.decisions))
    for decision in sorted(plan.decisions, key=lambda item: order.index(item.configuration)):
        if decision.configuration != heading:
            heading = decision.configuration
            yield Text(f"\n{heading or 'For every configuration'}", style="bold underline")
        topic = decision.topic if not heading else f"{decision.topic} of {heading}"
        before = told.setdefault(decision.rule, topic)
        yield Text.assemble("\n", (decision.topic, "bold"), ": ", decision.result)
        rule = decision.rule if before == topic else f"The same as for the {before}, above."
        for name, words in (("Rule", rule), ("Numbers", decision.inputs), ("Would change it", decision.would_change)):
            yield Padding(Text(f"{name}: {words}"), _INDENT)
    for override in plan.overrides:
        yield Text.assemble("\n", ("Set by hand", "bold"), f": {override.key} = {override.value} ({override.planned})")


def findings_table(report: CheckReport) -> Table:
    """One row a kind of finding, the worst first: the first findings of it, what they cost, what to do."""
    table = Table(title="Findings", show_lines=True)
    for title in ("severity", "what"):
        table.add_column(title, overflow="fold")
    for kind in report.kinds:
        own = [item for item in report.findings if (item.severity, item.code) == (kind.severity, kind.code)]
        most = _MOST_ERRORS if kind.severity == "error" else _MOST_OTHERS
        what = Text.assemble((kind.title, "bold"), (f" ({kind.code})", "not bold dim"))
        for item in own[:most]:
            what.append(f"\n{_told(item)}", style="not bold")
            if item.hint and not kind.hint:
                what.append(f"\n{item.hint}", style="not bold dim")
        if len(own) > most:
            what.append(f"\nand {len(own) - most} more; --json or --html lists all", style="not bold")
        if kind.cost:
            what.append(f"\nCosts: {kind.cost}.", style="not bold")
        if kind.hint:
            what.append(f"\n{kind.hint}", style="not bold dim")
        table.add_row(Text(kind.severity, style=_SEVERITY_STYLE[kind.severity]), what)
    return table


def _told(item: Finding) -> str:
    """A finding with its case and file; of several cases the first."""
    parts = Path(item.file).parts[-2:] if item.file else ()
    where = ", ".join(part for part in (item.case, "/".join(parts)) if part)
    cases = f" ({listed(item.cases)})" if item.cases and item.cases[0] not in item.message else ""
    return f"{where}: {item.message}" if where else f"{item.message}{cases}"
