"""What the labels of the whole set say of each class: how often, how large, in how many pieces, in which folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, prod

import numpy as np

from autoseg.checking.facts import CaseFacts, Structure
from autoseg.checking.findings import ClassSummary
from autoseg.checking.outliers import MIN_CASES, Z_LIMIT, deviations
from autoseg.checking.wording import listed, num, share
from autoseg.domain.dataset import Dataset, LabelClass, Splits
from autoseg.domain.findings import Findings

TINY_EDGE_VOX = 4
"""A class is tiny where its median volume is below this edge to the power of the dimensions (64 voxels, 16 pixels).

Of a cube with this edge 88 % of the voxels lie on the surface, and two poolings make it one voxel.
"""

FEW_TO_LEARN_FROM = 3
"""A class in fewer training cases of a fold is hardly learnt; a rule of thumb, as much for people as for networks."""

ONE_PIECE_FRACTION = 0.8
"""Where a class is in one piece in so many of its cases, further pieces in the others are worth a look."""

LARGE_STRAY_FRACTION = 0.1
"""Strays with more than this part of a structure are hardly slips of the pen."""

VOLUME_FLOOR = log(1.5)
"""Least standard deviation of the logarithm of a class's volume: factors below 11 are never told."""

Presence = Mapping[str, frozenset[int]]


def class_presence(facts: Sequence[CaseFacts], dataset: Dataset) -> Presence:
    """For each case with a label map the numbers, from 1 on, of the classes in it."""
    return {
        item.case: frozenset(
            number for number, name in enumerate(dataset.labels.names, start=1) if name in item.labels.structures
        )
        for item in facts
        if item.labels is not None
    }


def summarise_classes(
    facts: Sequence[CaseFacts], dataset: Dataset, target_mm: tuple[float, ...] | None
) -> tuple[ClassSummary, ...]:
    """The classes in numbers.

    Args:
        facts: Of the cases that are learnt from.
        dataset: Names the classes.
        target_mm: The voxel size of the plan; None where nobody knows.
    """
    foreground = sum(item.labels.foreground_voxels for item in facts if item.labels is not None)
    out = []
    for item in dataset.labels.classes:
        found = _structures(facts, item)
        voxels = [structure.voxels for _, structure in found]
        pieces = [structure.pieces for _, structure in found if structure.pieces is not None]
        planned = [_planned_voxels(case, structure, target_mm) for case, structure in found]
        out.append(
            ClassSummary(
                name=item.name,
                values=item.values,
                num_cases=len(found),
                median_voxels=float(np.median(voxels)) if voxels else 0.0,
                least_voxels=min(voxels, default=0),
                most_voxels=max(voxels, default=0),
                median_planned_voxels=float(np.median(planned)) if planned else 0.0,
                median_pieces=float(np.median(pieces)) if pieces else 0.0,
                foreground_fraction=sum(voxels) / foreground if foreground else 0.0,
            )
        )
    return tuple(out)


def _structures(facts: Sequence[CaseFacts], item: LabelClass) -> list[tuple[CaseFacts, Structure]]:
    return [
        (case, case.labels.structures[item.name])
        for case in facts
        if case.labels is not None and item.name in case.labels.structures
    ]


def _planned_voxels(case: CaseFacts, structure: Structure, target_mm: tuple[float, ...] | None) -> float:
    """The voxels of a structure after resampling to the planned spacing."""
    if target_mm is None or case.geometry is None or case.geometry.is_2d:
        return float(structure.voxels)
    return structure.voxels * prod(case.spacing_mm) / prod(target_mm)


def check_classes(
    facts: Sequence[CaseFacts],
    dataset: Dataset,
    classes: Sequence[ClassSummary],
    splits: Splits | None,
    found: Findings,
) -> None:
    """Add what is odd about classes.

    Args:
        facts: Of the cases that are learnt from.
        dataset: Names the classes.
        classes: As summarised.
        splits: The folds that would be used; None where there are none.
        found: Takes the findings.
    """
    all_read = bool(facts) and all(item.labels is not None for item in facts)
    presence = class_presence(facts, dataset)
    flat = any(item.geometry is not None and item.geometry.is_2d for item in facts)
    for number, (item, summary) in enumerate(zip(dataset.labels.classes, classes, strict=True), start=1):
        if summary.num_cases == 0:
            if all_read:
                _add_never(item, found)
            continue
        _check_rare(number, item, presence, splits, found)
        _check_tiny(summary, 2 if flat else 3, found)
        structures = _structures(facts, item)
        _check_pieces(item, structures, found)
        _check_volumes(item, structures, found)
    _check_gaps(dataset, found)


def _add_never(item: LabelClass, found: Findings) -> None:
    found.add(
        "class-never-occurs",
        f"the class {item.name!r} (value {', '.join(map(str, item.values))}) is in no label map",
        severity="warning",
        hint="A class without examples is never learnt; take it out of the labels, or check their values.",
        cost=f"the class {item.name!r} cannot be learnt",
    )


