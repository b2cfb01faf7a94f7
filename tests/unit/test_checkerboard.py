"""How much of a network's output is a checkerboard, fresh and trained, for every kind of step up.

The energy of a checkerboard is the share of the output's variance at the frequencies of the stride: what tells voxels
apart by their place in a block of 2 x 2 alone. Inputs and targets are smooth and have next to none.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from autoseg.domain.network_plan import NetworkPlan
from autoseg.network.unet import UNet, build

KINDS = {
    "transposed": {},
    "linear": {"upsampling": "linear"},
    "nearest": {"upsampling": "nearest", "upsampling_kernel": 3},
    "pixel shuffle": {"upsampling": "pixel_shuffle", "upsampling_kernel": 3},
}


def network(kind: str, dims: int, seed: int = 0) -> UNet:
    plan = NetworkPlan.model_validate(
        {
            "in_channels": 1,
            "num_classes": 1,
            "output": "channels",
            "patch_size": (32,) * dims,
            "features_per_stage": (8, 16),
            "strides": ((1,) * dims, (2,) * dims),
            "kernel_sizes": ((3,) * dims,) * 2,
            "blocks_per_stage_encoder": (1, 1),
            "blocks_per_stage_decoder": (1,),
            "deep_supervision": False,
            **KINDS[kind],
        }
    )
    return build(plan, seed)


def smooth(dims: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(4, 1, *(4,) * dims, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=8.0, mode="bilinear" if dims == 2 else "trilinear")


def checkerboard(image: Tensor) -> float:
    """Energy at the frequencies of stride 2, over all but the mean."""
    axes = tuple(range(2, image.ndim))
    energy = torch.fft.fftn(image.detach() - image.detach().mean(axes, keepdim=True), dim=axes).abs().square()
    half = image.shape[-1] // 2
    places = [place for place in product((0, half), repeat=len(axes)) if any(place)]
    return float(sum(energy[(..., *place)].sum() for place in places) / energy.sum())


def test_the_measure_sees_a_checkerboard_and_nothing_else() -> None:
    board = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).float()[None, None]
    assert checkerboard(board) == pytest.approx(1)
    assert checkerboard(smooth(2, torch.Generator().manual_seed(0))) < 1e-3


@pytest.mark.parametrize("dims", [2, 3])
def test_only_a_transposed_convolution_starts_with_a_checkerboard(dims: int) -> None:
    """Its weights differ from voxel to voxel of a block; a pixel shuffle's do too, but ICNR starts them alike."""
    image = smooth(dims, torch.Generator().manual_seed(1))
    fresh = {kind: checkerboard(network(kind, dims)(image)) for kind in KINDS}
    assert fresh.pop("transposed") > 0.03
    assert max(fresh.values()) < 0.008, fresh


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_no_checkerboard(kind: str) -> None:
    unet = network(kind, 2)
    generator = torch.Generator().manual_seed(2)
    optimiser = torch.optim.Adam(unet.parameters(), lr=5e-3)
    image = smooth(2, generator)
    first = nn.functional.mse_loss(unet(image), image.square())
    for _ in range(40):
        seen = smooth(2, generator)
        optimiser.zero_grad()
        nn.functional.mse_loss(unet(seen), seen.square()).backward()
        optimiser.step()
    out = unet(image)
    assert nn.functional.mse_loss(out, image.square()) < 0.7 * first
    # A transposed convolution has to unlearn the one it starts with; the others end at that of the target itself.
    allowed = 10 if kind == "transposed" else 2
    assert checkerboard(out) < allowed * checkerboard(image.square()) < 0.01
