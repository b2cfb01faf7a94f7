"""Losses of regions and of classes partly annotated: values by hand, and gradients that must not be there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.training.losses import (
    SMOOTH,
    dice_binary_cross_entropy,
    dice_cross_entropy,
    downsample,
    supervised_loss,
)
from autoseg.training.validation import count_agreement, count_region_agreement

BOTH = pytest.mark.parametrize("batch_dice", [False, True])
# Values 1, 2, 3 in regions {1, 3} and {2, 3}, and one that is all of them.
TABLE = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)


def drawn(seed: int, num_outputs: int, num_values: int, ignores: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((3, num_outputs, 4, 5, 6), generator=generator)
    labels = torch.randint(-1 if ignores else 0, num_values, (3, 4, 5, 6), generator=generator)
    return logits.requires_grad_(), labels


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, logits)
    return found


@BOTH
@pytest.mark.parametrize("ignores", [False, True])
def test_regions_equal_the_formula_voxel_by_voxel(batch_dice: bool, ignores: bool) -> None:
    logits, labels = drawn(0, 3, 4, ignores)
    entropies, scores = [], {}
    for sample, region in ((n, k) for n in range(3) for k in range(3)):
        kept = labels[sample] != IGNORE_INDEX
        target = torch.tensor([[[bool(TABLE[region, v]) for v in row] for row in plane] for plane in labels[sample]])
        target = target[kept].float()
        probability = logits[sample, region][kept].sigmoid()
        entropies.append(functional.binary_cross_entropy(probability, target, reduction="none"))
        scores[sample, region] = torch.stack([(probability * target).sum(), probability.sum(), target.sum()])
    sums = list(scores.values())
    if batch_dice:
        sums = [scores[0, region] + scores[1, region] + scores[2, region] for region in range(3)]
    dice = torch.stack([(2 * both + SMOOTH) / (p + t + SMOOTH) for both, p, t in sums]).mean()
    expected = torch.cat(entropies).mean() + 1 - dice
    loss = dice_binary_cross_entropy(logits, labels, TABLE, batch_dice=batch_dice)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_one_region_equals_one_class_against_background() -> None:
    """Softmax over (0, z) is the sigmoid of z."""
    logits, labels = drawn(1, 1, 2)
    both = torch.cat([torch.zeros_like(logits), logits], 1)
    table = torch.tensor([[False, True]])
    for batch_dice in (False, True):
        of_region = dice_binary_cross_entropy(logits, labels, table, batch_dice=batch_dice)
        torch.testing.assert_close(of_region, dice_cross_entropy(both, labels, batch_dice=batch_dice))


def test_perfect_regions_have_no_loss() -> None:
    _, labels = drawn(2, 3, 4)
    perfect = torch.where(TABLE[:, labels].movedim(0, 1), 40.0, -40.0)
    assert float(dice_binary_cross_entropy(perfect, labels, TABLE, batch_dice=False)) == pytest.approx(0, abs=1e-5)
    assert float(dice_binary_cross_entropy(-perfect, labels, TABLE, batch_dice=False)) > 30


@BOTH
def test_ignored_voxels_have_no_gradient_in_any_loss(batch_dice: bool) -> None:
    logits, labels = drawn(3, 3, 3, ignores=True)
    known = torch.tensor([[True, False], [True, True], [False, True]])
    all_known = torch.tensor([[True, False, True]] * 3)
    ignored = (labels == IGNORE_INDEX)[:, None].expand_as(logits)
    for loss in (
        dice_cross_entropy(logits, labels, batch_dice=batch_dice),
        dice_cross_entropy(logits, labels, batch_dice=batch_dice, annotated=known),
        dice_binary_cross_entropy(logits, labels, TABLE, batch_dice=batch_dice),
        dice_binary_cross_entropy(logits, labels, TABLE, batch_dice=batch_dice, annotated=all_known),
    ):
        found = gradient(loss, logits)
        assert float(found[ignored].abs().max()) == 0
        assert float(found[~ignored].abs().max()) > 0


def test_nothing_but_ignored_is_a_number() -> None:
    labels = torch.full((1, 4, 4), IGNORE_INDEX)
    assert float(dice_binary_cross_entropy(torch.randn(1, 3, 4, 4), labels, TABLE, batch_dice=False)) == 0


@BOTH
def test_with_all_classes_annotated_nothing_changes_bit_for_bit(batch_dice: bool) -> None:
    logits, labels = drawn(4, 3, 3, ignores=True)
    plain = dice_cross_entropy(logits, labels, batch_dice=batch_dice)
    known = dice_cross_entropy(logits, labels, batch_dice=batch_dice, annotated=torch.ones(3, 2, dtype=torch.bool))
    assert torch.equal(plain, known)
    torch.testing.assert_close(gradient(plain, logits), gradient(known, logits), rtol=1e-6, atol=1e-9)
    plain = dice_binary_cross_entropy(logits, labels, TABLE, batch_dice=batch_dice)
    every = torch.ones(3, 3, dtype=torch.bool)
    known = dice_binary_cross_entropy(logits, labels, TABLE, batch_dice=batch_dice, annotated=every)
    assert torch.equal(plain, known)
    assert torch.equal(gradient(plain, logits), gradient(known, logits))


def test_marginal_loss_by_hand() -> None:
    """One voxel of background; probabilities 0.5, 0.2 and 0.3, the last class not annotated."""
    logits = torch.tensor([0.5, 0.2, 0.3]).log().reshape(1, 3, 1, 1)
    labels = torch.zeros((1, 1, 1), dtype=torch.long)
    known = torch.tensor([[True, False]])
    loss = dice_cross_entropy(logits, labels, batch_dice=False, annotated=known)
    dice = SMOOTH / (0.2 + SMOOTH)
    assert float(loss) == pytest.approx(-float(torch.tensor(0.8).log()) + 1 - dice, rel=1e-5)


@BOTH
def test_background_does_not_push_down_what_was_not_annotated(batch_dice: bool) -> None:
    """Where a class was not annotated its logit and the background's rise together; annotated, it is pushed down."""
    logits, _ = drawn(5, 4, 4)
    labels = torch.zeros((3, 4, 5, 6), dtype=torch.long)
    known = torch.tensor([[True, False, True]] * 3)
    downhill = -gradient(dice_cross_entropy(logits, labels, batch_dice=batch_dice, annotated=known), logits)
    assert float(downhill[:, 2].min()) > 0, "the class that nobody annotated"
    assert float(downhill[:, 0].min()) > 0
    assert float(downhill[:, [1, 3]].max()) < 0
    plain = -gradient(dice_cross_entropy(logits, labels, batch_dice=batch_dice), logits)
    assert float(plain[:, 2].max()) < 0


