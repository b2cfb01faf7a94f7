"""Metrics of many cases, and their summary: what `validation/summary.json` and `autoseg evaluate --json` hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.fingerprint import Fingerprint
from autoseg.domain.values import Value
from autoseg.errors import AutosegError, DatasetError
from autoseg.evaluation.metrics import METRIC_NAMES, ClassMetrics, case_metrics, undeclared_values
from autoseg.io.images import read_labels
from autoseg.runtime import NoProgress, Progress

SCHEMA_VERSION = 1

Pair = tuple[str, Path, Path]
"""Case id, predicted label map, reference label map."""


class CaseMetrics(Value):
    """Metrics of one case.

    Attributes:
        case: Its id.
        classes: In the order of the label schema.
    """

    case: str
    classes: tuple[ClassMetrics, ...]

    @property
    def mean_dice(self) -> float | None:
        """Mean Dice over the classes that the reference contains; None when it contains none."""
        return _mean([item.dice for item in self.classes if item.dice is not None and item.reference_vox > 0])


class MetricSummary(Value):
    """One metric of one class over the cases whose reference contains the class.

    Attributes:
        mean: Over the cases where the metric is defined; so are the other figures. None when there is no such case.
        num_undefined: Cases that contain the class but for which the metric is not defined (distances of a miss).
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


class ClassSummary(Value):
    """One class over all cases.

    Attributes:
        num_present: Cases whose reference contains the class; the metrics are about these.
        num_missed: Those of them where nothing was predicted.
        num_absent: Cases without the class.
        num_spurious: Those of them where it was predicted all the same.
        num_unannotated: Cases whose reference says nothing about the class; they count nowhere else.
        metrics: One entry a name of `METRIC_NAMES`, in that order.
    """

    name: str
    num_present: int
    num_missed: int
    num_absent: int
    num_spurious: int
    num_unannotated: int = 0
    metrics: tuple[MetricSummary, ...]

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
    """

    num_cases: int
    mean_foreground_dice: float | None
    classes: tuple[ClassSummary, ...]


class Evaluation(Value):
    """Predictions compared with references.

    Attributes:
        labels: The classes that were compared.
        tolerance_mm: Of the surface Dice, by class.
        summary: Over all cases.
        cases: Sorted by id.
        not_predicted: References for which there was no prediction; they count nowhere.
    """

    schema_version: int = SCHEMA_VERSION
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
    ) -> Self:
        """Sort the cases and summarise them."""
        ordered = tuple(sorted(cases, key=lambda item: item.case))
        return cls(
            labels=labels,
            tolerance_mm=dict(tolerance_mm),
            summary=summarise(ordered, labels.names),
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
        predict_s: Seconds of predicting.
        score_s: Seconds of comparing.
        evaluation: The comparison.
        best: The best weights by the quick looks, on the same cases; None: not looked at yet.
    """

    schema_version: int = SCHEMA_VERSION
    weights_sha256: str
    predict_s: float
    score_s: float
    evaluation: Evaluation
    best: BestWeights | None = None


def summarise(cases: Sequence[CaseMetrics], class_names: Sequence[str]) -> Summary:
    """Summarise every class over the cases that contain it."""
    classes = []
    for index, name in enumerate(class_names):
        rows = [case.classes[index] for case in cases if case.classes[index].presence != "unannotated"]
        present = [row for row in rows if row.reference_vox > 0]
        classes.append(
            ClassSummary(
                name=name,
                num_present=len(present),
                num_missed=sum(row.presence == "missed" for row in rows),
                num_absent=len(rows) - len(present),
                num_spurious=sum(row.presence == "spurious" for row in rows),
                num_unannotated=len(cases) - len(rows),
                metrics=tuple(
                    _summarise_metric(metric, [getattr(row, metric) for row in present]) for metric in METRIC_NAMES
                ),
            )
        )
    means = [item.metric("dice").mean for item in classes]
    return Summary(
        num_cases=len(cases),
        mean_foreground_dice=_mean([value for value in means if value is not None]),
        classes=tuple(classes),
    )


