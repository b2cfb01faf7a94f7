"""Folds of a cross-validation: nnU-Net's own where a data set allows it, else by patient and stratified."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from autoseg.domain.dataset import Case, Dataset, Fold, Splits
from autoseg.domain.values import validation_problems
from autoseg.errors import DatasetError

NUM_FOLDS = 5
"""Source: nnU-Net v2, so that folds can be compared."""

NNUNET_SPLIT_SEED = 12345
"""Seed of nnU-Net's shuffled five-fold split. Source: nnU-Net v2, `generate_crossval_split`; decision 0002."""

_LISTED = 5


def dataset_splits(dataset: Dataset, class_presence: Mapping[str, frozenset[int]] | None, seed: int) -> Splits:
    """The folds to use: those that came with the data set where there are any, else made ones.

    Args:
        dataset: The data set.
        class_presence: As for `make_splits`.
        seed: As for `make_splits`.

    Raises:
        DatasetError: The given folds do not fit the cases, or there are too few cases to make any.
    """
    if dataset.splits is None:
        return make_splits(dataset.cases, class_presence, seed)
    problems = splits_problems(dataset.splits, dataset.cases)
    if problems:
        raise DatasetError("the folds that came with the data set cannot be used", problems=problems)
    return dataset.splits


def make_splits(
    cases: Sequence[Case],
    class_presence: Mapping[str, frozenset[int]] | None,
    seed: int,
    num_folds: int = NUM_FOLDS,
) -> Splits:
    """Divide cases into folds, each case validated exactly once, a patient never on both sides.

    Where no patient has several cases and every class is in every case (or nothing is known about classes), the folds
    equal nnU-Net's, whatever the seed. Otherwise whole patients are dealt out so that folds have like numbers of cases
    and of cases with each class. With fewer patients than folds, each patient is a fold.

    Args:
        cases: The labelled cases, in any order.
        class_presence: For each case id the foreground class indices that occur in it, or None when not known.
        seed: Decides between equally good assignments, where folds are stratified.
        num_folds: Folds wanted, at least 2.

    Raises:
        DatasetError: There are fewer than two cases or two patients.

    Source: decision 0002; stratification after Sechidis et al., ECML PKDD 2011, "On the stratification of multi-label
    data", applied to patients.
    """
    cases = sorted(cases, key=lambda case: case.id)
    groups = _patients(cases)
    if len(groups) < 2:
        what = f"{len(cases)} case{'s' if len(cases) != 1 else ''} of one patient" if cases else "no cases"
        raise DatasetError(
            f"there are {what}; a cross-validation needs at least two patients",
            hint="Train on every case with --fold all, or add cases.",
        )
    num_folds = min(num_folds, len(groups))
    by_patient = len(groups) < len(cases)
    stratify = class_presence is not None and len({class_presence.get(case.id, frozenset()) for case in cases}) > 1
    if not by_patient and not stratify:
        validation = _shuffled_folds(list(groups), num_folds)
        rule = f"{num_folds} folds of shuffled cases, equal to nnU-Net's (seed {NNUNET_SPLIT_SEED})"
    else:
        validation = _dealt_folds(
            groups, class_presence if stratify and class_presence is not None else {}, seed, num_folds
        )
        how = " and ".join([*(["by patient"] if by_patient else []), *(["stratified by class"] if stratify else [])])
        rule = f"{num_folds} folds {how} (seed {seed})"
    if len(groups) == num_folds < NUM_FOLDS:
        rule += "; few cases, so one " + ("patient" if by_patient else "case") + " is left out at a time"
    ids = [case.id for case in cases]
    folds = tuple(
        Fold(train=tuple(item for item in ids if item not in chosen), validation=tuple(sorted(chosen)))
        for chosen in (frozenset(fold) for fold in validation)
    )
    return Splits(rule=rule, folds=folds)


