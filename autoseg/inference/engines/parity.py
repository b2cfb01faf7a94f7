"""Whether an engine says of real tiles what PyTorch says in float32.

Source: docs/decisions/0035.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_PROBABILITY = 1e-4
"""Largest difference of a probability where an engine computes in float32."""

ROUNDED_PROBABILITY = 0.01
"""Largest mean difference, over the voxels that either calls foreground, of a voxel's probabilities where an engine
computes in less."""

ROUNDED_LABELS = 0.98
"""Least part of those voxels that get the same label from both; so the labels' Dice is 0.99 or more."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How two sets of logits compare.

    Attributes:
        same_labels: Part of the foreground voxels, of either, with the same label; 1 where there are none.
        largest_difference: Of a probability, over all voxels.
        mean_difference: Over the foreground voxels of either the mean of their largest difference of a probability;
            over all voxels where there are none.
        num_foreground: Voxels that either calls foreground.
    """

    same_labels: float
    largest_difference: float
    mean_difference: float
    num_foreground: int = 0

    def is_met(self, precision: str) -> bool:
        """Whether that is near enough for an engine that computes in this precision."""
        if precision == "fp32":
            return self.largest_difference <= EXACT_PROBABILITY
        return self.same_labels >= ROUNDED_LABELS and self.mean_difference <= ROUNDED_PROBABILITY


def compare(found: Tensor, expected: Tensor, *, is_regions: bool) -> Parity:
    """Compare logits of the same tiles.

    Args:
        found: (n, K, *patch), any floating type and device. Numbers that are not finite compare as far off.
        expected: Likewise, from PyTorch in float32.
        is_regions: Whether outputs are regions, each with a probability of its own; else classes, the first background.
    """
    ours, theirs = (_probabilities(logits, is_regions) for logits in (found, expected))
    if not bool(torch.isfinite(ours).all()):
        return Parity(0.0, 1.0, 1.0)
    difference = (ours - theirs).abs().amax(dim=1)
    largest = float(difference.max())
    if is_regions:
        labels = [found.cpu() > 0, expected.cpu() > 0]
        is_same = (labels[0] == labels[1]).all(dim=1)
        is_foreground = (labels[0] | labels[1]).any(dim=1)
    else:
        labels = [ours.argmax(dim=1), theirs.argmax(dim=1)]
        is_same = labels[0] == labels[1]
        is_foreground = (labels[0] > 0) | (labels[1] > 0)
    if not bool(is_foreground.any()):
        return Parity(1.0, largest, float(difference.mean()))
    same = float(is_same[is_foreground].float().mean())
    return Parity(same, largest, float(difference[is_foreground].mean()), int(is_foreground.sum()))


def _probabilities(logits: Tensor, is_regions: bool) -> Tensor:
    values = logits.to("cpu", torch.float32)
    return values.sigmoid() if is_regions else values.softmax(dim=1)
