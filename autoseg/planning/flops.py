"""How much a training step computes, in closed form: the operations of its convolutions.

With the speed of a machine, measured on such convolutions, this gives the seconds of a step. Norms, activations, loss,
augmentation and optimiser are not counted: their share is in the measured speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

from autoseg.domain.network_plan import BlockKind, NetworkPlan
from autoseg.planning.activations import stage_sizes

Ints = tuple[int, ...]

OPERATIONS_OF_A_PRODUCT = 2
"""A multiplication and an addition."""

PASSES_OF_A_STEP = 3
"""Forward, gradient of the input and gradient of the weights: each is as many products as the forward pass.

The first convolution needs no gradient of its input. Source: Goodfellow et al. 2016, Deep Learning, section 9.5."""


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """What the count depends on. Tuples per stage are finest first.

    Attributes:
        patch_size: Voxels per axis, divisible by the strides.
        blocks_encoder: Blocks per stage.
        blocks_decoder: Convolutions per decoder stage (one stage fewer).
        num_classes: Channels of every head.
        deep_supervision: Whether each decoder stage has a head; else only the finest.
    """

    in_channels: int
    num_classes: int
    patch_size: Ints
    features: Ints
    strides: tuple[Ints, ...]
    kernel_sizes: tuple[Ints, ...]
    encoder_block: BlockKind
    blocks_encoder: Ints
    blocks_decoder: Ints
    deep_supervision: bool = True

    @classmethod
    def of(cls, network: NetworkPlan) -> Self:
        """Of a network as the planner makes them: strided and transposed convolutions, concatenated skips."""
        return cls(
            in_channels=network.in_channels,
            num_classes=network.num_classes,
            patch_size=network.patch_size,
            features=network.features_per_stage,
            strides=network.strides,
            kernel_sizes=network.kernel_sizes,
            encoder_block=network.encoder_block,
            blocks_encoder=network.blocks_per_stage_encoder,
            blocks_decoder=network.blocks_per_stage_decoder,
            deep_supervision=network.deep_supervision,
        )


def _encoder_products(shape: NetworkShape, voxels: Sequence[int]) -> Iterator[int]:
    """Products of each encoder convolution, in order."""
    width_before = shape.in_channels
    for stage, width in enumerate(shape.features):
        kernel = prod(shape.kernel_sizes[stage])
        if shape.encoder_block != "conv":
            if stage == 0:
                yield kernel * width_before * width * voxels[stage]
                width_before = width
            elif width_before != width:
                yield width_before * width * voxels[stage]  # the shortcut, 1 wide
        convs = shape.blocks_encoder[stage] * (1 if shape.encoder_block == "conv" else 2)
        for _ in range(convs):
            yield kernel * width_before * width * voxels[stage]
            width_before = width


def _decoder_products(shape: NetworkShape, voxels: Sequence[int]) -> Iterator[int]:
    """Products of each convolution of the decoder and of each head."""
    for stage, count in enumerate(shape.blocks_decoder):
        width, below = shape.features[stage], shape.features[stage + 1]
        yield below * width * voxels[stage]  # transposed convolution: kernel = stride, so one product an output
        kernel = prod(shape.kernel_sizes[stage])
        for number in range(count):
            yield kernel * (2 * width if number == 0 else width) * width * voxels[stage]
        if stage == 0 or shape.deep_supervision:
            yield width * shape.num_classes * voxels[stage]


def count_forward_flops(shape: NetworkShape) -> int:
    """Operations of the forward pass of one sample."""
    voxels = [prod(size) for size in stage_sizes(shape.patch_size, shape.strides)]
    products = sum(_encoder_products(shape, voxels)) + sum(_decoder_products(shape, voxels))
    return OPERATIONS_OF_A_PRODUCT * products


def count_training_flops(shape: NetworkShape) -> int:
    """Operations of the forward and backward passes of one sample."""
    voxels = [prod(size) for size in stage_sizes(shape.patch_size, shape.strides)]
    first = next(_encoder_products(shape, voxels))
    return PASSES_OF_A_STEP * count_forward_flops(shape) - OPERATIONS_OF_A_PRODUCT * first
