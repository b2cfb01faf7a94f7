"""`autoseg import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli import options


def register(app: typer.Typer) -> None:
    """Add the command with its subcommands."""
    group = typer.Typer(
        name="import",
        help="Make a run of models that another program trained.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.command("nnunet")(nnunet)
    # Of a group with a single command typer would make that command itself.
    group.callback()(_group)
    app.add_typer(group)


def _group() -> None:
    """Make a run of models that another program trained."""


def nnunet(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|ZIP",
            help="A folder of nnU-Net v2's results (of one configuration, or of a data set), or a zip it exported.",
            show_default=False,
        ),
    ],
    out: options.OutRun,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="NAME", help="The checkpoint of each fold to take.")
    ] = "checkpoint_final.pth",
) -> None:
    """Make a run of trained nnU-Net v2 models: `predict` then segments as nnU-Net does."""
    from autoseg.cli.output import stdout
    from autoseg.interop.nnunet import import_nnunet

    imported = import_nnunet(source, out, checkpoint)
    for name, folds in imported.folds.items():
        plural = "s" if len(folds) > 1 else ""
        stdout.print(f"{name}: fold{plural} {', '.join(map(str, folds))}", markup=False, soft_wrap=True)
    licence = (imported.licence.splitlines() or ["not stated; ask those who trained the model"])[0]
    stdout.print(f"Licence of the weights: {licence}", markup=False, soft_wrap=True)
    stdout.print(f"Predict with: autoseg predict {imported.run} INPUT --out OUT", markup=False, soft_wrap=True)
