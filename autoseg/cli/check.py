"""`autoseg check`."""

from __future__ import annotations

from pathlib import Path

import typer

from autoseg.cli import options, repairing


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("check")(check)


def check(
    dataset: options.DatasetArgument,
    repair: repairing.RepairTo = None,
    resample_labels: repairing.ResampleLabels = False,
    replace_nan: repairing.ReplaceNan = False,
    keep_orientation: repairing.KeepOrientation = False,
    keep_values: repairing.KeepValues = False,
    keep_empty: repairing.KeepEmpty = False,
    json: options.Json = None,
    html: options.Html = None,
) -> None:
    """List everything that is wrong with a data set, at once; exit 3 if anything stops training."""
    from autoseg.checking.repairs import RepairSettings
    from autoseg.cli.output import TerminalProgress, emit_json, stdout
    from autoseg.cli.tables import findings_table
    from autoseg.errors import DatasetError
    from autoseg.pipeline import planning

    allowed = RepairSettings(
        resample_labels=resample_labels,
        replace_non_finite=replace_nan,
        keep_orientation=keep_orientation,
        keep_values=keep_values,
        keep_empty=keep_empty,
    )
    dataset = repairing.repair(dataset, repair, allowed, is_quiet=json == "-")
    page = None if html is None else Path(html)
    report = planning.check(dataset, page=page, progress=TerminalProgress())
    if json is not None:
        emit_json(report.model_dump(mode="json"), json)
    if json != "-":
        if report.findings:
            stdout.print(findings_table(report))
        stdout.print(report.headline(), markup=False, soft_wrap=True)
        if page is not None:
            stdout.print(f"Page: {page}", markup=False, soft_wrap=True)
    if report.stops_training:
        raise typer.Exit(DatasetError.exit_code)
