"""Labels decided by probabilities, where rules ask for it; without such rules logits decide, which costs less.

`domain.inference.Threshold` says what a threshold means; `evaluation.thresholds` does the same with stored
probabilities.

Source: docs/decisions/0043.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import Rule, Temperature, Thresholds, thresholds_of
from autoseg.inference.members import probabilities

LABELLED = 0.5
"""Regions without a threshold are predicted above this."""

_MOST_BYTE_CLASSES = 2**8


@dataclass(frozen=True, slots=True)
class Criteria:
    """By what a label is decided besides being the most probable.

    Attributes:
        schema: The labels.
        thresholds: Of each foreground class or region; None: it has none.
    """

    schema: LabelSchema
    thresholds: Thresholds

    @classmethod
    def of(cls, rules: Sequence[Rule], schema: LabelSchema) -> Criteria | None:
        """What rules ask for; None where logits can decide.

        Args:
            rules: Of an `InferenceRecipe`.
            schema: The labels.
        """
        thresholds = thresholds_of(rules, schema)
        return None if thresholds is None else cls(schema, thresholds)

    def of_logits(self, logits: Tensor, temperature: Temperature) -> Tensor:
        """The same as `of_shares`, of the logits of one member.

        Args:
            logits: (K, ...) float32.
            temperature: They are divided by it, see `domain.inference.Temperature`.
        """
        return self.of_shares(probabilities(logits, is_regions=self.schema.has_regions, temperature=temperature))

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
