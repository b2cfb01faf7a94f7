"""`autoseg report`."""

from __future__ import annotations

import typer

from autoseg.cli import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(run: options.RunArgument, json: options.Json = None) -> None:
    """Write RUN/report/index.html, summary.json and cases.csv from the folds that are finished."""
    from autoseg.cli.output import emit_json, stdout
    from autoseg.io.files import read_json
    from autoseg.pipeline import results

    page = results.report(run)
    if json is not None:
        emit_json(read_json(page.parent / "summary.json"), json)
    if json != "-":
        stdout.print(f"Report: {page}", markup=False, soft_wrap=True)
