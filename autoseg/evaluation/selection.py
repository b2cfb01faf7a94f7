"""What cross-validation decided and why, as values: `RUN/crossval/selection.json`, which the report shows.

Candidates are the configurations of which every fold is finished, and pairs of them whose probabilities are averaged.
All are compared on the same cases, each predicted by models that had not seen it.
"""

from __future__ import annotations

from collections.abc import Mapping

from autoseg.domain.inference import FoldName, InferenceRecipe, Member, Rule
from autoseg.domain.values import Value, digest_of
from autoseg.evaluation.metrics import METRICS_VERSION
from autoseg.evaluation.statistics import Interval, StatisticsRecord
from autoseg.evaluation.summaries import Summary

SCHEMA_VERSION = 1

SELECTION_VERSION = 3
"""Of how decisions are made: those of another version are made anew. 2: a temperature for
each class, and rules about probabilities. 3: temperatures for each class only where they calibrate better."""

FINAL = "final"
"""Name of what the recipe gives: the chosen candidate with its post-processing."""

COMPARED_METRICS = ("dice", "surface_dice", "hd95_mm")
"""Of two candidates: the first for each class too, the others over all classes."""


def inputs_digest(weights: Mapping[str, Mapping[str, str]]) -> str:
    """Names what a selection is made from.

    Args:
        weights: SHA-256 of the weights, by configuration and fold, of every configuration that is a candidate.
    """
    ordered = {name: dict(sorted(folds.items())) for name, folds in weights.items()}
    return digest_of({"version": SELECTION_VERSION, "metrics": METRICS_VERSION, "weights": ordered})


def folder_name(candidate: str) -> str:
    """Name of the folder of a candidate's predictions in `RUN/crossval`."""
    return candidate.replace(" ", "")


class Candidate(Value):
    """A configuration, or several whose probabilities are averaged.

    Attributes:
        name: Of the configuration; of a pair such as "2d + 3d_fullres".
        members: With weights and temperatures, as they would be in `inference.json`.
        mean_foreground_dice: Over the common cases.
        interval: Of it, over patients.
        cross_fitted_dice: Of a pair with weights that were learned: the mean foreground Dice when each fold is
            predicted with the weights that are best on the other folds. None for a single configuration.
        seconds_per_case: Of predicting, as measured during validation (all members together); None: not known.
    """

    name: str
    members: tuple[Member, ...]
    mean_foreground_dice: float | None
    interval: Interval | None = None
    cross_fitted_dice: float | None = None
    seconds_per_case: float | None = None


class CandidateComparison(Value):
    """Two candidates on the same cases.

    Attributes:
        first: Its name.
        second: The other's.
        metric: One of `COMPARED_METRICS`.
        class_name: None: the mean over the classes that a case contains.
        num_patients: That have the metric by both.
        mean_first: Mean over classes of the mean over cases, or of the class, over the cases where both have it.
        mean_second: The same of the other.
        difference: mean_first - mean_second.
        interval: Of the difference, over patients.
        p_value: Of the Wilcoxon signed-rank test over patients; None without pairs.
        p_adjusted: The same, adjusted for the number of pairs of candidates (Holm).
        rank_biserial: Effect size: 1 where the first is higher for every patient, -1 where the second is.
    """

    first: str
    second: str
    metric: str
    class_name: str | None
    num_patients: int
    mean_first: float | None
    mean_second: float | None
    difference: float | None
    interval: Interval | None
    p_value: float | None
    p_adjusted: float | None
    rank_biserial: float | None


class TriedRule(Value):
    """A rule of post-processing that was tried, after those that had been kept before it.

    Attributes:
        rule: As in `inference.json`.
        dice_before: Mean foreground Dice without it.
        dice_after: With it.
        interval: Of the gain, over patients.
        class_gains: Gain of the mean Dice by class.
        is_kept: Whether it is in the recipe.
        reason: Why, in words.
    """

    rule: Rule
    dice_before: float
    dice_after: float
    interval: Interval | None
    class_gains: dict[str, float | None]
    is_kept: bool
    reason: str


class ReliabilityBin(Value):
    """Voxels to which a class was given about the same probability.

    Attributes:
        confidence: Their mean probability.
        frequency: Part of them that belongs to the class.
        voxels: How many; the bins of a class together are the voxels that were looked at.
    """

    confidence: float
    frequency: float
    voxels: int


