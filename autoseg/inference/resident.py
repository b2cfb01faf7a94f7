"""Networks in memory, in the form that is fastest on their device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autoseg.domain.plan import Configuration
from autoseg.inference.tiles import Forward
from autoseg.io.model import Model
from autoseg.network.channels_last import memory_format
from autoseg.network.norms import Norm
from autoseg.network.unet import UNet, restore
from autoseg.preprocessing.previous import one_hot
from autoseg.runtime import autocast


def resident(model: Model, device: torch.device, precision: str) -> nn.Module:
    """The network on its device, in the form that is fastest there."""
    plan = model.card.settings.network
    network = restore(plan, model.weights)
    if is_cast(device, precision):
        for_cpu_in_bf16(network)
    return network.to(device)


def is_cast(device: torch.device, precision: str) -> bool:
    """Whether weights and tiles are bfloat16 themselves, without autocast."""
    return device.type == "cpu" and precision == "bf16"


def for_cpu_in_bf16(network: UNet) -> None:
    """Make its layers bfloat16 and channels last; norms keep float32 parameters.

    Channels last saves the convolutions a change of layout before and after each: twice as fast as autocast.

    Source: docs/decisions/0006.
    """
    layout = memory_format(network.plan.dims)
    for module in network.modules():
        if not isinstance(module, Norm) and not list(module.children()):
            module.to(torch.bfloat16, memory_format=layout)  # type: ignore[call-overload]


def averaged(
    networks: Sequence[Callable[[Tensor], Tensor]], settings: Configuration, device: torch.device, precision: str
) -> Forward:
    """The mean logits of the networks, for tiles with three spatial axes on any device.

    Of a cascade the last channel of the tiles is the label map of the previous stage. One network's logits are given as
    it makes them, in 16 bit too; the mean of several is float32.
    """
    dims, is_cascade = settings.network.dims, settings.previous_stage is not None
    casts = is_cast(device, precision)

    def forward(tiles: Tensor) -> Tensor:
        x = tiles.to(device)
        if is_cascade:
            x = torch.cat([x[:, :-1], one_hot(x[:, -1], settings.num_previous_channels + 1)], dim=1)
        x = x.to(torch.bfloat16 if casts else torch.float32)
        if dims == 2:
            x = x.squeeze(2)
        with autocast(device, "fp32" if casts else precision):
            mean: Tensor = networks[0](x)
            if len(networks) > 1:
                mean = mean.to(torch.float32)
                # Summed as they come: the outputs of two networks are in memory, however many there are.
                for network in networks[1:]:
                    mean = mean.add_(network(x))
                mean = mean.div_(len(networks))
        return mean.unsqueeze(2) if dims == 2 else mean

    return forward
