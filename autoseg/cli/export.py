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
    ONNX = "onnx"
    BUNDLE = "bundle"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|MODEL", help="A run folder, an exported model, or one trained fold's folder."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="PATH", help="The folder, or .zip or .onnx file, to make.", show_default=False),
    ],
    kind: Annotated[
        Format,
        typer.Option(
            "--format",
            help="model: everything that predict needs, and a model card. onnx: one file for all folds, with a JSON "
            "card beside it that says how to run it (needs the extra onnx). bundle: a folder that python -m "
            "monai.bundle run takes, and predict too.",
        ),
    ] = Format.MODEL,
    config: options.Config = None,
    fold: Annotated[
        str | None, typer.Option("--fold", help="Folds to take: one number, several as 0,1, or all. Default: finished.")
    ] = None,
) -> None:
    """Write a trained model as one folder or .zip that predict takes anywhere, or for another program."""
    from autoseg.cli.output import stdout
    from autoseg.pipeline.bundle_exporting import export_bundle
    from autoseg.pipeline.exporting import export_model
    from autoseg.pipeline.onnx_exporting import export_onnx_file

    writers = {Format.MODEL: export_model, Format.ONNX: export_onnx_file, Format.BUNDLE: export_bundle}
    stdout.print(str(writers[kind](run, out, config, fold)), markup=False, soft_wrap=True)
