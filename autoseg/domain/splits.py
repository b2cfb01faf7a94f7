"""Folds of a cross-validation: nnU-Net's own where a data set allows it, else by patient and stratified."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from autoseg.domain.dataset import Case, Dataset, Fold, Splits
from autoseg.domain.patients import recognise_patients
from autoseg.domain.values import validation_problems
from autoseg.errors import DatasetError

NUM_FOLDS = 5
"""Source: nnU-Net v2, so that folds can be compared."""

NNUNET_SPLIT_SEED = 12345
"""Seed of nnU-Net's shuffled five-fold split. Source: nnU-Net v2, `generate_crossval_split`; decision 0002."""

_MAX_SWAPS = 500
"""Against endless evening of large sets; twenty or so are usual."""

_GAIN_DIGITS = 9
_LEAST_GAIN = 1e-8
"""Gains are sums of floats, whose last digits mean nothing."""

_LISTED = 5

Trait = tuple[int, str, str]
"""Something folds should have alike: (0, "", class) or (1, column, value), so that any two can be put in order."""


def dataset_splits(
    dataset: Dataset,
    class_presence: Mapping[str, frozenset[int]] | None,
    seed: int,
    *,
    names_tell_patients: bool = True,
) -> Splits:
    """The folds to use: those that came with the data set where there are any, else made ones.

    Args:
        dataset: The data set.
        class_presence: As for `make_splits`.
        seed: As for `make_splits`.
        names_tell_patients: As for `make_splits`.

    Raises:
        DatasetError: The given folds do not fit the cases, or there are too few cases to make any.
    """
    if dataset.splits is None:
        return make_splits(dataset.cases, class_presence, seed, names_tell_patients=names_tell_patients)
    problems = splits_problems(dataset.splits, dataset.cases)
    if problems:
        raise DatasetError("the folds that came with the data set cannot be used", problems=problems)
    return dataset.splits


def make_splits(
    cases: Sequence[Case],
    class_presence: Mapping[str, frozenset[int]] | None,
    seed: int,
    num_folds: int = NUM_FOLDS,
    *,
    names_tell_patients: bool = True,
) -> Splits:
    """Divide cases into folds, each case validated exactly once, a patient never on both sides.

    Where no patient has several cases, every class is in every case (or nothing is known about classes) and no strata
    are given, the folds equal nnU-Net's, whatever the seed. Otherwise whole patients are dealt out so that folds have
    like numbers of cases and of cases with each class and each stratum. With fewer patients than folds, each patient is
    a fold.

    Args:
        cases: The labelled cases, in any order.
        class_presence: For each case id the foreground class indices that occur in it, or None when not known.
        seed: Decides between equally good assignments, where folds are stratified.
        num_folds: Folds wanted, at least 2.
        names_tell_patients: Whether names such as `sub-01_ses-2` tell patients where no case names its own.

    Raises:
        DatasetError: There are fewer than two cases or two patients.

    Source: decision 0002; stratification after Sechidis et al., ECML PKDD 2011, "On the stratification of multi-label
    data", applied to patients.
    """
    cases = sorted(cases, key=lambda case: case.id)
    patients = patients_of(cases, names_tell_patients=names_tell_patients)
    groups = _groups(cases, patients)
    if len(groups) < 2:
        what = f"{len(cases)} case{'s' if len(cases) != 1 else ''} of one patient" if cases else "no cases"
        raise DatasetError(
            f"there are {what}; a cross-validation needs at least two patients",
            hint="Train on every case with --fold all, or add cases.",
        )
    num_folds = min(num_folds, len(groups))
    by_patient = len(groups) < len(cases)
    traits, kinds = _traits(cases, class_presence)
    if not by_patient and not kinds:
        validation = _shuffled_folds(list(groups), num_folds)
        rule = f"{num_folds} folds of shuffled cases, equal to nnU-Net's (seed {NNUNET_SPLIT_SEED})"
    else:
        validation = _dealt_folds(groups, traits if kinds else {}, seed, num_folds)
        how = [*(["by patient"] if by_patient else []), *([f"stratified by {' and '.join(kinds)}"] if kinds else [])]
        rule = f"{num_folds} folds {' and '.join(how)} (seed {seed})"
    if by_patient and not any(case.patient for case in cases):
        rule += f"; {_recognised(patients)}"
    if len(groups) == num_folds < NUM_FOLDS:
        rule += "; few cases, so one " + ("patient" if by_patient else "case") + " is left out at a time"
    ids = [case.id for case in cases]
    folds = tuple(
        Fold(train=tuple(item for item in ids if item not in chosen), validation=tuple(sorted(chosen)))
        for chosen in (frozenset(fold) for fold in validation)
    )
    return Splits(rule=rule, folds=folds)


