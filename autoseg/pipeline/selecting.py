"""Decide by cross-validation what `predict RUN` uses: configuration or pair, temperatures, post-processing.

What is decided is written to `inference.json`, and why to `crossval/selection.json`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg import __version__
from autoseg.domain.dataset import Case, Dataset
from autoseg.domain.geometry import Geometry
from autoseg.domain.inference import InferenceRecipe, Member
from autoseg.domain.splits import patients_of
from autoseg.evaluation import calibration
from autoseg.evaluation.comparing import choose_candidate, compare_all
from autoseg.evaluation.confidence import confidence_of
from autoseg.evaluation.counts import dice_of, mean_foreground
from autoseg.evaluation.crossval import evaluate_cases, tolerance_of
from autoseg.evaluation.ensemble import WEIGHTS, Decoder, Indices, Part, pair_counts, pair_labels
from autoseg.evaluation.postprocess import apply_rules
from autoseg.evaluation.rules_search import Found, Predicted, RuleSearch
from autoseg.evaluation.selection import (
    FINAL,
    Calibration,
    Candidate,
    CaseConfidence,
    Selection,
    folder_name,
    inputs_digest,
)
from autoseg.evaluation.statistics import StatisticsRecord
from autoseg.evaluation.summaries import CaseMetrics, Evaluation, Summary, summarise
from autoseg.io.files import read_text, write_text
from autoseg.io.images import read_header, read_labels, write_labels
from autoseg.io.probabilities import ProbabilityStore
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.cases import SILENT, annotated_names, labels_of
from autoseg.pipeline.held_out import FinishedConfiguration, finished_configurations, keep_probabilities
from autoseg.runtime import Progress, num_cpus

log = logging.getLogger("autoseg")

R = TypeVar("R")

CHOSEN_BY = "cross-validation"
"""In the provenance of an `inference.json` that was written here, and may be replaced."""

SUMMARY_FILE = "summary.json"
"""Metrics of a candidate's label maps, beside them."""

