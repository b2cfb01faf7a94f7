"""Conditions that are vectors: the time step of a diffusion, classes, and anything else a vector can hold.

All are summed into one embedding a sample, which every block of the network sees through a projection of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoseg.domain.network_plan import Ints

SinusoidOrder = Literal["cos_sin", "sin_cos"]
"""Which half of a sinusoidal embedding comes first: cosines (Stable Diffusion, MONAI) or sines (DDPM)."""

MAX_PERIOD = 10_000.0
"""Longest wavelength of a sinusoidal embedding over 2 pi. Source: Vaswani et al. 2017, section 3.5."""


def sinusoid(
    time: Tensor,
    channels: int,
    *,
    order: SinusoidOrder = "cos_sin",
    frequency_shift: int = 0,
    max_period: float = MAX_PERIOD,
) -> Tensor:
    """Sines and cosines of a time at geometrically spaced frequencies.

    Frequency i of h = channels // 2 is ``max_period ** (-i / (h - frequency_shift))``.

    Args:
        time: (N,) times, whole or not; for diffusions of 1,000 steps 0 ... 999.
        channels: Width of the result; an odd one ends in a zero.
        order: Which half comes first.
        frequency_shift: 0 leaves the frequency 1 / max_period out, 1 has it as the last.
        max_period: See above.

    Returns:
        (N, channels) float32.

    Source: Vaswani et al. 2017, section 3.5; DDPM has ("sin_cos", 1), Stable Diffusion and MONAI have ("cos_sin", 0).
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=time.device)
    frequencies = torch.exp(steps * (-log(max_period) / max(half - frequency_shift, 1)))
    angles = time.to(torch.float32)[:, None] * frequencies
    parts = (angles.cos(), angles.sin()) if order == "cos_sin" else (angles.sin(), angles.cos())
    return functional.pad(torch.cat(parts, dim=1), (0, channels % 2))


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear: from a vector to the width of the embedding."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_channels, channels)
        self.second = nn.Linear(channels, channels)

    def forward(self, vector: Tensor) -> Tensor:
        """(N, in_channels) of any type to (N, channels)."""
        hidden = self.first(vector.to(self.first.weight.dtype))
        out: Tensor = self.second(functional.silu(hidden))
        return out


class TimeEmbedding(nn.Module):
    """Sinusoids of the time step through an MLP.

    Args:
        channels: Width of the sinusoidal embedding.
        embedding_channels: Width of the result.
        order: See `sinusoid`.
        frequency_shift: See `sinusoid`.

    Source: Ho et al. 2020, DDPM, appendix B.
    """

    def __init__(
        self, channels: int, embedding_channels: int, *, order: SinusoidOrder = "cos_sin", frequency_shift: int = 0
    ) -> None:
        super().__init__()
        self.channels = channels
        self.order: SinusoidOrder = order
        self.frequency_shift = frequency_shift
        self.mlp = EmbeddingMLP(channels, embedding_channels)

    def forward(self, time: Tensor) -> Tensor:
        """Times (N,) to (N, embedding_channels)."""
        out: Tensor = self.mlp(
            sinusoid(time, self.channels, order=self.order, frequency_shift=self.frequency_shift),
        )
        return out


class ConditionEmbedding(nn.Module):
    """The sum of everything else that a network is conditioned on by vectors.

    Args:
        embedding_channels: Width of the result.
        vector_channels: Width of each condition vector; each goes through an MLP of its own.
        num_classes: Entries of a learned table of classes; 0 for no classes.
        has_null: Whether stand-ins for absent conditions are learned: a vector each, and an entry for "no class".

    Source: Dhariwal and Nichol 2021 (classes); Podell et al. 2023, SDXL, section 2.2 (vectors); Ho and Salimans 2021,
    section 3.2 (stand-ins).
    """

    def __init__(
        self, embedding_channels: int, vector_channels: Ints, num_classes: int = 0, has_null: bool = False
    ) -> None:
        super().__init__()
        self.vectors = nn.ModuleList(EmbeddingMLP(channels, embedding_channels) for channels in vector_channels)
        self.null_vectors = nn.ParameterList(torch.zeros(channels) for channels in vector_channels if has_null)
        self.classes = nn.Embedding(num_classes, embedding_channels) if num_classes else None
        self.null_class = nn.Parameter(torch.zeros(embedding_channels)) if num_classes and has_null else None

    def forward(
        self,
        vectors: Sequence[Tensor | None] = (),
        classes: Tensor | None = None,
        is_null: Tensor | None = None,
    ) -> Tensor:
        """The embedding of each sample.

        Args:
            vectors: One (N, channels) for each condition vector; None, or none at all, where it is absent.
            classes: (N,) whole numbers, 0 ... num_classes - 1; None where absent.
            is_null: (N,) bool, True for samples whose conditions are to be left out; None for none.

        Returns:
            (N, embedding_channels), or (1, embedding_channels) where every condition is absent.

        Raises:
            ValueError: A condition is absent and no stand-in was learned, or one is given that the network has not.
        """
        given = tuple(vectors) or (None,) * len(self.vectors)
        if len(given) != len(self.vectors):
            raise ValueError(f"the network takes {len(self.vectors)} condition vectors, got {len(given)}")
        if classes is not None and self.classes is None:
            raise ValueError("the network has no classes, got some: leave classes out")
        parts = [self._vector(index, vector, is_null) for index, vector in enumerate(given)]
        if self.classes is not None:
            table = None if classes is None else self.classes(classes)
            parts.append(_or_null(table, self.null_class, is_null, "classes"))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _vector(self, index: int, vector: Tensor | None, is_null: Tensor | None) -> Tensor:
        null = self.null_vectors[index] if len(self.null_vectors) else None
        out: Tensor = self.vectors[index](_or_null(vector, null, is_null, f"vectors[{index}]"))
        return out


def _or_null(value: Tensor | None, null: Tensor | None, is_null: Tensor | None, name: str) -> Tensor:
    """(N, channels) with the stand-in where the condition is absent."""
    if null is None:
        if value is None or is_null is not None:
            raise ValueError(f"{name} cannot be absent: the network was planned with has_null_condition false")
        return value
    if value is None:
        return null[None]
    return value if is_null is None else torch.where(is_null[:, None], null.to(value.dtype), value)


class EmbeddingProjection(nn.Module):
    """Brings the embedding into a block, through SiLU and a linear layer to the block's channels.

    Args:
        embedding_channels: Width of the embedding.
        channels: Of the block's features.
        kind: "add" adds it to the features; "scale_shift" makes features * (1 + scale) + shift of them, which are to
            be normalised.

    Source: Ho et al. 2020, DDPM ("add"); Dhariwal and Nichol 2021, section 3.1 ("scale_shift").
    """

    def __init__(self, embedding_channels: int, channels: int, *, kind: Literal["add", "scale_shift"] = "add") -> None:
        super().__init__()
        self.kind: Literal["add", "scale_shift"] = kind
        self.linear = nn.Linear(embedding_channels, channels * (2 if kind == "scale_shift" else 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Features (N, C, *spatial) and embedding (N, E) to features."""
        projected: Tensor = self.linear(functional.silu(embedding))
        projected = projected.view(*projected.shape, *(1,) * (x.ndim - 2))
        if self.kind == "add":
            return x + projected
        scale, shift = projected.chunk(2, dim=1)
        return x * (1 + scale) + shift
