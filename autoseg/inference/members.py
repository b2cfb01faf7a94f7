"""Probabilities beside the logits of each network and each mirror image, so that their mean is known as well.

The mean of probabilities is not the probability of mean logits: where two networks are sure of different classes, the
first says so. Everything between a network and the image's own grid is linear (means over networks, mirror images and
tiles, and resampling), so probabilities go the same way as logits, as further outputs.

Source: docs/decisions/0037.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoseg.domain.inference import Temperature


def divisor_of(logits: Tensor, temperature: Temperature, *, is_regions: bool, dim: int = 0) -> float | Tensor:
    """What logits are divided by, as a number or in a shape that fits theirs; see `domain.inference.Temperature`.

    Args:
        logits: Any shape, floating; they are not changed.
        temperature: One for all outputs, or one for each.
        is_regions: Whether outputs are regions.
        dim: The axis of classes or regions.
    """
    if not isinstance(temperature, tuple):
        return temperature
    of_each = torch.tensor(temperature, dtype=logits.dtype, device=logits.device)
    if is_regions:
        return of_each.reshape([-1 if axis == dim else 1 for axis in range(logits.ndim)])
    return of_each[logits.argmax(dim, keepdim=True)]


def probabilities(logits: Tensor, *, is_regions: bool, temperature: Temperature = 1.0, dim: int = 0) -> Tensor:
    """What logits say: softmax over classes, or the sigmoid of each region.

    Args:
        logits: Any shape, floating.
        is_regions: Whether outputs are regions.
        temperature: Logits are divided by it.
        dim: The axis of classes or regions.
    """
    if temperature != 1:
        logits = logits / divisor_of(logits, temperature, is_regions=is_regions, dim=dim)
    return torch.sigmoid(logits) if is_regions else torch.softmax(logits, dim)


class WithProbabilities(nn.Module):
    """A network that gives its logits and, after them, its probabilities: (n, C, ...) to (n, 2 K, ...), float32.

    Args:
        network: (n, C, ...) to logits (n, K, ...).
        is_regions: Whether outputs are regions.
        temperature: Logits are divided by it before they become probabilities.
    """

    def __init__(
        self, network: Callable[[Tensor], Tensor], *, is_regions: bool, temperature: Temperature = 1.0
    ) -> None:
        super().__init__()
        self.network = network
        self.is_regions = is_regions
        self.temperature = temperature

    def forward(self, tiles: Tensor) -> Tensor:
        """Predict tiles."""
        logits = self.network(tiles).to(torch.float32)
        shares = probabilities(logits, is_regions=self.is_regions, temperature=self.temperature, dim=1)
        return torch.cat([logits, shares], dim=1)