_WEIGHT_DIGITS = 2


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with what it predicted.

    Attributes:
        candidate: What it is.
        cases: Its metrics, in the order of the cases.
        label_maps: By case id.
    """

    candidate: Candidate
    cases: tuple[CaseMetrics, ...]
    label_maps: Mapping[str, Path]


def select(
    run: RunFolder, *, device: str = "auto", precision: str = "auto", progress: Progress = SILENT
) -> Selection | None:
    """Decide, unless that is done for these weights already; None while no configuration has all folds finished.

    Args:
        run: The run.
        device: See `runtime.pick_device`.
        precision: See `runtime.pick_precision`.
        progress: One step a case.

    Raises:
        ConfigError: The folder is not a run, or a file in it is not valid.
        DatasetError: Images or label maps that cannot be read.
    """
    dataset = run.read_dataset()
    finished = finished_configurations(run, dataset)
    if not finished:
        return None
    digest = inputs_digest({item.name: item.weights for item in finished})
    stored = stored_selection(run)
    if stored is not None and stored.inputs_digest == digest:
        _write_recipe(run, stored.recipe)
        return stored
    selection = _Selecting(run, dataset, finished, device, precision, progress).run(digest)
    _write_recipe(run, selection.recipe)
    run.write(run.selection_file, selection)
    return selection


def stored_selection(run: RunFolder) -> Selection | None:
    """What was decided before; None where nothing was.

    Raises:
        ConfigError: The file is not valid.
    """
    path = run.selection_file
    return Selection.from_json(read_text(path), path) if path.is_file() else None


def _write_recipe(run: RunFolder, recipe: InferenceRecipe) -> None:
    """Write `inference.json`, unless a person wrote the one that is there."""
    there = run.read_inference()
    if there is not None and there.provenance.get("chosen_by") != CHOSEN_BY:
        log.warning(
            "%s was not made by cross-validation and is kept as it is; delete it to predict with what was chosen",
            run.inference_file,
        )
        return
    if there != recipe:
        run.write(run.inference_file, recipe)


class _Selecting:
    """One selection.

    Args:
        run: The run.
        dataset: Its data set.
        finished: Configurations with all folds; at least one.
        device: See `select`.
        precision: See `select`.
        progress: See `select`.
    """

    def __init__(
        self,
        run: RunFolder,
        dataset: Dataset,
        finished: Sequence[FinishedConfiguration],
        device: str,
        precision: str,
        progress: Progress,
    ) -> None:
        self._started = time.monotonic()
        self._run, self._dataset, self._progress = run, dataset, progress
        self._finished = {item.name: item for item in finished}
        self._schema = dataset.labels
        self._decoder = Decoder(dataset.labels)
        self._patients = patients_of(dataset.cases)
        common = set.intersection(*(set(item.cases) for item in finished))
        self._cases = tuple(case for case in sorted(dataset.cases, key=lambda one: one.id) if case.id in common)
        self._annotated = annotated_names(self._cases)
        self._stores = {
            name: keep_probabilities(run, dataset, item, device=device, precision=precision, progress=progress)
            for name, item in self._finished.items()
        }
        self._temperatures: dict[str, float] = {}

    def run(self, digest: str) -> Selection:
        """Everything, one step after the other."""
        calibrations = tuple(self._calibrate(name) for name in self._finished)
        self._temperatures = {item.configuration: item.temperature for item in calibrations}
        scored = [self._single(item) for item in self._finished.values()]
        scored += [self._pair(first, second) for first, second in combinations(self._finished, 2)]
        by_name = {item.candidate.name: item for item in scored}
        comparisons = compare_all(
            {name: item.cases for name, item in by_name.items()}, self._schema.names, self._patients
        )
        chosen, reason = choose_candidate([item.candidate for item in scored], comparisons)
        best = by_name[chosen.name]
        before = self._summary(best.cases)
        found = self._search_rules(best)
        final = self._apply(found, best) if found.rules else before
        return Selection(
            inputs_digest=digest,
            statistics=StatisticsRecord(num_patients=before.num_patients),
            num_cases=len(self._cases),
            candidates=tuple(
                sorted((item.candidate for item in scored), key=lambda item: -(item.mean_foreground_dice or 0.0))
            ),
            comparisons=comparisons,
            choice=chosen.name,
            reason=reason,
            recipe=InferenceRecipe(
                members=chosen.members,
                postprocessing=found.rules,
                provenance={
                    "chosen_by": CHOSEN_BY,
                    "choice": chosen.name,
                    "reason": reason,
                    "mean_foreground_dice": final.mean_foreground_dice,
                    "num_cases": len(self._cases),
                    "inputs_digest": digest,
                    "autoseg_version": __version__,
                },
            ),
            tried_rules=found.tried,
            calibrations=calibrations,
            chosen=before,
            final=final,
            confidences=self._confidences(chosen),
            seconds=time.monotonic() - self._started,
        )

    def _each(self, what: str, step: Callable[[int, Case], R]) -> list[R]:
        """A step for every case, a few at a time."""
        self._progress.start(what, len(self._cases))
        results = []
        with ThreadPoolExecutor(num_cpus()) as pool:
            for item in pool.map(step, range(len(self._cases)), self._cases):
                results.append(item)
                self._progress.advance()
        self._progress.finish()
        return results

    def _fresh(self, candidate: str) -> Path:
        """The folder of a candidate's predictions, without those of an earlier selection."""
        folder = self._run.crossval_folder / folder_name(candidate)
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _reference(self, case: Case) -> Indices:
        """Value indices (Z, Y, X) of the reference."""
        labels, _ = read_labels(labels_of(case), self._geometry(case))
        return self._decoder.table.encode_reference(np.ascontiguousarray(labels.T))

    def _geometry(self, case: Case) -> Geometry:
        """Of the image, as a label map that was predicted for it has it: an image may be a whole series of files."""
        return read_header(next(iter(self._finished.values())).cases[case.id].label_map).geometry

    def _summary(self, cases: Sequence[CaseMetrics]) -> Summary:
        return summarise(cases, self._schema.names, self._patients)

    def _store(self, name: str, case: Case) -> ProbabilityStore:
        return self._stores[name][case.id]

    def _part(self, name: str, case: Case) -> Part:
        return Part(self._store(name, case).open(case.id), self._temperatures[name])

    def _calibrate(self, name: str) -> Calibration:
        most = calibration.num_voxels_per_case(len(self._cases))

        def draw(number: int, case: Case) -> calibration.Sample | None:
            if case.annotated is not None:
                return None  # of a class that was not annotated nobody knows
            stored = self._store(name, case).open(case.id)
            return calibration.draw(stored, self._reference(case), self._schema, number, most)

        samples = [item for item in self._each(f"Calibrating {name}", draw) if item is not None]
        nothing = calibration.Sample(
            np.zeros((self._schema.num_outputs, 0), np.uint8), np.zeros((self._schema.num_outputs, 0), np.bool_)
        )
        return calibration.calibrate(calibration.join([nothing, *samples]), self._schema, name)

    def _member(self, name: str, weight: float = 1.0) -> Member:
        return Member(
            configuration=name,
            folds=self._finished[name].folds,
            weight=weight,
            temperature=self._temperatures[name],
        )

    def _single(self, item: FinishedConfiguration) -> Scored:
        cases = tuple(item.cases[case.id].metrics for case in self._cases)
        summary = self._summary(cases)
        candidate = Candidate(
            name=item.name,
            members=(self._member(item.name),),
            mean_foreground_dice=summary.mean_foreground_dice,
            interval=summary.interval,
            seconds_per_case=item.seconds_per_case,
        )
        return Scored(candidate, cases, {case.id: item.cases[case.id].label_map for case in self._cases})

    def _pair(self, first: str, second: str) -> Scored:
        name = f"{first} + {second}"
        weight, cross_fitted = self._weight(first, second)
        folder = self._fresh(name)

        def write(_: int, case: Case) -> Path:
            path = folder / f"{case.id}{self._dataset.file_ending}"
            labels = pair_labels(self._part(first, case), self._part(second, case), weight, self._decoder)
            write_labels(path, labels, self._geometry(case))
            return path

        paths = self._each(f"Averaging {name}", write)
        label_maps = {case.id: path for case, path in zip(self._cases, paths, strict=True)}
        evaluation = self._evaluate(label_maps, folder)
        shares = (weight, round(1 - weight, _WEIGHT_DIGITS))
        seconds = sum(self._finished[one].seconds_per_case for one in (first, second))
        candidate = Candidate(
            name=name,
            members=tuple(self._member(one, share) for one, share in zip((first, second), shares, strict=True)),
            mean_foreground_dice=evaluation.summary.mean_foreground_dice,
            interval=evaluation.summary.interval,
            cross_fitted_dice=cross_fitted,
            seconds_per_case=seconds,
        )
        return Scored(candidate, evaluation.cases, label_maps)

    def _weight(self, first: str, second: str) -> tuple[float, float | None]:
        """The share of the first, and what a learned share scored on folds that it was not learned from."""

        def count(_: int, case: Case) -> NDArray[np.float64]:
            parts = (self._part(first, case), self._part(second, case))
            counts = pair_counts(*parts, WEIGHTS, self._reference(case), self._decoder)
            return np.array([dice_of(item, self._schema, case.annotated) for item in counts])

        dice = np.array(self._each(f"Weighing {first} and {second}", count))  # (cases, weights, classes)
        folds = np.array([self._finished[first].cases[case.id].fold for case in self._cases])
        return learned_weight(dice, folds)

    def _evaluate(self, label_maps: Mapping[str, Path], folder: Path) -> Evaluation:
        evaluation = evaluate_cases(
            [(case.id, label_maps[case.id], labels_of(case)) for case in self._cases],
            self._schema,
            tolerance_of(self._run.read_fingerprint()),
            workers=num_cpus(),
            progress=self._progress,
            annotated=self._annotated,
            patients=self._patients,
        )
        write_text(folder / SUMMARY_FILE, evaluation.to_json())
        return evaluation

    def _search_rules(self, best: Scored) -> Found:
        predicted = [
            Predicted(case.id, best.label_maps[case.id], labels_of(case), case.annotated) for case in self._cases
        ]
        return RuleSearch(predicted, self._schema, self._patients, num_cpus(), self._progress).run()

    def _apply(self, found: Found, best: Scored) -> Summary:
        """Write and score what the rules make of the chosen predictions."""
        folder = self._fresh(FINAL)

        def write(_: int, case: Case) -> Path:
            path = folder / f"{case.id}{self._dataset.file_ending}"
            labels, geometry = read_labels(best.label_maps[case.id], None)
            write_labels(path, apply_rules(labels, found.rules, self._schema, geometry.spacing_mm), geometry)
            return path

        paths = self._each("Applying the rules", write)
        label_maps = {case.id: path for case, path in zip(self._cases, paths, strict=True)}
        return self._evaluate(label_maps, folder).summary

    def _confidences(self, chosen: Candidate) -> tuple[CaseConfidence, ...]:
        total = sum(member.weight for member in chosen.members)

        def look(_: int, case: Case) -> CaseConfidence:
            parts = [(self._part(one.configuration, case), one.weight / total) for one in chosen.members]
            return confidence_of(case.id, parts, self._reference(case), self._decoder)

        return tuple(self._each("Looking for cases that are unsure", look))


def learned_weight(dice: NDArray[np.float64], folds: NDArray[np.integer]) -> tuple[float, float | None]:
    """Equal shares, unless others are better on folds that they were not learned from.

    Args:
        dice: (cases, weights, classes) for `WEIGHTS`; NaN where a case lacks a class.
        folds: (cases,) the fold that holds each out.

    Returns:
        The share of the first configuration; and the mean foreground Dice where each fold has the share that is best on
        the other folds, None with equal shares.
    """
    fitted = np.full_like(dice[:, 0], np.nan)
    for fold in np.unique(folds):
        fitted[folds == fold] = dice[folds == fold, _best(dice[folds != fold])]
    learned, equal = mean_foreground(fitted), mean_foreground(dice[:, 0])
    best = _best(dice)
    if learned is None or equal is None or learned <= equal or best == 0:
        return WEIGHTS[0], None
    return WEIGHTS[best], learned


def _best(dice: NDArray[np.float64]) -> int:
    """The weight with the highest mean foreground Dice; of equal ones the first."""
    scores = [mean_foreground(dice[:, index]) for index in range(len(WEIGHTS))]
    return max(range(len(WEIGHTS)), key=lambda index: (-1.0 if scores[index] is None else scores[index], -index))
