"""Patients and strata of cases in the layouts that name none: two optional objects in their `dataset.json`.

    "patients": {"knee_1_left": "knee_1", "knee_1_right": "knee_1"},
    "strata": {"knee_1_left": {"site": "Lyon"}, ...}

These are keys in somebody else's file, so what is not of this form is taken for something else and left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from autoseg.domain.dataset import Case
from autoseg.domain.findings import Findings

PATIENTS_KEY = "patients"
STRATA_KEY = "strata"

_LISTED = 5


def with_groups(cases: Sequence[Case], data: dict[str, Any], known: Collection[str], found: Findings) -> list[Case]:
    """The cases with the patients and strata that a description gives them.

    Args:
        cases: As resolved.
        data: The description.
        known: Ids of all cases that were looked for, the broken ones too.
        found: Gets a warning for ids that are not among them.
    """
    patients, strata = _patients(data.get(PATIENTS_KEY)), _strata(data.get(STRATA_KEY))
    for key, named in ((PATIENTS_KEY, patients), (STRATA_KEY, strata)):
        unknown = sorted(set(named) - set(known))
        if unknown:
            more = f" and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
            found.add(
                "unknown-case",
                f'"{key}" names cases that are not there: {", ".join(unknown[:_LISTED])}{more}',
                severity="warning",
            )
    return [
        case.model_copy(update={"patient": patients.get(case.id, case.patient), "strata": strata.get(case.id, {})})
        for case in cases
    ]


def _patients(data: Any) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(item, str | int) and item != "" for item in data.values()):
        return {}
    return {str(case): str(patient) for case, patient in data.items()}


def _strata(data: Any) -> dict[str, dict[str, str]]:
    if not isinstance(data, dict) or not all(isinstance(item, dict) for item in data.values()):
        return {}
    return {str(case): {str(key): str(value) for key, value in item.items()} for case, item in data.items()}
