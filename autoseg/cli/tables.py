"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from autoseg.checking.findings import CheckReport
from autoseg.domain.plan import Plan
from autoseg.evaluation.crossval import Evaluation, table

_SEVERITY_STYLE = {"error": "bold red", "warning": "yellow", "note": "dim"}


def _times(values: tuple[float, ...] | tuple[int, ...]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def plan_table(plan: Plan) -> Table:
    """The plan's figures, a column a configuration."""
    table = Table(title=f"Plan {plan.digest()} for {plan.dataset} (preset {plan.preset}, {plan.vram_gb:g} GB)")
    table.add_column("")
    for name in plan.configurations:
        table.add_column(name)
    members = tuple(plan.configurations.values())
    rows = (
        ("target spacing (mm)", [_times(item.preprocess.target_spacing) for item in members]),
        ("patch size (voxels)", [_times(item.network.patch_size) for item in members]),
        ("batch size", [str(item.training.batch_size) for item in members]),
        ("features per stage", ["-".join(map(str, item.network.features_per_stage)) for item in members]),
        ("strides", [", ".join(_times(stride) for stride in item.network.strides) for item in members]),
        ("kernel sizes", [", ".join(_times(kernel) for kernel in item.network.kernel_sizes) for item in members]),
        (
            "normalization",
            [
                ", ".join(one.scheme + (" in mask" if one.use_mask else "") for one in item.preprocess.normalization)
                for item in members
            ],
        ),
    )
    for title, cells in rows:
        table.add_row(title, *cells)
    return table


def decision_lines(plan: Plan) -> Iterator[Text]:
    """Every decision in words: rule, numbers, result, what would change it."""
    heading = None
    # Together by configuration, in the order in which these first appear.
    order = list(dict.fromkeys(decision.configuration for decision in plan.decisions))
    for decision in sorted(plan.decisions, key=lambda item: order.index(item.configuration)):
        if decision.configuration != heading:
            heading = decision.configuration
            yield Text(f"\n{heading or 'For every configuration'}", style="bold underline")
        yield Text.assemble("\n", (decision.topic, "bold"), ": ", decision.result)
        yield Text(f"  Rule: {decision.rule}")
        yield Text(f"  From: {decision.inputs}")
        yield Text(f"  Would change it: {decision.would_change}")
    for override in plan.overrides:
        yield Text.assemble("\n", ("Set by hand", "bold"), f": {override.key} = {override.value} ({override.planned})")


def findings_table(report: CheckReport) -> Table:
    """One row a finding, the worst first."""
    table = Table(title="Findings")
    for title in ("severity", "case", "file", "what"):
        table.add_column(title, overflow="fold")
    order = list(_SEVERITY_STYLE)
    for item in sorted(report.findings, key=lambda found: (order.index(found.severity), found.case, found.file)):
        what = Text(item.message)
        if item.hint:
            what.append(f"\n{item.hint}", style="dim")
        table.add_row(Text(item.severity, style=_SEVERITY_STYLE[item.severity]), Text(item.case), Text(item.file), what)
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """A row a class with the means over the cases, and the mean foreground Dice below."""
    summary = evaluation.summary
    header, rows = table(evaluation)
    mean = summary.mean_foreground_dice
    shown = Table(
        title=f"{summary.num_cases} cases",
        caption="Mean foreground Dice: " + ("undefined" if mean is None else f"{mean:.4f}"),
    )
    for title in header:
        shown.add_column(title, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown
