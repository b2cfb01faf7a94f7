"""The previous stage of a cascade in its run: out-of-fold label maps to learn from, models to predict with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autoseg.domain.dataset import Dataset, Fold
from autoseg.domain.plan import Configuration
from autoseg.errors import ConfigError, ModelError
from autoseg.io.files import read_json, remove_leftovers
from autoseg.io.maps import MapStore, OutOfFoldMaps
from autoseg.io.model import PREVIOUS_WEIGHTS, Model, ModelCard, load_model, read_card
from autoseg.io.run_folder import RunFolder, fold_name, is_trained, trained_folds_in
from autoseg.pipeline.cases import SILENT, map_cases
from autoseg.pipeline.disk import DiskGuard, most_bytes
from autoseg.pipeline.needs import preparing_bytes
from autoseg.pipeline.tasks import Done, MapSource, PreparingMaps
from autoseg.preprocessing.prepare import cache_digest
from autoseg.runtime import Progress
from autoseg.training.cascade import PreviousStage
from autoseg.training.records import VALIDATION_FOLDER, VALIDATION_SUMMARY_FILE, FoldCases, read_run

log = logging.getLogger("autoseg")

FoldName = int | Literal["all"]

MAPS_SUFFIX = "previous"
"""The cached label maps lie beside the cached images, in a folder of the cascade's name with this ending."""


@dataclass(frozen=True, slots=True)
class OutOfFold:
    """What a model of the previous stage predicted for a case that it had not seen.

    Attributes:
        fold: Of the model: the case is one of its validation cases.
        label_map: The prediction, on the file's grid.
        weights_sha256: Of the model.
    """

    fold: int
    label_map: Path
    weights_sha256: str


def out_of_fold(
    run_folder: RunFolder, dataset: Dataset, stage: str, folds: Sequence[tuple[FoldName, Fold]]
) -> dict[FoldName, dict[str, OutOfFold]]:
    """For each fold of a cascade, the predictions of the previous stage that it learns from and is validated with.

    A case's prediction comes from the fold that holds it out. A validation case of fold K is held out by fold K of the
    previous stage too, whose prediction is taken: neither of the two networks has seen it.

    Args:
        run_folder: The run.
        dataset: Its data set.
        stage: Name of the previous stage.
        folds: Of the cascade: number (or "all") and cases.

    Raises:
        ModelError: Folds of the previous stage are not finished; all are named, with the commands that train them.
        ConfigError: No fold holds out some of the cases.
    """
    splits = run_folder.read_splits().folds
    holders = {case.id: [j for j, fold in enumerate(splits) if case.id in fold.validation] for case in dataset.cases}
    wanted = {number: (*members.train, *members.validation) for number, members in folds}
    never = sorted({case_id for case_ids in wanted.values() for case_id in case_ids if not holders.get(case_id)})
    if never:
        raise ConfigError(
            f"{len(never)} cases are a validation case of no fold, so no model of {stage} can predict them unseen: "
            f"{never[0]} first",
            hint=f"Give each case to one fold's validation in {run_folder.splits_file}, or delete that file and plan "
            "again.",
        )
    chosen = {
        number: {case_id: number if number in holders[case_id] else holders[case_id][0] for case_id in case_ids}
        for number, case_ids in wanted.items()
    }
    needed: dict[int, set[str]] = {}
    for by_case in chosen.values():
        for case_id, holder in by_case.items():
            needed.setdefault(int(holder), set()).add(case_id)
    found = _predictions(run_folder, dataset, stage, splits, needed)
    return {
        number: {case_id: found[int(holder), case_id] for case_id, holder in by_case.items()}
        for number, by_case in chosen.items()
    }


def _predictions(
    run_folder: RunFolder, dataset: Dataset, stage: str, splits: Sequence[Fold], needed: Mapping[int, set[str]]
) -> dict[tuple[int, str], OutOfFold]:
    """The validation predictions of each needed fold; ModelError when some are not there."""
    found: dict[tuple[int, str], OutOfFold] = {}
    problems: dict[int, str] = {}
    for fold in sorted(needed):
        folder = run_folder.fold_folder(stage, fold)
        maps = {
            case_id: folder / VALIDATION_FOLDER / f"{case_id}{dataset.file_ending}" for case_id in sorted(needed[fold])
        }
        members = FoldCases(splits[fold].train, splits[fold].validation, annotated=dataset.annotated_rows)
        problem = _problem(folder, members, maps)
        if problem:
            problems[fold] = problem
            continue
        weights = read_card(folder).weights_sha256
        found |= {(fold, case_id): OutOfFold(fold, label_map, weights) for case_id, label_map in maps.items()}
    if problems:
        command = f"autoseg train {run_folder.root} --config {stage}"
        commands = [command] if len(problems) == len(splits) else [f"{command} --fold {fold}" for fold in problems]
        raise ModelError(
            f"a cascade learns from what {stage} predicts for cases that it has not seen, and "
            f"{len(problems)} of the {len(needed)} folds of {stage} that are needed cannot give that yet",
            problems=[f"fold {fold}: {problem}" for fold, problem in problems.items()],
            hint="\n  ".join(["Train first:", *commands]),
        )
    return found


