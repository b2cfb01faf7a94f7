"""Convolutions whose gradients oneDNN gets wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoseg.network.blocks import padded_convolution
from autoseg.network.channels_last import to_channels_last


def dirty_memory() -> None:
    """Leave numbers that are none in memory that is free again."""
    blocks = [torch.full((size,), float("nan")) for size in (100, 10_000, 100_000, 1_000_000) for _ in range(3)]
    del blocks


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 4, 4), (2, 16, 16), (4, 2, 2), (1, 4, 4)])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 3, 3)])
@pytest.mark.parametrize("is_last", [False, True])
def test_gradients_in_bf16_are_those_of_float32(
    size: tuple[int, int, int], kernel: tuple[int, int, int], is_last: bool
) -> None:
    torch.manual_seed(0)
    layer = padded_convolution(3, 16, 24, kernel)
    images = torch.randn(2, 16, *size)
    direction = torch.randn(2, 24, *size)

    def gradients(precision: str) -> tuple[Tensor, Tensor, Tensor]:
        layer.zero_grad()
        x = (to_channels_last(images) if is_last else images.clone()).requires_grad_()
        dirty_memory()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = layer(x)
        dirty_memory()
        y.backward(direction.to(y.dtype))
        assert layer.weight.grad is not None
        assert x.grad is not None
        return y.detach().float(), layer.weight.grad.clone(), x.grad.clone()

    for found, expected in zip(gradients("bf16"), gradients("fp32"), strict=True):
        assert (found - expected).abs().max() < 0.03 * expected.abs().max()
