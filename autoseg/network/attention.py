"""Attention in a U-Net: over all voxels of a feature map, to a condition sequence, and of the decoder to its skips.

Every product of queries and keys goes through PyTorch's fused kernels, which never hold the matrix of all pairs: memory
grows with the number of voxels, not with its square. That is why attention weights have no dropout of their own; no
fused kernel on the CPU has it.

Feature maps are (N, C, *spatial) with 2 or 3 spatial axes; inside, they are sequences of voxels (N, T, C), which is how
a channels-last tensor lies in memory.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autoseg.network.blocks import convolution
from autoseg.network.norms import GroupNorm

_HEAD_ALIGNMENT = 8
"""Head widths are padded with zeros to multiples of this. Source: PyTorch's fused CUDA kernels take no others in every
precision, and would fall back to the matrix of all pairs."""

_FEED_FORWARD_RATIO = 4
"""Width of a transformer's feed-forward layer over that of its input. Source: Vaswani et al. 2017, table 3."""

_LINEAR_MODES = {2: "bilinear", 3: "trilinear"}


def attend(queries: Tensor, keys: Tensor, values: Tensor, head_channels: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head scaled dot-product attention.

    Args:
        queries: (N, T, C).
        keys: (N, L, C).
        values: (N, L, C).
        head_channels: Channels of a head; divides C. Heads are runs of neighbouring channels.
        mask: (N, L) bool, True where a key may be attended to; None for everywhere. A sample without any such key gets
            zeros.

    Returns:
        (N, T, C).

    Source: Vaswani et al. 2017, section 3.2.
    """
    excess = -head_channels % _HEAD_ALIGNMENT
    q, k, v = (_split_heads(part, head_channels, excess) for part in (queries, keys, values))
    allowed, reachable = None, None
    if mask is not None:
        reachable = mask.any(dim=1)[:, None, None]
        # A softmax over nothing is not a number: such a sample attends to everything, and is zeroed below.
        allowed = (mask | ~reachable[:, 0])[:, None, None, :]
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=head_channels**-0.5)
    out = out[..., :head_channels].transpose(1, 2).flatten(2)
    return out if reachable is None else out * reachable


def _split_heads(tokens: Tensor, head_channels: int, excess: int) -> Tensor:
    """(N, T, C) to (N, heads, T, head_channels + excess)."""
    heads = tokens.reshape(*tokens.shape[:2], -1, head_channels).transpose(1, 2)
    return functional.pad(heads, (0, excess)) if excess else heads


def _tokens(x: Tensor) -> Tensor:
    """(N, C, *spatial) as (N, voxels, C), without a copy."""
    return x.flatten(2).transpose(1, 2)


def _feature_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(N, voxels, C) as (N, C, *spatial) with the spatial axes and the memory layout of `like`."""
    x = tokens.transpose(1, 2).reshape(like.shape)
    layout = torch.channels_last_3d if like.ndim == 5 else torch.channels_last
    return x if like.is_contiguous(memory_format=layout) else x.contiguous()


class TokenAttention(nn.Module):
    """Self-attention of a sequence: one projection to queries, keys and values, attention, one projection back.

    Args:
        channels: Width of the sequence.
        head_channels: Width of a head; divides `channels`.
        has_qkv_bias: Whether the first projection has a bias.
        dropout: On the output.
    """

    def __init__(self, channels: int, head_channels: int, *, has_qkv_bias: bool, dropout: float = 0.0) -> None:
        super().__init__()
        _check_heads(channels, head_channels)
        self.head_channels = head_channels
        self.qkv = nn.Linear(channels, 3 * channels, bias=has_qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, C) to (N, T, C)."""
        queries, keys, values = self.qkv(tokens).chunk(3, dim=-1)
        out = self.proj(attend(queries, keys, values, self.head_channels))
        return functional.dropout(out, self.dropout, self.training)


class CrossAttention(nn.Module):
    """Attention of a sequence to a condition sequence.

    Args:
        channels: Width of the sequence.
        head_channels: Width of a head; divides `channels`.
        context_channels: Width of the condition sequence.
        dropout: On the output.
    """

    def __init__(self, channels: int, head_channels: int, context_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        _check_heads(channels, head_channels)
        self.head_channels = head_channels
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(context_channels, 2 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.dropout = dropout

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, T, C), condition (N, L, D) and its mask (N, L), True where a token counts, to (N, T, C)."""
        keys, values = self.key_value(context).chunk(2, dim=-1)
        out = self.proj(attend(self.query(tokens), keys, values, self.head_channels, mask))
        return functional.dropout(out, self.dropout, self.training)


class FeedForward(nn.Module):
    """A gated feed-forward layer: half of a projection times the GELU of the other half, projected back.

    Source: Shazeer 2020, GLU variants improve transformer (GEGLU).
    """

    def __init__(self, channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        inner = _FEED_FORWARD_RATIO * channels
        self.gate = nn.Linear(channels, 2 * inner)
        self.proj = nn.Linear(inner, channels)
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, C) to (N, T, C)."""
        values, gates = self.gate(tokens).chunk(2, dim=-1)
        hidden = functional.dropout(values * functional.gelu(gates), self.dropout, self.training)
        out: Tensor = self.proj(hidden)
        return out


class SelfAttention(nn.Module):
    """Self-attention over all voxels of a feature map, added to it: group norm, attention, sum.

    Voxels are told apart by their features alone: permuting them permutes the output.

    Args:
        channels: Of the feature map.
        head_channels: Width of a head; divides `channels`.
        norm_groups: Groups of the normalisation; divides `channels`.
        norm_eps: Added to the variance.

    Source: Ho et al. 2020, DDPM, appendix B (one head); Dhariwal and Nichol 2021 (several).
    """

    def __init__(self, channels: int, head_channels: int, *, norm_groups: int = 32, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, norm_eps, norm_groups)
        self.attention = TokenAttention(channels, head_channels, has_qkv_bias=True)

    def start(self, generator: torch.Generator) -> None:
        """The last projection to zero: at first the feature map comes out as it went in.

        Source: Ho et al. 2020, DDPM (the last layer of every residual branch).
        """
        nn.init.zeros_(self.attention.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to the same."""
        return x + _feature_map(self.attention(_tokens(self.norm(x))), x)


class TransformerLayer(nn.Module):
    """Self-attention, attention to a condition if there is one, a gated feed-forward layer.

    Each is normalised first, and added to what it was given.
    """

    def __init__(self, channels: int, head_channels: int, context_channels: int | None, *, dropout: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(channels)
        self.self_attention = TokenAttention(channels, head_channels, has_qkv_bias=False, dropout=dropout)
        if context_channels is not None:
            self.norm_cross = nn.LayerNorm(channels)
            self.cross_attention = CrossAttention(channels, head_channels, context_channels, dropout=dropout)
        self.norm_feed = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, dropout=dropout)

    def forward(self, tokens: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """(N, T, C) to (N, T, C); with a condition where the layer has one."""
        tokens = tokens + self.self_attention(self.norm_self(tokens))
        if context is not None:
            tokens = tokens + self.cross_attention(self.norm_cross(tokens), context, mask)
        return cast("Tensor", tokens + self.feed_forward(self.norm_feed(tokens)))


class SpatialTransformer(nn.Module):
    """Transformer layers over all voxels of a feature map, with attention to a condition sequence; added to the map.

    Args:
        dims: 2 or 3 spatial axes.
        channels: Of the feature map, and width of the layers.
        head_channels: Width of a head; divides `channels`.
        depth: Number of layers.
        context_channels: Width of the condition sequence; None for layers without condition.
        norm_groups: Groups of the normalisation in front; divides `channels`.
        norm_eps: Added to its variance.
        dropout: After attention and in the feed-forward layers.
        has_linear_projection: Whether the projections in front of and after the layers are linear layers on the
            sequence, or 1x1 convolutions on the map: the same numbers, weights of another shape.

    Source: Rombach et al. 2022, latent diffusion, section 3.3 and appendix E.2.1; linear projections as in SDXL.
    """

    def __init__(
        self,
        dims: int,
        channels: int,
        head_channels: int,
        depth: int,
        context_channels: int | None,
        *,
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        has_linear_projection: bool = False,
    ) -> None:
        super().__init__()
        self.context_channels = context_channels
        self.has_linear_projection = has_linear_projection
        self.norm = GroupNorm(channels, norm_eps, norm_groups)
        self.proj_in = _projection(dims, channels, has_linear_projection)
        self.layers = nn.ModuleList(
            TransformerLayer(channels, head_channels, context_channels, dropout=dropout) for _ in range(depth)
        )
        self.proj_out = _projection(dims, channels, has_linear_projection)

    def start(self, generator: torch.Generator) -> None:
        """The last projection to zero: at first the feature map comes out as it went in.

        Source: Ho et al. 2020, DDPM (the last layer of every residual branch).
        """
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (N, C, *spatial).
            context: (N, L, D) condition sequence; given if and only if the transformer was built for one.
            mask: (N, L) bool, True where a token of the condition counts; None for all.

        Returns:
            As `x`.

        Raises:
            ValueError: The condition is missing, superfluous, or of another width.
        """
        width = None if context is None else context.shape[-1]
        if width != self.context_channels:
            raise ValueError(
                f"the condition sequence has {width or 'no'} channels, the network was built for "
                f"{self.context_channels or 'no'} channels: give context (batch, length, channels) accordingly"
            )
        normed = self.norm(x)
        tokens = self.proj_in(_tokens(normed)) if self.has_linear_projection else _tokens(self.proj_in(normed))
        for layer in self.layers:
            tokens = layer(tokens, context, mask)
        if self.has_linear_projection:
            return x + _feature_map(self.proj_out(tokens), x)
        added: Tensor = x + self.proj_out(_feature_map(tokens, x))
        return added


class NullCondition(nn.Module):
    """A learned token for "no condition", as classifier-free guidance needs.

    Args:
        context_channels: Width of the condition sequence.

    Source: Ho and Salimans 2021, classifier-free diffusion guidance, section 3.2.
    """

    def __init__(self, context_channels: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(context_channels))

    def forward(
        self, context: Tensor | None, mask: Tensor | None, batch_size: int, is_null: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The condition, with the learned token where there is none.

        Every position of a sample without condition becomes the token: equal tokens attend as one.

        Args:
            context: (N, L, D), or None for no condition at all.
            mask: (N, L) bool, True where a token counts; None for all. A sample without any has no condition.
            batch_size: N.
            is_null: (N,) bool, True for samples whose condition is to be left out; None for none.

        Returns:
            A condition (N, L, D), L = 1 where none was given, and its mask (N, L) or None.
        """
        if context is None:
            return self.token.expand(batch_size, 1, -1), None
        absent = is_null
        if mask is not None:
            empty = ~mask.any(dim=1)
            absent = empty if is_null is None else is_null | empty
            mask = mask | absent[:, None]
        if absent is None:
            return context, mask
        return torch.where(absent[:, None, None], self.token.to(context.dtype), context), mask


class AttentionGate(nn.Module):
    """Weighs each voxel of a skip by what the decoder knows from below.

    Args:
        dims: 2 or 3 spatial axes.
        skip_channels: Of the skip.
        gate_channels: Of the decoder's feature map.
        inner_channels: Of the features that both are brought to and compared in.

    Source: Oktay et al. 2018, Attention U-Net, equations 1 and 2. There the comparison is on the coarse grid and its
    result is interpolated; here the coarse features are, so that the weights can follow fine edges.
    """

    def __init__(self, dims: int, skip_channels: int, gate_channels: int, inner_channels: int) -> None:
        super().__init__()
        layer = convolution(dims)
        self.skip = layer(skip_channels, inner_channels, 1, bias=False)
        self.gate = layer(gate_channels, inner_channels, 1)
        self.weight = layer(inner_channels, 1, 1)
        self.mode = _LINEAR_MODES[dims]

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        """Skip (N, C, *spatial) and gate (N, G, *spatial or coarser) to the weighed skip."""
        known = self.gate(gate)
        if known.shape[2:] != skip.shape[2:]:
            known = functional.interpolate(known, size=skip.shape[2:], mode=self.mode)
        weights = torch.sigmoid(self.weight(functional.relu(self.skip(skip) + known)))
        return skip * weights


def _projection(dims: int, channels: int, is_linear: bool) -> nn.Linear | nn.Conv2d | nn.Conv3d:
    if is_linear:
        return nn.Linear(channels, channels)
    return nn.Conv3d(channels, channels, 1) if dims == 3 else nn.Conv2d(channels, channels, 1)


def _check_heads(channels: int, head_channels: int) -> None:
    if head_channels < 1 or channels % head_channels:
        raise ValueError(f"heads of {head_channels} channels do not divide the {channels} channels they share")
