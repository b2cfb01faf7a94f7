"""How much a training step holds in memory, counted in activations.

The count is nnU-Net's: comparable between networks of one family and calibrated by the planner's constants, not bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod


def stage_sizes(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Voxels per axis of the feature maps of each stage, finest first."""
    sizes = []
    size = tuple(patch_size)
    for stride in strides:
        size = tuple(edge // step for edge, step in zip(size, stride, strict=True))
        sizes.append(size)
    return tuple(sizes)


def count_activations(
    patch_size: Sequence[int],
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    convs_encoder: Sequence[int],
    convs_decoder: Sequence[int],
    num_outputs: int,
) -> int:
    """Numbers that convolutions of a plain U-Net write for one sample.

    Counted are the outputs of every encoder convolution, of the up-convolution and every convolution of each decoder
    stage, and of the head at full resolution. Heads of deep supervision, norms, activations, weights and gradients are
    not counted: the planner's limits were fitted without them.

    Args:
        patch_size: Voxels per axis, divisible by the strides.
        strides: Per stage, finest first.
        features: Channels per stage.
        convs_encoder: Convolutions per stage.
        convs_decoder: Convolutions per decoder stage, by the stage it ends on, finest first (one fewer).
        num_outputs: Channels of the head.

    Source: nnU-Net 2.8, where the planner builds the network for this estimate without deep supervision.
    """
    voxels = [prod(size) for size in stage_sizes(patch_size, strides)]
    encoder = sum(count * width * voxel for count, width, voxel in zip(convs_encoder, features, voxels, strict=True))
    levels = zip(convs_decoder, features[:-1], voxels[:-1], strict=True)
    decoder = sum((count + 1) * width * voxel for count, width, voxel in levels)
    head = num_outputs * voxels[0] if len(voxels) > 1 else 0
    return encoder + decoder + head
