"""`autoseg run`."""

from __future__ import annotations

import typer

from autoseg.cli import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run")(run)


def run(
    dataset: options.DatasetArgument,
    out: options.OutRun,
    preset: options.Preset = None,
    vram: options.Vram = None,
    step_time: options.StepTime = None,
    add: options.Add = None,
    set_: options.Set = None,
    config_file: options.ConfigFile = None,
    measure: options.Measure = False,
    config: options.Config = None,
    fold: options.Fold = "each",
    epochs: options.Epochs = None,
    time_budget: options.TimeBudget = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: options.Seed = None,
    pretrained: options.Pretrained = None,
    restart: options.Restart = False,
    jobs: options.Jobs = "auto",
    log: options.Log = None,
) -> None:
    """Check, plan, train every fold of every configuration, choose, report; run again, it goes on where it stopped."""
    from autoseg.cli.output import TerminalProgress, stdout
    from autoseg.pipeline import results
    from autoseg.pipeline.settings import resolve_settings

    settings = resolve_settings(
        config_file,
        preset=preset,
        vram=vram,
        step_time=step_time,
        additions=add or (),
        assignments=set_ or (),
        epochs=epochs,
        time_budget=time_budget,
        device=device,
        precision=precision,
        seed=seed,
        log=log or (),
        pretrained=pretrained,
    )
    page = results.run(
        dataset,
        out,
        settings,
        configuration=config,
        fold=fold,
        restart=restart,
        measures_step=measure,
        jobs=options.parse_jobs(jobs),
        progress=TerminalProgress(),
    )
    stdout.print(f"Report: {page}", markup=False, soft_wrap=True)
