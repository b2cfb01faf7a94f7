"""A quick look during training: pseudo-Dice over a few fixed patches of the validation cases."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoseg import runtime
from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.training.batches import BatchReader, assemble
from autoseg.training.losses import level_loss, region_targets

TIME_FRACTION = 0.04
"""Part of a training's time that looking at validation cases may take."""

WHOLE_FRACTION = 0.01
"""Part of a training's time for looks at whole cases (`whole`); the quick ones have the rest. Source: decision 27."""

QUICK_FRACTION = TIME_FRACTION - WHOLE_FRACTION
"""Part of a time budget that quick looks may take."""

MIN_PATCHES = 4
"""Fewer patches say nothing."""

FORWARD_FRACTION = 1 / 3
"""Seconds of a forward pass as part of a training step's: the backward pass computes twice as much."""

EMA_WEIGHT = 0.1
"""Weight of the newest pseudo-Dice in its running mean. Source: nnU-Net v2."""


@dataclass(frozen=True, slots=True)
class QuickLook:
    """What the fixed patches gave.

    Attributes:
        loss: Mean loss of the finest output.
        pseudo_dice: A foreground class or region each; None where it is neither there nor predicted, and where no
            patch is of a case that was annotated for it.
        seconds: What it took.
    """

    loss: float
    pseudo_dice: tuple[float | None, ...]
    seconds: float

    @property
    def mean(self) -> float | None:
        """Mean of the classes that are defined."""
        defined = [value for value in self.pseudo_dice if value is not None]
        return sum(defined) / len(defined) if defined else None


def affordable_patches(epoch_s: float, step_s: float, batch_size: int, most: int) -> int:
    """How many patches fit into their part of an epoch.

    Args:
        epoch_s: Seconds of an epoch.
        step_s: Seconds of a training step.
        batch_size: Patches a step.
        most: Never more than these.
    """
    patch_s = FORWARD_FRACTION * step_s / batch_size
    return min(most, max(MIN_PATCHES, int(QUICK_FRACTION * epoch_s / max(patch_s, 1e-9))))


def quick_look(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    reader: BatchReader,
    num_patches: int,
    *,
    device: torch.device,
    precision: str,
    batch_dice: bool,
    regions: Tensor | None = None,
    check: Callable[[], None] | None = None,
) -> QuickLook:
    """Predict the first patches of the validation stream, which are the same every time.

    Args:
        network: Left as it was, its mode included.
        weights: Parameters to look at (running mean or the network's own).
        reader: Draws validation patches, without augmentation.
        num_patches: How many.
        device: Where the network is.
        precision: Of the forward pass.
        batch_dice: As in training, for the loss.
        regions: (K, values) bool on the device, which value indices each region holds; None of ordinary classes.
        check: Called before each batch; may raise to leave the look.
    """
    began = time.monotonic()
    size = reader.sampler.batch_size
    was_training = network.training
    network.eval()
    counts: Tensor | None = None
    loss_sum = 0.0
    try:
        with torch.inference_mode(), runtime.autocast(device, precision):
            for step in range(-(-num_patches // size)):
                if check is not None:
                    check()
                samples = reader.read(step)[: num_patches - step * size]
                batch = assemble(samples, device)
                logits: Tensor = torch.func.functional_call(network, dict(weights), (batch.images,))
                known = batch.annotated
                loss = level_loss(logits, batch.labels, batch_dice=batch_dice, regions=regions, annotated=known)
                loss_sum += float(loss) * len(samples)
                if regions is None:
                    found = count_agreement(logits.argmax(1), batch.labels, logits.shape[1], known)
                else:
                    found = count_region_agreement(logits, batch.labels, regions, known)
                counts = found if counts is None else counts + found
    finally:
        network.train(was_training)
    assert counts is not None
    return QuickLook(loss_sum / num_patches, pseudo_dice(counts.tolist()), time.monotonic() - began)


def count_agreement(predicted: Tensor, labels: Tensor, num_classes: int, annotated: Tensor | None = None) -> Tensor:
    """Voxels of each foreground class: (K - 1, 3) in both, in the prediction, in the labels; ignored ones left out.

    Args:
        predicted: (N, *spatial) class indices.
        labels: The same, or IGNORE_INDEX.
        num_classes: K, background included.
        annotated: (N, K - 1) bool: a class counts only in samples in which it was annotated; None: in all.
    """
    valid = labels != IGNORE_INDEX
    rows = []
    for index in range(1, num_classes):
        known = valid if annotated is None else valid & _spread(annotated[:, index - 1], labels)
        rows.append(_counts((predicted == index) & known, (labels == index) & known))
    return torch.stack(rows)


def count_region_agreement(logits: Tensor, labels: Tensor, regions: Tensor, annotated: Tensor | None = None) -> Tensor:
    """The same of regions, which are predicted where their logit is above 0.

    Args:
        logits: (N, K, *spatial).
        labels: (N, *spatial) value indices or IGNORE_INDEX.
        regions: (K, values) bool.
        annotated: (N, K) bool.
    """
    valid, is_inside = region_targets(labels, regions)
    rows = []
    for index in range(len(regions)):
        known = valid[:, 0] if annotated is None else valid[:, 0] & _spread(annotated[:, index], labels)
        rows.append(_counts((logits[:, index] > 0) & known, is_inside[:, index] & known))
    return torch.stack(rows)


def _spread(row: Tensor, labels: Tensor) -> Tensor:
    """(N,) to the dimensions of (N, *spatial)."""
    return row.reshape(-1, *(1 for _ in labels.shape[1:]))


def _counts(is_predicted: Tensor, is_labelled: Tensor) -> Tensor:
    return torch.stack([(is_predicted & is_labelled).sum(), is_predicted.sum(), is_labelled.sum()])


def pseudo_dice(counts: Sequence[Sequence[int]]) -> tuple[float | None, ...]:
    """Dice from rows of (in both, predicted, labelled); None where nothing is predicted or labelled."""
    return tuple(
        2 * both / (predicted + labelled) if predicted + labelled else None for both, predicted, labelled in counts
    )


def running_mean(previous: float | None, newest: float | None) -> float | None:
    """The pseudo-Dice's running mean; an undefined value leaves it as it was."""
    if previous is None or newest is None:
        return newest if previous is None else previous
    return (1 - EMA_WEIGHT) * previous + EMA_WEIGHT * newest
