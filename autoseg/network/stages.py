"""The stages of a U-Net: blocks of one resolution, with the step into it and the attention after each block.

An encoder stage gives the features after its step and after each block; which of them are skips is the network's
choice. A decoder level takes as many skips as its plan says, each in front of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from autoseg.domain.network_plan import BlockKind, Ints, NetworkPlan
from autoseg.network.attention import AttentionGate, SelfAttention, SpatialTransformer
from autoseg.network.blocks import BLOCKS, Block, ConvBlock, PreactivationBlock, convolution
from autoseg.network.norms import activation
from autoseg.network.resampling import step_down, step_up

GATE_RATIO = 2
"""Channels of a skip over those in which an attention gate compares. Source: Oktay et al. 2018, section 3.1."""


class Cues(NamedTuple):
    """What a network is told beside the image.

    Attributes:
        embedding: (N, E) for every block, or None.
        context: (N, L, D) for the cross-attention, or None.
        mask: (N, L), True where a token of the context counts; None for everywhere.
    """

    embedding: Tensor | None = None
    context: Tensor | None = None
    mask: Tensor | None = None


def _attention(plan: NetworkPlan, stage: int, channels: int, depth: int) -> nn.Module:
    chosen, head_channels = plan.attention, plan.head_channels(stage, channels)
    if chosen.kind == "self":
        return SelfAttention(channels, head_channels, norm_groups=chosen.num_norm_groups, norm_eps=chosen.norm_eps)
    return SpatialTransformer(
        plan.dims,
        channels,
        head_channels,
        depth,
        chosen.context_channels,
        norm_groups=chosen.num_norm_groups,
        norm_eps=chosen.norm_eps,
        dropout=plan.dropout,
        has_linear_projection=chosen.has_linear_projection,
    )


def _attentions(plan: NetworkPlan, stage: int, channels: Ints) -> nn.ModuleList:
    """One after each block of a chosen stage, none elsewhere."""
    if stage not in plan.attention_stages:
        return nn.ModuleList()
    return nn.ModuleList(_attention(plan, stage, count, plan.transformer_depth(stage)) for count in channels)


def _attend(attention: nn.Module, x: Tensor, cues: Cues) -> Tensor:
    attended: Tensor = attention(x, *(cues[1:] if isinstance(attention, SpatialTransformer) else ()))
    return attended


def _step(layer: nn.Module, x: Tensor, cues: Cues) -> Tensor:
    out: Tensor = layer(x, cues.embedding) if isinstance(layer, PreactivationBlock) else layer(x)
    return out


class StageShortcut(nn.Module):
    """Adds the input of a stage to the output of its convolutions, then the activation.

    An input with fewer channels is repeated where they divide, else brought up by a 1x1 convolution.

    Source: Milletari et al. 2016, V-Net, section 2.
    """

    def __init__(self, plan: NetworkPlan, in_channels: int, out_channels: int) -> None:
        super().__init__()
        repeats = out_channels // in_channels if out_channels % in_channels == 0 else 0
        self.repeats = repeats
        self.conv = None if repeats else convolution(plan.dims)(in_channels, out_channels, 1)
        self.activation = activation(plan, out_channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Input (N, C, *spatial) and output (N, K, *spatial) of the convolutions to (N, K, *spatial)."""
        if self.conv is not None:
            x = self.conv(x)
        elif self.repeats > 1:
            x = x.repeat(1, self.repeats, *(1,) * (x.ndim - 2))
        out: Tensor = self.activation(y + x)
        return out


def _blocks(
    plan: NetworkPlan, kind: BlockKind, stage: int, channels: Sequence[tuple[int, int]], stride: Ints | None = None
) -> list[Block]:
    """A block for each pair of channels in and out; the first takes the stride.

    With a shortcut around the stage, the last block leaves the activation to it.
    """
    kernel = plan.kernel_sizes[stage]
    strides = [stride, *(None for _ in channels[1:])]
    made = [BLOCKS[kind](plan, *pair, kernel, step) for pair, step in zip(channels, strides, strict=True)]
    if plan.has_stage_shortcuts:
        made[-1] = ConvBlock(plan, *channels[-1], kernel, strides[-1], ends_with="norm")
    return made


