"""Labels decided by probabilities, where rules ask for it; without such rules logits decide, which costs less.

`domain.inference.Threshold` says what a threshold means; `evaluation.thresholds` does the same with stored
probabilities. Rules about the mean probability of components need, of every voxel, how probable that is which it was
given: one byte a voxel for classes that exclude each other, one for each region that has such a rule; in memory while
it is small, else in a file.

Source: docs/decisions/0043.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import DropUnlikely, Rule, Temperature, Thresholds, thresholds_of
from autoseg.evaluation.postprocess import Likelihoods
from autoseg.evaluation.thresholds import LABELLED
from autoseg.inference.gather import to_levels, view_of_crop
from autoseg.inference.members import probabilities
from autoseg.io.scratch import Scratch
from autoseg.preprocessing.crop import Box
from autoseg.preprocessing.transform import Trail

_MOST_BYTE_CLASSES = 2**8


@dataclass(frozen=True, slots=True)
class Criteria:
    """By what a label is decided besides being the most probable, and what is to be known of it afterwards.

    Attributes:
        schema: The labels.
        thresholds: Of each foreground class or region; None: it has none.
        weighed: Numbers of the classes or regions whose probability rules ask for afterwards.
    """

    schema: LabelSchema
    thresholds: Thresholds
    weighed: tuple[int, ...] = ()

    @classmethod
    def of(cls, rules: Sequence[Rule], schema: LabelSchema) -> Criteria | None:
        """What rules ask for; None where logits can decide.

        Args:
            rules: Of an `InferenceRecipe`.
            schema: The labels.
        """
        thresholds = thresholds_of(rules, schema)
        named = {name for rule in rules if isinstance(rule, DropUnlikely) for name in rule.classes}
        if thresholds is None and not named:
            return None
        weighed = tuple(number for number, name in enumerate(schema.names) if name in named)
        return cls(schema, thresholds or (None,) * len(schema.classes), weighed)

    @property
    def num_maps(self) -> int:
        """Of probabilities that are kept: classes that exclude each other share one."""
        return len(self.weighed) if self.schema.has_regions else min(1, len(self.weighed))

    def of_shares(self, shares: Tensor) -> Tensor:
        """What voxels are.

        Args:
            shares: Probabilities (K, ...), float32.

        Returns:
            Class indices (...), 0 for background; of regions a number with bit i set where the voxel is in region i.
        """
        if self.schema.has_regions:
            codes = torch.zeros(shares.shape[1:], dtype=torch.int64, device=shares.device)
            for number, (share, threshold) in enumerate(zip(shares, self.thresholds, strict=True)):
                inside = share > LABELLED if threshold is None else share >= threshold
                codes |= inside.to(torch.int64) << number
            return codes
        dtype = torch.uint8 if len(shares) <= _MOST_BYTE_CLASSES else torch.int16
        winners = torch.zeros(shares.shape[1:], dtype=dtype, device=shares.device)
        best = torch.zeros_like(shares[0])
        for number, (share, threshold) in enumerate(zip(shares[1:], self.thresholds, strict=True), start=1):
            may_be = share > shares[0] if threshold is None else share >= threshold
            wins = may_be & (share > best)
            winners.masked_fill_(wins, number)
            best = torch.where(wins, share, best)
        return winners

    def levels(self, shares: Tensor, numbers: Tensor) -> Tensor:
        """How probable what voxels are is: uint8 (num_maps, ...), in 255ths.

        Args:
            shares: Probabilities (K, ...).
            numbers: What `of_shares` gave of them.
        """
        if self.schema.has_regions:
            return to_levels(shares[list(self.weighed)])
        return to_levels(shares.gather(0, numbers[None].long()))


class Deciding:
    """Decides the labels of one image, and keeps how probable they are where rules ask for that afterwards.

    Args:
        criteria: Of the rules.
        shape: Of the image (I, J, K).
        folder: For what is too large for memory; made when missing.

    Raises:
        OSError: The disk has no room.
    """

    def __init__(self, criteria: Criteria, shape: tuple[int, int, int], folder: Path) -> None:
        self.criteria = criteria
        self._maps: Scratch | None = None
        if criteria.num_maps:
            folder.mkdir(parents=True, exist_ok=True)
            self._maps = Scratch((criteria.num_maps, *shape[::-1]), folder)

    def of_stream(self, trail: Trail, temperature: Temperature) -> StreamJudge:
        """Decides by the logits of a prepared image; see `labels_from_stream`.

        Args:
            trail: Of the image.
            temperature: Logits are divided by it, see `domain.inference.Temperature`.
        """
        return StreamJudge(self, trail, temperature)

    def of_shares(self, shares: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """What voxels are, and what is to be kept of them; changes nothing.

        Args:
            shares: Probabilities (K, ...), float32.
        """
        numbers = self.criteria.of_shares(shares)
        return numbers, () if self._maps is None else (self.criteria.levels(shares, numbers),)

    def take(self, slices: slice, shares: Tensor) -> NDArray[np.integer]:
        """Decide, and keep what is to be kept.

        Args:
            slices: Along the last axis of the file's grid.
            shares: (K, Z, Y, X) float32, the reverse of the file's axes.
        """
        numbers, kept = self.of_shares(shares)
        self.keep(lambda array: array[..., slices, :, :], kept)
        found: NDArray[np.integer] = numbers.numpy()
        return found

    def keep(self, view: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], kept: Sequence[Tensor]) -> None:
        """Keep what `of_shares` gave of some voxels.

        Args:
            view: Of an array (..., Z, Y, X) those voxels, in the order of what was found.
            kept: See `of_shares`.
        """
        if self._maps is None:
            return
        (levels,) = (item.cpu().numpy() for item in kept)
        view(self._maps.array)[...] = levels
        self._maps.written(levels.size)

    @property
    def likelihoods(self) -> Likelihoods | None:
        """See `apply_rules`; None where no rule asks for them."""
        if self._maps is None:
            return None
        names, is_regions = self.criteria.schema.names, self.criteria.schema.has_regions
        return {
            names[number]: self._maps.array[place if is_regions else 0].T
            for place, number in enumerate(self.criteria.weighed)
        }


class StreamJudge:
    """Decides by logits that come slab by slab; a `Judge`.

    Args:
        deciding: For the image.
        trail: Of the prepared image.
        temperature: See `Deciding.of_stream`.
    """

    def __init__(self, deciding: Deciding, trail: Trail, temperature: Temperature) -> None:
        self._deciding = deciding
        self._trail = trail
        self._temperature = temperature

    def decide(self, logits: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """What some rows are, and what is to be kept of them; changes nothing, so that it can be tried again elsewhere.

        Args:
            logits: (K, D, H, W) float32 on the crop's own grid, on any device.
        """
        is_regions = self._deciding.criteria.schema.has_regions
        return self._deciding.of_shares(probabilities(logits, is_regions=is_regions, temperature=self._temperature))

    def store(self, box: Box, kept: Sequence[Tensor]) -> None:
        """Keep what `decide` gave of a part of the crop.

        Args:
            box: The part, in network axis order.
            kept: What `decide` gave.
        """
        self._deciding.keep(lambda array: view_of_crop(array, self._trail, box), kept)