def _problem(folder: Path, cases: FoldCases, maps: Mapping[str, Path]) -> str:
    """Why a fold cannot give its validation predictions; empty when it can."""
    if not is_trained(folder):
        return "is not trained"
    record = read_run(folder)
    if record is not None and record.cases_digest not in ("", cases.digest):
        return "was trained with other cases than it has in the splits now; train it with --restart"
    summary = folder / VALIDATION_FOLDER / VALIDATION_SUMMARY_FILE
    if not summary.is_file() or read_json(summary).get("weights_sha256") != read_card(folder).weights_sha256:
        return "has not predicted its validation cases with its final weights"
    missing = [path for path in maps.values() if not path.is_file()]
    return f"{missing[0]} is missing: delete {summary} to have it made anew" if missing else ""


def prepare_maps(
    run_folder: RunFolder,
    dataset: Dataset,
    name: str,
    part: Configuration,
    found: Mapping[str, OutOfFold],
    *,
    progress: Progress = SILENT,
) -> PreviousStage:
    """Bring the predictions to the grid of the cascade's cached images, those that are not there yet.

    Args:
        run_folder: The run.
        dataset: Its data set.
        name: Of the cascade.
        part: The cascade.
        found: By case id.
        progress: One step a case.

    Raises:
        DatasetError: Label maps that cannot be used, all of them.
    """
    assert part.previous_stage is not None
    root = run_folder.cache_folder(f"{name}-{MAPS_SUFFIX}", cache_digest(part.preprocess, dataset.labels))
    stores = {case_id: MapStore(root / fold_name(item.fold), item.weights_sha256) for case_id, item in found.items()}

    sources = {
        case_id: MapSource(
            label_map=str(item.label_map), folder=str(stores[case_id].folder), weights_sha256=item.weights_sha256
        )
        for case_id, item in found.items()
    }
    for folder in {store.folder for store in stores.values()}:
        remove_leftovers(folder)
    cases = [dataset.case(case_id) for case_id in found]
    missing = [case for case in cases if not stores[case.id].is_current(case.id, sources[case.id].files(case))]
    if missing:
        fingerprint = run_folder.read_fingerprint()
        # A map is smaller than image and labels.
        sizes = most_bytes(missing, part.preprocess, fingerprint)
        guard = DiskGuard(root, [(stores[case_id].path(case_id), size) for case_id, size in sizes.items()])
        with guard.room():
            map_cases(
                PreparingMaps(
                    plan=part.preprocess,
                    labels=dataset.labels,
                    sources={case.id: sources[case.id] for case in missing},
                ),
                Done,
                missing,
                preparing_bytes(missing, part.preprocess, fingerprint),
                description=f"Preprocessing the label maps of {part.previous_stage}",
                progress=progress,
            )
    weights = {fold_name(item.fold): item.weights_sha256 for item in found.values()}
    return PreviousStage(part.previous_stage, OutOfFoldMaps(stores), dict(sorted(weights.items())))


def load_previous(models: Sequence[Model]) -> tuple[Model, ...] | None:
    """The models of a cascade's previous stage: every finished fold of it, beside the cascade's own folder.

    Args:
        models: Of one configuration.

    Returns:
        None when they are no cascade.

    Raises:
        ModelError: The previous stage is not there.
    """
    cards = [model.card for model in models]
    if cards[0].settings.previous_stage is None:
        return None
    previous = tuple(load_model(folder) for folder in previous_folders(cards[0], models[0].folder))
    warn_of_other_weights(cards, [model.card for model in previous])
    return previous


def previous_folders(card: ModelCard, folder: Path | None) -> tuple[Path, ...]:
    """The fold folders of a cascade's previous stage, every finished one; () when it is no cascade.

    Args:
        card: Of a model of the cascade.
        folder: Of that model.

    Raises:
        ModelError: The previous stage is not there.
    """
    stage = card.settings.previous_stage
    if stage is None:
        return ()
    # models/CASCADE/fold_K stands beside models/STAGE.
    stage_folder = None if folder is None else folder.resolve().parent.parent / stage
    folds = () if stage_folder is None else trained_folds_in(stage_folder)
    if stage_folder is None or not folds:
        raise ModelError(
            f"{card.configuration} is a cascade: it also needs {stage}, of which no finished fold is in {stage_folder}",
            hint=f"Predict with its run, where {stage} is trained (autoseg train RUN --config {stage}), or copy the "
            f"run's folder models/{stage} there.",
        )
    return tuple(stage_folder / fold_name(fold) for fold in folds)


def warn_of_other_weights(cards: Sequence[ModelCard], previous: Sequence[ModelCard]) -> None:
    """Say when the previous stage was trained again after the cascade had learned from it."""
    now = {fold_name(card.fold): card.weights_sha256 for card in previous}
    for card in cards:
        then = card.provenance.get(PREVIOUS_WEIGHTS)
        if not isinstance(then, dict):
            continue
        changed = sorted(fold for fold, weights in then.items() if now.get(fold, weights) != weights)
        if changed:
            log.warning(
                "%s fold %s learned from other weights of %s than there are now (%s): train it again with --restart",
                card.configuration,
                card.fold,
                card.settings.previous_stage,
                ", ".join(changed),
            )
