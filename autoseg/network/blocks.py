"""The parts a U-Net is made of: normalisation, convolution blocks, steps down and up. All for 2D and 3D."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from autoseg.network import channels_last

Ints = tuple[int, ...]

NORM_EPS = 1e-5
"""Added to the variance in a normalisation. Source: nnU-Net v2, plain U-Net."""

LEAKY_SLOPE = 0.01
"""Slope of the activation below zero. Source: nnU-Net v2, plain U-Net."""

# Below this many voxels a channel the group normalisation of channels-last tensors is 5 to 20 times slower than that of
# contiguous ones, copy included. Source: docs/decisions/0006.
_MIN_CHANNELS_LAST_VOXELS = 1024

_LINEAR_MODES = {2: "bilinear", 3: "trilinear"}


def convolution(dims: int) -> Callable[..., nn.Module]:
    """The convolution layer for 2 or 3 dimensions."""
    return nn.Conv3d if dims == 3 else nn.Conv2d


class InstanceNorm(nn.Module):
    """Every channel of every sample to mean 0 and variance 1, then scale and shift.

    On the CPU it runs as a group normalisation with one channel a group: the same numbers, and 2 to 3 times faster in
    float32. Elsewhere the instance normalisation is kept, because autocast would make a group normalisation float32.
    A channel with a single voxel is allowed and comes out as its shift.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, *spatial)."""
        if x.device.type == "cpu":
            if x[0, 0].numel() < _MIN_CHANNELS_LAST_VOXELS:
                x = x.contiguous()
            return torch.group_norm(x, x.shape[1], self.weight, self.bias, NORM_EPS, False)
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, NORM_EPS, True)


class ConvBlock(nn.Module):
    """Convolution (with bias, padded to keep the size), instance norm, leaky ReLU."""

    def __init__(self, dims: int, in_channels: int, out_channels: int, kernel: Ints, stride: Ints) -> None:
        super().__init__()
        padding = tuple(size // 2 for size in kernel)
        self.conv = convolution(dims)(in_channels, out_channels, kernel, stride=stride, padding=padding)
        self.norm = InstanceNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, K, *ceil(spatial / stride))."""
        x = self.conv(x)
        if channels_last.is_meant_for(x):
            return channels_last.norm_leaky_relu(x, self.norm.weight, self.norm.bias, NORM_EPS, LEAKY_SLOPE)
        return nn.functional.leaky_relu(self.norm(x), LEAKY_SLOPE, inplace=True)


class ConvStack(nn.Sequential):
    """Convolution blocks one after the other; the first may change channels and resolution."""

    def __init__(
        self, dims: int, count: int, in_channels: int, out_channels: int, kernel: Ints, stride: Ints | None = None
    ) -> None:
        ones = (1,) * dims
        first = ConvBlock(dims, in_channels, out_channels, kernel, stride or ones)
        rest = (ConvBlock(dims, out_channels, out_channels, kernel, ones) for _ in range(count - 1))
        super().__init__(first, *rest)


class MaxPool(nn.Module):
    """Maximum over blocks of the stride; sizes that do not divide are rounded up, as a strided convolution does."""

    def __init__(self, dims: int, stride: Ints) -> None:
        super().__init__()
        self.pool = (nn.MaxPool3d if dims == 3 else nn.MaxPool2d)(stride, stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, C, *ceil(spatial / stride))."""
        pooled: Tensor = self.pool(x)
        return pooled


class Interpolate(nn.Module):
    """A 1x1 convolution to the new number of channels, then linear interpolation by the stride.

    The two commute, and the convolution is cheaper on the coarse grid.
    """

    def __init__(self, dims: int, in_channels: int, out_channels: int, stride: Ints) -> None:
        super().__init__()
        self.stride = tuple(float(step) for step in stride)
        self.mode = _LINEAR_MODES[dims]
        self.conv = convolution(dims)(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, K, *(spatial * stride))."""
        return nn.functional.interpolate(self.conv(x), scale_factor=self.stride, mode=self.mode)


def upsampling(
    kind: Literal["transposed", "interpolation"], dims: int, in_channels: int, out_channels: int, stride: Ints
) -> nn.Module:
    """The step up in the decoder; a transposed convolution has kernel = stride, so that no checkerboard appears."""
    if kind == "interpolation":
        return Interpolate(dims, in_channels, out_channels, stride)
    layer: Callable[..., nn.Module] = nn.ConvTranspose3d if dims == 3 else nn.ConvTranspose2d
    return layer(in_channels, out_channels, stride, stride=stride)
