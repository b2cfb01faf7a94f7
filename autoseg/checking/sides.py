"""Left and right: pairs of classes, and cases in which they seem to have changed places."""

from __future__ import annotations

from collections.abc import Sequence

from autoseg.checking.facts import CaseFacts
from autoseg.checking.wording import listed, num
from autoseg.domain.dataset import LabelSchema
from autoseg.domain.findings import Findings

MIN_CASES = 3
"""Of fewer, there is no majority."""

AGREEMENT = 0.75
"""Of the pairs in a case that can be judged, so many must lie the other way round."""

MIN_DISTANCE_VOX = 1.0
"""Centres nearer to each other (from left to right) than a voxel say nothing."""


def check_sides(facts: Sequence[CaseFacts], schema: LabelSchema, found: Findings) -> None:
    """Add what left and right mean for the set.

    Args:
        facts: Of the cases that are learnt from.
        schema: The classes.
        found: Takes the findings.
    """
    pairs = schema.sided_pairs
    solid = [item for item in facts if item.geometry is None or not item.geometry.is_2d]
    if not pairs or not solid:
        return
    found.add(
        "left-right-pairs",
        f"{num(len(pairs), 'pair')} of classes {'is' if len(pairs) == 1 else 'are'} told apart by side only: "
        + listed([f"{left} and {right}" for left, right in pairs], 3),
        severity="note",
        hint="The plan says how mirroring keeps them apart: `autoseg plan --why`.",
        cost="nothing, where the names are right",
    )
    # True where the left one of a pair lies to the left of the right one, in the world of the header.
    views = {
        item.case: [as_named for pair in pairs if (as_named := _lies_as_named(item, pair)) is not None]
        for item in solid
    }
    judged = {case: sum(view) / len(view) for case, view in views.items() if view}
    if len(judged) < MIN_CASES:
        return
    right_way = [case for case, part in judged.items() if part >= AGREEMENT]
    wrong_way = [case for case, part in judged.items() if part <= 1 - AGREEMENT]
    if len(wrong_way) > len(right_way):
        found.add(
            "sides-mirrored",
            f"in {len(wrong_way)} of {len(judged)} cases the left structures lie to the right of the right ones, by "
            "the headers: names or headers are mirrored throughout",
            cases=wrong_way,
            severity="note",
            hint="All cases being alike, it does not harm training; images of other sources would be named wrongly.",
        )
    odd = right_way if len(wrong_way) > len(right_way) else wrong_way
    for case in odd if len(right_way) != len(wrong_way) else ():
        found.add(
            "sides-swapped",
            f"left and right lie the other way round than in {max(len(right_way), len(wrong_way))} of {len(judged)} "
            f"cases, in {len(views[case])} of {num(len(pairs), 'pair')} that could be judged",
            case=case,
            severity="warning",
            hint="Its labels are swapped, or its header is mirrored: compare with the other cases in a viewer.",
        )


def _lies_as_named(item: CaseFacts, pair: tuple[str, str]) -> bool | None:
    """Whether the left one lies to the left; None where that cannot be told."""
    if item.labels is None or item.geometry is None:
        return None
    left, right = (item.labels.structures.get(name) for name in pair)
    if left is None or right is None:
        return None
    distance = right.centre_mm[0] - left.centre_mm[0]
    if abs(distance) < MIN_DISTANCE_VOX * min(item.spacing_mm):
        return None
    return distance > 0
