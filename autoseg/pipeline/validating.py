"""Predict and score a fold's validation cases with its final weights, and the best weights beside them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.config import TrainSettings
from autoseg.domain.dataset import Dataset
from autoseg.domain.inference import DEFAULT_TTA
from autoseg.domain.splits import patients_of
from autoseg.errors import AutosegError
from autoseg.evaluation.crossval import BestWeights, Evaluation, FoldEvaluation, evaluate_cases, tolerance_of
from autoseg.evaluation.metrics import METRICS_VERSION
from autoseg.inference.cases import predict_cases
from autoseg.io.files import read_json, write_text
from autoseg.io.model import BEST, Model, is_whole, load_model
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.cascade import OutOfFold
from autoseg.pipeline.cases import SILENT, annotated_names, labels_of
from autoseg.runtime import Progress, num_cpus
from autoseg.training.records import VALIDATION_FOLDER, VALIDATION_SUMMARY_FILE
from autoseg.training.telling import duration

BEST_S = 60.0
"""The best weights are compared where that takes no longer than this, ..."""

BEST_FRACTION = 0.05
"""... or no longer than this part of the training. Source: decision 27."""


@dataclass(frozen=True, slots=True)
class _Scoring:
    """How the validation cases of one fold are predicted and compared."""

    run_folder: RunFolder
    dataset: Dataset
    case_ids: Sequence[str]
    settings: TrainSettings
    previous: Mapping[str, OutOfFold] | None
    progress: Progress

    def score(self, model: Model, out: Path) -> tuple[Evaluation, float, float]:
        """Predict into a folder and compare; returns the seconds of both too.

        Raises:
            AutosegError: Cases that could not be predicted or compared.
        """
        started = time.monotonic()
        cases = [self.dataset.case(case_id) for case_id in self.case_ids]
        previous = self.previous
        outcome = predict_cases(
            [model],
            cases,
            out,
            ending=self.dataset.file_ending,
            device=self.settings.device,
            precision=self.settings.precision,
            # Scores compare models: all are to be computed alike, whatever was found to be quickest when.
            engine="torch",
            tta=DEFAULT_TTA,
            previous=None if previous is None else {case_id: previous[case_id].label_map for case_id in self.case_ids},
            progress=self.progress,
        )
        outcome.raise_failures()
        predicted_s = time.monotonic() - started
        evaluation, score_s = self.compare(out)
        return evaluation, predicted_s, score_s

    def compare(self, out: Path) -> tuple[Evaluation, float]:
        """Compare what is predicted already; returns the seconds too.

        Raises:
            AutosegError: Cases that could not be compared.
        """
        started = time.monotonic()
        cases = [self.dataset.case(case_id) for case_id in self.case_ids]
        evaluation = evaluate_cases(
            [(case.id, self.label_map(case.id, out), labels_of(case)) for case in cases],
            self.dataset.labels,
            tolerance_of(self.run_folder.read_fingerprint()),
            workers=num_cpus(),
            progress=self.progress,
            annotated=annotated_names(cases),
            patients=patients_of(self.dataset.cases),
        )
        return evaluation, time.monotonic() - started

    def label_map(self, case_id: str, out: Path) -> Path:
        """Where the prediction of a case lies."""
        return out / f"{case_id}{self.dataset.file_ending}"


def validate_fold(
    run_folder: RunFolder,
    folder: Path,
    dataset: Dataset,
    case_ids: Sequence[str],
    settings: TrainSettings,
    *,
    previous: Mapping[str, OutOfFold] | None = None,
    progress: Progress = SILENT,
) -> FoldEvaluation | None:
    """Predict a fold's validation cases with its final weights and score them, unless that is done; None without cases.

    The best weights are scored on the same cases afterwards, where there are others and it does not take long.

    Args:
        run_folder: The run.
        folder: Of the fold.
        dataset: The run's.
        case_ids: The validation cases.
        settings: Device and precision.
        previous: Of a cascade: what the previous stage predicted for them, unseen.
        progress: One step a case.
    """
    if not case_ids:
        return None
    validation, model = folder / VALIDATION_FOLDER, load_model(folder)
    summary = validation / VALIDATION_SUMMARY_FILE
    scoring = _Scoring(run_folder, dataset, case_ids, settings, previous, progress)
    scored = _stored(summary, model)
    if scored is not None and scored.evaluation.metrics_version != METRICS_VERSION:
        scored = _renewed(scored, scoring, validation)
        if scored is not None:
            write_text(summary, scored.to_json())
    if scored is None:
        evaluation, predict_s, score_s = scoring.score(model, validation)
        scored = FoldEvaluation(
            weights_sha256=model.card.weights_sha256,
            tta=DEFAULT_TTA,
            predict_s=predict_s,
            score_s=score_s,
            evaluation=evaluation,
        )
        write_text(summary, scored.to_json())
    if scored.best is None:
        scored = scored.model_copy(update={"best": _best_weights(folder, model, scored, scoring)})
        write_text(summary, scored.to_json())
    return scored


def _stored(summary: Path, model: Model) -> FoldEvaluation | None:
    """What was scored before; None when there is nothing, or other weights or another mirroring were scored."""
    if not summary.is_file():
        return None
    stored = read_json(summary)
    if stored.get("weights_sha256") != model.card.weights_sha256:
        return None
    scored = FoldEvaluation.model_validate(stored)
    return scored if scored.tta == DEFAULT_TTA else None


def _renewed(scored: FoldEvaluation, scoring: _Scoring, validation: Path) -> FoldEvaluation | None:
    """What an earlier version scored, with the metrics of today; None where label maps are missing."""
    if not all(scoring.label_map(case_id, validation).is_file() for case_id in scoring.case_ids):
        return None
    evaluation, score_s = scoring.compare(validation)
    return scored.model_copy(update={"evaluation": evaluation, "score_s": score_s})


def _best_weights(folder: Path, final: Model, scored: FoldEvaluation, scoring: _Scoring) -> BestWeights:
    """Score the best weights, or say why not."""
    if not is_whole(folder, BEST):
        return BestWeights(skipped="there are none")
    best = load_model(folder, BEST)
    checksum = best.card.weights_sha256
    if checksum == final.card.weights_sha256:
        return BestWeights(weights_sha256=checksum, skipped="they are the final weights")
    expected_s = scored.predict_s + scored.score_s
    trained_s = final.card.provenance.get("seconds")
    limit_s = max(BEST_S, BEST_FRACTION * trained_s) if isinstance(trained_s, int | float) else BEST_S
    if expected_s > limit_s:
        return BestWeights(weights_sha256=checksum, differ=True, skipped=f"it would take about {duration(expected_s)}")
    epochs = best.card.provenance.get("epochs")
    try:
        # In the fold folder, where a training removes what a killed process left behind.
        with tempfile.TemporaryDirectory(prefix=".tmp-best-", dir=folder) as temporary:
            evaluation, predict_s, score_s = scoring.score(best, Path(temporary))
    except AutosegError as problem:
        return BestWeights(weights_sha256=checksum, differ=True, skipped=problem.message)
    summary = evaluation.summary
    return BestWeights(
        weights_sha256=checksum,
        differ=True,
        epoch=epochs if isinstance(epochs, int) else None,
        mean_foreground_dice=summary.mean_foreground_dice,
        class_dice={item.name: item.metric("dice").mean for item in summary.classes},
        seconds=predict_s + score_s,
    )
