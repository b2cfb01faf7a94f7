"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoseg.errors import ConfigError

DatasetArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DATASET",
        help="A folder in the MSD or nnU-Net raw layout, its dataset.json, or a .json/.csv manifest of the cases.",
        show_default=False,
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder that `plan` made.")]
OutRun = Annotated[Path, typer.Option("--out", metavar="RUN", help="The run folder to make.", show_default=False)]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="[FILE]", help="Print the result as JSON, or write it to FILE (ends in .json)."),
]
Html = Annotated[
    str | None,
    typer.Option(
        "--html",
        metavar="[FILE]",
        help="Also write a page with the findings and a picture of every case: FILE (ends in .html), or "
        "autoseg-check.html here.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option("--config", help="A configuration of the plan, e.g. 2d. Default: 3d_fullres where planned, else 2d."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Planning rules: default, cpu (short steps, for machines without a GPU), nnunet, nnunet-resenc-m, "
        "nnunet-resenc-l, nnunet-resenc-xl; or a YAML file of your own like those in configs/presets. Default: cpu "
        "where there is no GPU, else default.",
    ),
]
StepTime = Annotated[
    str | None,
    typer.Option("--step-time", metavar="0.3s", help="Longest training step, with the preset cpu. Default: 0.3s."),
]
Add = Annotated[
    list[str] | None,
    typer.Option(
        "--add",
        metavar="NAME=CONFIG",
        help="Add a configuration that begins as a copy of a planned one, e.g. 3d_small=3d_fullres; change it with "
        "--set. Such configurations, also those written into plan.json by hand, stay when planned again. Repeatable.",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="8GB",
        help="Memory for one training step, or auto: what the CUDA device has free (without one the preset's own, or "
        "less where the computer has less). Default: the preset's own (8GB; nnunet-resenc-l 24GB, -xl 40GB).",
    ),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Try a real training step on this machine: plan smaller if it does not fit, and forecast the time.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key, e.g. 3d_fullres.training.batch_size=4. Repeatable."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config-file", help="Settings in YAML; configs/default.yaml shows every key.")
]
Fold = Annotated[
    str,
    typer.Option("--fold", help="A fold's number, each (every fold in turn), or all (one model on every case)."),
]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, help="Train this many epochs.")]
TimeBudget = Annotated[
    str | None,
    typer.Option("--time-budget", metavar="25m", help="Train this long a fold, the whole schedule fitted into it."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32, bf16 or fp16.")]
PrecisionOfEngines = Annotated[
    str, typer.Option("--precision", help="auto, fp32, bf16, fp16, or int8 with --engine openvino.")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, help="Of initial weights, patches and augmentation. Default: that of the settings."),
]
Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="NAME",
        help="Also log the learning curve to tensorboard, mlflow or wandb (needs the extra of that name). Repeatable.",
    ),
]
Pretrained = Annotated[
    Path | None,
    typer.Option(
        "--pretrained",
        metavar="MODEL",
        help="Begin with the weights of this model (a fold folder, or a run) where they fit.",
        show_default=False,
    ),
]
Select = Annotated[
    bool,
    typer.Option(
        "--select",
        help="First choose by cross-validation what `predict` uses: configuration or pair, temperatures, "
        "post-processing (RUN/inference.json). `run` does so at its end.",
    ),
]
Jobs = Annotated[
    str,
    typer.Option(
        "--jobs",
        metavar="N",
        help="Folds that are trained at a time, each in a process of its own; fewer where memory does not allow it. "
        "auto: one on each GPU.",
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what was trained and start afresh.")]


def parse_jobs(text: str) -> int | None:
    """A number of jobs; None for "auto".

    Raises:
        ConfigError: Neither.
    """
    if text == "auto":
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise ConfigError(f"--jobs needs a number from 1, or auto; got {text!r}")
