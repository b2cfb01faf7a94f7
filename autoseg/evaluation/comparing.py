"""Candidates compared pair by pair on the same cases, and which one is chosen.

Source: docs/decisions/0041.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from autoseg.evaluation.counts import class_means, mean_foreground
from autoseg.evaluation.selection import COMPARED_METRICS, Candidate, CandidateComparison
from autoseg.evaluation.statistics import (
    MIN_PATIENTS,
    Bootstrap,
    holm,
    interval_of,
    mean_of_means,
    paired_test,
    patient_means,
)
from autoseg.evaluation.summaries import CaseMetrics, metric_table

SIGNIFICANT = 0.05
"""P value below which a pair of configurations is taken for better than the best single one."""

_Table = NDArray[np.float64]


def compare_all(
    candidates: Mapping[str, Sequence[CaseMetrics]], class_names: Sequence[str], patients: Mapping[str, str]
) -> tuple[CandidateComparison, ...]:
    """Compare every pair of candidates by every metric over all classes, and by the Dice for each class too.

    Args:
        candidates: Their metrics, by name; all have the same cases in the same order.
        class_names: In the order of the metrics.
        patients: By case id; a case that is not in it is a patient of its own.
    """
    ids = [case.case for case in next(iter(candidates.values()))]
    bootstrap = Bootstrap.of(ids, patients)
    rows: list[CandidateComparison] = []
    for metric in COMPARED_METRICS:
        tables = {name: metric_table(cases, metric, len(class_names)) for name, cases in candidates.items()}
        found = [
            comparison
            for first, second in combinations(candidates, 2)
            for comparison in _compare(first, second, metric, tables[first], tables[second], class_names, bootstrap)
        ]
        for class_name in (None, *class_names) if metric == COMPARED_METRICS[0] else (None,):
            rows += _adjusted([item for item in found if item.class_name == class_name])
    return tuple(rows)


def _adjusted(rows: Sequence[CandidateComparison]) -> list[CandidateComparison]:
    """P values adjusted for the number of pairs."""
    tested = [row.p_value for row in rows if row.p_value is not None]
    adjusted = iter(holm(tested))
    return [row if row.p_value is None else row.model_copy(update={"p_adjusted": next(adjusted)}) for row in rows]


def _compare(
    first: str,
    second: str,
    metric: str,
    table: _Table,
    other: _Table,
    class_names: Sequence[str],
    bootstrap: Bootstrap,
) -> list[CandidateComparison]:
    """Over all classes, then each class; only where both have the metric."""
    both = ~(np.isnan(table) | np.isnan(other))
    mine, theirs = np.where(both, table, np.nan), np.where(both, other, np.nan)
    drawn, drawn_other = bootstrap.means(mine), bootstrap.means(theirs)
    rows = [
        _row(
            (first, second, metric, None),
            (_mean_of_cases(mine), _mean_of_cases(theirs)),
            (mean_foreground(mine), mean_foreground(theirs)),
            mean_of_means(drawn) - mean_of_means(drawn_other),
            bootstrap,
        )
    ]
    means, means_other = class_means(mine), class_means(theirs)
    for index, name in enumerate(class_names):
        rows.append(
            _row(
                (first, second, metric, name),
                (mine[:, index], theirs[:, index]),
                (means[index], means_other[index]),
                drawn[:, index] - drawn_other[:, index],
                bootstrap,
            )
        )
    return rows


def _mean_of_cases(table: _Table) -> _Table:
    """Mean over the classes that a case has; NaN where it has none."""
    return mean_of_means(table)


def _row(
    names: tuple[str, str, str, str | None],
    values: tuple[_Table, _Table],
    means: tuple[float | None, float | None],
    differences: _Table,
    bootstrap: Bootstrap,
) -> CandidateComparison:
    by_patient = [patient_means(item, bootstrap.patient_of) for item in values]
    test = paired_test(by_patient[0], by_patient[1])
    mean_first, mean_second = means
    return CandidateComparison(
        first=names[0],
        second=names[1],
        metric=names[2],
        class_name=names[3],
        num_patients=test.num_pairs,
        mean_first=mean_first,
        mean_second=mean_second,
        difference=None if mean_first is None or mean_second is None else mean_first - mean_second,
        interval=interval_of(differences) if test.num_pairs >= MIN_PATIENTS else None,
        p_value=test.p_value,
        p_adjusted=None,
        rank_biserial=test.rank_biserial,
    )


def choose_candidate(
    candidates: Sequence[Candidate], comparisons: Sequence[CandidateComparison]
) -> tuple[Candidate, str]:
    """The candidate to predict with, and why.

    The best single configuration by mean foreground Dice; a pair takes its place where its Dice is higher and the
    paired test over patients says that this is no accident, since it takes the time of both.

    Args:
        candidates: At least one single configuration among them.
        comparisons: Of every two of them.
    """

    def score(item: Candidate) -> float:
        return -1.0 if item.mean_foreground_dice is None else item.mean_foreground_dice

    singles = [item for item in candidates if len(item.members) == 1]
    pairs = [item for item in candidates if len(item.members) > 1]
    best = max(singles, key=score)
    said = [f"{best.name} has the highest mean foreground Dice of the single configurations ({score(best):.4f})"]
    if len(singles) == 1:
        said = [f"{best.name} is the only configuration whose folds are all finished ({score(best):.4f})"]
    better: list[tuple[Candidate, str]] = []
    for pair in pairs:
        row = _between(comparisons, pair.name, best.name)
        words = f"{pair.name} has {score(pair):.4f}"
        if row is not None and row.p_value is not None:
            words += f" (p = {row.p_value:.2g}, n = {row.num_patients})"
        is_sure = row is not None and row.p_value is not None and row.p_value < SIGNIFICANT
        if is_sure and score(pair) > score(best):
            better.append((pair, words))
        else:
            said.append(f"{words}, which is {'not clearly more' if score(pair) > score(best) else 'no more'}")
    if not better:
        return best, "; ".join(said)
    chosen, words = max(better, key=lambda item: score(item[0]))
    others = [said[0], *(text for pair, text in better if pair is not chosen), *said[1:]]
    return chosen, f"{words}, clearly more than {best.name} alone; " + "; ".join(others)


def _between(comparisons: Sequence[CandidateComparison], first: str, second: str) -> CandidateComparison | None:
    """How the Dice over all classes compares."""
    for row in comparisons:
        if row.metric == "dice" and row.class_name is None and {row.first, row.second} == {first, second}:
            return row
    return None
