"""Folds as people see them: what was recognised is told, and folds edited by hand are checked before they are used."""

from __future__ import annotations

import logging
from pathlib import Path

from autoseg.domain.dataset import Dataset, Splits
from autoseg.domain.splits import NUM_FOLDS, both_sides, patients_of, splits_problems
from autoseg.errors import DatasetError

log = logging.getLogger("autoseg")


def require_fitting(path: Path, splits: Splits, dataset: Dataset) -> None:
    """Refuse folds that do not fit the cases: unknown or doubled ids, a patient on both sides.

    Raises:
        DatasetError: Every problem, by fold.
    """
    problems = splits_problems(splits, dataset.cases)
    if problems:
        raise DatasetError(
            f"the folds in {path} cannot be used",
            problems=problems,
            hint="Correct that file, or delete it and plan again to have folds made.",
        )


def tell_splits(splits: Splits, dataset: Dataset, *, names_tell_patients: bool) -> None:
    """Say what people would want to know of new folds: patients told by names, leaks these show, few cases.

    Args:
        splits: The folds, made or given.
        dataset: Their cases.
        names_tell_patients: Whether names are asked for patients.
    """
    patients = patients_of(dataset.cases, names_tell_patients=names_tell_patients)
    leaks = [(number, both_sides(fold, patients)) for number, fold in enumerate(splits.folds)]
    leaking = next(((number, found) for number, found in leaks if found), None)
    if leaking is not None:
        log.warning(
            "by their names, cases of one patient are on both sides of fold %d of the folds that came with the data "
            "set: %s",
            leaking[0],
            leaking[1][0],
        )
    elif patients and not any(case.patient for case in dataset.cases):
        log.info("Splits: %s. To take every case for a patient: --set splits.patients=given", splits.rule)
    num_patients = len(dataset.cases) - len(patients) + len(set(patients.values()))
    if dataset.splits is None and num_patients < NUM_FOLDS:
        log.warning(
            "there are %d %s, so each fold leaves one out; scores of so few say little",
            num_patients,
            "patients" if patients else "cases",
        )
