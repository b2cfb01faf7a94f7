"""First weights, from a seed of their own.

Convolutions start as He et al. 2015 have it for the activation (nnU-Net v2 takes the same), linear layers keep the
variance of their input, tables are small, norms start as the identity, everything else is zero. A module whose weights
start otherwise says so in its method `start`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

TABLE_STD = 0.02
"""Standard deviation of a learned table's first entries. Source: Radford et al. 2018, GPT, section 4.1."""

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@runtime_checkable
class HasOwnStart(Protocol):
    """A module that starts otherwise than the rule has it."""

    def start(self, generator: torch.Generator) -> None:
        """Set the weights, after those of the modules inside."""
        ...


@torch.no_grad()
def initialise(network: nn.Module, seed: int | None, slope: float) -> None:
    """Set every weight of a network; the global random state is not touched.

    Args:
        network: On the CPU, with memory of any content.
        seed: None leaves convolutions, linear layers and tables zero, for weights that are loaded next.
        slope: Of the activation below zero, for He initialisation.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    for module in network.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
        elif seed is not None:
            _draw(module, slope, generator)
    # The innermost first, so that a block has the last word on the norms and convolutions in it.
    for module in reversed(list(network.modules())):
        if isinstance(module, HasOwnStart):
            module.start(generator)


def _draw(module: nn.Module, slope: float, generator: torch.Generator) -> None:
    if isinstance(module, _CONVOLUTIONS):
        nn.init.kaiming_normal_(module.weight, a=slope, generator=generator)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=TABLE_STD, generator=generator)
