"""Instance norm + leaky ReLU for training in bf16 on the CPU with channels last.

oneDNN's bf16 convolutions work on channels-last tensors and convert all others before and after each call, a quarter of
a training step. With channels last throughout, the step loses that, but PyTorch's own backward pass of the norm is
several times slower in this layout. Here is one that is as quick as the memory allows; the step as a whole takes two
thirds of the time, and its gradients are as close to those of float32 as before.

Source: docs/decisions/0007.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NO_ACTIVATION = 1.0
"""The slope that leaves out the activation, as in front of a residual sum."""


def memory_format(dims: int) -> torch.memory_format:
    """The channels-last layout of images with 2 or 3 spatial axes."""
    return torch.channels_last_3d if dims == 3 else torch.channels_last


def to_channels_last(images: Tensor) -> Tensor:
    """A copy of (N, C, *spatial) in channels-last layout, with a single channel too.

    With one channel both layouts are the same in memory, and PyTorch would go on in the contiguous one; the strides of
    a fresh tensor say which is meant.
    """
    layout = memory_format(images.ndim - 2)
    return torch.empty(images.shape, dtype=images.dtype, device=images.device, memory_format=layout).copy_(images)


def is_meant_for(x: Tensor) -> bool:
    """Whether `norm_leaky_relu` is the quick way for (N, C, *spatial): bf16 training on the CPU, channels last."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and x.requires_grad
        and x.is_contiguous(memory_format=memory_format(x.ndim - 2))
    )


def norm_leaky_relu(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """Instance norm with scale and shift, then leaky ReLU.

    Args:
        x: (N, C, *spatial) bf16, channels last.
        weight: (C,) float32.
        bias: (C,) float32.
        eps: Added to the variance.
        slope: Of the activation below zero, 0 or more; `NO_ACTIVATION` leaves it out.

    Returns:
        As `x`.
    """
    result: Tensor = _NormLeakyReLU.apply(x, weight, bias, eps, slope)  # type: ignore[no-untyped-call]
    return result


def _rows(x: Tensor) -> Tensor:
    """(N, C, *spatial) in channels-last layout as (N, voxels, C), without a copy."""
    return x.movedim(1, -1).flatten(1, -2)


class _NormLeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
        num, channels = x.shape[:2]
        voxels = x[0, 0].numel()
        y, mean, scale = torch.native_group_norm(x, weight, bias, num, channels, voxels, channels, eps)
        has_activation = slope != NO_ACTIVATION
        if has_activation:
            functional.leaky_relu(y, slope, inplace=True)
        # Without activation the output is not needed again, and the residual sum may overwrite it.
        ctx.save_for_backward(x, y if has_activation else None, weight, mean, scale)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, mean, scale = ctx.saved_tensors
        inner = gradients[0].to(x)
        if y is not None:
            # The output is above zero where the input of the activation is.
            inner = torch.ops.aten.leaky_relu_backward(inner, y, ctx.slope, True)
        inner = inner.contiguous(memory_format=memory_format(x.ndim - 2))
        dy, rows = _rows(inner), _rows(x)
        mean, scale = mean.float().view(x.shape[:2]), scale.float().view(x.shape[:2])
        # Sums over voxels of the gradient, alone and times the normalised input; bf16 sums accumulate in float32.
        total = dy.sum(1).float()
        projection = ((dy * rows).sum(1).float() - mean * total) * scale
        # dx = scale * weight * (dy - mean of dy - normalised x * mean of dy * normalised x), as a * dy + b * x + c.
        a = scale * weight.float()
        b = -a * projection * scale / rows.shape[1]
        c = -a * total / rows.shape[1] - b * mean
        a, b, c = (coefficient.to(x.dtype)[:, None] for coefficient in (a, b, c))
        dx = torch.addcmul(c.expand_as(rows), rows, b).addcmul_(dy, a)
        dx = dx.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
        return dx, projection.sum(0).to(weight), total.sum(0).to(weight), None, None
