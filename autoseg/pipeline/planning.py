"""Check and plan: from files on disk to the JSON files of a run folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.checking.doctor import examine_dataset
from autoseg.checking.findings import CheckReport
from autoseg.config import AUTO, PlanSettings, Settings
from autoseg.domain.dataset import Case, Dataset, LabelSchema, Splits
from autoseg.domain.fingerprint import Budget, CaseStats, Fingerprint
from autoseg.domain.layouts import load_dataset
from autoseg.domain.plan import Plan
from autoseg.domain.splits import dataset_splits
from autoseg.errors import PlanError
from autoseg.io.files import read_json
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.cases import SILENT, map_cases
from autoseg.pipeline.folds import require_fitting, tell_splits
from autoseg.pipeline.forecast import Measurements, earlier_forecast, make_forecast
from autoseg.pipeline.host import Target, budget_of
from autoseg.pipeline.measuring import with_measured_step
from autoseg.pipeline.needs import measuring_bytes
from autoseg.pipeline.tasks import Measuring
from autoseg.planning.additions import add_copies, keep_added
from autoseg.planning.importing import import_fingerprint
from autoseg.planning.overrides import apply_overrides
from autoseg.planning.planner import make_plan
from autoseg.planning.presets import PlannerRules, preset_rules
from autoseg.preprocessing.measure import merge
from autoseg.report.check_page import write_check_page
from autoseg.runtime import Progress, num_cpus

log = logging.getLogger("autoseg")

MIN_PATIENTS = 2
"""Fewer cannot be split into cases to learn from and cases to hold out."""


def check(dataset_path: Path, *, page: Path | None = None, progress: Progress = SILENT) -> CheckReport:
    """Everything that is wrong with a data set.

    Args:
        dataset_path: A folder, its dataset.json, or a manifest.
        page: Where to write an HTML page with pictures; None writes none.
        progress: Where to tell how far it is.

    Raises:
        OSError: The page cannot be written.
    """
    found = examine_dataset(dataset_path, workers=num_cpus(), progress=progress, with_pictures=page is not None)
    if page is not None:
        write_check_page(page, found)
    return found.report


def measure(dataset: Dataset, *, progress: Progress = SILENT) -> Fingerprint:
    """Read every case once and measure it.

    Raises:
        DatasetError: Cases that cannot be read, all of them.
    """
    schema, channels = dataset.labels, tuple(channel.name for channel in dataset.channels)

    stats = map_cases(
        Measuring(labels=schema, num_channels=len(channels)),
        CaseStats,
        dataset.cases,
        measuring_bytes(dataset.cases, len(channels)),
        description="Measuring",
        progress=progress,
    )
    stats = tuple(_of_annotated(found, schema, case) for found, case in zip(stats, dataset.cases, strict=True))
    return merge(stats, channels, schema.num_classes)


def _of_annotated(found: CaseStats, schema: LabelSchema, case: Case) -> CaseStats:
    """Voxels of each class or region, 0 where it was not annotated: the case says nothing about strays."""
    counts = schema.region_table()[:, 1:] @ np.array(found.class_voxels)
    known = schema.annotated_row(case.annotated)
    voxels = tuple(int(count) if is_known else 0 for count, is_known in zip(counts, known, strict=True))
    return found.model_copy(update={"class_voxels": voxels})


def plan(
    dataset_path: Path,
    out: Path,
    settings: Settings,
    *,
    fingerprint_file: Path | None = None,
    measures_step: bool = False,
    progress: Progress = SILENT,
) -> Plan:
    """Measure a data set (or take a fingerprint), derive the plan, and write the run folder's JSON files.

    Args:
        dataset_path: A folder, its dataset.json, or a manifest.
        out: The run folder.
        settings: How to plan; device and precision of `settings.train` are those that memory is forecast for.
        fingerprint_file: Measurements to take instead of reading images.
        measures_step: Whether a real training step is tried, and the plan made smaller where it does not fit.
        progress: Where to tell how far it is.

    Raises:
        DatasetError: Something about the data stops planning.
        PlanError: No plan fits, or the folder holds models of another plan.
        ConfigError: Unknown preset or key.
    """
    run_folder = RunFolder(out)
    # A name that does not exist is found before every image is read.
    target = Target.of(settings.train)
    rules = preset_rules(target.preset if settings.plan.preset == AUTO else settings.plan.preset)
    dataset = load_dataset(dataset_path, need_files=fingerprint_file is None)
    if fingerprint_file is None:
        fingerprint = measure(dataset, progress=progress)
    else:
        fingerprint = import_fingerprint(
            fingerprint_file,
            tuple(channel.name for channel in dataset.channels),
            dataset.labels.num_classes,
            # As nnU-Net does: what the description says counts, for its files may be elsewhere.
            dataset.num_training_stated or len(dataset.cases),
        )
    earlier = None if measures_step and not run_folder.has_models else earlier_forecast(run_folder, target)
    budget = budget_of(settings.plan, rules, target, earlier.flops_per_second if earlier else None)

    def plan_for(vram_gb: float | None) -> Plan:
        limits = budget.model_copy(update={"vram_gb": vram_gb})
        return _make_plan(run_folder, fingerprint, dataset, settings.plan, rules, limits)

    planned = plan_for(budget.vram_gb)
    budget_gb, measured = planned.vram_gb, Measurements(flops_per_second=budget.flops_per_second)
    if measures_step:
        planned, measured = with_measured_step(planned, plan_for, target, measured, earlier)
    _refuse_models_of_another_plan(run_folder, planned)
    run_folder.write(run_folder.dataset_file, dataset)
    run_folder.write(run_folder.fingerprint_file, fingerprint)
    if dataset.cases:
        names_tell = settings.plan.patients == "names"
        _write_splits(run_folder, dataset, fingerprint, settings.train.seed, names_tell_patients=names_tell)
    run_folder.write(run_folder.plan_file, planned)
    forecast = make_forecast(planned, fingerprint, target, measured, budget_gb=budget_gb, folder=run_folder.root)
    run_folder.write(run_folder.forecast_file, forecast)
    return planned


def _warn_of_left_out_cases(run_folder: RunFolder, splits: Splits, dataset: Dataset) -> None:
    dealt = {case_id for fold in splits.folds for case_id in (*fold.train, *fold.validation)}
    left_out = [case.id for case in dataset.cases if case.id not in dealt]
    if left_out:
        log.warning(
            "%d cases are in no fold of %s, %s first; delete that file to have new folds made",
            len(left_out),
            run_folder.splits_file,
            left_out[0],
        )


def _make_plan(
    run_folder: RunFolder,
    fingerprint: Fingerprint,
    dataset: Dataset,
    settings: PlanSettings,
    rules: PlannerRules,
    budget: Budget,
) -> Plan:
    planned = make_plan(fingerprint, dataset.name, dataset.labels, dataset.channels, rules, budget)
    if run_folder.plan_file.is_file():
        planned = keep_added(planned, _earlier_plan(run_folder), str(run_folder.plan_file))
    planned = add_copies(planned, settings.configurations)
    return apply_overrides(planned, tuple(settings.overrides.items()))


def _earlier_plan(run_folder: RunFolder) -> dict[str, Any]:
    """The content of the plan file, of whatever version; PlanError where nobody could tell what it holds."""
    earlier = read_json(run_folder.plan_file, PlanError)
    if not isinstance(earlier, dict):
        raise PlanError(
            f"{run_folder.plan_file} is not a plan: it must hold keys and values, got {type(earlier).__name__}",
            hint="Delete it to plan afresh.",
        )
    return earlier


def _refuse_models_of_another_plan(run_folder: RunFolder, planned: Plan) -> None:
    others = []
    for fold in sorted(run_folder.models_folder.glob("*/fold_*")):
        # What somebody added or changed for one configuration of their own does not concern models of others.
        found = _plan_digest_of(fold)
        if found is not None and found != planned.digest(fold.parent.name):
            others.append(str(fold))
    if others:
        raise PlanError(
            f"{run_folder.root} holds models that were trained with another plan than {planned.digest()}",
            problems=others,
            hint="Plan into another folder, or delete these models first.",
        )


def _plan_digest_of(fold: Path) -> str | None:
    """The plan that a fold was trained with, or imported with; None where nothing says it."""
    for name, key in (("run.json", "plan_digest"), ("weights.json", "digest")):
        if (fold / name).is_file():
            return str(read_json(fold / name).get(key))
    return None


def _write_splits(
    run_folder: RunFolder, dataset: Dataset, fingerprint: Fingerprint, seed: int, *, names_tell_patients: bool
) -> None:
    """Write the folds; folds that are there already are kept, because people edit them.

    Raises:
        DatasetError: Folds that are there do not fit the cases.
    """
    if run_folder.splits_file.is_file():
        splits = run_folder.read_splits()
        if splits.folds:
            require_fitting(run_folder.splits_file, splits, dataset)
            _warn_of_left_out_cases(run_folder, splits, dataset)
            return
    if len({case.patient or case.id for case in dataset.cases}) < MIN_PATIENTS:
        rule = "no folds: a single case or patient cannot be trained on and held out at once"
        run_folder.write(run_folder.splits_file, Splits(rule=rule, folds=()))
        return
    presence = {
        stats.case: frozenset(index for index, voxels in enumerate(stats.class_voxels, start=1) if voxels)
        for stats in fingerprint.cases
    }
    splits = dataset_splits(dataset, presence or None, seed, names_tell_patients=names_tell_patients)
    run_folder.write(run_folder.splits_file, splits)
    tell_splits(splits, dataset, names_tell_patients=names_tell_patients)
