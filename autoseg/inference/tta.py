"""Test-time mirroring: predictions of flipped tiles, flipped back, and their average over every combination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from autoseg.domain.plan import Configuration
from autoseg.inference.ladder import AtATime
from autoseg.inference.tiles import Forward


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


@dataclass(frozen=True, slots=True)
class Mirrors:
    """What may be flipped, and how a network's input and output are.

    Attributes:
        axes: Spatial axes of a tile.
        swap: What changes places where its axis is flipped; None: nothing.
    """

    axes: tuple[int, ...]
    swap: TileSwap | None = None

    def forth(self, tiles: Tensor, flip: Sequence[int]) -> Tensor:
        """(n, C, *spatial) tiles flipped along some of the axes."""
        if not flip:
            return tiles
        flipped = tiles.flip([axis + 2 for axis in flip])
        return self.swap.swap_input(flipped) if self.swap is not None and self.swap.axis in flip else flipped

    def back(self, logits: Tensor, flip: Sequence[int]) -> Tensor:
        """(n, K, *spatial) logits of such tiles as they belong to the tiles themselves."""
        if not flip:
            return logits
        restored = logits.flip([axis + 2 for axis in flip])
        return self.swap.swap_output(restored) if self.swap is not None and self.swap.axis in flip else restored


def mirrors_of(settings: Configuration, copies: int = 1) -> Mirrors:
    """What a configuration mirrors at test time; a tile always has three spatial axes.

    Args:
        settings: Of the models.
        copies: How many times the network gives its outputs, one after the other: 2 with probabilities beside logits.
    """
    skipped, sides = 3 - settings.network.dims, settings.sides
    swap = None
    if sides is not None and sides.mirror_pairs == "swap":
        count = len(sides.outputs)
        outputs = tuple(copy * count + output for copy in range(copies) for output in sides.outputs)
        swap = TileSwap(sides.axis + skipped, outputs, () if settings.previous_stage is None else sides.labels)
    axes = tuple(axis + skipped for axis in settings.mirrored(settings.inference.mirror_axes))
    return Mirrors(axes, swap)


def mirrored(
    forward: Forward, axes: Sequence[int], swap: TileSwap | None = None, at_a_time: AtATime | None = None
) -> Forward:
    """The forward function averaged over all mirror combinations, in float32.

    Args:
        forward: (n, C, *spatial) to (n, K, *spatial).
        axes: Spatial axes that may be flipped; none gives `forward` itself.
        swap: What changes places where its axis is flipped; None: nothing.
        at_a_time: How many tiles `forward` gets at a time, mirror images counted; None: one mirror image of all tiles.
    """
    mirrors = Mirrors(tuple(axes), swap)
    flips = mirror_combinations(axes)
    if len(flips) == 1:
        return forward
    several = at_a_time or AtATime()

    def average(tiles: Tensor) -> Tensor:
        def step(some: Sequence[tuple[int, ...]]) -> list[Tensor]:
            outputs = forward(torch.cat([mirrors.forth(tiles, flip) for flip in some]))
            parts = torch.split(outputs, len(tiles))
            return [mirrors.back(part, flip) for part, flip in zip(parts, some, strict=True)]

        outputs = several.run(flips, step, len(tiles))
        # Summed as they come, but not into the first, which is the network's own (perhaps the tiles themselves).
        total = next(outputs).to(torch.float32) + next(outputs)
        for logits in outputs:
            total = total.add_(logits)
        return total.div_(len(flips))

    return average


def with_mirroring(
    forward: Forward, settings: Configuration, copies: int = 1, at_a_time: AtATime | None = None
) -> Forward:
    """The forward function averaged over all that a configuration mirrors; see `mirrors_of` and `mirrored`."""
    mirrors = mirrors_of(settings, copies)
    return mirrored(forward, mirrors.axes, mirrors.swap, at_a_time)
