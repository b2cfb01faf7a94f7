"""Everything that a run's finished folds say, gathered from their files: the content of `report/summary.json`."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import autoseg
from autoseg.domain.dataset import Dataset
from autoseg.domain.fingerprint import Fingerprint
from autoseg.domain.plan import Plan
from autoseg.domain.splits import patients_of
from autoseg.domain.values import Value
from autoseg.errors import ConfigError
from autoseg.evaluation.crossval import CaseMetrics, Evaluation, FoldEvaluation, Summary, summarise
from autoseg.evaluation.metrics import ClassMetrics
from autoseg.evaluation.selection import FINAL, Selection, folder_name, inputs_digest
from autoseg.evaluation.statistics import StatisticsRecord, patient_numbers
from autoseg.io.files import read_json, read_text
from autoseg.io.model import WEIGHTS
from autoseg.io.run_folder import RunFolder
from autoseg.training.records import (
    VALIDATION_FOLDER,
    VALIDATION_SUMMARY_FILE,
    EpochRecord,
    RunRecord,
    read_metrics,
    read_run,
)

log = logging.getLogger("autoseg")

SCHEMA_VERSION = 1

SUMMARY_FILE = "summary.json"


class FoldResult(Value):
    """One finished fold.

    Attributes:
        fold: Its number, or "all" (which has no validation cases).
        num_cases: Validation cases compared.
        mean_foreground_dice: Over them; None without.
        class_dice: Mean Dice by class, over the cases that contain it.
        predict_s: Seconds of predicting the validation cases.
        training: The record of the training; None when its file is gone.
    """

    fold: int | str
    num_cases: int
    mean_foreground_dice: float | None
    class_dice: dict[str, float | None]
    predict_s: float | None
    training: RunRecord | None


class ConfigurationResult(Value):
    """The finished folds of one configuration; or a mean of several, or what the recipe makes of them.

    Attributes:
        name: Of the configuration; of a pair such as "2d + 3d_fullres"; "final" with post-processing.
        folds: Empty unless it is a configuration that was trained.
        summary: Over the out-of-fold predictions of all finished folds together; None when no fold has any.
        kind: What it is: "trained"; "ensemble": averaged probabilities of several; "final": what `predict` gives by
            `inference.json`, with its post-processing.
    """

    name: str
    folds: tuple[FoldResult, ...]
    summary: Summary | None
    kind: Literal["trained", "ensemble", "final"] = "trained"


class ReportSummary(Value):
    """What `report/summary.json` holds.

    Attributes:
        created: Time of writing, ISO 8601, UTC.
        tolerance_mm: Of the surface Dice, by class.
        num_cases: Labelled cases of the data set.
        best: Configuration with the highest mean foreground Dice; None when none was scored.
        num_patients: Of the data set; a case whose patient is not known is one of its own.
        statistics: How intervals and tests were made.
        selection: What was decided by cross-validation: candidates and their comparisons, the choice, post-processing,
            calibration, how sure each case is. None before all folds of a configuration are finished.
    """

    schema_version: int = SCHEMA_VERSION
    autoseg_version: str
    created: str
    dataset: str
    num_cases: int
    plan_digest: str
    fingerprint_digest: str
    tolerance_mm: dict[str, float]
    best: str | None
    configurations: tuple[ConfigurationResult, ...]
    num_patients: int | None = None
    statistics: StatisticsRecord | None = None
    selection: Selection | None = None


@dataclass(frozen=True, slots=True)
class CaseRow:
    """The out-of-fold metrics of one case, with the fold whose model predicted it.

    Attributes:
        prediction: The predicted label map.
    """

    configuration: str
    fold: int | str
    metrics: CaseMetrics
    prediction: Path


@dataclass(frozen=True, slots=True)
class Curve:
    """The learning curve of one fold."""

    configuration: str
    fold: int | str
    epochs: tuple[EpochRecord, ...]


@dataclass(frozen=True, slots=True)
class RunResults:
    """A run with all its results."""

    dataset: Dataset
    plan: Plan
    fingerprint: Fingerprint
    summary: ReportSummary
    cases: tuple[CaseRow, ...]
    curves: tuple[Curve, ...]


def knows_patients(results: RunResults) -> bool:
    """Whether it is known whose the cases are; else each counts as a patient of its own, and is called a case."""
    return bool(patients_of(results.dataset.cases))


def collect(run: RunFolder) -> RunResults:
    """Read every finished fold of every configuration.

    Raises:
        ConfigError: The folder is not a run, no fold is finished, or a file is not valid.
    """
    dataset, plan, fingerprint = run.read_dataset(), run.read_plan(), run.read_fingerprint()
    patients = patients_of(dataset.cases)
    num_patients = int(patient_numbers([case.id for case in dataset.cases], patients).max(initial=-1)) + 1
    names = run.trained_configurations()
    if not names:
        raise ConfigError(
            f"{run.root} has no finished fold to report on", hint=f"Train one first: autoseg train {run.root}"
        )
    configurations: list[ConfigurationResult] = []
    rows: list[CaseRow] = []
    curves: list[Curve] = []
    tolerance_mm: dict[str, float] = {}
    weights: dict[str, dict[str, str]] = {}
    for name in names:
        folds = []
        for fold in run.trained_folds(name):
            folder = run.fold_folder(name, fold)
            scored = read_fold_evaluation(folder)
            folds.append(_fold_result(fold, folder, scored))
            curves.append(Curve(name, fold, read_metrics(folder)))
            if scored is not None:
                weights.setdefault(name, {})[str(fold)] = scored.weights_sha256
                tolerance_mm |= scored.evaluation.tolerance_mm
                rows += _case_rows(name, fold, folder, scored.evaluation, dataset.file_ending)
        configurations.append(_configuration_result(name, folds, rows, plan, patients))
    selection = _selection(run, weights)
    if selection is not None:
        for candidate in _predicted_anew(selection):
            result, found = _of_crossval(run, candidate, rows, dataset.file_ending)
            configurations.append(result)
            rows += found
    summary = ReportSummary(
        autoseg_version=autoseg.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dataset=dataset.name,
        num_cases=len(dataset.cases),
        plan_digest=plan.digest(),
        fingerprint_digest=fingerprint.digest(),
        tolerance_mm=tolerance_mm,
        best=_best(configurations) if selection is None else selection.choice,
        configurations=tuple(configurations),
        num_patients=num_patients,
        statistics=StatisticsRecord(num_patients=num_patients),
        selection=selection,
    )
    return RunResults(dataset, plan, fingerprint, summary, tuple(rows), tuple(curves))


def _selection(run: RunFolder, weights: Mapping[str, Mapping[str, str]]) -> Selection | None:
    """What cross-validation decided; None where it did not, or by other weights or another version than are here."""
    path = run.selection_file
    if not path.is_file():
        return None
    selection = Selection.from_json(read_text(path), path)
    names = {member.configuration for item in selection.candidates for member in item.members}
    if inputs_digest({name: folds for name, folds in weights.items() if name in names}) == selection.inputs_digest:
        return selection
    log.warning(
        "%s is left out: it was made from other weights or by another version; run: autoseg report %s --select",
        path,
        run.root,
    )
    return None


def _predicted_anew(selection: Selection) -> tuple[str, ...]:
    """Candidates with label maps of their own, and what the recipe gives where it does more than choose."""
    pairs = tuple(item.name for item in selection.candidates if len(item.members) > 1)
    return (*pairs, FINAL) if selection.recipe.postprocessing else pairs


def _of_crossval(
    run: RunFolder, name: str, rows: list[CaseRow], ending: str
) -> tuple[ConfigurationResult, list[CaseRow]]:
    """A pair, or what the recipe gives, with its cases.

    Raises:
        ConfigError: Its scores are missing or not valid.
    """
    folder = run.crossval_folder / folder_name(name)
    path = folder / SUMMARY_FILE
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing, which {run.selection_file} speaks of",
            hint=f"Delete {run.selection_file} and run: autoseg report {run.root} --select",
        )
    evaluation = Evaluation.from_json(read_text(path), path)
    folds = {row.metrics.case: row.fold for row in rows}
    result = ConfigurationResult(
        name=name, folds=(), summary=evaluation.summary, kind="final" if name == FINAL else "ensemble"
    )
    found = [CaseRow(name, folds[case.case], case, folder / f"{case.case}{ending}") for case in evaluation.cases]
    return result, found


def read_fold_evaluation(folder: Path) -> FoldEvaluation | None:
    """The scores of a fold's validation cases; None when it has none, or other weights than its own predicted.

    Raises:
        ConfigError: The file is not valid.
    """
    path = folder / VALIDATION_FOLDER / VALIDATION_SUMMARY_FILE
    if not path.is_file():
        return None
    scored = FoldEvaluation.from_json(read_text(path), path)
    card = read_json(folder / f"{WEIGHTS}.json")
    if not isinstance(card, dict) or card.get("weights_sha256") != scored.weights_sha256:
        log.warning("%s is left out: other weights than those of the fold made it; train again to renew it", path)
        return None
    return scored


def _fold_result(fold: int | str, folder: Path, scored: FoldEvaluation | None) -> FoldResult:
    summary = scored.evaluation.summary if scored is not None else None
    return FoldResult(
        fold=fold,
        num_cases=summary.num_cases if summary is not None else 0,
        mean_foreground_dice=summary.mean_foreground_dice if summary is not None else None,
        class_dice={item.name: item.metric("dice").mean for item in summary.classes} if summary is not None else {},
        predict_s=scored.predict_s if scored is not None else None,
        training=read_run(folder),
    )


def _case_rows(name: str, fold: int | str, folder: Path, evaluation: Evaluation, ending: str) -> Iterator[CaseRow]:
    for case in evaluation.cases:
        yield CaseRow(name, fold, case, folder / VALIDATION_FOLDER / f"{case.case}{ending}")


def _configuration_result(
    name: str, folds: list[FoldResult], rows: list[CaseRow], plan: Plan, patients: Mapping[str, str]
) -> ConfigurationResult:
    cases = [row.metrics for row in rows if row.configuration == name]
    summary = summarise(cases, plan.labels.names, patients) if cases else None
    return ConfigurationResult(name=name, folds=tuple(folds), summary=summary)


def _best(configurations: list[ConfigurationResult]) -> str | None:
    scores = {
        item.name: item.summary.mean_foreground_dice
        for item in configurations
        if item.summary is not None and item.summary.mean_foreground_dice is not None
    }
    return max(scores, key=lambda name: scores[name] or 0.0) if scores else None


def cases_csv(results: RunResults) -> str:
    """One line a configuration, case and class; what is not defined is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    fields = tuple(ClassMetrics.model_fields)
    writer.writerow(("configuration", "fold", "case", "class", *fields[1:]))
    for row in results.cases:
        for item in row.metrics.classes:
            values = (getattr(item, name) for name in fields[1:])
            writer.writerow((row.configuration, row.fold, row.metrics.case, item.name, *values))
    return buffer.getvalue()
