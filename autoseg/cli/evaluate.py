"""`autoseg evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("evaluate")(evaluate)


def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Folder of predicted label maps.")],
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="Folder of reference label maps with the same names.")
    ],
    json: options.Json = None,
) -> None:
    """Compare label maps with references: Dice, HD95, surface Dice by case and class."""
    from autoseg.cli.output import TerminalProgress, emit_json, stdout
    from autoseg.cli.result_tables import evaluation_table
    from autoseg.pipeline import results

    evaluation = results.evaluate(predictions, reference, progress=TerminalProgress())
    if json is not None:
        emit_json(evaluation.model_dump(mode="json"), json)
    if json != "-":
        stdout.print(evaluation_table(evaluation))
