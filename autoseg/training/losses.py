"""Dice + cross-entropy over every output of deep supervision: of classes, of regions, and of classes partly annotated.

Where a class was not annotated in a sample, its voxels may be labelled as background there. So the sample says nothing
about that class: of ordinary classes its probability is added to the background's, and a voxel labelled as background
asks for their sum (marginal loss); of regions its output is left out. Dice counts annotated classes only.

Source: Shi et al. 2021, "Marginal loss and exclusion loss for partially supervised multi-organ segmentation", Medical
Image Analysis 70, section 3.1 (the exclusion loss is not used); docs/decisions/0020.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.training.shares import WHOLE, Share

SMOOTH = 1e-5
"""Added above and below in Dice, so that a class absent from both counts as perfect. Source: nnU-Net v2."""


HARDEST_SAMPLED = 16
"""One voxel in so many tells how hard the hardest are: exact enough, and far quicker than sorting all."""


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


def dice_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    batch_dice: bool,
    annotated: Tensor | None = None,
    hard_fraction: float = 1.0,
    share: Share = WHOLE,
) -> Tensor:
    """Cross-entropy plus 1 - mean soft Dice of the foreground classes.

    Voxels labelled IGNORE_INDEX take no part. (nnU-Net v2 leaves the 1 out: its loss is smaller by exactly 1.)

    Args:
        logits: (N, K, *spatial), any float dtype; computed in float32.
        labels: (N, *spatial) class indices, integer.
        batch_dice: Pool Dice over the batch instead of averaging over samples.
        annotated: (N, K - 1) bool, which foreground classes were annotated in each sample; None: all in all.
        hard_fraction: See `mean_of_hardest`.
        share: Of the batch's loss, where these samples are a part of it.

    Returns:
        A scalar, at least 0.
    """
    num_classes = logits.shape[1]
    log_probabilities = torch.log_softmax(logits.float().flatten(2), 1)
    targets = labels.flatten(1).long()
    if annotated is not None:
        log_probabilities, targets = _with_unknown_in_background(log_probabilities, targets, annotated)
    valid = targets != IGNORE_INDEX
    entropies = functional.nll_loss(log_probabilities, targets, ignore_index=IGNORE_INDEX, reduction="none")
    cross_entropy = mean_of_hardest(entropies, valid, hard_fraction, share)

    probabilities = log_probabilities[:, 1:].exp()
    classes = torch.arange(1, num_classes, device=labels.device)[:, None]
    is_class = targets[:, None] == classes
    intersection = (probabilities * is_class).sum(2)
    predicted = (probabilities * valid[:, None]).sum(2)
    present = is_class.sum(2)
    sums = (intersection, predicted, present)
    return cross_entropy + _dice_loss(sums, batch_dice=batch_dice, annotated=annotated, share=share)


def dice_binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    regions: Tensor,
    *,
    batch_dice: bool,
    annotated: Tensor | None = None,
    hard_fraction: float = 1.0,
    share: Share = WHOLE,
) -> Tensor:
    """Binary cross-entropy, averaged over regions and voxels, plus 1 - mean soft Dice of the regions.

    Voxels labelled IGNORE_INDEX take no part. (nnU-Net v2 leaves the 1 out; and where there is an ignore label it adds
    the binary cross-entropies of the regions up instead of averaging them, so that they weigh more than Dice.)

    Args:
        logits: (N, K, *spatial), one a region, any float dtype; computed in float32.
        labels: (N, *spatial) value indices, integer.
        regions: (K, values) bool, which value indices each region holds.
        batch_dice: As in `dice_cross_entropy`.
        annotated: (N, K) bool, which regions were annotated in each sample; None: all in all.
        hard_fraction: See `mean_of_hardest`.
        share: Of the batch's loss, where these samples are a part of it.

    Returns:
        A scalar, at least 0.
    """
    logits = logits.float().flatten(2)
    valid, is_inside = region_targets(labels.flatten(1), regions)
    counted = valid if annotated is None else valid & annotated[:, :, None]
    # Softplus - x t is the binary cross-entropy without a float copy of the targets.
    entropies = (functional.softplus(logits) - logits * is_inside) * counted
    counted = counted.expand_as(logits)
    cross_entropy = mean_of_hardest(entropies.flatten(1), counted.flatten(1), hard_fraction, share)

    probabilities = torch.sigmoid(logits)
    intersection = (probabilities * is_inside).sum(2)
    predicted = (probabilities * valid).sum(2)
    present = is_inside.sum(2)
    sums = (intersection, predicted, present)
    return cross_entropy + _dice_loss(sums, batch_dice=batch_dice, annotated=annotated, share=share)


def mean_of_hardest(entropies: Tensor, counted: Tensor, fraction: float, share: Share = WHOLE) -> Tensor:
    """The mean over the hardest voxels of each sample; with fraction 1 over all of them.

    Small structures are a few of very many voxels, of which most are soon easy: in a mean over all they hardly count.
    What is hard is decided for each sample alone, so that it does not depend on how samples come together.

    Args:
        entropies: (N, M) cross-entropies, 0 where not counted.
        counted: (N, M) bool, voxels that take part.
        fraction: Part of each sample's voxels, above 0 up to 1.
        share: Of the batch's mean.

    Source: Wu et al. 2016, "Bridging category-level and instance-level semantic image segmentation", section 3.2
    (online bootstrapping); Isensee et al. 2021 use it as "topk loss". The threshold comes from every
    HARDEST_SAMPLED-th voxel.
    """
    if fraction < 1:
        sampled = entropies.detach()[:, ::HARDEST_SAMPLED]
        place = max(1, round((1 - fraction) * sampled.shape[1]))
        threshold = sampled.kthvalue(place, dim=1, keepdim=True).values
        counted = counted & (entropies.detach() >= threshold)
        entropies = entropies * counted
    return entropies.sum() / share.total(counted.sum()).clamp_min(1)


def region_targets(labels: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Where a label map says something, and where each region is.

    Args:
        labels: (N, *spatial) value indices, integer.
        regions: (K, values) bool.

    Returns:
        (N, 1, *spatial) bool, False where nobody annotated; (N, K, *spatial) bool, the regions.
    """
    valid = (labels != IGNORE_INDEX)[:, None]
    is_inside = regions[:, labels.long().clamp_min(0)].movedim(0, 1)
    return valid, is_inside & valid