def _summarise_metric(metric: str, values: Sequence[float | None]) -> MetricSummary:
    defined = np.array([value for value in values if value is not None], np.float64)
    figures: list[float | None] = [None] * 5
    if len(defined):
        figures = [float(value) for value in np.quantile(defined, [0.5, 0.25, 0.75, 0.0, 1.0])]
    return MetricSummary(
        metric=metric,
        mean=_mean(list(defined)),
        median=figures[0],
        quartile_1=figures[1],
        quartile_3=figures[2],
        minimum=figures[3],
        maximum=figures[4],
        num_defined=len(defined),
        num_undefined=len(values) - len(defined),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def default_tolerance_mm(spacings_mm: Iterable[Sequence[float]], shapes: Iterable[Sequence[int]]) -> float:
    """The default tolerance of the surface Dice: the median, over the cases, of the largest voxel spacing.

    A surface drawn on voxels is uncertain by about one voxel, and the coarsest axis sets how much that is. One value
    for a data set, so that its cases and folds can be compared. Axes of a single voxel have no spacing that means
    anything and do not count.

    Args:
        spacings_mm: One row a case, in any axis order.
        shapes: Voxels along the same axes; as many rows, at least one.

    Source: docs/decisions/0005-metrics-and-what-they-mean-for-empty-classes.md.
    """
    largest = []
    for spacing, shape in zip(spacings_mm, shapes, strict=True):
        counted = [value for value, size in zip(spacing, shape, strict=True) if size > 1]
        largest.append(max(counted or spacing))
    return float(np.median(largest))


def tolerance_of(fingerprint: Fingerprint) -> float:
    """The default tolerance for a data set that was measured."""
    return default_tolerance_mm(fingerprint.spacings_mm, fingerprint.shapes)


def evaluate_cases(
    pairs: Iterable[Pair],
    schema: LabelSchema,
    tolerance_mm: float | Mapping[str, float],
    workers: int = 1,
    progress: Progress | None = None,
    annotated: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Evaluation:
    """Compare predicted label maps with references.

    Args:
        pairs: Case id, prediction, reference.
        schema: The classes.
        tolerance_mm: Of the surface Dice: one value for all classes, or one for each by name.
        workers: Threads; at most so many cases are in memory.
        progress: Told after each case.
        annotated: Names of the classes that were annotated, of the cases in which not all were.

    Raises:
        DatasetError: Cases that could not be compared, all listed, after the others were.
    """
    wanted = sorted(pairs)
    tolerances = resolve_tolerance(tolerance_mm, schema)
    progress = progress or NoProgress()
    progress.start("comparing with the reference", len(wanted))
    rows: list[CaseMetrics] = []
    problems: list[str] = []
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        waiting: set[Future[CaseMetrics]] = {
            pool.submit(_evaluate_case, pair, schema, tolerances, annotated.get(pair[0])) for pair in wanted
        }
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    _collect(future, rows, problems)
                    progress.advance()
        except BaseException:
            # Ctrl-C or a bug in one case: do not work through the rest first.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.finish()
    if problems:
        raise DatasetError(f"{len(problems)} of {len(wanted)} cases cannot be compared", problems=sorted(problems))
    return Evaluation.of(rows, schema, tolerances)


def _collect(future: Future[CaseMetrics], rows: list[CaseMetrics], problems: list[str]) -> None:
    try:
        rows.append(future.result())
    except AutosegError as problem:
        problems.append(str(problem))


def _evaluate_case(
    pair: Pair, schema: LabelSchema, tolerance_mm: Mapping[str, float], annotated: Collection[str] | None
) -> CaseMetrics:
    """Metrics of one case.

    Raises:
        DatasetError: A file cannot be read or the grids differ; names the case.
    """
    case, prediction_path, reference_path = pair
    try:
        reference, geometry = read_labels(reference_path, None)
        prediction, _ = read_labels(prediction_path, geometry)
        _require_declared(reference, schema, f"the reference {reference_path}")
        _require_declared(prediction, schema, f"the prediction {prediction_path}")
        classes = case_metrics(prediction, reference, schema, geometry.spacing_mm, tolerance_mm, annotated)
        return CaseMetrics(case=case, classes=classes)
    except AutosegError as problem:
        raise DatasetError(f"{case}: {problem}") from problem


def _require_declared(labels: NDArray[np.integer], schema: LabelSchema, what: str) -> None:
    """Raise a DatasetError when a value means nothing: it would silently count as background."""
    unknown = undeclared_values(labels, schema)
    if unknown:
        raise DatasetError(
            f"{what} holds the label values {list(unknown)}, declared are {sorted(schema.declared_values)}"
        )


def resolve_tolerance(tolerance_mm: float | Mapping[str, float], schema: LabelSchema) -> dict[str, float]:
    """The tolerance of every class, in the order of the schema.

    Raises:
        DatasetError: A class has none, or one is negative.
    """
    given = tolerance_mm if isinstance(tolerance_mm, Mapping) else dict.fromkeys(schema.names, tolerance_mm)
    problems = [f"class {name!r} has no tolerance" for name in schema.names if name not in given]
    problems += [f"class {name!r} has the tolerance {given[name]} mm" for name in given if not given[name] >= 0]
    if problems:
        raise DatasetError("every class needs a surface Dice tolerance of at least 0 mm", problems=problems)
    return {name: float(given[name]) for name in schema.names}


def table(evaluation: Evaluation) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The summary as text for a terminal: the header and one row a class."""
    header = ("class", "Dice", "IoU", "NSD", "HD95 mm", "avg. dist. mm", "cases", "missed", "false alarms")
    rows = []
    for item in evaluation.summary.classes:
        figures = [_text(item.metric(name).mean, 2 if name.endswith("_mm") else 4) for name in METRIC_NAMES]
        counts = (str(item.num_present), str(item.num_missed), f"{item.num_spurious} of {item.num_absent}")
        rows.append((item.name, *figures, *counts))
    return header, tuple(rows)


def _text(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
