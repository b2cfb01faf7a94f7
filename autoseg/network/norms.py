"""Normalisation layers and activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoseg.domain.network_plan import ActivationKind, NetworkPlan, NormKind
from autoseg.network import channels_last

NORM_EPS = 1e-5
"""Added to the variance in a normalisation. Source: nnU-Net v2, plain U-Net."""

LEAKY_SLOPE = 0.01
"""Slope of the activation below zero. Source: nnU-Net v2, plain U-Net."""

PRELU_START = 0.25
"""First slope of a learned activation. Source: He et al. 2015, section 2.1."""

BATCH_MOMENTUM = 0.1
"""Share of the current batch in the running statistics a step. Source: PyTorch's default."""

# Below this many voxels a channel the group normalisation of channels-last tensors is 5 to 20 times slower than that of
# contiguous ones, copy included. Source: docs/decisions/0006.
_MIN_CHANNELS_LAST_VOXELS = 1024

_START_SLOPES: dict[ActivationKind, float] = {"leaky_relu": LEAKY_SLOPE, "prelu": PRELU_START}


def start_slope(kind: ActivationKind) -> float:
    """Slope below zero that He initialisation reckons with; 0 for the smooth activations too."""
    return _START_SLOPES.get(kind, 0.0)


class Norm(nn.Module):
    """What every normalisation has: a scale and a shift a channel, which stay float32 in every precision."""

    def __init__(self, channels: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def start(self, generator: torch.Generator) -> None:
        """Scale 1, shift 0."""
        del generator
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class InstanceNorm(Norm):
    """Every channel of every sample to mean 0 and variance 1, then scale and shift.

    On the CPU it runs as a group normalisation with one channel a group: the same numbers, and 2 to 3 times faster in
    float32. Elsewhere the instance normalisation is kept, because autocast would make a group normalisation float32.
    A channel with a single voxel is allowed and comes out as its shift.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, *spatial)."""
        # ONNX has this layer; a group normalisation would become five.
        if x.device.type == "cpu" and not torch.onnx.is_in_onnx_export():
            return _group_norm(x, x.shape[1], self.weight, self.bias, self.eps)
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, True)


class GroupNorm(Norm):
    """Every group of neighbouring channels of every sample to mean 0 and variance 1, then scale and shift a channel."""

    def __init__(self, channels: int, eps: float, num_groups: int) -> None:
        super().__init__(channels, eps)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, *spatial)."""
        return _group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class BatchNorm(Norm):
    """Every channel to mean 0 and variance 1 over the batch, in evaluation by running statistics; scale and shift.

    The running statistics are parameters that no gradient reaches, so that everything that keeps or averages the
    weights of a training keeps or averages them too.
    """

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps)
        self.running_mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(channels), requires_grad=False)

    def start(self, generator: torch.Generator) -> None:
        """Scale 1, shift 0; mean 0 and variance 1 until a batch is seen."""
        super().start(generator)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, *spatial); in training the running statistics follow, unless the batch is one voxel."""
        values_a_channel = x.numel() // x.shape[1]
        if self.training and values_a_channel == 1:
            # One value has no variance: it comes out as the shift, and the statistics learn nothing from it.
            return self.bias.to(x.dtype).view(-1, *(1,) * (x.ndim - 2)) + (x - x)
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, BATCH_MOMENTUM, self.eps
        )


class LayerNorm(Norm):
    """The channels of every voxel to mean 0 and variance 1, then scale and shift a channel.

    Source: Liu et al. 2022, ConvNeXt. A group norm with one group is the other layer norm, over voxels too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, *spatial)."""
        last = x.movedim(1, -1)
        return functional.layer_norm(last, last.shape[-1:], self.weight, self.bias, self.eps).movedim(-1, 1)


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if x.device.type == "cpu" and x[0, 0].numel() < _MIN_CHANNELS_LAST_VOXELS:
        x = x.contiguous()
    return torch.group_norm(x, num_groups, weight, bias, eps, False)


def normalisation(plan: NetworkPlan, channels: int) -> nn.Module:
    """The plan's normalisation of so many channels; the identity where it has none."""
    layers: dict[NormKind, Callable[[], nn.Module]] = {
        "instance": partial(InstanceNorm, channels, plan.norm_eps),
        "group": partial(GroupNorm, channels, plan.norm_eps, plan.num_norm_groups),
        "batch": partial(BatchNorm, channels, plan.norm_eps),
        "layer": partial(LayerNorm, channels, plan.norm_eps),
        "none": nn.Identity,
    }
    return layers[plan.norm]()


class PReLU(nn.Module):
    """A leaky ReLU that learns its slope below zero, one a channel.

    Source: He et al. 2015, section 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), PRELU_START))

    def start(self, generator: torch.Generator) -> None:
        """All slopes 0.25."""
        del generator
        nn.init.constant_(self.weight, PRELU_START)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to the same."""
        return functional.prelu(x, self.weight.to(x.dtype))


class LeakyReLU(nn.Module):
    """A leaky ReLU, or with slope 0 a ReLU."""

    def __init__(self, slope: float, *, overwrites: bool) -> None:
        super().__init__()
        self.slope = slope
        self.overwrites = overwrites

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return functional.leaky_relu(x, self.slope, inplace=self.overwrites)


def activation(plan: NetworkPlan, channels: int, *, overwrites: bool = True) -> nn.Module:
    """The plan's activation of so many channels.

    Args:
        plan: The network.
        channels: Of what it gets.
        overwrites: Whether it may overwrite what it gets, which saves memory.
    """
    layers: dict[ActivationKind, Callable[[], nn.Module]] = {
        "relu": partial(LeakyReLU, 0.0, overwrites=overwrites),
        "leaky_relu": partial(LeakyReLU, LEAKY_SLOPE, overwrites=overwrites),
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "prelu": partial(PReLU, channels),
    }
    return layers[plan.activation]()


def normalise_and_activate(x: Tensor, norm: nn.Module, active: nn.Module) -> Tensor:
    """Norm, then activation, in the quickest way there is.

    Args:
        x: (N, C, *spatial).
        norm: From `normalisation`.
        active: From `activation`, or the identity.
    """
    slope = _slope(active)
    if slope is not None and isinstance(norm, InstanceNorm) and channels_last.is_meant_for(x):
        return channels_last.norm_leaky_relu(x, norm.weight, norm.bias, norm.eps, slope)
    out: Tensor = active(norm(x))
    return out


def _slope(active: nn.Module) -> float | None:
    """Slope below zero of an activation that has nothing but one; 1 for none at all, None for others."""
    if isinstance(active, LeakyReLU):
        return active.slope
    return channels_last.NO_ACTIVATION if isinstance(active, nn.Identity) else None
