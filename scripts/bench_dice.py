"""Dice of label maps against others, as the benchmarks of whole predictions count it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def dice(ours: NDArray[np.integer], theirs: NDArray[np.integer]) -> dict[int, float]:
    """Of each foreground value that either map has."""
    found = {}
    for value in np.union1d(np.unique(ours), np.unique(theirs)):
        if value:
            a, b = ours == value, theirs == value
            found[int(value)] = 2 * int((a & b).sum()) / (int(a.sum()) + int(b.sum()))
    return found


def mean_dice(rows: Sequence[dict[int, float]]) -> float | None:
    """The mean over classes of the mean over images that have the class; None where none has any."""
    by_class: dict[int, list[float]] = {}
    for row in rows:
        for value, score in row.items():
            by_class.setdefault(value, []).append(score)
    return float(np.mean([np.mean(scores) for scores in by_class.values()])) if by_class else None
