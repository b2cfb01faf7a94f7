"""What a network is, part by part: parameters, multiplications, and memory of the features kept for the backward pass.

The network is built and run once without any memory or arithmetic (on fake tensors that know only their shapes), so
that the figures are those of the layers themselves and the largest network takes no longer than its number of layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from autoseg.domain.network_plan import Ints, NetworkPlan
from autoseg.domain.values import Value
from autoseg.network.attention import CrossAttention, TokenAttention
from autoseg.network.unet import UNet

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)

_CONTEXT_LENGTH = 77
"""Tokens of a condition sequence in the count of multiplications. Source: Rombach et al. 2022 (CLIP's text)."""


class PartSummary(Value):
    """One part of a network, for one patch.

    Attributes:
        name: "stem", "encoder 0", "middle", "decoder 0", "heads", "conditions"; 0 is the finest.
        size: Of its output; of the finest head for the heads; empty for the conditions.
        channels: Of its output.
        parameters: That learn.
        macs: Multiplications (with an addition each) of convolutions, linear layers and attention.
        activation_bytes: Memory of what its forward pass keeps for the backward pass, in float32; what two parts keep
            counts in the first.
    """

    name: str
    size: Ints
    channels: int
    parameters: int
    macs: int
    activation_bytes: int


class NetworkSummary(Value):
    """A network, part by part in the order of the data flow, for one patch."""

    patch_size: Ints
    parts: tuple[PartSummary, ...]
    parameters: int
    macs: int
    activation_bytes: int


def summarise(plan: NetworkPlan) -> NetworkSummary:
    """Parameters, multiplications and activation memory of a network for one patch in training."""
    with FakeTensorMode():
        network = UNet(plan)
        parts = _parts(network)
        meters = {name: _Meter(modules) for name, modules in parts.items()}
        ledger = _Ledger(network)
        handles = [handle for meter in meters.values() for handle in meter.attach(ledger)]
        image = torch.empty(1, plan.in_channels, *plan.patch_size)
        with saved_tensors_hooks(ledger.keep, _as_it_is):
            network(image, **_conditions(plan))
        for handle in handles:
            handle.remove()
    rows = tuple(meter.row(name, ledger) for name, meter in meters.items())
    return NetworkSummary(
        patch_size=plan.patch_size,
        parts=rows,
        parameters=sum(row.parameters for row in rows),
        macs=sum(row.macs for row in rows),
        activation_bytes=sum(row.activation_bytes for row in rows),
    )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _parts(network: UNet) -> dict[str, list[nn.Module]]:
    """The modules of each part, in the order of the data flow; every weight is in one."""
    parts: dict[str, list[nn.Module | None]] = {
        "conditions": [network.time_embedding, network.condition_embedding, network.null_context],
        "stem": [network.stem],
    }
    parts |= {f"encoder {index}": [stage] for index, stage in enumerate(network.encoder)}
    parts["middle"] = [network.middle]
    parts |= {f"decoder {index}": [level] for index, level in reversed(list(enumerate(network.decoder)))}
    parts["heads"] = list(reversed(network.heads))
    present = {name: [module for module in modules if module is not None] for name, modules in parts.items()}
    return {name: modules for name, modules in present.items() if modules}


def _conditions(plan: NetworkPlan) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if plan.condition is not None:
        told["time"] = torch.empty(1)
        told["vectors"] = [torch.empty(1, channels) for channels in plan.condition.vector_channels]
        if plan.condition.num_classes:
            told["classes"] = torch.empty(1, dtype=torch.long)
    if plan.context_channels is not None:
        told["context"] = torch.empty(1, _CONTEXT_LENGTH, plan.context_channels)
    return told


class _Ledger:
    """What the backward pass keeps, each piece of memory once, in the name of the part that is running."""

    def __init__(self, network: nn.Module) -> None:
        # Weights are kept too, but are no activations. The tensors are held so that no address is given out twice.
        self._held: dict[int, Tensor] = {_address(weight): weight for weight in network.parameters()}
        self._bytes: dict[object, int] = {}
        self.running: object = None

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves."""
        address = _address(tensor)
        if address not in self._held:
            self._held[address] = tensor
            self._bytes[self.running] = self._bytes.get(self.running, 0) + tensor.untyped_storage().nbytes()
        return tensor

    def bytes_of(self, part: object) -> int:
        """Sum of a part."""
        return self._bytes.get(part, 0)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Meter:
    """Counts in one part while it runs."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._macs = 0
        self._shape: Ints = ()

    def attach(self, ledger: _Ledger) -> list[torch.utils.hooks.RemovableHandle]:
        """Start to count."""

        def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
            del module, given
            ledger.running = self

        def leave(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            del module, given
            self._shape = tuple((out if isinstance(out, Tensor) else out[0]).shape)

        def count(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
            self._macs += _macs(module, given, out)

        handles = [module.register_forward_pre_hook(enter) for module in self._modules]
        handles += [module.register_forward_hook(leave) for module in self._modules]
        counted = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, TokenAttention, CrossAttention)
        inner = (layer for module in self._modules for layer in module.modules() if isinstance(layer, counted))
        return handles + [layer.register_forward_hook(count) for layer in inner]

    def row(self, name: str, ledger: _Ledger) -> PartSummary:
        """What was counted."""
        weights = [weight for module in self._modules for weight in module.parameters() if weight.requires_grad]
        return PartSummary(
            name=name,
            size=self._shape[2:],
            channels=self._shape[1],
            parameters=sum(weight.numel() for weight in weights),
            macs=self._macs,
            activation_bytes=ledger.bytes_of(self),
        )


def _macs(layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> int:
    if isinstance(layer, _CONVOLUTIONS):
        return int(out.numel()) * layer.in_channels * prod(layer.kernel_size)
    if isinstance(layer, _TRANSPOSED):
        return int(given[0].numel()) * layer.out_channels * prod(layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return out.numel() * layer.in_features
    # Queries times keys, and weights times values.
    length = given[1].shape[1] if isinstance(layer, CrossAttention) else out.shape[1]
    return 2 * out.numel() * int(length)
