"""Metrics of cases and their summary: what `validation/summary.json` and `autoseg evaluate --json` hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import Tta
from autoseg.domain.values import Value
from autoseg.evaluation.lesions import Lesions
from autoseg.evaluation.metrics import METRIC_NAMES, METRICS_VERSION, ClassMetrics, Confusion
from autoseg.evaluation.statistics import Bootstrap, Interval, interval_of, mean_of_means

SCHEMA_VERSION = 1

EACH_CASE_ALONE: Mapping[str, str] = MappingProxyType({})
"""As patients by case id: nothing is known of them, so every case is one."""


class CaseMetrics(Value):
    """Metrics of one case.

    Attributes:
        case: Its id.
        classes: In the order of the label schema.
        confusions: Which class was taken for which, in voxels; empty for regions and in files of earlier versions.
    """

    case: str
    classes: tuple[ClassMetrics, ...]
    confusions: tuple[Confusion, ...] = ()

    @property
    def mean_dice(self) -> float | None:
        """Mean Dice over the classes that the reference contains; None when it contains none."""
        return mean([item.dice for item in self.classes if item.dice is not None and item.reference_vox > 0])


class MetricSummary(Value):
    """One metric of one class over the cases whose reference contains the class.

    Attributes:
        mean: Over the cases where the metric is defined; so are the other figures. None when there is no such case.
        num_undefined: Cases that contain the class but for which the metric is not defined (distances of a miss).
        interval: Of the mean, over patients; None where fewer than two patients have the metric.
    """

    metric: str
    mean: float | None
    median: float | None
    quartile_1: float | None
    quartile_3: float | None
    minimum: float | None
    maximum: float | None
    num_defined: int
    num_undefined: int
    interval: Interval | None = None


class LesionSummary(Value):
    """Lesions of one class over all cases together, those without the class too; see `lesions`.

    Attributes:
        reference: Lesions of the references.
        found: Those of them that were found.
        predicted: Predicted lesions.
        true: Those of them that are true.
        precision: true / predicted; None where nothing was predicted.
        recall: found / reference; None where there are none.
        f1: Harmonic mean of both; None where there is no lesion at all.
    """

    reference: int
    found: int
    predicted: int
    true: int
    precision: float | None
    recall: float | None
    f1: float | None

    @classmethod
    def of(cls, rows: Iterable[ClassMetrics]) -> Self:
        """Those of several cases together."""
        total = sum((row.lesions for row in rows), Lesions())
        return cls(
            reference=total.reference,
            found=total.found,
            predicted=total.predicted,
            true=total.true,
            precision=total.precision,
            recall=total.recall,
            f1=total.f1,
        )


class ClassSummary(Value):
    """One class over all cases.

    Attributes:
        num_present: Cases whose reference contains the class; the metrics are about these.
        num_missed: Those of them where nothing was predicted.
        num_absent: Cases without the class.
        num_spurious: Those of them where it was predicted all the same.
        num_unannotated: Cases whose reference says nothing about the class; they count nowhere else.
        metrics: One entry a name of `METRIC_NAMES`, in that order; of files of earlier versions only the first ones.
        detection_recall: Cases where it was predicted, of those that contain it; None where none does.
        detection_specificity: Cases where it was not predicted, of those without it; None where there is none.
        mean_spurious_mm3: Mean predicted volume over the cases without the class, 0 where nothing was; None as above.
        lesions: Over all cases together; None in files of earlier versions.
    """

    name: str
    num_present: int
    num_missed: int
    num_absent: int
    num_spurious: int
    num_unannotated: int = 0
    metrics: tuple[MetricSummary, ...]
    detection_recall: float | None = None
    detection_specificity: float | None = None
    mean_spurious_mm3: float | None = None
    lesions: LesionSummary | None = None

    def metric(self, name: str) -> MetricSummary:
        """The summary of the metric of that name; KeyError when there is none."""
        for item in self.metrics:
            if item.metric == name:
                return item
        raise KeyError(name)


class Summary(Value):
    """All classes over all cases.

    Attributes:
        mean_foreground_dice: Mean over classes of the mean over the cases that contain the class; None when no case
            contains any class. Source: design, section 4.
        num_patients: Of the cases; a case whose patient is not known is one of its own. 0 in earlier versions' files.
        interval: Of the mean foreground Dice, over patients; None with fewer than two.
        confusions: Which class was taken for which, in voxels over all cases; empty for regions.
    """

    num_cases: int
    mean_foreground_dice: float | None
    classes: tuple[ClassSummary, ...]
    num_patients: int = 0
    interval: Interval | None = None
    confusions: tuple[Confusion, ...] = ()


class Evaluation(Value):
    """Predictions compared with references.

    Attributes:
        metrics_version: Of the definitions; see `METRICS_VERSION`.
        labels: The classes that were compared.
        tolerance_mm: Of the surface Dice, by class.
        summary: Over all cases.
        cases: Sorted by id.
        not_predicted: References for which there was no prediction; they count nowhere.
    """

    schema_version: int = SCHEMA_VERSION
    metrics_version: int = 1
    labels: LabelSchema
    tolerance_mm: dict[str, float]
    summary: Summary
    cases: tuple[CaseMetrics, ...]
    not_predicted: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        cases: Iterable[CaseMetrics],
        labels: LabelSchema,
        tolerance_mm: Mapping[str, float],
        not_predicted: Sequence[str] = (),
        patients: Mapping[str, str] = EACH_CASE_ALONE,
    ) -> Self:
        """Sort the cases and summarise them."""
        ordered = tuple(sorted(cases, key=lambda item: item.case))
        return cls(
            metrics_version=METRICS_VERSION,
            labels=labels,
            tolerance_mm=dict(tolerance_mm),
            summary=summarise(ordered, labels.names, patients),
            cases=ordered,
            not_predicted=tuple(not_predicted),
        )


class BestWeights(Value):
    """The fold's best weights by the quick looks of its training, beside the final ones: chosen on the cases scored.

    Such a score is too good by an unknown amount, and never stands for the fold.

    Attributes:
        chosen_on_these_cases: Says so in the file.
        weights_sha256: The weights; empty where there are none.
        differ: Whether they are others than the final ones.
        epoch: Epochs done when they were saved.
        mean_foreground_dice: As of the final weights, on the same cases.
        class_dice: Mean Dice by class.
        seconds: Of predicting and comparing.
        skipped: Why they were not scored; empty where they were.
    """

    chosen_on_these_cases: Literal[True] = True
    weights_sha256: str = ""
    differ: bool = False
    epoch: int | None = None
    mean_foreground_dice: float | None = None
    class_dice: dict[str, float | None] = Field(default_factory=dict)
    seconds: float = 0.0
    skipped: str = ""


class FoldEvaluation(Value):
    """A fold's validation cases, predicted by its final weights and compared: its `validation/summary.json`.

    Attributes:
        weights_sha256: The weights that predicted; other weights make it stale.
        tta: Test-time mirroring that they predicted with; another default makes it stale too.
        predict_s: Seconds of predicting.
        score_s: Seconds of comparing.
        evaluation: The comparison.
        best: The best weights by the quick looks, on the same cases; None: not looked at yet.
    """

    schema_version: int = SCHEMA_VERSION
    weights_sha256: str
    tta: Tta = "none"
    predict_s: float
    score_s: float
    evaluation: Evaluation
    best: BestWeights | None = None


def summarise(
    cases: Sequence[CaseMetrics], class_names: Sequence[str], patients: Mapping[str, str] = EACH_CASE_ALONE
) -> Summary:
    """Summarise every class over the cases that contain it.

    Args:
        cases: One entry a class each.
        class_names: In the order of the entries.
        patients: By case id, for the intervals; a case that is not in it is a patient of its own.
    """
    bootstrap = Bootstrap.of([case.case for case in cases], patients)
    classes = tuple(_summarise_class(cases, index, name, bootstrap) for index, name in enumerate(class_names))
    means = [item.metric("dice").mean for item in classes]
    resampled = mean_of_means(bootstrap.means(metric_table(cases, "dice", len(class_names))))
    return Summary(
        num_cases=len(cases),
        mean_foreground_dice=mean([value for value in means if value is not None]),
        classes=classes,
        num_patients=bootstrap.num_patients,
        interval=interval_of(resampled) if bootstrap.num_patients > 1 else None,
        confusions=_together(cases),
    )


def metric_table(cases: Sequence[CaseMetrics], metric: str, num_classes: int) -> NDArray[np.float64]:
    """A metric as an array (cases, classes): NaN where the reference lacks the class or the metric is not defined."""
    table = np.full((len(cases), num_classes), np.nan)
    for row, case in enumerate(cases):
        for column, item in enumerate(case.classes):
            value = getattr(item, metric)
            if value is not None and item.reference_vox > 0:
                table[row, column] = value
    return table


def _summarise_class(cases: Sequence[CaseMetrics], index: int, name: str, bootstrap: Bootstrap) -> ClassSummary:
    rows = [case.classes[index] for case in cases if case.classes[index].presence != "unannotated"]
    present = [row for row in rows if row.reference_vox > 0]
    absent = [row for row in rows if row.reference_vox == 0]
    num_missed = sum(row.presence == "missed" for row in rows)
    num_spurious = sum(row.presence == "spurious" for row in rows)
    own = [CaseMetrics(case=case.case, classes=(case.classes[index],)) for case in cases]
    tables = np.concatenate([metric_table(own, metric, 1) for metric in METRIC_NAMES], axis=1)
    intervals = bootstrap.intervals(tables)
    return ClassSummary(
        name=name,
        num_present=len(present),
        num_missed=num_missed,
        num_absent=len(absent),
        num_spurious=num_spurious,
        num_unannotated=len(cases) - len(rows),
        metrics=tuple(
            _summarise_metric(metric, [getattr(row, metric) for row in present], interval)
            for metric, interval in zip(METRIC_NAMES, intervals, strict=True)
        ),
        detection_recall=1 - num_missed / len(present) if present else None,
        detection_specificity=1 - num_spurious / len(absent) if absent else None,
        mean_spurious_mm3=mean([row.prediction_mm3 for row in absent]),
        lesions=LesionSummary.of(rows),
    )


def _summarise_metric(metric: str, values: Sequence[float | None], interval: Interval | None) -> MetricSummary:
    defined = np.array([value for value in values if value is not None], np.float64)
    figures: list[float | None] = [None] * 5
    if len(defined):
        figures = [float(value) for value in np.quantile(defined, [0.5, 0.25, 0.75, 0.0, 1.0])]
    return MetricSummary(
        metric=metric,
        mean=mean(list(defined)),
        median=figures[0],
        quartile_1=figures[1],
        quartile_3=figures[2],
        minimum=figures[3],
        maximum=figures[4],
        num_defined=len(defined),
        num_undefined=len(values) - len(defined),
        interval=interval,
    )


def _together(cases: Sequence[CaseMetrics]) -> tuple[Confusion, ...]:
    total: Counter[tuple[str, str]] = Counter()
    for case in cases:
        for item in case.confusions:
            total[item.reference, item.prediction] += item.voxels
    return tuple(Confusion(reference=pair[0], prediction=pair[1], voxels=count) for pair, count in total.items())


def mean(values: Sequence[float]) -> float | None:
    """Their mean; None where there are none."""
    return float(np.mean(values)) if values else None
