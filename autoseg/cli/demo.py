"""`autoseg demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_OUT = Path("autoseg-demo")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="Folder for data, run and predictions.")] = DEFAULT_OUT,
) -> None:
    """Plan, train, predict and report on packaged real data, in minutes on a CPU."""
    from autoseg.cli.output import TerminalProgress, stderr, stdout
    from autoseg.pipeline.demo import run_demo

    def say(text: str) -> None:
        stderr.print(f"\n[bold]{text}[/]", soft_wrap=True)

    outcome = run_demo(out, say=say, progress=TerminalProgress())
    for line in outcome.lines():
        stdout.print(line, markup=False, soft_wrap=True)
