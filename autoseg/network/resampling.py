"""The steps of a U-Net from one resolution to the next. All for 2D and 3D."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from autoseg.domain.network_plan import Ints, NetworkPlan
from autoseg.network.blocks import AveragePool, PreactivationBlock, convolution, padded_convolution
from autoseg.network.norms import activation, normalisation, normalise_and_activate, start_slope

_LINEAR_MODES = {2: "bilinear", 3: "trilinear"}


class MaxPool(nn.Module):
    """Maximum over blocks of the stride; sizes that do not divide are rounded up, as a strided convolution does."""

    def __init__(self, dims: int, stride: Ints) -> None:
        super().__init__()
        self.pool = (nn.MaxPool3d if dims == 3 else nn.MaxPool2d)(stride, stride, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, C, *ceil(spatial / stride))."""
        pooled: Tensor = self.pool(x)
        return pooled


class Resize(nn.Module):
    """Interpolation by the stride, linear or nearest."""

    def __init__(self, dims: int, stride: Ints, *, is_linear: bool) -> None:
        super().__init__()
        self.stride = tuple(float(step) for step in stride)
        self.mode = _LINEAR_MODES[dims] if is_linear else "nearest"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, C, *(spatial * stride))."""
        return nn.functional.interpolate(x, scale_factor=self.stride, mode=self.mode)


class Interpolate(nn.Module):
    """Interpolation by the stride and a convolution to the new number of channels.

    A 1x1 convolution comes first: the two commute, and it is cheaper on the coarse grid. A larger one comes after,
    where it smooths what nearest interpolation leaves.
    """

    def __init__(
        self, plan: NetworkPlan, in_channels: int, out_channels: int, stride: Ints, *, has_bias: bool = True
    ) -> None:
        super().__init__()
        kernel = (plan.upsampling_kernel,) * plan.dims
        self.is_convolved_first = plan.upsampling_kernel == 1
        self.resize = Resize(plan.dims, stride, is_linear=plan.upsampling == "linear")
        self.conv = padded_convolution(plan.dims, in_channels, out_channels, kernel, has_bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, K, *(spatial * stride))."""
        out: Tensor = self.resize(self.conv(x)) if self.is_convolved_first else self.conv(self.resize(x))
        return out


class PixelShuffle(nn.Module):
    """A convolution to channels x stride values a voxel, dealt out to the finer voxels.

    It starts as nearest interpolation of a convolution (ICNR), so that a fresh network shows no checkerboard.

    Source: Shi et al. 2016 (2D); Aitken et al. 2017, section 3 (ICNR).
    """

    def __init__(
        self, plan: NetworkPlan, in_channels: int, out_channels: int, stride: Ints, *, has_bias: bool = True
    ) -> None:
        super().__init__()
        self.stride = stride
        self.slope = start_slope(plan.activation)
        kernel = (plan.upsampling_kernel,) * plan.dims
        self.conv = padded_convolution(plan.dims, in_channels, out_channels * prod(stride), kernel, has_bias=has_bias)

    def start(self, generator: torch.Generator) -> None:
        """One random filter for all finer voxels of a channel."""
        copies = prod(self.stride)
        weight = self.conv.get_parameter("weight")
        one = torch.empty_like(weight[::copies])
        nn.init.kaiming_normal_(one, a=self.slope, generator=generator)
        with torch.no_grad():
            weight.copy_(one.repeat_interleave(copies, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, K, *(spatial * stride))."""
        x = self.conv(x)
        size, dims = x.shape[2:], len(self.stride)
        x = x.reshape(x.shape[0], -1, *self.stride, *size)
        # From (N, K, *stride, *spatial) to each step beside its axis.
        order = [axis for pair in zip(range(2 + dims, 2 + 2 * dims), range(2, 2 + dims), strict=True) for axis in pair]
        finer = [length * step for length, step in zip(size, self.stride, strict=True)]
        return x.permute(0, 1, *order).reshape(*x.shape[:2], *finer)


class ActiveStep(nn.Module):
    """A step with norm and activation behind it."""

    def __init__(self, plan: NetworkPlan, step: nn.Module, channels: int) -> None:
        super().__init__()
        self.step = step
        self.norm = normalisation(plan, channels)
        self.activation = activation(plan, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, K, *resampled)."""
        return normalise_and_activate(self.step(x), self.norm, self.activation)


def _strided_layer(plan: NetworkPlan, stage: int, in_channels: int, out_channels: int) -> nn.Module:
    stride, kernel = plan.strides[stage], plan.kernel_sizes[stage]
    if plan.downsampling_kernel == "stride":
        return convolution(plan.dims)(in_channels, out_channels, stride, stride=stride)
    return padded_convolution(plan.dims, in_channels, out_channels, kernel, stride)


def step_down(plan: NetworkPlan, stage: int) -> nn.Module | None:
    """The layer that takes features into a stage; None where the stage's first block takes the step."""
    if stage == 0 or not plan.has_down_layers:
        return None
    stride, channels = plan.strides[stage], plan.features_per_stage[stage - 1]
    if plan.downsampling == "strided_layer":
        given = plan.channels_into(stage)
        layer = _strided_layer(plan, stage, channels, given)
        return ActiveStep(plan, layer, given) if plan.has_active_resampling else layer
    pool = MaxPool(plan.dims, stride) if plan.downsampling == "max_pool" else AveragePool(plan.dims, stride)
    if plan.resamples_in_blocks:
        return PreactivationBlock(plan, channels, channels, plan.kernel_sizes[stage - 1], resampling=pool)
    return pool


def step_up(plan: NetworkPlan, level: int) -> nn.Module | None:
    """The layer that takes features of the stage below up to a decoder level; None at the coarsest stage.

    A transposed convolution has kernel = stride, so that no checkerboard comes of overlapping kernels.
    """
    if level == plan.num_stages - 1:
        return None
    stride, dims, has_bias = plan.strides[level + 1], plan.dims, plan.has_up_bias
    channels, given = plan.features_below(level), plan.upsampled_features(level)
    if plan.resamples_in_blocks:
        resize = Resize(dims, stride, is_linear=plan.upsampling == "linear")
        return PreactivationBlock(plan, channels, given, plan.kernel_sizes[level + 1], resampling=resize)
    layer: nn.Module
    if plan.upsampling == "transposed":
        transposed: Callable[..., nn.Module] = nn.ConvTranspose3d if dims == 3 else nn.ConvTranspose2d
        layer = transposed(channels, given, stride, stride=stride, bias=has_bias)
    else:
        kind = PixelShuffle if plan.upsampling == "pixel_shuffle" else Interpolate
        layer = kind(plan, channels, given, stride, has_bias=has_bias)
    return ActiveStep(plan, layer, given) if plan.has_active_resampling else layer
