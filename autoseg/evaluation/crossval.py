"""Predictions of many cases compared with their references."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.fingerprint import Fingerprint
from autoseg.errors import AutosegError, DatasetError
from autoseg.evaluation.metrics import compare_maps, undeclared_values
from autoseg.evaluation.summaries import (
    EACH_CASE_ALONE,
    BestWeights,
    CaseMetrics,
    ClassSummary,
    Evaluation,
    FoldEvaluation,
    MetricSummary,
    Summary,
    summarise,
)
from autoseg.io.images import read_labels
from autoseg.runtime import NoProgress, Progress

__all__ = [
    "BestWeights",
    "CaseMetrics",
    "ClassSummary",
    "Evaluation",
    "FoldEvaluation",
    "MetricSummary",
    "Pair",
    "Summary",
    "default_tolerance_mm",
    "evaluate_cases",
    "lesions_text",
    "resolve_tolerance",
    "summarise",
    "table",
    "tolerance_of",
]

TABLE_METRICS = ("dice", "iou", "surface_dice", "hd95_mm", "average_distance_mm", "relative_volume_error")
"""Metrics that the terminal shows."""

TABLE_TITLES = ("class", "Dice", "IoU", "NSD", "HD95 mm", "avg. dist. mm", "volume error")

Pair = tuple[str, Path, Path]
"""Case id, predicted label map, reference label map."""


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
    patients: Mapping[str, str] = EACH_CASE_ALONE,
) -> Evaluation:
    """Compare predicted label maps with references.

    Args:
        pairs: Case id, prediction, reference.
        schema: The classes.
        tolerance_mm: Of the surface Dice: one value for all classes, or one for each by name.
        workers: Threads; at most so many cases are in memory.
        progress: Told after each case.
        annotated: Names of the classes that were annotated, of the cases in which not all were.
        patients: By case id, for the intervals; a case that is not in it is a patient of its own.

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
    return Evaluation.of(rows, schema, tolerances, patients=patients)


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
        found = compare_maps(prediction, reference, schema, geometry.spacing_mm, tolerance_mm, annotated)
        return CaseMetrics(case=case, classes=found.classes, confusions=found.confusions)
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
    header = (*TABLE_TITLES, "lesion P / R / F1", "cases", "missed", "false alarms")
    rows = []
    for item in evaluation.summary.classes:
        figures = [_text(item.metric(name).mean, 2 if name.endswith("_mm") else 4) for name in TABLE_METRICS]
        figures.append(lesions_text(item))
        counts = (str(item.num_present), str(item.num_missed), f"{item.num_spurious} of {item.num_absent}")
        rows.append((item.name, *figures, *counts))
    return header, tuple(rows)


def lesions_text(item: ClassSummary) -> str:
    """Precision, recall and F1 of the lesions of a class over all cases."""
    found = item.lesions
    return "–" if found is None else " / ".join(_text(value, 2) for value in (found.precision, found.recall, found.f1))


def _text(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