def _with_unknown_in_background(log_probabilities: Tensor, targets: Tensor, annotated: Tensor) -> tuple[Tensor, Tensor]:
    """Add the probabilities of classes that were not annotated to the background's, and call their voxels background.

    Args:
        log_probabilities: (N, K, M).
        targets: (N, M) class indices or IGNORE_INDEX.
        annotated: (N, K - 1) bool.
    """
    is_unknown = functional.pad(~annotated, (1, 0))
    in_background = is_unknown.clone()
    in_background[:, 0] = True
    background = log_probabilities.masked_fill(~in_background[:, :, None], -torch.inf).logsumexp(1, keepdim=True)
    log_probabilities = torch.cat([background, log_probabilities[:, 1:]], 1)
    return log_probabilities, targets.masked_fill(is_unknown.gather(1, targets.clamp_min(0)), 0)


def _dice_loss(
    sums: tuple[Tensor, Tensor, Tensor], *, batch_dice: bool, annotated: Tensor | None, share: Share
) -> Tensor:
    """1 - mean soft Dice over samples and classes, or over classes pooled over the batch.

    Args:
        sums: (N, K) each: of intersection, of what is predicted, of what is present.
        batch_dice: As in `dice_cross_entropy`.
        annotated: The same.
        share: The same.
    """
    if not batch_dice:
        mean = share.mean(_dice(*sums), annotated)
        return share.once(torch.ones_like(mean)) - mean
    pooled = [part.sum(0) if annotated is None else (part * annotated).sum(0) for part in sums]
    dice = _dice(*(share.total(part) for part in pooled))
    if annotated is None:
        return share.once(1 - dice.mean())
    counted = share.total(annotated.sum(0)) > 0
    return share.once(1 - (dice * counted).sum() / counted.sum().clamp_min(1))


def _dice(intersection: Tensor, predicted: Tensor, present: Tensor) -> Tensor:
    return (2 * intersection + SMOOTH) / (predicted + present + SMOOTH)


def level_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    batch_dice: bool,
    regions: Tensor | None,
    annotated: Tensor | None,
    hard_fraction: float = 1.0,
    share: Share = WHOLE,
) -> Tensor:
    """The loss of one output: of regions where there are any, else of classes."""
    if regions is None:
        return dice_cross_entropy(
            logits, labels, batch_dice=batch_dice, annotated=annotated, hard_fraction=hard_fraction, share=share
        )
    return dice_binary_cross_entropy(
        logits, labels, regions, batch_dice=batch_dice, annotated=annotated, hard_fraction=hard_fraction, share=share
    )


def supervised_loss(
    outputs: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    batch_dice: bool,
    regions: Tensor | None = None,
    annotated: Tensor | None = None,
    hard_fraction: float = 1.0,
    weights: Sequence[float] = (),
    share: Share = WHOLE,
) -> Tensor:
    """The weighted sum over the outputs of deep supervision.

    Args:
        outputs: Logits, finest first, or those of the finest only.
        labels: (N, *spatial) value indices on the finest grid.
        batch_dice: As in `dice_cross_entropy`.
        regions: (K, values) bool, which value indices each region holds; None of ordinary classes.
        annotated: (N, foreground classes) bool, as in `dice_cross_entropy`.
        hard_fraction: See `mean_of_hardest`.
        weights: Of the outputs, finest first; empty: those of `supervision_weights`. Outputs beyond them count nothing.
        share: Of the batch's loss, where these samples are a part of it.
    """
    levels = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    total = torch.zeros((), device=labels.device)
    for weight, logits in zip(weights or supervision_weights(len(levels)), levels, strict=False):
        if weight > 0:
            targets = downsample(labels, logits.shape[2:])
            loss = level_loss(
                logits,
                targets,
                batch_dice=batch_dice,
                regions=regions,
                annotated=annotated,
                hard_fraction=hard_fraction,
                share=share,
            )
            total = total + weight * loss
    return total
