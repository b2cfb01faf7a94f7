"""The quick norm is instance norm + leaky ReLU, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autoseg.network.channels_last import is_meant_for, norm_leaky_relu, to_channels_last

SLOPE = 0.01


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.leaky_relu(functional.instance_norm(x, None, None, weight, bias, eps=1e-5), SLOPE)


@pytest.mark.parametrize("shape", [(2, 8, 6, 5, 4), (3, 16, 9, 7), (1, 4, 2, 2, 1)])
def test_equals_autograd_in_float64(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = to_channels_last(torch.randn(shape, generator=generator) * 2 + 1).to(torch.bfloat16)
    weight = torch.rand(shape[1], generator=generator) + 0.5
    bias = torch.randn(shape[1], generator=generator)
    gradient = torch.randn(shape, generator=generator).to(torch.bfloat16)

    quick = [x.requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    assert is_meant_for(quick[0])
    y = norm_leaky_relu(*quick, 1e-5, SLOPE)
    y.backward(gradient)
    exact = [tensor.detach().double().contiguous().requires_grad_() for tensor in quick]
    expected = reference(*exact)
    expected.backward(gradient.double())

    assert (y.double() - expected).abs().max() < 0.03 * expected.abs().max()
    for ours, theirs in zip(quick, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        # bf16 has 8 bits: 2^-9 for each of a few roundings.
        assert error < 0.015


def test_one_channel_keeps_the_layout_through_a_convolution() -> None:
    images = to_channels_last(torch.randn(2, 1, 6, 6, 6))
    convolution = torch.nn.Conv3d(1, 4, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        features = convolution(images)
    assert features.is_contiguous(memory_format=torch.channels_last_3d)
    assert is_meant_for(features)


def test_is_left_alone_elsewhere() -> None:
    x = to_channels_last(torch.randn(2, 4, 6, 6)).to(torch.bfloat16)
    assert not is_meant_for(x)  # nothing learns
    assert not is_meant_for(x.float().requires_grad_())
    assert not is_meant_for(x.contiguous().clone(memory_format=torch.contiguous_format).requires_grad_())
