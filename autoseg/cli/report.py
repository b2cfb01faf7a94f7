"""`autoseg report`."""

from __future__ import annotations

import typer

from autoseg.cli import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(run: options.RunArgument, select: options.Select = False, json: options.Json = None) -> None:
    """Write RUN/report/index.html, summary.json and cases.csv from the folds that are finished."""
    from autoseg.cli.output import TerminalProgress, emit_json, stdout
    from autoseg.cli.result_tables import report_tables
    from autoseg.io.files import read_json
    from autoseg.pipeline import results
    from autoseg.report.collect import SUMMARY_FILE, ReportSummary

    page = results.report(run, selects=select, progress=TerminalProgress())
    data = read_json(page.parent / SUMMARY_FILE)
    if json is not None:
        emit_json(data, json)
    if json != "-":
        for table in report_tables(ReportSummary.model_validate(data)):
            stdout.print(table)
        stdout.print(f"Report: {page}", markup=False, soft_wrap=True)
