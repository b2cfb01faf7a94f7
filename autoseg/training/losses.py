"""Dice + cross-entropy over every output of deep supervision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from autoseg.domain.dataset import IGNORE_INDEX

SMOOTH = 1e-5
"""Added above and below in Dice, so that a class absent from both counts as perfect. Source: nnU-Net v2."""


def supervision_weights(num_outputs: int) -> tuple[float, ...]:
    """Weights of the outputs, finest first: halved at every level, the coarsest 0, sum 1.

    Source: nnU-Net v2.
    """
    raw = [1 / 2**level for level in range(num_outputs)]
    if num_outputs > 1:
        raw[-1] = 0.0
    return tuple(value / sum(raw) for value in raw)


def downsample(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels (N, *spatial) on a coarser grid, nearest voxel centre; the same tensor when the size is the same."""
    for axis, length in enumerate(size, start=1):
        old = labels.shape[axis]
        if length != old:
            centres = (torch.arange(length, device=labels.device) * 2 + 1) * old // (2 * length)
            labels = labels.index_select(axis, centres)
    return labels


def dice_cross_entropy(logits: Tensor, labels: Tensor, *, batch_dice: bool) -> Tensor:
    """Cross-entropy plus 1 - mean soft Dice of the foreground classes.

    Voxels labelled IGNORE_INDEX take no part. (nnU-Net v2 leaves the 1 out: its loss is smaller by exactly 1.)

    Args:
        logits: (N, K, *spatial), any float dtype; computed in float32.
        labels: (N, *spatial) class indices, integer.
        batch_dice: Pool Dice over the batch instead of averaging over samples.

    Returns:
        A scalar, at least 0.
    """
    num_classes = logits.shape[1]
    log_probabilities = torch.log_softmax(logits.float().flatten(2), 1)
    targets = labels.flatten(1).long()
    valid = targets != IGNORE_INDEX
    cross_entropy = functional.nll_loss(log_probabilities, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    cross_entropy = cross_entropy / valid.sum().clamp_min(1)

    probabilities = log_probabilities[:, 1:].exp()
    classes = torch.arange(1, num_classes, device=labels.device)[:, None]
    is_class = targets[:, None] == classes
    intersection = (probabilities * is_class).sum(2)
    predicted = (probabilities * valid[:, None]).sum(2)
    present = is_class.sum(2)
    if batch_dice:
        intersection, predicted, present = (part.sum(0) for part in (intersection, predicted, present))
    dice = (2 * intersection + SMOOTH) / (predicted + present + SMOOTH)
    return cross_entropy + 1 - dice.mean()


def supervised_loss(outputs: Tensor | Sequence[Tensor], labels: Tensor, *, batch_dice: bool) -> Tensor:
    """The weighted sum over the outputs of deep supervision.

    Args:
        outputs: Logits, finest first, or those of the finest only.
        labels: (N, *spatial) class indices on the finest grid.
        batch_dice: As in `dice_cross_entropy`.
    """
    levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    total = torch.zeros((), device=labels.device)
    for weight, logits in zip(supervision_weights(len(levels)), levels, strict=True):
        if weight > 0:
            targets = downsample(labels, logits.shape[2:])
            total = total + weight * dice_cross_entropy(logits, targets, batch_dice=batch_dice)
    return total
