"""Which classes are the left and the right one of a pair, told by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

Pair = tuple[str, str]

_SIDES = {"left": "left", "l": "left", "lh": "left", "right": "right", "r": "right", "rh": "right"}
_LETTERS = ("l", "r")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")
"""A word of a name: "RightParotid", "right_parotid" and "R parotid" all hold two. Letters with accents are of their own
words, so that names which differ in them stay different."""

_BY_FORM = frozenset(
    ("heart", "cardiac", "myocardium", "coronary", "auricle", "atrium", "atria", "atrial", "ventricle", "ventricles")
) | {"ventricular", "liver", "hepatic"}
"""Words of parts that are named by what they are and not by where they lie: the mirror image of a left ventricle of the
heart is no right ventricle, and the liver's lobes are not each other's mirror images."""

_BY_SIDE_AFTER_ALL = frozenset(("lateral", "brain", "cerebral"))
"""With one of these a ventricle is the brain's, which does come in mirrored pairs."""


def left_right_pairs(names: Sequence[str]) -> tuple[Pair, ...]:
    """Pairs (left, right) of class names that differ in one word only, which names the side.

    The single letters count as words of their own alone ("kidney_L", "L Kidney", "KidneyL"), not before a digit: L1 is
    a vertebra. A name that holds two sides, or a side that two names claim, makes no pair.

    Args:
        names: Of the classes; sides are written left and right, l and r, or lh and rh, in upper or lower case.
    """
    sides: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in names:
        matches = list(_WORD.finditer(name))
        found = [number for number, match in enumerate(matches) if _side(match)]
        if len(found) != 1:
            continue
        words = [match[0].lower() for match in matches]
        side = _SIDES[words[found[0]]]
        words[found[0]] = "*"
        sides.setdefault(tuple(words), {}).setdefault(side, []).append(name)
    return tuple(
        (pair["left"][0], pair["right"][0])
        for pair in sides.values()
        if len(pair) == 2 and all(len(claimed) == 1 for claimed in pair.values())
    )


def _side(match: re.Match[str]) -> bool:
    """Whether a word of a name tells a side."""
    word = match[0].lower()
    following = match.string[match.end() : match.end() + 1]
    return word in _SIDES and not (word in _LETTERS and following.isdigit())


def without_partner(names: Sequence[str], pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Class names that hold a side and are in no pair."""
    paired = {name for pair in pairs for name in pair}
    return tuple(name for name in names if name not in paired and any(map(_side, _WORD.finditer(name))))


def named_by_form(pair: Pair) -> bool:
    """Whether a pair that was told by its names may be of parts that are no mirror images of each other."""
    words = {word.lower() for word in _WORD.findall(pair[0])}
    return bool(words & _BY_FORM) and not words & _BY_SIDE_AFTER_ALL


def pairs_problems(pairs: Sequence[Pair], names: Sequence[str]) -> tuple[str, ...]:
    """What is wrong with declared pairs, in words.

    Args:
        pairs: Class names (left, right).
        names: Of all classes.
    """
    counts = Counter(name for pair in pairs for name in pair)
    unknown = [name for name in counts if name not in names]
    doubled = [name for name, count in counts.items() if count > 1]
    problems = []
    if unknown:
        problems.append(f"pairs names {', '.join(map(repr, unknown))}; the classes are {', '.join(names)}")
    if doubled:
        problems.append(f"pairs names {', '.join(map(repr, doubled))} more than once")
    return tuple(problems)
