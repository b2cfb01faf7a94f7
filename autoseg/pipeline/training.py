"""Train folds, then predict and score their validation cases with the final weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoseg.compute import Processes, joined, own_device
from autoseg.config import TrainSettings, parse_assignments
from autoseg.domain.dataset import Dataset, Fold
from autoseg.domain.plan import Plan
from autoseg.domain.trained_on import TrainedOn, summarise
from autoseg.errors import ConfigError
from autoseg.evaluation.crossval import BestWeights
from autoseg.io.files import remove_leftovers
from autoseg.io.model import Model
from autoseg.io.run_folder import FOLD_ALL, RunFolder
from autoseg.io.store import CaseStore
from autoseg.pipeline.cascade import FoldName, OutOfFold, out_of_fold, prepare_maps
from autoseg.pipeline.cases import SILENT, map_cases
from autoseg.pipeline.disk import DiskGuard, most_bytes
from autoseg.pipeline.folds import require_fitting
from autoseg.pipeline.forecast import earlier_forecast
from autoseg.pipeline.host import Target
from autoseg.pipeline.needs import preparing_bytes
from autoseg.pipeline.pretrained import load_pretrained
from autoseg.pipeline.tasks import Done, Preparing
from autoseg.pipeline.validating import validate_fold
from autoseg.planning.overrides import apply_overrides
from autoseg.preprocessing.prepare import cache_digest
from autoseg.runtime import Progress
from autoseg.training import loggers, orders, records
from autoseg.training.cascade import PreviousStage
from autoseg.training.following import follow, require_shares
from autoseg.training.trainer import train_fold


@dataclass(frozen=True, slots=True)
class FoldOutcome:
    """What came of training one fold.

    Attributes:
        folder: Where the model lies.
        mean_dice: Mean foreground Dice of the validation cases by the final weights; None for the fold "all".
        num_validation: How many cases that is over.
        train_s: Seconds of training.
        validation_s: Seconds of predicting and scoring the validation cases, after the budget.
        best: The best weights by the quick looks, on the same cases.
    """

    configuration: str
    fold: FoldName
    folder: Path
    mean_dice: float | None
    num_validation: int
    train_s: float
    validation_s: float
    best: BestWeights | None = None

    def line(self) -> str:
        """One line for a person."""
        head = f"{self.configuration} fold {self.fold}: trained in {self.train_s / 60:.1f} min"
        if self.num_validation == 0:
            return f"{head}; no validation cases. Model: {self.folder}"
        dice = "undefined" if self.mean_dice is None else f"{self.mean_dice:.4f}"
        return (
            f"{head}; mean foreground Dice {dice} on {self.num_validation} validation cases "
            f"(predicted and scored in {self.validation_s:.0f} s). {self._best_line()}Model: {self.folder}"
        )

    def _best_line(self) -> str:
        """What the best weights scored, marked as what it is; nothing where they were not scored."""
        best = self.best
        if best is None or not best.differ:
            return ""
        if best.mean_foreground_dice is None:
            return f"The best weights by the looks during training were not compared: {best.skipped or 'no Dice'}. "
        return (
            f"The best weights by the looks during training (epoch {best.epoch}) have {best.mean_foreground_dice:.4f} "
            f"there, but were chosen on these cases (another {best.seconds:.0f} s). "
        )


def store_of(run_folder: RunFolder, dataset: Dataset, planned: Plan, name: str) -> CaseStore:
    """Where the preprocessed cases of a configuration are kept, those that there are."""
    preprocess = planned.configurations[name].preprocess
    owner = next(other for other, part in planned.configurations.items() if part.preprocess == preprocess)
    return CaseStore(run_folder.cache_folder(owner, cache_digest(preprocess, dataset.labels)))


def prepare(
    run_folder: RunFolder, dataset: Dataset, planned: Plan, name: str, *, progress: Progress = SILENT
) -> CaseStore:
    """Preprocess every case that is not in the cache yet; returns the store.

    Configurations that preprocess alike, as a cascade and 3d_fullres do, share one folder: that of the first of them.

    Args:
        run_folder: The run.
        dataset: Its data set.
        planned: Its plan.
        name: Of the configuration.
        progress: One step a case.

    Raises:
        DatasetError: Cases that cannot be prepared, all of them.
        DeviceMemoryError: Cases need more memory than there is.
        ConfigError: The disk is too full.
    """
    preprocess = planned.configurations[name].preprocess
    store = store_of(run_folder, dataset, planned, name)
    # What a killed process left behind takes room.
    remove_leftovers(store.folder)
    missing = [case for case in dataset.cases if not store.is_current(case.id, case.files, case.missing)]
    if missing:
        fingerprint = run_folder.read_fingerprint()
        sizes = most_bytes(missing, preprocess, fingerprint)
        guard = DiskGuard(store.folder, [(store.path(case_id), size) for case_id, size in sizes.items()])
        guard.check()
        with guard.room():
            map_cases(
                Preparing(plan=preprocess, labels=dataset.labels, folder=str(store.folder)),
                Done,
                missing,
                preparing_bytes(missing, preprocess, fingerprint),
                description=f"Preprocessing {name}",
                progress=progress,
                after_each=guard.check,
            )
    return store


def train(
    run_path: Path,
    settings: TrainSettings,
    *,
    configuration: str | None = None,
    fold: str = "each",
    restart: bool = False,
    assignments: Sequence[str] = (),
    progress: Progress = SILENT,
) -> tuple[FoldOutcome, ...]:
    """Train folds of one configuration and score their validation cases.

    Where several processes were started together, the first one does it, and the others take part in the training.

    Args:
        run_path: The run folder.
        settings: How long, where, with which seed.
        configuration: Its name; default as the plan says.
        fold: A number, "each" or "all".
        restart: Forget what was trained.
        assignments: KEY=VALUE of the plan's training section, for these folds alone.
        progress: Where to tell how far it is.

    Returns:
        One outcome a fold; none in processes that took part.

    Raises:
        ConfigError: Unknown configuration, fold or key, a logger that is not installed, or the fold is being trained by
            another process.
        DatasetError: Cases that cannot be prepared.
        ModelError: It is a cascade and folds of its previous stage are not finished; or the pretrained model cannot
            be read.
        LeaderStopped: The first process has ended with an error, and this is another.
        ProcessLost: Another process has ended.
    """
    with joined(own_device(settings.device)) as processes:
        if not processes.is_main:
            _take_part(RunFolder(run_path), settings, configuration, assignments, processes)
            return ()
        with orders.leading(processes):
            return _train_folds(
                RunFolder(run_path), settings, configuration, fold, restart, assignments, progress, processes
            )


def _train_folds(
    run_folder: RunFolder,
    settings: TrainSettings,
    configuration: str | None,
    fold: str,
    restart: bool,
    assignments: Sequence[str],
    progress: Progress,
    processes: Processes,
) -> tuple[FoldOutcome, ...]:
    dataset, planned = run_folder.read_dataset(), run_folder.read_plan()
    planned = _with_training_overrides(planned, assignments)
    name = _configuration_name(planned, configuration)
    folds = _choose_folds(run_folder, fold, dataset)
    part = planned.configurations[name]
    # Before anything that takes long.
    loggers.require(settings.log)
    require_shares(part, processes)
    found = out_of_fold(run_folder, dataset, part.previous_stage, folds) if part.previous_stage else {}
    for number, _ in folds:
        _pretrained(settings, planned, name, number, run_folder)
    store = prepare(run_folder, dataset, planned, name, progress=progress)
    return tuple(
        _train_one(
            run_folder,
            dataset,
            planned,
            name,
            number,
            members,
            store,
            found.get(number),
            settings,
            restart,
            progress,
            processes,
        )
        for number, members in folds
    )


def _pretrained(
    settings: TrainSettings, planned: Plan, name: str, number: FoldName, run_folder: RunFolder
) -> Model | None:
    """What a fold begins with; None where no model is named."""
    if settings.pretrained is None:
        return None
    return load_pretrained(Path(settings.pretrained), planned, name, number, run_folder.fold_folder(name, number))


def _take_part(
    run_folder: RunFolder,
    settings: TrainSettings,
    configuration: str | None,
    assignments: Sequence[str],
    processes: Processes,
) -> None:
    """Take part in fold after fold, as the main process says. Nothing is written but by it."""
    while isinstance(order := orders.hear(processes), orders.TakePart):
        # By now the cache is whole.
        dataset, planned = run_folder.read_dataset(), run_folder.read_plan()
        planned = _with_training_overrides(planned, assignments)
        name = _configuration_name(planned, configuration)
        folds = _choose_folds(run_folder, str(order.fold), dataset)
        ((number, members),) = folds
        part = planned.configurations[name]
        previous: PreviousStage | None = None
        if part.previous_stage:
            found = out_of_fold(run_folder, dataset, part.previous_stage, folds)
            previous = prepare_maps(run_folder, dataset, name, part, found[number])
        follow(
            planned,
            name,
            store_of(run_folder, dataset, planned, name),
            members.train,
            _fold_settings(settings),
            processes,
            previous,
            dataset.annotated_rows,
        )


def _train_one(
    run_folder: RunFolder,
    dataset: Dataset,
    planned: Plan,
    name: str,
    number: FoldName,
    members: Fold,
    store: CaseStore,
    found: Mapping[str, OutOfFold] | None,
    settings: TrainSettings,
    restart: bool,
    progress: Progress,
    processes: Processes,
) -> FoldOutcome:
    previous: PreviousStage | None = None
    if found is not None:
        previous = prepare_maps(run_folder, dataset, name, planned.configurations[name], found, progress=progress)
    folder = run_folder.fold_folder(name, number)
    orders.take_part(processes, number)
    with orders.leading(processes):
        result = train_fold(
            folder,
            planned,
            name,
            number,
            store,
            members.train,
            members.validation,
            replace(
                _fold_settings(settings, restart=restart),
                pretrained=_pretrained(settings, planned, name, number, run_folder),
                planned_speed=_planned_speed(run_folder, settings),
                trained_on=_trained_on(run_folder, planned, name),
            ),
            progress,
            previous,
            dataset.annotated_rows,
            processes,
        )
    started = time.monotonic()
    scored = validate_fold(run_folder, folder, dataset, members.validation, settings, previous=found, progress=progress)
    best = None if scored is None else scored.best
    return FoldOutcome(
        configuration=name,
        fold=number,
        folder=folder,
        mean_dice=None if scored is None else scored.evaluation.summary.mean_foreground_dice,
        num_validation=len(members.validation),
        train_s=result.seconds,
        validation_s=max(0.0, time.monotonic() - started - (best.seconds if best else 0.0)),
        best=best,
    )


def _trained_on(run_folder: RunFolder, planned: Plan, name: str) -> TrainedOn | None:
    """What the images are like, for the model's card; None where nobody measured them."""
    if not run_folder.fingerprint_file.is_file():
        return None
    return summarise(run_folder.read_fingerprint(), planned.configurations[name].preprocess.normalization)