def _check_rare(number: int, item: LabelClass, presence: Presence, splits: Splits | None, found: Findings) -> None:
    """Classes of which a fold has too few cases to learn from, or none to be scored on."""
    having = sorted(case for case, classes in presence.items() if number in classes)
    if splits is None or len(having) == len(presence):
        return
    left = [len(set(fold.train) & set(having)) for fold in splits.folds]
    few = [str(fold) for fold, count in enumerate(left) if count < FEW_TO_LEARN_FROM]
    without = [str(fold) for fold, one in enumerate(splits.folds) if not set(one.validation) & set(having)]
    if not few and not without:
        return
    parts = [f"the class {item.name!r} is in {len(having)} of {num(len(presence), 'case')} ({listed(having)})"]
    if few:
        parts.append(
            f"fold {listed(few)} would learn it from {num(min(left), 'case')} or few more"
            if min(left)
            else f"fold {listed(few)} would have next to none or none to learn it from"
        )
    if without:
        parts.append(f"fold {listed(without)} would hold out none with it")
    cost = f"{item.name!r} is not scored in {len(without)} of {len(splits.folds)} folds"
    if few:
        cost = f"{item.name!r} is hardly learnt in {len(few)} of {len(splits.folds)} folds"
    found.add(
        "rare-class",
        "; ".join(parts),
        severity="warning" if few else "note",
        cases=having,
        hint="Label more cases that have it, or join it with another class.",
        cost=cost,
    )


def _check_tiny(summary: ClassSummary, num_axes: int, found: Findings) -> None:
    median = summary.median_planned_voxels
    if median >= TINY_EDGE_VOX**num_axes:
        return
    edge = max(1.0, median ** (1 / num_axes))
    surface = 1 - max(0.0, (edge - 2) / edge) ** num_axes
    found.add(
        "tiny-structures",
        f"the class {summary.name!r} has a median of {median:.0f} voxels at the planned spacing "
        f"({summary.least_voxels:,} to {summary.most_voxels:,} in the files)",
        severity="warning",
        hint="Keep the resolution (a finer target spacing costs time and memory), or judge it by detection, not Dice.",
        cost=f"about {surface:.0%} of the voxels of {summary.name!r} lie on its surface: half a voxel of error takes "
        "much of its Dice",
    )


def _check_pieces(item: LabelClass, structures: Sequence[tuple[CaseFacts, Structure]], found: Findings) -> None:
    """Cases with stray islands of a class that is in one piece elsewhere."""
    counted = [(case, one) for case, one in structures if one.pieces is not None]
    whole = sum(one.pieces == 1 for _, one in counted)
    if len(counted) < MIN_CASES or whole < ONE_PIECE_FRACTION * len(counted):
        return
    for case, one in counted:
        if one.pieces is not None and one.pieces > 1:
            fraction = one.stray_voxels / one.voxels
            found.add(
                "stray-islands",
                f"{item.name!r} is in {one.pieces} pieces: {num(one.stray_voxels, 'voxel')} ({share(fraction, 1)} of "
                f"it) off the largest; {whole} of {len(counted)} cases have one piece",
                case=case.case,
                severity="warning" if fraction > LARGE_STRAY_FRACTION else "note",
                hint="A slip while drawing, or a gap in it?",
                voxels=one.stray_voxels,
            )


def _check_volumes(item: LabelClass, structures: Sequence[tuple[CaseFacts, Structure]], found: Findings) -> None:
    placed = [(case, one) for case, one in structures if case.geometry is not None]
    if len(placed) < MIN_CASES:
        return
    volumes = np.array([one.voxels * prod(case.spacing_mm) for case, one in placed])
    unit = "pixels" if any(case.geometry is not None and case.geometry.is_2d for case, _ in placed) else "mm³"
    middle = float(np.median(volumes))
    for (case, one), volume, off in zip(placed, volumes, deviations(np.log(volumes), VOLUME_FLOOR), strict=True):
        if off > Z_LIMIT:
            found.add(
                "volume-outlier",
                f"{item.name!r} measures {volume:,.4g} {unit}, in the middle case {middle:,.4g}",
                case=case.case,
                severity="note",
                hint="Look at it: half drawn, drawn twice, or another structure?",
                voxels=one.voxels,
            )


def _check_gaps(dataset: Dataset, found: Findings) -> None:
    declared = {value for item in dataset.labels.classes for value in item.values}
    missing = sorted(set(range(1, max(declared) + 1)) - declared - {dataset.labels.ignore})
    if missing:
        found.add(
            "label-gaps",
            f"the label values are not consecutive: {listed([str(value) for value in missing])} of 1 to "
            f"{max(declared)} {'is' if len(missing) == 1 else 'are'} not used",
            severity="note",
            hint="Training takes them as they are, and predictions have the same values.",
            cost="nothing",
        )
