"""Any size goes through every member of the U-Net family and comes back the same."""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from network_family import FAMILY, awake, conditions, image, member

from autoseg.network.unet import UNet, build

MOST_AN_AXIS = 97
MOST_VOXELS = 1500


@cache
def network(name: str, dims: int) -> UNet:
    return awake(build(member(name, dims), seed=1)).eval()


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Three axes of 1 to 97 voxels in any order; one may be the longest, then the others are short."""
    drawn: list[int] = []
    for _ in range(3):
        drawn.append(draw(st.integers(1, min(MOST_AN_AXIS, MOST_VOXELS // prod(drawn)))))
    order = draw(st.permutations(range(3)))
    return drawn[order[0]], drawn[order[1]], drawn[order[2]]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=2, deadline=None)
@example(size=(1, 1, 1))
@example(size=(3, 97, 2))
@given(size=sizes())
def test_any_size_comes_back(name: str, dims: int, size: tuple[int, int, int]) -> None:
    unet, given_size = network(name, dims), size[:dims]
    with torch.inference_mode():
        out = unet(image(unet.plan, *given_size), **conditions(unet.plan))
    assert out.shape == (1, unet.plan.num_classes, *given_size)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", FAMILY)
def test_the_padding_of_an_odd_size_is_its_edge_and_is_cut_off(name: str) -> None:
    unet = network(name, 2)
    odd = image(unet.plan, 5, 7)
    padded = torch.nn.functional.pad(odd, (0, 1, 0, 1), mode="replicate")
    told = conditions(unet.plan)
    with torch.inference_mode():
        assert torch.equal(unet(odd, **told), unet(padded, **told)[:, :, :5, :7])
