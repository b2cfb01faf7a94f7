"""Test-time mirroring: the average over predictions of flipped tiles, flipped back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from autoseg.domain.plan import Configuration
from autoseg.inference.sliding_window import Forward

Tta = Literal["none", "full"]


def mirror_combinations(axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Every subset of the axes, the empty one first: 8 of 3 axes.

    Args:
        axes: Spatial axes of a tile.
    """
    return tuple(subset for count in range(len(axes) + 1) for subset in combinations(axes, count))


@dataclass(frozen=True, slots=True)
class TileSwap:
    """What changes places in the mirror image along one axis.

    Attributes:
        axis: Spatial axis of a tile.
        outputs: For each output the one whose place it takes.
        previous: Of a cascade: what the labels of its previous stage become, which are a tile's last channel; empty
            where there is no such channel.
    """

    axis: int
    outputs: tuple[int, ...]
    previous: tuple[int, ...] = ()

    def swap_input(self, tiles: Tensor) -> Tensor:
        """(n, C, *spatial) tiles as they are in a world with left and right changed; the image is none of labels."""
        if not self.previous:
            return tiles
        labels = torch.tensor(self.previous, device=tiles.device)[tiles[:, -1:].long()]
        return torch.cat([tiles[:, :-1], labels.to(tiles.dtype)], dim=1)

    def swap_output(self, logits: Tensor) -> Tensor:
        """(n, K, *spatial) logits back from such a world."""
        return logits.index_select(1, torch.tensor(self.outputs, device=logits.device))


def mirrored(forward: Forward, axes: Sequence[int], swap: TileSwap | None = None) -> Forward:
    """The forward function averaged over all mirror combinations, in float32.

    Args:
        forward: (n, C, *spatial) to (n, K, *spatial).
        axes: Spatial axes that may be flipped; none gives `forward` itself.
        swap: What changes places where its axis is flipped; None: nothing.
    """
    flips = mirror_combinations(axes)[1:]
    if not flips:
        return forward

    def average(tiles: Tensor) -> Tensor:
        total = forward(tiles).float()
        for flip in flips:
            dims = [axis + 2 for axis in flip]
            flipped = tiles.flip(dims)
            if swap is not None and swap.axis in flip:
                total = total + swap.swap_output(forward(swap.swap_input(flipped)).flip(dims))
            else:
                total = total + forward(flipped).flip(dims)
        return total / (len(flips) + 1)

    return average


def with_mirroring(forward: Forward, settings: Configuration) -> Forward:
    """The forward function averaged over all that a configuration mirrors; a tile always has three spatial axes."""
    skipped, sides = 3 - settings.network.dims, settings.sides
    swap = None
    if sides is not None and sides.mirror_pairs == "swap":
        swap = TileSwap(sides.axis + skipped, sides.outputs, () if settings.previous_stage is None else sides.labels)
    return mirrored(forward, [axis + skipped for axis in settings.mirrored(settings.inference.mirror_axes)], swap)
