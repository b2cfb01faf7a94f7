"""What the finished folds predicted for the cases that they had not seen: scores, label maps, and probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.domain.dataset import Case, Dataset
from autoseg.domain.inference import Tta
from autoseg.evaluation.summaries import CaseMetrics
from autoseg.inference.keeping import Keeper
from autoseg.inference.line import run_line
from autoseg.inference.outcome import Tally
from autoseg.inference.settings import PredictionSettings
from autoseg.inference.stages import Ready, Stages, load_stages
from autoseg.io.files import remove_leftovers
from autoseg.io.images import read_case
from autoseg.io.model import load_model
from autoseg.io.probabilities import Codes, ProbabilityStore
from autoseg.io.run_folder import RunFolder, fold_name
from autoseg.pipeline.cascade import out_of_fold
from autoseg.pipeline.cases import SILENT
from autoseg.report.collect import read_fold_evaluation
from autoseg.runtime import Progress, configure_allocator
from autoseg.training.records import VALIDATION_FOLDER


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A case, predicted by a model that had not seen it.

    Attributes:
        fold: Of the model.
        metrics: Of the label map.
        label_map: The prediction, on the file's grid.
    """

    fold: int
    metrics: CaseMetrics
    label_map: Path


@dataclass(frozen=True, slots=True)
class FinishedConfiguration:
    """A configuration of which every fold is finished and scored.

    Attributes:
        name: Of the configuration.
        weights: SHA-256 of each fold's weights, by the fold's number.
        tta: Test-time mirroring of each fold's predictions, by its number.
        cases: By case id.
        seconds_per_case: Of predicting.
    """

    name: str
    weights: Mapping[str, str]
    tta: Mapping[str, Tta]
    cases: Mapping[str, HeldOut]
    seconds_per_case: float

    @property
    def folds(self) -> tuple[int, ...]:
        """Numbers of its folds."""
        return tuple(int(fold) for fold in self.weights)


def finished_configurations(run: RunFolder, dataset: Dataset) -> tuple[FinishedConfiguration, ...]:
    """The configurations of the plan whose every fold is finished and has scored its validation cases.

    Raises:
        ConfigError: The folder is not a run, or a file in it is not valid.
    """
    num_folds = len(run.read_splits().folds)
    found = []
    for name in run.read_plan().configurations:
        scored = {
            fold: read_fold_evaluation(run.fold_folder(name, fold))
            for fold in range(num_folds)
            if fold in run.trained_folds(name)
        }
        whole = {fold: item for fold, item in scored.items() if item is not None}
        if not num_folds or len(whole) < num_folds:
            continue
        cases: dict[str, HeldOut] = {}
        for fold, item in whole.items():
            folder = run.fold_folder(name, fold) / VALIDATION_FOLDER
            for metrics in item.evaluation.cases:
                label_map = folder / f"{metrics.case}{dataset.file_ending}"
                cases.setdefault(metrics.case, HeldOut(fold, metrics, label_map))
        found.append(
            FinishedConfiguration(
                name=name,
                weights={str(fold): item.weights_sha256 for fold, item in whole.items()},
                tta={str(fold): item.tta for fold, item in whole.items()},
                cases=cases,
                seconds_per_case=sum(item.predict_s for item in whole.values())
                / max(1, sum(len(item.evaluation.cases) for item in whole.values())),
            )
        )
    return tuple(found)


def keep_probabilities(
    run: RunFolder,
    dataset: Dataset,
    finished: FinishedConfiguration,
    *,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = SILENT,
) -> dict[str, ProbabilityStore]:
    """Predict the held-out cases once more and keep the probabilities, those that are not there yet.

    Args:
        run: The run.
        dataset: Its data set.
        finished: The configuration.
        device: See `runtime.pick_device`.
        precision: See `runtime.pick_precision`.
        progress: One step a case.

    Returns:
        By case id, where they are.

    Raises:
        AutosegError: Cases that cannot be predicted.
        OSError: The disk is full.
    """
    root = run.probabilities_folder / finished.name
    stores = {fold: _store(root, finished, fold) for fold in finished.folds}
    for fold, store in stores.items():
        held = [dataset.case(case_id) for case_id, item in finished.cases.items() if item.fold == fold]
        missing = [case for case in held if not store.is_current(case)]
        if not missing:
            continue
        store.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(store.folder)
        settings = PredictionSettings(precision=precision, tta=finished.tta[str(fold)], engine="torch")
        stages = _stages(run, dataset, finished.name, fold, missing, device, settings)
        _predict(stages, missing, store, progress)
    return {case_id: stores[item.fold] for case_id, item in finished.cases.items()}


def _store(root: Path, finished: FinishedConfiguration, fold: int) -> ProbabilityStore:
    return ProbabilityStore(root / fold_name(fold), finished.weights[str(fold)], finished.tta[str(fold)])


def _stages(
    run: RunFolder,
    dataset: Dataset,
    name: str,
    fold: int,
    cases: Sequence[Case],
    device: str,
    settings: PredictionSettings,
) -> Stages:
    """The network of a fold, as it was validated; of a cascade with the label maps that it was validated with."""
    model = load_model(run.fold_folder(name, fold))
    stage = model.card.settings.previous_stage
    previous: dict[str, Path] | None = None
    if stage is not None:
        members = run.read_splits().folds[fold]
        found = out_of_fold(run, dataset, stage, [(fold, members)])[fold]
        previous = {case.id: found[case.id].label_map for case in cases}
    return load_stages([model], previous, settings, device)


def _predict(stages: Stages, cases: Sequence[Case], store: ProbabilityStore, progress: Progress) -> None:
    configure_allocator(share_arena=True)
    predictor = stages.last

    def read(case: Case) -> Ready:
        return stages.prepare(read_case(case, predictor.num_channels), case.id)

    def segment(ready: Ready) -> Codes:
        keeper = Keeper(ready.image.trail, predictor.settings.preprocess, predictor.labels, store.folder)
        stages.each_column(ready, keeper.add)
        return keeper.codes

    def write(case: Case, codes: Codes) -> tuple[Path, ...]:
        store.write(case, codes)
        return (store.path(case.id),)

    tally = Tally(cases, progress)
    run_line(cases, read, segment, write, tally.add)
    tally.outcome().raise_failures()