@BOTH
def test_moving_probability_between_background_and_unknown_changes_nothing(batch_dice: bool) -> None:
    logits, labels = drawn(6, 4, 3)
    labels[labels == 2] = 0
    known = torch.tensor([[True, False, False]] * 3)
    moved = logits.softmax(1).detach().clone()
    moved[:, 0], moved[:, 2], moved[:, 3] = (
        moved[:, 0] / 2,
        moved[:, 0] / 4 + moved[:, 3],
        moved[:, 2] + moved[:, 0] / 4,
    )
    once = dice_cross_entropy(logits, labels, batch_dice=batch_dice, annotated=known)
    again = dice_cross_entropy(moved.log(), labels, batch_dice=batch_dice, annotated=known)
    torch.testing.assert_close(once, again, rtol=1e-5, atol=1e-5)


def test_strays_of_a_class_that_was_not_annotated_are_background() -> None:
    logits, labels = drawn(7, 3, 3)
    known = torch.tensor([[True, False]] * 3)
    as_background = torch.where(labels == 2, 0, labels)
    one, other = (
        dice_cross_entropy(logits, item, batch_dice=False, annotated=known) for item in (labels, as_background)
    )
    assert torch.equal(one, other)


@BOTH
def test_regions_that_were_not_annotated_have_no_gradient(batch_dice: bool) -> None:
    logits, labels = drawn(8, 3, 4)
    known = torch.tensor([[True, False, True], [True, True, True], [False, True, True]])
    found = gradient(dice_binary_cross_entropy(logits, labels, TABLE, batch_dice=batch_dice, annotated=known), logits)
    assert float(found[~known].abs().max()) == 0
    assert float(found[known].abs().flatten(1).max(1).values.min()) > 0