class ClassCalibration(Value):
    """How well the probabilities of one class are calibrated.

    Attributes:
        name: The class.
        error_before: Expected calibration error with temperature 1, 0 ... 1.
        error_after: With the fitted temperatures.
        bins_before: Of equal width in probability, empty ones left out, for a reliability diagram.
        bins_after: The same with the fitted temperatures.
        temperature: Of the class: of classes that exclude each other at the voxels where it is the most probable. None
            in a file of a version that had one for all.
    """

    name: str
    error_before: float
    error_after: float
    bins_before: tuple[ReliabilityBin, ...]
    bins_after: tuple[ReliabilityBin, ...]
    temperature: float | None = None


class Calibration(Value):
    """The temperatures of one configuration, fitted on its out-of-fold probabilities.

    Attributes:
        configuration: Its name.
        temperature: One for all classes, to compare with; above 1 the network was too sure.
        num_voxels: That were looked at: those where a class is likely or true, see docs/reference/metrics.md.
        loss_before: Mean negative log-likelihood over them.
        loss_after: With the temperatures that were taken.
        error_before: Expected calibration error, the mean over the classes.
        error_after: With the temperatures that were taken.
        classes: Each class on its own.
        background_temperature: At the voxels where the background is the most probable; None of regions.
        loss_common: The loss with the one temperature for all; None where a file does not say.
        error_common: The calibration error with it.
        error_each: The calibration error with a temperature for each class: these are taken where it is less. None
            where a file does not say.
    """

    configuration: str
    temperature: float
    num_voxels: int
    loss_before: float
    loss_after: float
    error_before: float
    error_after: float
    classes: tuple[ClassCalibration, ...]
    background_temperature: float | None = None
    loss_common: float | None = None
    error_common: float | None = None
    error_each: float | None = None

    def member(self, folds: tuple[FoldName, ...], weight: float = 1.0) -> Member:
        """The configuration as a member of a recipe, with its temperatures.

        Args:
            folds: Of the models.
            weight: Of the member.
        """
        common = self.temperature if self.background_temperature is None else self.background_temperature
        named = {item.name: item.temperature for item in self.classes if item.temperature is not None}
        differs = any(value != common for value in named.values())
        return Member(
            configuration=self.configuration,
            folds=folds,
            weight=weight,
            temperature=common,
            class_temperatures=named if differs else None,
        )


class CaseConfidence(Value):
    """How sure the chosen candidate is of a case, by its out-of-fold probabilities.

    Attributes:
        case: Its id.
        mean_entropy: Mean entropy of the class probabilities over the predicted foreground, in parts of the largest
            possible one, 0 ... 1; None where nothing is predicted.
        expected_dice: By class: the Dice that the probabilities let expect if the truth were drawn from them; None
            where the class is not expected.
        sure_errors_fraction: Voxels whose predicted class has a probability of at least 0.9 and yet is not that of the
            reference, over the voxels of foreground in either map. High values hint at a wrong label.
    """

    case: str
    mean_entropy: float | None
    expected_dice: dict[str, float | None]
    sure_errors_fraction: float | None


class Selection(Value):
    """The decisions of a cross-validation.

    Attributes:
        inputs_digest: Of the scores that it was made from: others make it stale.
        statistics: How intervals and tests were made.
        num_cases: Cases that every candidate predicted.
        candidates: The best first.
        comparisons: Of every pair of candidates, by metric; by the Dice for each class too.
        choice: Name of the chosen candidate.
        reason: Why, in words.
        recipe: As written to `inference.json`.
        tried_rules: Of the post-processing, in the order in which they were tried.
        calibrations: One a configuration.
        chosen: The chosen candidate over the common cases, before post-processing.
        final: The same after it, which is what `predict` gives; equal to `chosen` where no rule is kept.
        confidences: One a case, for the chosen candidate.
        seconds: That the decisions took.
    """

    schema_version: int = SCHEMA_VERSION
    inputs_digest: str
    statistics: StatisticsRecord
    num_cases: int
    candidates: tuple[Candidate, ...]
    comparisons: tuple[CandidateComparison, ...]
    choice: str
    reason: str
    recipe: InferenceRecipe
    tried_rules: tuple[TriedRule, ...] = ()
    calibrations: tuple[Calibration, ...] = ()
    chosen: Summary
    final: Summary
    confidences: tuple[CaseConfidence, ...] = ()
    seconds: float = 0.0
