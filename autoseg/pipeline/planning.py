"""Check and plan: from files on disk to the JSON files of a run folder."""

from __future__ import annotations

import logging
from pathlib import Path

from autoseg.checking.doctor import check_dataset
from autoseg.checking.findings import CheckReport
from autoseg.config import PlanSettings, Settings
from autoseg.domain.dataset import Case, Dataset, Splits
from autoseg.domain.fingerprint import Budget, CaseStats, Fingerprint
from autoseg.domain.layouts import load_dataset
from autoseg.domain.plan import Plan
from autoseg.domain.splits import dataset_splits, splits_problems
from autoseg.errors import ConfigError, PlanError
from autoseg.io.files import read_json
from autoseg.io.images import read_case, read_labels
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.cases import SILENT, encode_labels, labels_of, map_cases
from autoseg.planning.importing import import_fingerprint
from autoseg.planning.overrides import apply_overrides
from autoseg.planning.planner import make_plan
from autoseg.preprocessing.measure import measure_case, merge
from autoseg.runtime import Progress, num_cpus

log = logging.getLogger("autoseg")

MIN_PATIENTS = 2
"""Fewer cannot be split into cases to learn from and cases to hold out."""


def check(dataset_path: Path, *, progress: Progress = SILENT) -> CheckReport:
    """Everything that is wrong with a data set."""
    return check_dataset(dataset_path, workers=num_cpus(), progress=progress)


def measure(dataset: Dataset, *, progress: Progress = SILENT) -> Fingerprint:
    """Read every case once and measure it.

    Raises:
        DatasetError: Cases that cannot be read, all of them.
    """
    schema, channels = dataset.labels, tuple(channel.name for channel in dataset.channels)

    def measure_one(case: Case) -> CaseStats:
        volume = read_case(case, len(channels))
        labels, _ = read_labels(labels_of(case), volume.geometry)
        return measure_case(volume, encode_labels(dataset, case, labels), case.id, schema.num_classes)

    stats = map_cases(measure_one, dataset.cases, description="Measuring", progress=progress)
    return merge(stats, channels, schema.num_classes)


def plan(
    dataset_path: Path,
    out: Path,
    settings: Settings,
    *,
    fingerprint_file: Path | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Measure a data set (or take a fingerprint), derive the plan, and write the run folder's JSON files.

    Raises:
        DatasetError: Something about the data stops planning.
        PlanError: No plan fits, or the folder holds models of another plan.
        ConfigError: Unknown preset or key.
    """
    run_folder = RunFolder(out)
    dataset = load_dataset(dataset_path, need_files=fingerprint_file is None)
    if dataset.labels.has_regions:
        raise ConfigError(
            f"{dataset_path} declares regions (classes that join several label values), which cannot be trained yet",
            hint="Give each class one label value.",
        )
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
    planned = _make_plan(fingerprint, dataset, settings.plan)
    _refuse_models_of_another_plan(run_folder, planned)
    run_folder.write(run_folder.dataset_file, dataset)
    run_folder.write(run_folder.fingerprint_file, fingerprint)
    if dataset.cases:
        _write_splits(run_folder, dataset, fingerprint, settings.train.seed)
    run_folder.write(run_folder.plan_file, planned)
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


def _make_plan(fingerprint: Fingerprint, dataset: Dataset, settings: PlanSettings) -> Plan:
    planned = make_plan(
        fingerprint,
        dataset.name,
        dataset.labels,
        dataset.channels,
        settings.preset,
        Budget(vram_gb=settings.vram_gb),
    )
    return apply_overrides(planned, tuple(settings.overrides.items()))


def _refuse_models_of_another_plan(run_folder: RunFolder, planned: Plan) -> None:
    others = []
    for file in sorted(run_folder.models_folder.glob("*/fold_*/run.json")):
        if read_json(file).get("plan_digest") != planned.digest():
            others.append(str(file.parent))
    if others:
        raise PlanError(
            f"{run_folder.root} holds models that were trained with another plan than {planned.digest()}",
            problems=others,
            hint="Plan into another folder, or delete these models first.",
        )


def _write_splits(run_folder: RunFolder, dataset: Dataset, fingerprint: Fingerprint, seed: int) -> None:
    """Write the folds; folds that are there already and fit the cases are kept, because people edit them."""
    if run_folder.splits_file.is_file():
        splits = run_folder.read_splits()
        if not splits_problems(splits, dataset.cases):
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
    run_folder.write(run_folder.splits_file, dataset_splits(dataset, presence or None, seed))
