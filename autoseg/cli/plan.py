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
    step_time: options.StepTime = None,
    add: options.Add = None,
    set_: options.Set = None,
    config_file: options.ConfigFile = None,
    why: Annotated[
        bool, typer.Option("--why", help="Say the rule and the numbers of every decision (also in --json).")
    ] = False,
    fingerprint: Annotated[
        Path | None,
        typer.Option(help="Plan from this fingerprint (ours, or nnU-Net's dataset_fingerprint.json); reads no image."),
    ] = None,
    measure: options.Measure = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    json: options.Json = None,
) -> None:
    """Measure a data set and derive a U-Net from the measurements."""
    from autoseg.cli.output import TerminalProgress, emit_json, stdout
    from autoseg.cli.tables import decision_lines, forecast_notes, forecast_table, plan_table
    from autoseg.io.run_folder import RunFolder
    from autoseg.pipeline import planning
    from autoseg.pipeline.forecast import read_forecast
    from autoseg.pipeline.settings import resolve_settings
    from autoseg.planning.explain import explain

    settings = resolve_settings(
        config_file,
        preset=preset,
        vram=vram,
        step_time=step_time,
        additions=add or (),
        assignments=set_ or (),
        device=device,
        precision=precision,
    )
    made = planning.plan(
        dataset,
        out,
        settings,
        fingerprint_file=fingerprint,
        measures_step=measure,
        progress=TerminalProgress(),
    )
    if json is not None:
        shown = made.model_copy(update={"decisions": explain(made)}) if why else made
        emit_json(shown.model_dump(mode="json"), json)
        if json == "-":
            return
    stdout.print(plan_table(made))
    forecast = read_forecast(RunFolder(out))
    stdout.print(forecast_table(forecast))
    for note in forecast_notes(forecast):
        stdout.print(note, soft_wrap=True)
    if why:
        for line in decision_lines(made):
            stdout.print(line)
    if made.added_names:
        stdout.print(f"Added by hand, checked and kept: {', '.join(made.added_names)}.", markup=False, soft_wrap=True)
    stdout.print(f"Plan written to {out / 'plan.json'}. Next: autoseg train {out}", markup=False, soft_wrap=True)
