"""`autoseg export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli import options


class Format(StrEnum):
    """What is written."""

    MODEL = "model"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|MODEL", help="A run folder, an exported model, or one trained fold's folder."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="PATH", help="The folder or .zip file to make.", show_default=False)
    ],
    kind: Annotated[
        Format, typer.Option("--format", help="model: everything that predict needs, and a model card.")
    ] = Format.MODEL,
    config: options.Config = None,
    fold: Annotated[
        str | None, typer.Option("--fold", help="Folds to take: one number, several as 0,1, or all. Default: finished.")
    ] = None,
) -> None:
    """Write a trained model as one folder or .zip that predict takes anywhere."""
    from autoseg.cli.output import stdout
    from autoseg.pipeline.exporting import export_model

    writers = {Format.MODEL: export_model}
    stdout.print(str(writers[kind](run, out, config, fold)), markup=False, soft_wrap=True)