def patients_of(cases: Sequence[Case], *, names_tell_patients: bool = True) -> dict[str, str]:
    """Case id to patient, for the cases whose patient is known.

    Args:
        cases: All of them.
        names_tell_patients: Whether names are asked where not one case names its patient (see `domain.patients`).
    """
    given = {case.id: case.patient for case in cases if case.patient}
    if given or not names_tell_patients:
        return given
    return recognise_patients(case.id for case in cases)


def _recognised(patients: Mapping[str, str]) -> str:
    """Say which patients names told, by the first of them."""
    first, count = min(patients.values()), len(set(patients.values()))
    cases = sorted(case for case, patient in patients.items() if patient == first)
    return (
        f"{count} patient{'' if count == 1 else 's'} recognised by the names of {len(patients)} cases "
        f"({cases[0]} and {cases[1]} are of {first})"
    )


def _groups(cases: Sequence[Case], patients: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Case ids by patient, in the order of the first case; a case without a patient is one of its own."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for case in cases:
        groups.setdefault((case.id in patients, patients.get(case.id, case.id)), []).append(case.id)
    return {ids[0]: tuple(ids) for ids in groups.values()}


def _traits(
    cases: Sequence[Case], class_presence: Mapping[str, frozenset[int]] | None
) -> tuple[dict[str, frozenset[Trait]], tuple[str, ...]]:
    """What folds should have alike of each case, and its kinds in words; kinds that all cases share are left out."""
    traits: dict[str, set[Trait]] = {case.id: set() for case in cases}
    what = []
    if class_presence is not None and len({class_presence.get(case.id, frozenset()) for case in cases}) > 1:
        what.append("class")
        for case in cases:
            traits[case.id] |= {(0, "", f"{index:06d}") for index in class_presence.get(case.id, ())}
    for column in sorted({column for case in cases for column in case.strata}):
        values = {case.id: case.strata.get(column, "") for case in cases}
        if len(set(values.values())) == 1:
            continue
        what.append(column)
        for case_id, value in values.items():
            traits[case_id].add((1, column, value))
    return {case_id: frozenset(items) for case_id, items in traits.items()}, tuple(what)


def _shuffled_folds(ids: Sequence[str], num_folds: int) -> list[list[str]]:
    """Consecutive pieces of the shuffled ids, the first ones longer by one where it does not come out even.

    Source: scikit-learn's documentation of KFold(shuffle=True, random_state=...), which nnU-Net uses.
    """
    order = np.arange(len(ids))
    np.random.RandomState(NNUNET_SPLIT_SEED).shuffle(order)
    return [[ids[int(index)] for index in piece] for piece in np.array_split(order, num_folds)]


def _dealt_folds(
    groups: Mapping[str, tuple[str, ...]], traits: Mapping[str, frozenset[Trait]], seed: int, num_folds: int
) -> list[list[str]]:
    """Deal out whole groups: those with the rarest trait first, each to the fold that lacks that trait most.

    Of folds that lack it alike, the one that has least of the group's other traits and fewest cases takes it.
    """
    names = list(groups)
    counts = {name: Counter(item for case in groups[name] for item in traits.get(case, frozenset())) for name in names}
    totals: Counter[Trait] = sum(counts.values(), Counter())
    num_cases = sum(map(len, groups.values()))
    rarest = {name: min(counts[name], key=lambda item: (totals[item], item), default=None) for name in names}
    luck = dict(zip(names, np.random.default_rng(seed).permutation(len(names)).tolist(), strict=True))

    def urgency(name: str) -> tuple[float, int, int]:
        first = rarest[name]
        return (float("inf") if first is None else totals[first], -len(groups[name]), luck[name])

    folds: list[list[str]] = [[] for _ in range(num_folds)]
    have: list[Counter[Trait]] = [Counter() for _ in range(num_folds)]

    def fullness(fold: int, name: str) -> tuple[int, float, int]:
        first = rarest[name]
        shares = [have[fold][item] / totals[item] for item in counts[name]]
        # An ordinary sum would depend on the order of the traits, which nothing fixes.
        return (0 if first is None else have[fold][first], fsum([*shares, len(folds[fold]) / num_cases]), fold)

    for position, name in enumerate(sorted(names, key=urgency)):
        empty = [fold for fold in range(num_folds) if not folds[fold]]
        # When only as many groups are left as folds are empty, each of those gets one.
        candidates = empty if len(empty) >= len(names) - position else list(range(num_folds))
        best = min(candidates, key=lambda fold: fullness(fold, name))
        folds[best].append(name)
        have[best].update(counts[name])
    evened = _evened_folds(folds, {name: (len(groups[name]), counts[name]) for name in names}, sorted(totals))
    return [[case for name in fold for case in groups[name]] for fold in evened]


def _evened_folds(
    folds: Sequence[list[str]], contents: Mapping[str, tuple[int, Counter[Trait]]], traits: Sequence[Trait]
) -> list[list[str]]:
    """Swap groups of two folds, the best swap first, as long as that makes the folds more alike.

    Dealing out looks at the rarest trait of each group; where groups have several, the others come out uneven.
    What counts is the sum, over traits and the number of cases, of the squared differences between folds, each divided
    by the trait's total, so that rare traits weigh as much as common ones.
    """
    order = sorted(contents)
    table = np.array([[contents[name][0], *(contents[name][1][item] for item in traits)] for name in order], np.float64)
    weights = 1 / table.sum(axis=0)
    place = {name: row for row, name in enumerate(order)}
    members = [sorted(place[name] for name in fold) for fold in folds]
    for _ in range(_MAX_SWAPS if traits else 0):
        gain, swap = min(
            (_best_swap(table, weights, members[first], members[second]), (first, second))
            for first, second in combinations(range(len(members)), 2)
        )
        if gain[0] > -_LEAST_GAIN:
            break
        first, second = swap
        members[first] = sorted({*members[first], gain[2]} - {gain[1]})
        members[second] = sorted({*members[second], gain[1]} - {gain[2]})
    return [[order[row] for row in fold] for fold in members]


def _best_swap(
    table: NDArray[np.float64], weights: NDArray[np.float64], first: Sequence[int], second: Sequence[int]
) -> tuple[float, int, int]:
    """The swap of two rows that changes unevenness most: by how much (negative is better), and both rows."""
    apart = table[first].sum(axis=0) - table[second].sum(axis=0)
    best = (0.0, -1, -1)
    for row in first:
        change = table[second] - table[row]
        # What folds hold changes by +change and -change; squares of sums, less the squares before.
        gains = (2 * change * (apart + change)) @ weights
        chosen = int(gains.argmin())
        best = min(best, (round(float(gains[chosen]), _GAIN_DIGITS), row, second[chosen]))
    return best


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
            problems.append(f"fold {number} names {_cases(unknown)} not in the data set: {_listed(unknown)}")
        for side in ("train", "validation"):
            members: tuple[str, ...] = getattr(fold, side)
            doubled = sorted(item for item, count in Counter(members).items() if count > 1)
            if not members:
                problems.append(f"fold {number} has no {side} cases")
            if doubled:
                problems.append(f"fold {number} names {_cases(doubled)} twice under {side}: {_listed(doubled)}")
        both = both_sides(fold, {case: patient for case, patient in patients.items() if patient})
        if both:
            problems.append(f"fold {number} trains and validates on cases of the same patient: {_listed(both)}")
    return tuple(problems)


def both_sides(fold: Fold, patients: Mapping[str, str]) -> tuple[str, ...]:
    """The patients with cases on both sides of a fold, each with one case of either side, in words.

    Args:
        fold: The fold.
        patients: Case id to patient, where it is known.
    """
    train, validation = (
        {patients[item]: item for item in reversed(side) if item in patients} for side in (fold.train, fold.validation)
    )
    return tuple(f"{name} ({train[name]} and {validation[name]})" for name in sorted(set(train) & set(validation)))


def _cases(ids: Sequence[str]) -> str:
    return f"{len(ids)} case{'s' if len(ids) > 1 else ''}"


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
