"""Evaluate label maps, write the report, and run the whole line."""

from __future__ import annotations

from pathlib import Path

from autoseg.config import Settings
from autoseg.errors import DatasetError
from autoseg.evaluation.crossval import Evaluation
from autoseg.evaluation.folders import evaluate_folder
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.cases import SILENT
from autoseg.pipeline.planning import check, plan
from autoseg.pipeline.pretrained import require_there
from autoseg.pipeline.training import train
from autoseg.report.page import write_report
from autoseg.runtime import Progress, num_cpus


def evaluate(predictions: Path, reference: Path, *, progress: Progress = SILENT) -> Evaluation:
    """Compare two folders of label maps by name.

    Raises:
        DatasetError: Files that do not fit each other, all of them.
    """
    return evaluate_folder(predictions, reference, workers=num_cpus(), progress=progress)


def report(run_path: Path) -> Path:
    """Write the report of every finished fold; returns the page.

    Raises:
        ConfigError: The folder is not a run, or no fold is finished.
    """
    return write_report(RunFolder(run_path))


def run(
    dataset_path: Path,
    out: Path,
    settings: Settings,
    *,
    configuration: str | None = None,
    fold: str = "each",
    restart: bool = False,
    measures_step: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Check, plan, train, report; returns the page. Of a cascade, every fold of the previous stage is trained first.

    Raises:
        DatasetError: The check found something that stops training.
        ModelError: There is no such pretrained model.
    """
    if settings.train.pretrained is not None:
        require_there(Path(settings.train.pretrained))
    findings = check(dataset_path, progress=progress)
    if findings.stops_training:
        errors = [item for item in findings.findings if item.severity == "error"]
        raise DatasetError(
            f"{len(errors)} findings in {dataset_path} stop training",
            problems=[f"{item.case or item.file}: {item.message}" for item in errors],
            hint=f"Repair them; `autoseg check {dataset_path}` shows every finding.",
        )
    planned = plan(dataset_path, out, settings, measures_step=measures_step, progress=progress)
    wanted = planned.configurations.get(configuration or planned.default_configuration)
    if wanted is not None and wanted.previous_stage is not None:
        # Any fold of a cascade learns from what every fold of its previous stage predicts.
        train(out, settings.train, configuration=wanted.previous_stage, restart=restart, progress=progress)
    train(out, settings.train, configuration=configuration, fold=fold, restart=restart, progress=progress)
    return report(out)
