"""The blocks a stage of a U-Net is made of, for 2D and 3D.

Every block takes features (N, C, *spatial) and, where the network has a condition, its embedding (N, E).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoseg.domain.network_plan import BlockKind, Ints, NetworkPlan
from autoseg.network.channels_last import memory_format
from autoseg.network.embedding import EmbeddingProjection
from autoseg.network.norms import Norm, activation, normalisation, normalise_and_activate

SQUEEZE_RATIO = 16
"""Channels over those of the bottleneck of a squeeze and excitation. Source: Hu et al. 2018, section 6.4."""

SQUEEZE_DIVISOR = 8
"""Channels of that bottleneck are rounded to multiples of this. Source: nnU-Net's residual encoder (after timm)."""


class Convolution3d(nn.Conv3d):
    """PyTorch's, with right gradients where the first spatial axis has two voxels.

    There oneDNN's bf16 kernels leave a part of the weights' gradient as it lay in memory: wrong always, not finite at
    times. With the zeros of that axis added beforehand they do not.

    Source: docs/decisions/0048.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, K, *spatial / stride)."""
        if not self._is_wrong(input):
            return super().forward(input)
        assert isinstance(self.padding, tuple)
        padded = functional.pad(input, (0, 0, 0, 0, self.padding[0], self.padding[0]))
        return functional.conv3d(
            padded, self.weight, self.bias, self.stride, (0, *self.padding[1:]), self.dilation, self.groups
        )

    def _is_wrong(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or x.shape[2] != 2 or self.kernel_size[0] == 1 or not torch.is_grad_enabled():
            return False
        return x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")


def convolution(dims: int) -> Callable[..., nn.Module]:
    """The convolution layer for 2 or 3 dimensions."""
    return Convolution3d if dims == 3 else nn.Conv2d


class AveragePool(nn.Module):
    """Mean over blocks of the stride, which divides the sizes."""

    def __init__(self, dims: int, stride: Ints) -> None:
        super().__init__()
        layer: Callable[..., nn.Module] = nn.AvgPool3d if dims == 3 else nn.AvgPool2d
        self.pool = layer(stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, C, *(spatial / stride)), in the type of `x` (under autocast on the CPU: float32)."""
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
            pooled: Tensor = self.pool(x)
            return pooled
        # PyTorch has no 3D average of bfloat16 on the CPU.
        pooled = self.pool(x.float())
        return pooled.to(x.dtype).contiguous(memory_format=memory_format(x.ndim - 2))


def padded_convolution(
    dims: int, in_channels: int, out_channels: int, kernel: Ints, stride: Ints | None = None, *, has_bias: bool = True
) -> nn.Module:
    """A convolution that keeps the size but for its stride; the kernel is odd."""
    padding = tuple(size // 2 for size in kernel)
    layer = convolution(dims)
    return layer(in_channels, out_channels, kernel, stride=stride or (1,) * dims, padding=padding, bias=has_bias)


def _channel_dropout(plan: NetworkPlan) -> nn.Module:
    if plan.dropout == 0:
        return nn.Identity()
    return (nn.Dropout3d if plan.dims == 3 else nn.Dropout2d)(plan.dropout)


def _projection(plan: NetworkPlan, channels: int) -> EmbeddingProjection | None:
    if plan.condition is None:
        return None
    return EmbeddingProjection(plan.embedding_channels, channels, kind=plan.condition.kind)


class ConvBlock(nn.Module):
    """Convolution, dropout, norm, embedding, activation.

    The embedding comes after the norm in both its kinds: an instance norm would take out again what was added to whole
    channels in front of it.

    Args:
        plan: The network.
        in_channels: Of the input.
        out_channels: Of the output.
        kernel: Of the convolution.
        stride: Of the convolution; None for ones.
        ends_with: The last part; a bare convolution has neither dropout nor embedding.
    """

    def __init__(
        self,
        plan: NetworkPlan,
        in_channels: int,
        out_channels: int,
        kernel: Ints,
        stride: Ints | None = None,
        *,
        ends_with: Literal["conv", "norm", "activation"] = "activation",
    ) -> None:
        super().__init__()
        is_bare = ends_with == "conv"
        self.conv = padded_convolution(
            plan.dims, in_channels, out_channels, kernel, stride, has_bias=plan.has_conv_bias or is_bare
        )
        self.dropout = nn.Identity() if is_bare else _channel_dropout(plan)
        self.norm = nn.Identity() if is_bare else normalisation(plan, out_channels)
        self.projection = None if is_bare else _projection(plan, out_channels)
        self.activation = activation(plan, out_channels) if ends_with == "activation" else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(N, C, *spatial) to (N, K, *ceil(spatial / stride))."""
        x = self.dropout(self.conv(x))
        if self.projection is None or embedding is None:
            return normalise_and_activate(x, self.norm, self.activation)
        out: Tensor = self.activation(self.projection(self.norm(x), embedding))
        return out


class Squeeze(nn.Module):
    """Weighs every channel by what all voxels hold: squeeze and excitation.

    Source: Hu et al. 2018, section 3.
    """

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        wanted = int(channels / SQUEEZE_RATIO + SQUEEZE_DIVISOR / 2) // SQUEEZE_DIVISOR * SQUEEZE_DIVISOR
        inner = max(SQUEEZE_DIVISOR, wanted)
        self.first = convolution(dims)(channels, inner, 1)
        self.second = convolution(dims)(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to the same."""
        mean = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)
        return x * torch.sigmoid(self.second(functional.relu(self.first(mean))))


class Shortcut(nn.Module):
    """The way around a residual block: mean over the stride, then a 1x1 convolution where the channels change.

    Args:
        plan: The network.
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Step of the block.
        has_norm: Whether the convolution has a norm behind it, and then no bias.

    Source: He, T. et al. 2019, section 4 (ResNet-D), as in nnU-Net's residual encoder.
    """

    def __init__(
        self, plan: NetworkPlan, in_channels: int, out_channels: int, stride: Ints | None, *, has_norm: bool
    ) -> None:
        super().__init__()
        is_wider = in_channels != out_channels
        self.pool = AveragePool(plan.dims, stride) if stride and max(stride) > 1 else None
        self.conv = convolution(plan.dims)(in_channels, out_channels, 1, bias=not has_norm) if is_wider else None
        self.norm = normalisation(plan, out_channels) if is_wider and has_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, K, *(spatial / stride)); the stride divides the sizes."""
        if self.pool is not None:
            x = self.pool(x)
        if self.conv is not None:
            x = normalise_and_activate(self.conv(x), self.norm, nn.Identity())
        return x


class ResidualBlock(nn.Module):
    """Convolution, norm, activation, convolution, norm, and the activation after the sum with the shortcut.

    It starts as its shortcut alone: the last norm's scale is 0 at first.

    Source: He et al. 2016; nnU-Net's residual encoder (Isensee et al. 2024).
    """

    def __init__(
        self, plan: NetworkPlan, in_channels: int, out_channels: int, kernel: Ints, stride: Ints | None = None
    ) -> None:
        super().__init__()
        dims, has_bias = plan.dims, plan.has_conv_bias
        self.conv1 = padded_convolution(dims, in_channels, out_channels, kernel, stride, has_bias=has_bias)
        self.dropout = _channel_dropout(plan)
        self.norm1 = normalisation(plan, out_channels)
        self.projection = _projection(plan, out_channels)
        self.activation1 = activation(plan, out_channels)
        self.conv2 = padded_convolution(dims, out_channels, out_channels, kernel, has_bias=has_bias)
        self.norm2 = normalisation(plan, out_channels)
        self.squeeze = Squeeze(dims, out_channels) if plan.squeezes else nn.Identity()
        self.shortcut = Shortcut(plan, in_channels, out_channels, stride, has_norm=True)
        self.activation2 = activation(plan, out_channels)

    def start(self, generator: torch.Generator) -> None:
        """The last norm to zero."""
        del generator
        if isinstance(self.norm2, Norm):
            nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(N, C, *spatial) to (N, K, *(spatial / stride))."""
        y = self.dropout(self.conv1(x))
        if self.projection is None or embedding is None:
            y = normalise_and_activate(y, self.norm1, self.activation1)
        else:
            y = self.activation1(self.projection(self.norm1(y), embedding))
        y = normalise_and_activate(self.conv2(y), self.norm2, nn.Identity())
        y = self.squeeze(y).add_(self.shortcut(x))
        out: Tensor = self.activation2(y)
        return out


class PreactivationBlock(nn.Module):
    """Norm, activation, convolution, twice, and the sum with the shortcut; dropout in front of the last convolution.

    An added embedding enters after the first convolution, a scale and shift after the second norm. It starts as its
    shortcut alone: the last convolution is 0 at first.

    Args:
        plan: The network.
        in_channels: Of the input.
        out_channels: Of the output.
        kernel: Of the convolutions.
        stride: Of the first convolution; None for ones.
        resampling: Takes the step down or up in both branches, in front of the first convolution.

    Source: He et al. 2016b; Ho et al. 2020, appendix B; Dhariwal and Nichol 2021, section 3 (resampling).
    """

    def __init__(
        self,
        plan: NetworkPlan,
        in_channels: int,
        out_channels: int,
        kernel: Ints,
        stride: Ints | None = None,
        *,
        resampling: nn.Module | None = None,
    ) -> None:
        super().__init__()
        dims, has_bias = plan.dims, plan.has_conv_bias
        self.norm1 = normalisation(plan, in_channels)
        # Without a norm the activation gets the input itself, which the shortcut needs too.
        self.activation1 = activation(plan, in_channels, overwrites=plan.norm != "none")
        self.resampling = resampling
        self.conv1 = padded_convolution(dims, in_channels, out_channels, kernel, stride, has_bias=has_bias)
        self.projection = _projection(plan, out_channels)
        self.norm2 = normalisation(plan, out_channels)
        self.activation2 = activation(plan, out_channels)
        self.dropout = nn.Dropout(plan.dropout)
        self.conv2 = padded_convolution(dims, out_channels, out_channels, kernel, has_bias=has_bias)
        self.squeeze = Squeeze(dims, out_channels) if plan.squeezes else nn.Identity()
        self.shortcut = Shortcut(plan, in_channels, out_channels, stride, has_norm=False)

    def start(self, generator: torch.Generator) -> None:
        """The last convolution to zero."""
        del generator
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(N, C, *spatial) to (N, K, *(spatial / stride)), or as resampled."""
        y = normalise_and_activate(x, self.norm1, self.activation1)
        if self.resampling is not None:
            x, y = self.resampling(x), self.resampling(y)
        y = self.conv2(self.dropout(self._inner(self.conv1(y), embedding)))
        out: Tensor = self.squeeze(y) + self.shortcut(x)
        return out

    def _inner(self, y: Tensor, embedding: Tensor | None) -> Tensor:
        if self.projection is None or embedding is None:
            return normalise_and_activate(y, self.norm2, self.activation2)
        if self.projection.kind == "add":
            return normalise_and_activate(self.projection(y, embedding), self.norm2, self.activation2)
        out: Tensor = self.activation2(self.projection(self.norm2(y), embedding))
        return out


Block = ConvBlock | ResidualBlock | PreactivationBlock

BLOCKS: dict[BlockKind, Callable[..., Block]] = {
    "conv": ConvBlock,
    "residual": ResidualBlock,
    "preactivation": PreactivationBlock,
}
"""What makes a block of each kind from plan, channels in and out, kernel and stride."""