def test_dice_counts_annotated_samples_only() -> None:
    """A class annotated in one sample only has that sample's Dice, pooled or not; one annotated nowhere has none."""
    logits, labels = drawn(9, 4, 3)
    known = torch.tensor([[True, False, False], [False, True, False], [False, False, False]])
    pooled = dice_cross_entropy(logits, labels, batch_dice=True, annotated=known)
    averaged = dice_cross_entropy(logits, labels, batch_dice=False, annotated=known)
    torch.testing.assert_close(pooled, averaged)
    first, second = (
        dice_cross_entropy(logits[n : n + 1], labels[n : n + 1], batch_dice=False, annotated=known[n : n + 1])
        for n in (0, 1)
    )
    # The third sample has neither cross-entropy nor Dice: everything in it may be anything.
    entropies = [_entropy(logits[n], labels[n], n + 1) for n in (0, 1)]
    dice = (first - entropies[0] + second - entropies[1]) / 2
    torch.testing.assert_close(averaged, sum(entropies) / 3 + dice)


def _entropy(logits: Tensor, labels: Tensor, known: int) -> Tensor:
    """Mean cross-entropy of a sample in which one class was annotated."""
    probability = logits.softmax(0)[known]
    return -torch.where(labels == known, probability, 1 - probability).log().mean()


def test_supervision_hands_regions_and_annotation_to_every_level() -> None:
    generator = torch.Generator().manual_seed(10)
    outputs = [torch.randn((2, 3, 8 // 2**i, 8 // 2**i), generator=generator) for i in range(3)]
    labels = torch.randint(-1, 4, (2, 8, 8), generator=generator)
    known = torch.tensor([[True, False, True], [True, True, False]])
    expected = sum(
        weight
        * dice_binary_cross_entropy(
            logits, downsample(labels, logits.shape[2:]), TABLE, batch_dice=True, annotated=known
        )
        for weight, logits in zip((2 / 3, 1 / 3), outputs, strict=False)
    )
    found = supervised_loss(outputs, labels, batch_dice=True, regions=TABLE, annotated=known)
    torch.testing.assert_close(found, torch.as_tensor(expected))


def test_pseudo_dice_counts_what_was_annotated_and_not_ignored() -> None:
    labels = torch.tensor([[[1, 1, 2, 0, IGNORE_INDEX]], [[1, 2, 2, 0, 0]]])
    predicted = torch.tensor([[[1, 2, 2, 0, 2]], [[2, 2, 1, 1, 0]]])
    assert count_agreement(predicted, labels, 3).tolist() == [[1, 3, 3], [2, 4, 3]]
    known = torch.tensor([[True, False], [True, True]])
    assert count_agreement(predicted, labels, 3, known).tolist() == [[1, 3, 3], [1, 2, 2]]


def test_pseudo_dice_of_regions() -> None:
    labels = torch.tensor([[[1, 2, 3, 0, IGNORE_INDEX]], [[3, 3, 0, 0, 1]]])
    logits = torch.where(TABLE[:2, labels.clamp_min(0)].movedim(0, 1), 1.0, -1.0)
    logits[0, :, 0, 4] = 1.0
    logits[1, 0, 0, 2] = 1.0
    assert count_region_agreement(logits, labels, TABLE[:2]).tolist() == [[5, 6, 5], [4, 4, 4]]
    known = torch.tensor([[True, True], [False, True]])
    assert count_region_agreement(logits, labels, TABLE[:2], known).tolist() == [[2, 2, 2], [4, 4, 4]]
