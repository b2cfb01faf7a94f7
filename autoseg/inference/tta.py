"""Test-time mirroring: the average over predictions of flipped tiles, flipped back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from torch import Tensor

from autoseg.inference.sliding_window import Forward

Tta = Literal["none", "full"]


def mirror_combinations(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Every subset of the axes, the empty one first: 8 of 3 axes.

    Args:
        axes: Spatial axes of a tile.
    """
    return tuple(subset for count in range(len(axes) + 1) for subset in combinations(axes, count))


def mirrored(forward: Forward, axes: Sequence[int]) -> Forward:
    """The forward function averaged over all mirror combinations, in float32.

    Args:
        forward: (n, C, *spatial) to (n, K, *spatial).
        axes: Spatial axes that may be flipped; none gives `forward` itself.
    """
    flips = mirror_combinations(axes)[1:]
    if not flips:
        return forward

    def average(tiles: Tensor) -> Tensor:
        total = forward(tiles).float()
        for flip in flips:
            dims = [axis + 2 for axis in flip]
            total = total + forward(tiles.flip(dims)).flip(dims)
        return total / (len(flips) + 1)

    return average
