"""Decide by cross-validation what `predict RUN` uses: configuration or pair, temperatures, post-processing.

What is decided is written to `inference.json`, and why to `crossval/selection.json`.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from itertools import combinations
from pathlib import Path

from autoseg import __version__
from autoseg.domain.dataset import Case
from autoseg.domain.inference import DropUnlikely, InferenceRecipe, thresholds_of
from autoseg.evaluation.comparing import choose_candidate, compare_all
from autoseg.evaluation.confidence import confidence_of
from autoseg.evaluation.postprocess import apply_rules
from autoseg.evaluation.rules_search import Found, Predicted, RuleSearch
from autoseg.evaluation.selection import FINAL, Candidate, CaseConfidence, Selection, inputs_digest
from autoseg.evaluation.statistics import StatisticsRecord
from autoseg.evaluation.summaries import Summary
from autoseg.evaluation.thresholds import likelihoods_of, with_thresholds
from autoseg.io.files import read_text
from autoseg.io.images import read_labels, write_labels
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.candidates import Candidates, Scored
from autoseg.pipeline.cases import SILENT, labels_of
from autoseg.pipeline.held_out import finished_configurations
from autoseg.runtime import Progress, num_cpus

log = logging.getLogger("autoseg")

CHOSEN_BY = "cross-validation"
"""In the provenance of an `inference.json` that was written here, and may be replaced."""


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
    selection = _Selecting(Candidates(run, dataset, finished, device, precision, progress)).run(digest)
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
    """One selection among candidates."""

    def __init__(self, candidates: Candidates) -> None:
        self._started = time.monotonic()
        self._all = candidates

    def run(self, digest: str) -> Selection:
        """Everything, one step after the other."""
        calibrations = tuple(self._all.calibrate(name) for name in self._all.finished)
        scored = [self._all.single(item) for item in self._all.finished.values()]
        scored += [self._all.pair(first, second) for first, second in combinations(self._all.finished, 2)]
        by_name = {item.candidate.name: item for item in scored}
        comparisons = compare_all(
            {name: item.cases for name, item in by_name.items()}, self._all.schema.names, self._all.patients
        )
        chosen, reason = choose_candidate([item.candidate for item in scored], comparisons)
        best = by_name[chosen.name]
        before = self._all.summary(best.cases)
        found = self._search_rules(best)
        final = self._apply(found, best) if found.rules else before
        return Selection(
            inputs_digest=digest,
            statistics=StatisticsRecord(num_patients=before.num_patients),
            num_cases=len(self._all.cases),
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
                    "num_cases": len(self._all.cases),
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

    def _search_rules(self, best: Scored) -> Found:
        predicted = [
            Predicted(
                case.id,
                best.label_maps[case.id],
                labels_of(case),
                case.annotated,
                partial(self._all.mixture, best.candidate, case),
            )
            for case in self._all.cases
        ]
        return RuleSearch(predicted, self._all.schema, self._all.patients, num_cpus(), self._all.progress).run()

    def _apply(self, found: Found, best: Scored) -> Summary:
        """Write and score what the rules make of the chosen predictions."""
        folder = self._all.fresh(FINAL)
        thresholds = thresholds_of(found.rules, self._all.schema)
        asks = any(isinstance(rule, DropUnlikely) for rule in found.rules)

        def write(_: int, case: Case) -> Path:
            path = folder / f"{case.id}{self._all.dataset.file_ending}"
            labels, geometry = read_labels(best.label_maps[case.id], None)
            mixture = self._all.mixture(best.candidate, case)
            if thresholds is not None:
                labels = with_thresholds(labels, mixture, thresholds, self._all.decoder)
            likelihoods = likelihoods_of(labels, mixture, self._all.decoder) if asks else None
            labels = apply_rules(labels, found.rules, self._all.schema, geometry.spacing_mm, likelihoods)
            write_labels(path, labels, geometry)
            return path

        paths = self._all.each("Applying the rules", write)
        label_maps = {case.id: path for case, path in zip(self._all.cases, paths, strict=True)}
        return self._all.evaluate(label_maps, folder).summary

    def _confidences(self, chosen: Candidate) -> tuple[CaseConfidence, ...]:
        def look(_: int, case: Case) -> CaseConfidence:
            parts = self._all.mixture(chosen, case)
            return confidence_of(case.id, parts, self._all.reference(case), self._all.decoder)

        return tuple(self._all.each("Looking for cases that are unsure", look))