class EncoderStage(nn.Module):
    """The blocks of one resolution, with the step down into it.

    The blocks are the children named "0", "1", ... Other children: `down`, `attentions`, `shortcut`.
    """

    def __init__(self, plan: NetworkPlan, stage: int) -> None:
        super().__init__()
        self.down = step_down(plan, stage)
        channels, given = plan.channels_into(stage), plan.block_channels(stage)
        stride = None if plan.has_down_layers or stage == 0 else plan.strides[stage]
        pairs = list(zip((channels, *given), given, strict=False))
        for index, block in enumerate(_blocks(plan, plan.encoder_block, stage, pairs, stride)):
            self.add_module(str(index), block)
        self.num_blocks = len(given)
        self.gives_each = plan.skips == "block"
        self.attentions = _attentions(plan, stage, given)
        self.shortcut = StageShortcut(plan, channels, given[-1]) if plan.has_stage_shortcuts else None

    def forward(self, x: Tensor, cues: Cues) -> tuple[Tensor, list[Tensor]]:
        """The stage's features and its skips: the features alone, or what the step down and each block gave."""
        given = []
        if self.down is not None:
            x = _step(self.down, x, cues)
            if self.gives_each:
                given.append(x)
        start = x if self.shortcut is not None else None
        for index in range(self.num_blocks):
            x = getattr(self, str(index))(x, cues.embedding)
            if index < len(self.attentions):
                x = _attend(self.attentions[index], x, cues)
            if self.gives_each:
                given.append(x)
        if self.shortcut is not None and start is not None:
            x = self.shortcut(start, x)
        return x, given or [x]


class Middle(nn.Module):
    """Block, attention where planned, block, on the coarsest stage.

    Source: Ho et al. 2020, appendix B.
    """

    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        stage, features = plan.num_stages - 1, plan.features_per_stage[-1]
        make = BLOCKS[plan.encoder_block]
        self.first = make(plan, features, features, plan.kernel_sizes[stage])
        self.attention = _attention(plan, stage, features, plan.middle_depth) if plan.attention.in_middle else None
        self.second = make(plan, features, features, plan.kernel_sizes[stage])

    def forward(self, x: Tensor, cues: Cues) -> Tensor:
        """(N, C, *spatial) to the same."""
        x = self.first(x, cues.embedding)
        if self.attention is not None:
            x = _attend(self.attention, x, cues)
        out: Tensor = self.second(x, cues.embedding)
        return out


class Join(nn.Module):
    """Where a skip enters the decoder.

    Args:
        plan: The network.
        channels: Of the decoder's features.
        skip_channels: Of the skip.
        gate_channels: Of the features that weigh it.

    Attributes:
        channels: What it gives.
    """

    def __init__(self, plan: NetworkPlan, channels: int, skip_channels: int, gate_channels: int) -> None:
        super().__init__()
        is_sum = plan.skip_join == "add"
        self.channels = channels if is_sum else channels + skip_channels
        self.is_sum = is_sum
        self.project = (
            convolution(plan.dims)(skip_channels, channels, 1) if is_sum and skip_channels != channels else None
        )
        inner = max(skip_channels // GATE_RATIO, 1)
        self.gate = AttentionGate(plan.dims, skip_channels, gate_channels, inner) if plan.skip_join == "gate" else None

    def forward(self, x: Tensor, skip: Tensor, below: Tensor) -> Tensor:
        """Features (N, C, *spatial), skip (N, S, *spatial) and the features in front of the step up to one tensor."""
        if self.gate is not None:
            skip = self.gate(skip, below)
        if self.project is not None:
            skip = self.project(skip)
        return x + skip if self.is_sum else torch.cat((x, skip), dim=1)


class DecoderLevel(nn.Module):
    """One step up (none at the coarsest stage), then blocks, with a skip in front of the first or of each."""

    def __init__(self, plan: NetworkPlan, level: int) -> None:
        super().__init__()
        self.up = step_up(plan, level)
        channels, given = plan.upsampled_features(level), plan.decoder_features[level]
        joins, pairs = [], []
        # The features that weigh a skip: those in front of the step up, later those of the block before.
        gate, skips = plan.features_below(level), plan.skip_channels(level)
        for index in range(plan.blocks_per_stage_decoder[level]):
            if index < len(skips):
                joins.append(Join(plan, channels, skips[index], gate))
                channels = joins[-1].channels
            pairs.append((channels, given))
            channels = gate = given
        self.joins = nn.ModuleList(joins)
        self.blocks = nn.ModuleList(_blocks(plan, plan.decoder_block, level, pairs))
        self.attentions = _attentions(plan, level, (given,) * len(pairs))
        self.shortcut = StageShortcut(plan, pairs[0][0], given) if plan.has_stage_shortcuts else None

    def forward(self, x: Tensor, skips: list[Tensor], cues: Cues) -> Tensor:
        """`x` from the level below; `skips` in the order of the blocks, emptied on the way to free their memory."""
        gate = x
        if self.up is not None:
            x = _step(self.up, x, cues)
        start = None
        for index, block in enumerate(self.blocks):
            if index < len(self.joins):
                x = self.joins[index](x, skips.pop(0), gate)
            if index == 0 and self.shortcut is not None:
                start = x
            x = gate = block(x, cues.embedding)
            if index < len(self.attentions):
                x = gate = _attend(self.attentions[index], x, cues)
        if self.shortcut is not None and start is not None:
            x = self.shortcut(start, x)
        return x
