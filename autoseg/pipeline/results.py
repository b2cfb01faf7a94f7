"""Evaluate label maps, write the report, and run the whole line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from autoseg.config import Settings, TrainSettings
from autoseg.domain.plan import Plan
from autoseg.errors import DatasetError
from autoseg.evaluation.crossval import Evaluation
from autoseg.evaluation.folders import evaluate_folder
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.cases import SILENT
from autoseg.pipeline.forecast import read_forecast
from autoseg.pipeline.planning import check, plan
from autoseg.pipeline.pretrained import require_there
from autoseg.pipeline.selecting import select
from autoseg.pipeline.several import Job, num_at_a_time, train_together, waves
from autoseg.pipeline.training import prepare, train
from autoseg.report.facts import PlannedCost
from autoseg.report.page import write_report
from autoseg.runtime import Progress, num_cpus

log = logging.getLogger("autoseg")


def evaluate(predictions: Path, reference: Path, *, progress: Progress = SILENT) -> Evaluation:
    """Compare two folders of label maps by name.

    Raises:
        DatasetError: Files that do not fit each other, all of them.
    """
    return evaluate_folder(predictions, reference, workers=num_cpus(), progress=progress)


def report(
    run_path: Path,
    *,
    selects: bool = False,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = SILENT,
) -> Path:
    """Write the report of every finished fold; returns the page.

    Args:
        run_path: The run folder.
        selects: Whether configuration, ensemble and post-processing are chosen first; see `select`.
        device: Of that.
        precision: Of that.
        progress: One step a case.

    Raises:
        ConfigError: The folder is not a run, or no fold is finished.
    """
    run_folder = RunFolder(run_path)
    if selects:
        selection = select(run_folder, device=device, precision=precision, progress=progress)
        if selection is None:
            log.info("Nothing is chosen yet: no configuration has all of its folds finished.")
        else:
            log.info("Chosen: %s. %s.", selection.choice, selection.reason)
    return write_report(run_folder, _planned_costs(run_folder))


def _planned_costs(folder: RunFolder) -> dict[str, PlannedCost]:
    """What the forecast of this plan says; nothing where there is none, or it is of another plan."""
    if not folder.forecast_file.is_file():
        return {}
    forecast = read_forecast(folder)
    if forecast.plan_digest != folder.read_plan().digest():
        return {}
    return {
        name: PlannedCost(
            device=forecast.device_name,
            training_bytes=one.training.total,
            prediction_bytes=one.prediction.total,
            cache_bytes=one.cache_bytes,
            step_seconds=one.measured.step_seconds if one.measured is not None else None,
            training_seconds=one.training_seconds,
        )
        for name, one in forecast.configurations.items()
    }


def run(
    dataset_path: Path,
    out: Path,
    settings: Settings,
    *,
    configuration: str | None = None,
    fold: str = "each",
    restart: bool = False,
    measures_step: bool = False,
    jobs: int | None = 1,
    progress: Progress = SILENT,
) -> Path:
    """Check, plan, train, choose, report; returns the page. Run again, it goes on where it stopped.

    Without `configuration` every planned one is trained, previous stages of cascades first. When every fold of some
    configuration is finished, what `predict` uses is chosen; see `select`.

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
    # Any fold of a cascade learns from what every fold of its previous stage predicts.
    wanted = {
        name: "each" if _is_previous(planned, name, configuration) else fold
        for name in _in_order(planned, configuration)
    }
    run_folder = RunFolder(out)
    at_a_time = 1 if jobs == 1 else num_at_a_time(run_folder, tuple(wanted), settings.train, jobs)
    if at_a_time > 1:
        _train_several(run_folder, planned, wanted, settings.train, at_a_time, restart, progress)
    for name, folds in wanted.items() if at_a_time == 1 else ():
        log.info("Training %s, fold %s", name, folds)
        train(out, settings.train, configuration=name, fold=folds, restart=restart, progress=progress)
    return report(
        out,
        selects=True,
        device=settings.train.device,
        precision=settings.train.precision,
        progress=progress,
    )


def _train_several(
    run_folder: RunFolder,
    planned: Plan,
    wanted: Mapping[str, str],
    settings: TrainSettings,
    at_a_time: int,
    restart: bool,
    progress: Progress,
) -> None:
    """Prepare the cases of every configuration, then train several folds at a time."""
    dataset = run_folder.read_dataset()
    for name in wanted:
        prepare(run_folder, dataset, planned, name, progress=progress)
    numbers = [str(number) for number in range(len(run_folder.read_splits().folds))]
    jobs = [Job(name, one) for name, fold in wanted.items() for one in (numbers if fold == "each" else (fold,))]
    for wave in waves(planned, tuple(wanted), jobs):
        train_together(run_folder, wave, settings, at_a_time, restart=restart, progress=progress)


def _in_order(planned: Plan, wanted: str | None) -> tuple[str, ...]:
    """Configurations to train, each after the previous stage that it needs."""
    if wanted is not None and wanted not in planned.configurations:
        return (wanted,)  # which the training refuses, naming those that there are
    names: list[str] = []
    for name in planned.configurations if wanted is None else (wanted,):
        stage = planned.configurations[name].previous_stage
        names += [item for item in (stage, name) if item is not None and item not in names]
    return tuple(names)


def _is_previous(planned: Plan, name: str, wanted: str | None) -> bool:
    """Whether another configuration that is trained needs every fold of this one."""
    trained = _in_order(planned, wanted)
    return any(
        planned.configurations[other].previous_stage == name for other in trained if other in planned.configurations
    )
