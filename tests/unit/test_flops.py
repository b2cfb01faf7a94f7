"""Activations and operations in closed form: by hand, by nnU-Net's calibration notes, and by torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoseg.domain.network_plan import NetworkPlan
from autoseg.network.unet import UNet
from autoseg.planning.activations import count_activations, stage_sizes
from autoseg.planning.flops import NetworkShape, count_forward_flops, count_training_flops


def deep_heads(patch: tuple[int, ...], strides: tuple[tuple[int, ...], ...], num_classes: int) -> int:
    """Outputs of the coarser heads, which nnU-Net's notes count and its planner does not."""
    sizes = stage_sizes(patch, strides)[1:-1]
    return sum(num_classes * int(torch.tensor(size).prod()) for size in sizes)


@pytest.mark.parametrize(
    ("patch", "features", "expected"),
    [
        ((128,) * 3, (32, 64, 128, 256, 320, 320), 558_319_104),
        ((512,) * 2, (32, 64, 128, 256, *[512] * 3), 129_793_792),
    ],
)
def test_residual_activations_are_those_that_nnunet_notes(
    patch: tuple[int, ...], features: tuple[int, ...], expected: int
) -> None:
    stages, dims = len(features), len(patch)
    strides = ((1,) * dims, *[(2,) * dims] * (stages - 1))
    blocks = (1, 3, 4, 6, 6, 6, 6)[:stages]
    count = count_activations(patch, strides, features, blocks, (1,) * (stages - 1), 3, "residual")
    assert count + deep_heads(patch, strides, 3) == expected


def test_operations_by_hand() -> None:
    # 8 voxels: 1 -> 2 and 2 -> 2 channels, kernel 3. 4 voxels: 2 -> 4, 4 -> 4. Up: 4 -> 2 at 8 voxels, then 4 -> 2 and
    # 2 -> 2. Head: 2 -> 3.
    shape = NetworkShape(1, 3, (8, 1), (2, 4), ((1, 1), (2, 1)), ((3, 1), (3, 1)), "conv", (2, 2), (2,))
    products = 8 * 3 * (2 + 4) + 4 * 3 * (8 + 16) + 8 * 8 + 8 * 3 * (8 + 4) + 8 * 6
    assert count_forward_flops(shape) == 2 * products
    assert count_training_flops(shape) == 2 * (3 * products - 8 * 3 * 2)


@pytest.mark.parametrize("block", ["conv", "residual"])
@pytest.mark.parametrize("dims", [2, 3])
def test_operations_are_those_that_torch_counts(block: str, dims: int) -> None:
    strides = ((1,) * dims, (2,) * dims, (1,) * (dims - 1) + (2,))
    plan = NetworkPlan(
        in_channels=2,
        num_classes=3,
        patch_size=(4,) * (dims - 1) + (8,),
        features_per_stage=(3, 5, 5),
        strides=strides,
        kernel_sizes=((1,) * (dims - 1) + (3,), (3,) * dims, (3,) * dims),
        encoder_block=block,
        blocks_per_stage_encoder=(1, 3, 2),
        blocks_per_stage_decoder=(1, 2),
    )
    shape = NetworkShape.of(plan)
    counter = FlopCounterMode(display=False)
    network = UNet(plan)
    with counter:
        outputs = network(torch.zeros(1, 2, *plan.patch_size))
    assert counter.get_total_flops() == count_forward_flops(shape)
    with counter:
        outputs = network(torch.zeros(1, 2, *plan.patch_size))
        sum(item.sum() for item in outputs).backward()
    assert counter.get_total_flops() == count_training_flops(shape)
