"""`autoseg train`."""

from __future__ import annotations

import typer

from autoseg.cli import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train)


def train(
    run: options.RunArgument,
    config: options.Config = None,
    fold: options.Fold = "each",
    epochs: options.Epochs = None,
    time_budget: options.TimeBudget = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: options.Seed = None,
    pretrained: options.Pretrained = None,
    restart: options.Restart = False,
    log: options.Log = None,
    set_: options.Set = None,
    config_file: options.ConfigFile = None,
) -> None:
    """Train folds; goes on where a run stopped."""
    from autoseg.cli.output import TerminalProgress, quieten, stdout
    from autoseg.compute import launched_rank
    from autoseg.pipeline import training
    from autoseg.pipeline.settings import resolve_settings
    from autoseg.runtime import NoProgress

    settings = resolve_settings(
        config_file,
        epochs=epochs,
        time_budget=time_budget,
        device=device,
        precision=precision,
        seed=seed,
        log=log or (),
        pretrained=pretrained,
    )
    is_first = launched_rank() == 0
    if not is_first:
        # One of several processes speaks for all.
        quieten()
    results = training.train(
        run,
        settings.train,
        configuration=config,
        fold=fold,
        restart=restart,
        assignments=set_ or (),
        progress=TerminalProgress() if is_first else NoProgress(),
    )
    for result in results:
        stdout.print(result.line(), markup=False, soft_wrap=True)
