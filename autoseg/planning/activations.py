"""How much a training step holds in memory, counted in activations.

The count is nnU-Net's: comparable between networks of one family and calibrated by the planner's constants, not bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

Ints = tuple[int, ...]

_CONVS_OF_RESIDUAL_BLOCK = 2


def stage_sizes(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[Ints, ...]:
    """Voxels per axis of the feature maps of each stage, finest first."""
    sizes = []
    size = tuple(patch_size)
    for stride in strides:
        size = tuple(edge // step for edge, step in zip(size, stride, strict=True))
        sizes.append(size)
    return tuple(sizes)


def _maps_of_encoder(
    strides: Sequence[Sequence[int]], features: Sequence[int], blocks: Sequence[int], block: Literal["conv", "residual"]
) -> Ints:
    """Per stage, how often its convolutions write a map of the stage's width and size.

    A residual encoder begins with a convolution of its own (the stem). Each of its blocks is two convolutions; the
    first block of a stage counts one more for its shortcut where width or size change.
    """
    if block == "conv":
        return tuple(blocks)
    maps = []
    for stage, count in enumerate(blocks):
        before = features[max(stage - 1, 0)]
        changes = before != features[stage] or max(strides[stage]) > 1
        maps.append(_CONVS_OF_RESIDUAL_BLOCK * count + changes + (stage == 0))
    return tuple(maps)


def count_activations(
    patch_size: Sequence[int],
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    blocks_encoder: Sequence[int],
    blocks_decoder: Sequence[int],
    num_outputs: int,
    encoder_block: Literal["conv", "residual"] = "conv",
) -> int:
    """Numbers that the convolutions of a U-Net write for one sample.

    Counted are the outputs of every encoder convolution, of the up-convolution and every convolution of each decoder
    stage, and of the head at full resolution. Heads of deep supervision, norms, activations, weights and gradients are
    not counted: the planner's limits were fitted without them.

    Args:
        patch_size: Voxels per axis, divisible by the strides.
        strides: Per stage, finest first.
        features: Channels per stage.
        blocks_encoder: Blocks per stage.
        blocks_decoder: Convolutions per decoder stage, by the stage it ends on, finest first (one fewer).
        num_outputs: Channels of the head.
        encoder_block: What the encoder is made of.

    Source: nnU-Net 2.8, where the planner builds the network for this estimate without deep supervision.
    """
    voxels = [prod(size) for size in stage_sizes(patch_size, strides)]
    maps = _maps_of_encoder(strides, features, blocks_encoder, encoder_block)
    encoder = sum(count * width * voxel for count, width, voxel in zip(maps, features, voxels, strict=True))
    levels = zip(blocks_decoder, features[:-1], voxels[:-1], strict=True)
    decoder = sum((count + 1) * width * voxel for count, width, voxel in levels)
    head = num_outputs * voxels[0] if len(voxels) > 1 else 0
    return encoder + decoder + head