def _patients(cases: Sequence[Case]) -> dict[str, tuple[str, ...]]:
    """Case ids by patient, in the order of the first case; a case without a patient is one of its own."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for case in cases:
        groups.setdefault((case.patient is not None, case.patient or case.id), []).append(case.id)
    return {ids[0]: tuple(ids) for ids in groups.values()}


def _shuffled_folds(ids: Sequence[str], num_folds: int) -> list[list[str]]:
    """Consecutive pieces of the shuffled ids, the first ones longer by one where it does not come out even.

    Source: scikit-learn's documentation of KFold(shuffle=True, random_state=...), which nnU-Net uses.
    """
    order = np.arange(len(ids))
    np.random.RandomState(NNUNET_SPLIT_SEED).shuffle(order)
    return [[ids[int(index)] for index in piece] for piece in np.array_split(order, num_folds)]


def _dealt_folds(
    groups: Mapping[str, tuple[str, ...]], presence: Mapping[str, frozenset[int]], seed: int, num_folds: int
) -> list[list[str]]:
    """Deal out whole groups: those with the rarest class first, each to the fold that lacks that class most."""
    names = list(groups)
    counts = {
        name: Counter(item for case in groups[name] for item in presence.get(case, frozenset())) for name in names
    }
    totals: Counter[int] = sum(counts.values(), Counter())
    rarest = {name: min(counts[name], key=lambda item: (totals[item], item), default=None) for name in names}
    luck = dict(zip(names, np.random.default_rng(seed).permutation(len(names)).tolist(), strict=True))

    def urgency(name: str) -> tuple[float, int, int]:
        first = rarest[name]
        return (float("inf") if first is None else totals[first], -len(groups[name]), luck[name])

    folds: list[list[str]] = [[] for _ in range(num_folds)]
    have: list[Counter[int]] = [Counter() for _ in range(num_folds)]
    for position, name in enumerate(sorted(names, key=urgency)):
        empty = [fold for fold in range(num_folds) if not folds[fold]]
        # When only as many groups are left as folds are empty, each of those gets one.
        candidates = empty if len(empty) >= len(names) - position else list(range(num_folds))
        first = rarest[name]
        best = min(candidates, key=lambda fold: (0 if first is None else have[fold][first], len(folds[fold]), fold))
        folds[best].extend(groups[name])
        have[best].update(counts[name])
    return folds


def parse_splits(text: str, where: str | Path) -> Splits:
    """Folds from JSON: autoseg's `splits.json`, or nnU-Net's `splits_final.json` (a list of {"train", "val"}).

    Raises:
        DatasetError: It is neither.
    """
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as problem:
        raise DatasetError(f"{where} is not valid JSON: {problem}") from None
    if not isinstance(data, list):
        return Splits.from_json(text, where, DatasetError)
    try:
        folds = tuple(Fold(train=tuple(item["train"]), validation=tuple(item["val"])) for item in data)
        return Splits(rule=f"as given in {Path(where).name}", folds=folds)
    except (KeyError, TypeError):
        raise DatasetError(f'{where}: every fold must be {{"train": [case ids], "val": [case ids]}}') from None
    except ValidationError as problem:
        raise DatasetError(f"{where} cannot be used as folds", problems=validation_problems(problem)) from None


def splits_problems(splits: Splits, cases: Sequence[Case]) -> tuple[str, ...]:
    """What is wrong with given folds for these cases, in words; nothing when they can be used.

    Cases that are in no fold are allowed: a fold may leave cases out on purpose.
    """
    patients = {case.id: case.patient for case in cases}
    problems = [] if splits.folds else ["there are no folds"]
    for number, fold in enumerate(splits.folds):
        unknown = sorted({*fold.train, *fold.validation} - set(patients))
        if unknown:
            problems.append(
                f"fold {number} names {len(unknown)} cases that are not there: {', '.join(unknown[:_LISTED])}"
            )
        problems += [
            f"fold {number} has no {side} cases" for side in ("train", "validation") if not getattr(fold, side)
        ]
        both = {patients.get(item) for item in fold.train} & {patients.get(item) for item in fold.validation} - {None}
        if both:
            listed = ", ".join(sorted(str(item) for item in both)[:_LISTED])
            problems.append(f"fold {number} trains and validates on cases of the same patient: {listed}")
    return tuple(problems)
