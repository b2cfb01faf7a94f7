"""Which classes were annotated in which case, as descriptions of data sets declare it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from autoseg.domain.dataset import Case, LabelSchema
from autoseg.domain.descriptions import DescriptionProblem
from autoseg.domain.findings import Findings

KEY = "annotated"
"""In a `dataset.json`: {"annotated": {CASE: [CLASS, ...]}}; in a manifest a key or column of each case."""


def parse_annotated(data: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The classes of each case that a `dataset.json` lists; cases that it does not list were annotated in full.

    Raises:
        DescriptionProblem: The key is there but is no object of lists of names.
    """
    declared = data.get(KEY, {})
    is_sound = isinstance(declared, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in declared.values()
    )
    if not is_sound:
        raise DescriptionProblem(
            [f'{KEY!r} must list the classes that were annotated in a case: {{"case_1": ["liver"]}}, got {declared!r}']
        )
    return {case_id: tuple(names) for case_id, names in declared.items()}


def with_annotated(
    cases: Sequence[Case],
    declared: Mapping[str, Sequence[str]],
    labels: LabelSchema,
    known_ids: Collection[str],
    found: Findings,
) -> list[Case]:
    """The cases with the classes that were annotated in them, in the order of the labels; what is wrong is found.

    Args:
        cases: Without.
        declared: Names of classes by case id.
        labels: The classes there are.
        known_ids: Ids of all cases, those included that cannot be used for other reasons.
        found: Gets the problems.
    """
    for case_id in sorted(set(declared) - set(known_ids)):
        found.add("unknown-case", f"{KEY!r} lists classes of a case that is not there", case=case_id)
    out = []
    for case in cases:
        names = declared.get(case.id)
        unknown = sorted(set(names or ()) - set(labels.names))
        if unknown:
            found.add(
                "unknown-class",
                f"{KEY!r} lists {', '.join(unknown)}; the classes are {', '.join(labels.names)}",
                case=case.id,
            )
        elif names is not None and not names:
            found.add(
                "nothing-annotated",
                f"{KEY!r} lists no class, so the case teaches nothing",
                case=case.id,
                hint=f"Take the case out, or take its {KEY!r} away if every class was annotated.",
            )
        elif names is not None and set(names) != set(labels.names):
            kept = tuple(name for name in labels.names if name in names)
            out.append(case.model_copy(update={KEY: kept}))
            continue
        out.append(case)
    _find_classes_nobody_annotated(out, labels, found)
    return out


def _find_classes_nobody_annotated(cases: Sequence[Case], labels: LabelSchema, found: Findings) -> None:
    labelled = [case for case in cases if case.labels is not None]
    if not labelled or any(case.annotated is None for case in labelled):
        return
    never = sorted(set(labels.names) - {name for case in labelled for name in case.annotated or ()})
    if never:
        found.add(
            "class-never-annotated",
            f"no case was annotated for {', '.join(never)}",
            hint="A class that nobody annotated cannot be learnt: take it out of the labels.",
        )
