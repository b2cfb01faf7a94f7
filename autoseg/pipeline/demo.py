"""The demo: the whole line on packaged real data, saying what it does as it goes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from autoseg.config import DEFAULT_PRESET, PlanSettings, Settings, TrainSettings
from autoseg.domain.values import Value
from autoseg.pipeline.cases import SILENT
from autoseg.pipeline.planning import check, plan
from autoseg.pipeline.prediction import predict
from autoseg.pipeline.results import evaluate, report
from autoseg.pipeline.training import train
from autoseg.runtime import Progress

TRAINING_S = 180.0
"""Long enough for a Dice above 0.75 on 2 cores, short enough that the whole demo stays under 6 minutes."""

FOLD = "0"


class DemoOutcome(Value):
    """Where the demo got, and what to open.

    Attributes:
        mean_dice: Mean foreground Dice over the test cases.
        class_dice: Mean Dice of each class over the test cases that contain it.
        num_cases: How many test cases.
        seconds: Of the whole demo.
    """

    mean_dice: float
    class_dice: dict[str, float | None]
    num_cases: int
    seconds: float
    page: str
    predictions: str
    data: str

    def lines(self) -> tuple[str, ...]:
        """The result, for a person."""
        classes = ", ".join(f"{name} {dice:.3f}" for name, dice in self.class_dice.items() if dice is not None)
        return (
            "",
            f"Mean foreground Dice on {self.num_cases} test cases it never saw: {self.mean_dice:.4f} ({classes})",
            f"The whole demo took {self.seconds / 60:.1f} minutes.",
            f"Report:      {self.page}",
            f"Predictions: {self.predictions}  (beside the images in {self.data}/imagesTs)",
        )


def copy_demo_data(folder: Path) -> None:
    """Copy the packaged cases, their dataset.json and their attribution into a folder."""
    source = resources.files("autoseg") / "demo_data"
    with resources.as_file(source) as packaged:
        shutil.copytree(packaged, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.py"))


def run_demo(out: Path, *, say: Callable[[str], None], progress: Progress = SILENT) -> DemoOutcome:
    """Copy the data, check, plan, train one fold, predict the test cases, score them, report.

    Args:
        out: Folder for `data`, `run` and `predictions`.
        say: Told each step in words.
        progress: Where to tell how far it is.
    """
    started = time.monotonic()
    data, run, predictions = out / "data", out / "run", out / "predictions"
    say("1/6 Copying 32 real MR images of the hippocampus: 24 to train on, 8 to test on")
    copy_demo_data(data)
    say("2/6 Checking the training data (autoseg check)")
    findings = check(data, progress=progress)
    say(findings.headline())
    say("3/6 Measuring the data and planning a U-Net from the measurements (autoseg plan)")
    # Not by the speed of the machine: its steps are short everywhere, and so everybody sees the same plan.
    settings = Settings(plan=PlanSettings(preset=DEFAULT_PRESET))
    planned = plan(data, run, settings, progress=progress)
    network = planned.configurations[planned.default_configuration].network
    say(
        f"    Plan: patch {' x '.join(map(str, network.patch_size))} voxels, "
        f"{network.num_stages} stages with {'-'.join(map(str, network.features_per_stage))} channels"
    )
    say(f"4/6 Training fold {FOLD} for {TRAINING_S / 60:g} minutes (autoseg train --fold {FOLD} --time-budget 3m)")
    (fold,) = train(run, TrainSettings(time_budget_s=TRAINING_S), fold=FOLD, progress=progress)
    say(fold.line())
    say("5/6 Segmenting the 8 test images (autoseg predict) and comparing with their labels (autoseg evaluate)")
    predict(run, [data / "imagesTs"], predictions, progress=progress).raise_failures()
    evaluation = evaluate(predictions, data / "labelsTs", progress=progress)
    say("6/6 Writing the report (autoseg report)")
    page = report(run)
    return DemoOutcome(
        mean_dice=evaluation.summary.mean_foreground_dice or 0.0,
        class_dice={item.name: item.metric("dice").mean for item in evaluation.summary.classes},
        num_cases=len(evaluation.cases),
        seconds=time.monotonic() - started,
        page=str(page),
        predictions=str(predictions),
        data=str(data),
    )
