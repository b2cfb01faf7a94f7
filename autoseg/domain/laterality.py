"""Which classes are the left and the right one of a pair, told by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SIDES = {"left": "left", "l": "left", "lh": "left", "right": "right", "r": "right", "rh": "right"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
"""A word of a name: "RightParotid", "right_parotid" and "R parotid" all hold two."""


def left_right_pairs(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs (left, right) of class names that differ in one word only, which names the side.

    Args:
        names: Of the classes; sides are written left and right, l and r, or lh and rh, in upper or lower case.
    """
    sides: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        words = [word.lower() for word in _WORD.findall(name)]
        found = [position for position, word in enumerate(words) if word in _SIDES]
        if len(found) != 1:
            continue
        side = _SIDES[words[found[0]]]
        words[found[0]] = "*"
        sides.setdefault(tuple(words), {})[side] = name
    return tuple((pair["left"], pair["right"]) for pair in sides.values() if len(pair) == 2)
