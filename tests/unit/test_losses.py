"""Dice + cross-entropy by hand, and what leaves them alone."""

from __future__ import annotations

import pytest
import torch

from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.training.losses import (
    dice_cross_entropy,
    downsample,
    mean_of_hardest,
    supervised_loss,
    supervision_weights,
)


def test_weights_halve_and_the_last_is_left_out() -> None:
    assert supervision_weights(4) == pytest.approx((4 / 7, 2 / 7, 1 / 7, 0))
    assert supervision_weights(2) == (1.0, 0.0)
    assert supervision_weights(1) == (1.0,)


def test_perfect_is_zero_and_wrong_is_large() -> None:
    labels = torch.randint(0, 3, (2, 6, 6), generator=torch.Generator().manual_seed(0))
    perfect = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1) * 200.0 - 100
    assert float(dice_cross_entropy(perfect, labels, batch_dice=False)) == pytest.approx(0, abs=1e-4)
    assert float(dice_cross_entropy(-perfect, labels, batch_dice=False)) > 50


def test_by_hand() -> None:
    """Two voxels, two classes, probabilities 0.8 and 0.4 of the foreground; the first is foreground."""
    logits = torch.tensor([[[0.2, 0.6], [0.8, 0.4]]]).log()[..., None]
    labels = torch.tensor([[[1], [0]]])
    cross_entropy = -(torch.tensor(0.8).log() + torch.tensor(0.6).log()) / 2
    dice = (2 * 0.8 + 1e-5) / (1.2 + 1 + 1e-5)
    loss = float(dice_cross_entropy(logits, labels, batch_dice=False))
    assert loss == pytest.approx(float(cross_entropy) + 1 - dice, rel=1e-5)


def test_batch_dice_pools() -> None:
    """A sample without the class counts as perfect alone, and not at all in a pool."""
    labels = torch.zeros((2, 4, 4), dtype=torch.int64)
    labels[0, :2] = 1
    logits = torch.stack([torch.zeros(2, 4, 4), torch.full((2, 4, 4), -60.0).index_fill(0, torch.tensor(0), 60.0)])
    logits[0] = 0
    cross_entropy = 0.5 * float(torch.tensor(2.0).log())
    alone = float(dice_cross_entropy(logits, labels, batch_dice=False)) - cross_entropy
    pooled = float(dice_cross_entropy(logits, labels, batch_dice=True)) - cross_entropy
    half = 2 * 4 / (8 + 8)
    assert alone == pytest.approx(1 - (half + 1) / 2, abs=1e-4)
    assert pooled == pytest.approx(1 - half, abs=1e-4)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_ignored_voxels_change_nothing(batch_dice: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((2, 3, 5, 5, 5), generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (2, 5, 5, 5), generator=generator)
    labels[:, 2:] = IGNORE_INDEX
    loss = dice_cross_entropy(logits, labels, batch_dice=batch_dice)
    loss.backward()
    cut = dice_cross_entropy(logits[:, :, :2], labels[:, :2], batch_dice=batch_dice)
    assert float(loss.detach()) == pytest.approx(float(cut.detach()), rel=1e-6)
    assert logits.grad is not None
    assert float(logits.grad[:, :, 2:].abs().max()) == 0


def test_nothing_but_ignored_is_no_loss() -> None:
    labels = torch.full((1, 4, 4), IGNORE_INDEX)
    assert float(dice_cross_entropy(torch.randn(1, 3, 4, 4), labels, batch_dice=False)) == pytest.approx(0)


def test_coarse_labels_are_those_at_the_voxel_centres() -> None:
    labels = torch.arange(12).reshape(1, 12)
    assert downsample(labels, (12,)) is labels
    assert downsample(labels, (6,)).tolist() == [[1, 3, 5, 7, 9, 11]]
    assert downsample(labels, (4,)).tolist() == [[1, 4, 7, 10]]
    exact = torch.nn.functional.interpolate(labels[None].float(), size=5, mode="nearest-exact")[0]
    assert downsample(labels, (5,)).tolist() == exact.int().tolist()


def test_supervision_sums_the_levels() -> None:
    generator = torch.Generator().manual_seed(2)
    outputs = [torch.randn((1, 2, 8 // 2**i, 8 // 2**i), generator=generator) for i in range(3)]
    labels = torch.randint(0, 2, (1, 8, 8), generator=generator)
    expected = sum(
        weight * dice_cross_entropy(logits, downsample(labels, logits.shape[2:]), batch_dice=False)
        for weight, logits in zip((2 / 3, 1 / 3), outputs, strict=False)
    )
    assert float(supervised_loss(outputs, labels, batch_dice=False)) == pytest.approx(float(expected), rel=1e-6)


def test_the_hardest_voxels_of_each_sample_are_averaged() -> None:
    entropies = torch.zeros(2, 1600)
    # One in sixteen is looked at; blocks of sixteen voxels are alike, so that these show the others.
    entropies[0] = torch.arange(100.0).repeat_interleave(16)
    entropies[1] = 10 * torch.arange(100.0).repeat_interleave(16)
    counted = torch.ones(2, 1600, dtype=torch.bool)
    found = mean_of_hardest(entropies, counted, 0.1)
    # Blocks 89 ... 99: those at the threshold take part.
    assert found == pytest.approx((94.0 + 940.0) / 2)
    alone = mean_of_hardest(entropies[:1], counted[:1], 0.1)
    assert alone == pytest.approx(94.0)
    assert mean_of_hardest(entropies, counted, 1.0) == pytest.approx(entropies.mean())


def test_the_hardest_are_found_among_what_counts() -> None:
    entropies = torch.arange(100.0).repeat_interleave(16)[None].clone()
    counted = torch.ones(1, 1600, dtype=torch.bool)
    counted[:, 1584:] = False
    entropies[:, 1584:] = 0
    assert mean_of_hardest(entropies, counted, 0.1) == pytest.approx(93.0, abs=1.0)
    assert mean_of_hardest(entropies * 0, counted & False, 0.1) == 0


def test_supervision_weights_of_the_plan_count() -> None:
    labels = (torch.rand(1, 8, 8) > 0.5).to(torch.int16)
    outputs = [torch.randn(1, 2, 8, 8), torch.randn(1, 2, 4, 4)]
    finest = supervised_loss(outputs[0], labels, batch_dice=False)
    assert torch.equal(supervised_loss(outputs, labels, batch_dice=False, weights=(1.0, 0.0)), finest)
    mixed = supervised_loss(outputs, labels, batch_dice=False, weights=(0.25, 0.75))
    coarse = dice_cross_entropy(outputs[1], downsample(labels, (4, 4)), batch_dice=False)
    assert mixed == pytest.approx(float(0.25 * finest + 0.75 * coarse), rel=1e-5)
