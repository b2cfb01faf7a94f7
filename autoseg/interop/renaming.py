"""From the names that another library gives its weights to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from autoseg.errors import ModelError

Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]
"""A pattern for a whole name, and what becomes of it. Names that end in #0, #1, ... are the parts of one tensor, to be
joined along its first axis in this order."""

_MOST_NAMED = 8
_PART = re.compile(r"(.*)#(\d)")


def rename(weights: Mapping[str, Tensor], rules: Sequence[Rule], origin: str) -> dict[str, Tensor]:
    """The weights under our names.

    Args:
        weights: By the other library's names.
        rules: The first that matches a name is taken.
        origin: Of the weights, for messages.

    Raises:
        ModelError: Names that no rule knows; all are counted and the first few named.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in weights.items():
        matches = ((pattern.fullmatch(name), replace) for pattern, replace in rules)
        new = next((replace(match) for match, replace in matches if match), None)
        if new is None:
            unknown.append(name)
        else:
            renamed[new] = tensor
    if unknown:
        raise ModelError(
            f"{len(unknown)} weight tensors are not those of {origin}",
            hint="The model may be of another architecture, or of another version of its library.",
            problems=unknown[:_MOST_NAMED],
        )
    return _join(renamed)


def count_of(weights: Mapping[str, Tensor], pattern: str, origin: str) -> int:
    """One more than the largest number that the first group of a pattern finds in the names.

    Raises:
        ModelError: It finds none.
    """
    found = [int(match[1]) for name in weights if (match := re.match(pattern, name))]
    if not found:
        raise ModelError(
            f"the weights are not those of {origin}",
            hint="The model may be of another architecture, or of another version of its library.",
            problems=sorted(weights)[:_MOST_NAMED],
        )
    return max(found) + 1


def _join(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        match = _PART.fullmatch(name)
        if match:
            parts.setdefault(match[1], {})[int(match[2])] = tensor
        else:
            whole[name] = tensor
    joined = {name: torch.cat([rows[index] for index in sorted(rows)]) for name, rows in parts.items()}
    return whole | joined
