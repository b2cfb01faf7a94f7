"""`autoseg plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan)


def plan(
    dataset: options.DatasetArgument,
    out: options.OutRun,
    preset: options.Preset = None,
    vram: options.Vram = None,
    set_: options.Set = None,
    config_file: options.ConfigFile = None,
    why: Annotated[bool, typer.Option("--why", help="Say for every decision the rule and the numbers.")] = False,
    fingerprint: Annotated[
        Path | None,
        typer.Option(help="Plan from this fingerprint (ours, or nnU-Net's dataset_fingerprint.json); reads no image."),
    ] = None,
    json: options.Json = None,
) -> None:
    """Measure a data set and derive a U-Net from the measurements."""
    from autoseg.cli.output import TerminalProgress, emit_json, stdout
    from autoseg.cli.tables import decision_lines, plan_table
    from autoseg.pipeline import planning
    from autoseg.pipeline.settings import resolve_settings

    settings = resolve_settings(config_file, preset=preset, vram=vram, assignments=set_ or ())
    made = planning.plan(dataset, out, settings, fingerprint_file=fingerprint, progress=TerminalProgress())
    if json is not None:
        emit_json(made.model_dump(mode="json"), json)
        if json == "-":
            return
    stdout.print(plan_table(made))
    if why:
        for line in decision_lines(made):
            stdout.print(line, soft_wrap=True)
    stdout.print(f"Plan written to {out / 'plan.json'}. Next: autoseg train {out}", markup=False, soft_wrap=True)
