"""The candidates of a cross-validation: configurations, and pairs of them whose probabilities are averaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import Case, Dataset
from autoseg.domain.geometry import Geometry
from autoseg.domain.inference import Member
from autoseg.domain.splits import patients_of
from autoseg.evaluation import calibration
from autoseg.evaluation.counts import dice_of, mean_foreground
from autoseg.evaluation.crossval import evaluate_cases, tolerance_of
from autoseg.evaluation.ensemble import WEIGHTS, Decoder, Indices, Part, pair_counts, pair_labels
from autoseg.evaluation.selection import Calibration, Candidate, folder_name
from autoseg.evaluation.summaries import CaseMetrics, Evaluation, Summary, summarise
from autoseg.evaluation.thresholds import Mixture
from autoseg.io.files import write_text
from autoseg.io.images import read_header, read_labels, write_labels
from autoseg.io.probabilities import ProbabilityStore
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.cases import annotated_names, labels_of
from autoseg.pipeline.held_out import FinishedConfiguration, keep_probabilities
from autoseg.runtime import Progress, num_cpus

R = TypeVar("R")

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


class Candidates:
    """What the candidates of one selection say of the cases that all of them predicted.

    Args:
        run: The run.
        dataset: Its data set.
        finished: Configurations with all folds; at least one.
        device: See `runtime.pick_device`.
        precision: See `runtime.pick_precision`.
        progress: One step a case.

    Attributes:
        cases: By their ids, those that every configuration predicted.
        calibrations: By configuration; what `calibrate` gave.
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
        self.run, self.dataset, self.progress = run, dataset, progress
        self.finished = {item.name: item for item in finished}
        self.schema = dataset.labels
        self.decoder = Decoder(dataset.labels)
        self.patients = patients_of(dataset.cases)
        common = set.intersection(*(set(item.cases) for item in finished))
        self.cases = tuple(case for case in sorted(dataset.cases, key=lambda one: one.id) if case.id in common)
        self._annotated = annotated_names(self.cases)
        self._stores = {
            name: keep_probabilities(run, dataset, item, device=device, precision=precision, progress=progress)
            for name, item in self.finished.items()
        }
        self.calibrations: dict[str, Calibration] = {}

    def each(self, what: str, step: Callable[[int, Case], R]) -> list[R]:
        """A step for every case, a few at a time."""
        self.progress.start(what, len(self.cases))
        results = []
        with ThreadPoolExecutor(num_cpus()) as pool:
            for item in pool.map(step, range(len(self.cases)), self.cases):
                results.append(item)
                self.progress.advance()
        self.progress.finish()
        return results

    def fresh(self, candidate: str) -> Path:
        """The folder of a candidate's predictions, without those of an earlier selection."""
        folder = self.run.crossval_folder / folder_name(candidate)
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def reference(self, case: Case) -> Indices:
        """Value indices (Z, Y, X) of the reference."""
        labels, _ = read_labels(labels_of(case), self._geometry(case))
        return self.decoder.table.encode_reference(np.ascontiguousarray(labels.T))

    def _geometry(self, case: Case) -> Geometry:
        """Of the image, as a label map that was predicted for it has it: an image may be a whole series of files."""
        return read_header(next(iter(self.finished.values())).cases[case.id].label_map).geometry

    def summary(self, cases: Sequence[CaseMetrics]) -> Summary:
        """Of a candidate."""
        return summarise(cases, self.schema.names, self.patients)

    def _store(self, name: str, case: Case) -> ProbabilityStore:
        return self._stores[name][case.id]

    def part(self, name: str, case: Case) -> Part:
        """What a configuration says of a case."""
        return Part(self._store(name, case).open(case.id), self._member(name).temperatures(self.schema))

    def mixture(self, candidate: Candidate, case: Case) -> Mixture:
        """What a candidate says of a case: its configurations with their shares."""
        total = sum(member.weight for member in candidate.members)
        return [(self.part(member.configuration, case), member.weight / total) for member in candidate.members]

    def calibrate(self, name: str) -> Calibration:
        """Fit the temperatures of a configuration; the parts and pairs that come later take them."""
        most = calibration.num_voxels_per_case(len(self.cases))

        def draw(number: int, case: Case) -> calibration.Sample | None:
            if case.annotated is not None:
                return None  # of a class that was not annotated nobody knows
            stored = self._store(name, case).open(case.id)
            return calibration.draw(stored, self.reference(case), self.schema, number, most)

        samples = [item for item in self.each(f"Calibrating {name}", draw) if item is not None]
        nothing = calibration.Sample(
            np.zeros((self.schema.num_outputs, 0), np.uint8), np.zeros((self.schema.num_outputs, 0), np.bool_)
        )
        found = calibration.calibrate(calibration.join([nothing, *samples]), self.schema, name)
        self.calibrations[name] = found
        return found

    def _member(self, name: str, weight: float = 1.0) -> Member:
        return self.calibrations[name].member(self.finished[name].folds, weight)

    def single(self, item: FinishedConfiguration) -> Scored:
        """A configuration, with the label maps that validation wrote."""
        cases = tuple(item.cases[case.id].metrics for case in self.cases)
        summary = self.summary(cases)
        candidate = Candidate(
            name=item.name,
            members=(self._member(item.name),),
            mean_foreground_dice=summary.mean_foreground_dice,
            interval=summary.interval,
            seconds_per_case=item.seconds_per_case,
        )
        return Scored(candidate, cases, {case.id: item.cases[case.id].label_map for case in self.cases})

    def pair(self, first: str, second: str) -> Scored:
        """Two configurations, whose mean is written."""
        name = f"{first} + {second}"
        weight, cross_fitted = self._weight(first, second)
        folder = self.fresh(name)

        def write(_: int, case: Case) -> Path:
            path = folder / f"{case.id}{self.dataset.file_ending}"
            labels = pair_labels(self.part(first, case), self.part(second, case), weight, self.decoder)
            write_labels(path, labels, self._geometry(case))
            return path

        paths = self.each(f"Averaging {name}", write)
        label_maps = {case.id: path for case, path in zip(self.cases, paths, strict=True)}
        evaluation = self.evaluate(label_maps, folder)
        shares = (weight, round(1 - weight, _WEIGHT_DIGITS))
        seconds = sum(self.finished[one].seconds_per_case for one in (first, second))
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
            parts = (self.part(first, case), self.part(second, case))
            counts = pair_counts(*parts, WEIGHTS, self.reference(case), self.decoder)
            return np.array([dice_of(item, self.schema, case.annotated) for item in counts])

        dice = np.array(self.each(f"Weighing {first} and {second}", count))  # (cases, weights, classes)
        folds = np.array([self.finished[first].cases[case.id].fold for case in self.cases])
        return learned_weight(dice, folds)

    def evaluate(self, label_maps: Mapping[str, Path], folder: Path) -> Evaluation:
        """Score label maps, and write the scores beside them."""
        evaluation = evaluate_cases(
            [(case.id, label_maps[case.id], labels_of(case)) for case in self.cases],
            self.schema,
            tolerance_of(self.run.read_fingerprint()),
            workers=num_cpus(),
            progress=self.progress,
            annotated=self._annotated,
            patients=self.patients,
        )
        write_text(folder / SUMMARY_FILE, evaluation.to_json())
        return evaluation


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