def _fold_settings(settings: TrainSettings, *, restart: bool = False) -> records.TrainSettings:
    return records.TrainSettings(
        num_epochs=settings.epochs,
        time_budget_s=settings.time_budget_s,
        device=settings.device,
        precision=settings.precision,
        seed=settings.seed,
        restart=restart,
        checkpoint_interval_s=settings.checkpoint_interval_s,
        compile=settings.compile,
        log=settings.log,
    )


def _planned_speed(run_folder: RunFolder, settings: TrainSettings) -> float | None:
    """Operations a second by which the plan foresaw its steps, where it was made on this machine."""
    found = earlier_forecast(run_folder, Target.of(settings))
    return None if found is None else found.flops_per_second


def _with_training_overrides(planned: Plan, assignments: Sequence[str]) -> Plan:
    pairs = parse_assignments(assignments)
    wrong = [key for key, _ in pairs if "training." not in key]
    if wrong:
        raise ConfigError(
            f"train can set keys of the training section only, not {', '.join(wrong)}",
            hint="Set network and preprocessing with: autoseg plan --set ...",
        )
    return apply_overrides(planned, pairs)


def _configuration_name(planned: Plan, wanted: str | None) -> str:
    name = wanted or planned.default_configuration
    if name not in planned.configurations:
        raise ConfigError(f"configuration {name!r} is not in the plan; it has {', '.join(planned.configurations)}")
    return name


def _choose_folds(run_folder: RunFolder, fold: str, dataset: Dataset) -> tuple[tuple[FoldName, Fold], ...]:
    if fold == FOLD_ALL:
        return (("all", Fold(train=tuple(case.id for case in dataset.cases), validation=())),)
    splits = run_folder.read_splits()
    folds = splits.folds
    if not folds:
        raise ConfigError(
            f"{run_folder.splits_file} has no folds: the data set has too few cases to hold any out",
            hint="Train on every case with --fold all.",
        )
    require_fitting(run_folder.splits_file, splits, dataset)
    if fold == "each":
        return tuple(enumerate(folds))
    if not fold.isdigit() or int(fold) >= len(folds):
        raise ConfigError(f"fold {fold!r} does not exist", hint=f"Use 0 to {len(folds) - 1}, each or all.")
    return ((int(fold), folds[int(fold)]),)
