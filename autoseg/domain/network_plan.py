"""The U-Net of a plan: everything that the network is built from.

One value describes the whole family, from the U-Net of 2015 over nnU-Net's two encoders to the U-Nets of diffusion
models. What is left at its default is nnU-Net's plain U-Net. Stages count from the finest (0) to the coarsest; every
tuple over stages is in this order, every tuple over axes in the one array-axis order of the plan (see
`PreprocessPlan.axis_order`). What cannot be built is refused here, by the rules of `network_rules`.
"""

from __future__ import annotations

from math import prod
from typing import Literal, Self

from pydantic import Field, model_validator

from autoseg.domain import network_rules
from autoseg.domain.values import Value

Ints = tuple[int, ...]
Floats = tuple[float, ...]

BlockKind = Literal["conv", "residual", "preactivation"]
NormKind = Literal["instance", "group", "batch", "layer", "none"]
ActivationKind = Literal["relu", "leaky_relu", "gelu", "silu", "prelu"]
DownsamplingKind = Literal["strided", "max_pool", "average_pool", "strided_layer"]
UpsamplingKind = Literal["transposed", "linear", "nearest", "pixel_shuffle"]
JoinKind = Literal["concatenate", "add", "gate"]


class AttentionPlan(Value):
    """Where a network attends, and how: a layer of attention after every block of the chosen stages.

    Attributes:
        kind: "self": every position attends to all others of its feature map. "transformer": `depths` layers of
            self-attention, cross-attention to the condition sequence (where there is one) and a feed-forward part.
        stages: Chosen stages, by number.
        resolutions: Chosen stages, by the longest axis of their feature map when the input is one patch.
        num_heads: Heads, one entry for all stages or one a stage of the network; empty where `head_channels` says it.
        head_channels: Channels of a head, likewise; empty where `num_heads` says it.
        depths: Transformer layers, one entry for all stages or one a stage of the network.
        in_middle: Whether the middle block has attention.
        middle_depth: Transformer layers of the middle block; None: those of the coarsest stage.
        context_channels: Channels D of the condition sequence (B, L, D); None: no cross-attention.
        num_norm_groups: Groups of the group norm in front of the attention.
        norm_eps: Added to the variance there.
        has_linear_projection: Whether a transformer projects tokens with a linear layer instead of a 1x1 convolution:
            the same numbers and as many parameters, the weights are matrices.
    """

    kind: Literal["self", "transformer"] = "self"
    stages: Ints = ()
    resolutions: Ints = ()
    num_heads: Ints = ()
    head_channels: Ints = ()
    depths: Ints = (1,)
    in_middle: bool = True
    middle_depth: int | None = Field(default=None, ge=1)
    context_channels: int | None = Field(default=None, ge=1)
    num_norm_groups: int = Field(default=32, ge=1)
    norm_eps: float = Field(default=1e-6, gt=0)
    has_linear_projection: bool = False


class ConditionPlan(Value):
    """What every block is told beside the image: the time step, vectors, a class, as one embedding.

    Attributes:
        kind: How a block takes it: "add" to its features, or "scale_shift" of its normalised features.
        time_channels: Channels of the sinusoids of the time step; None: as many as the finest stage has features.
        embedding_channels: Channels of the embedding; None: four times `time_channels`.
        sinusoid: Which half of the sinusoids comes first.
        frequency_shift: Taken off the number of frequencies: 1 makes the last one exactly 1 / period (Ho et al. 2020).
        vector_channels: Channels of each vector condition, which goes through an MLP of its own.
        num_classes: Classes of the class condition (a learned table); 0: none.
    """

    kind: Literal["add", "scale_shift"] = "add"
    time_channels: int | None = Field(default=None, ge=2)
    embedding_channels: int | None = Field(default=None, ge=1)
    sinusoid: Literal["cos_sin", "sin_cos"] = "cos_sin"
    frequency_shift: Literal[0, 1] = 0
    vector_channels: Ints = ()
    num_classes: int = Field(default=0, ge=0)


class NetworkPlan(Value):
    """A U-Net.

    Attributes:
        in_channels: Channels of the input.
        num_classes: Channels of the output: classes, background included, or what `output` says.
        output: "classes", of which a voxel has one; "regions", of which it may have several, without a background; or
            "channels" of something else (an image, noise, a velocity).
        patch_size: Two or three entries; the number of entries is the dimension of the network.
        features_per_stage: Channels of each resolution stage, finest first.
        strides: Per stage, the step *into* it; the first is all ones.
        kernel_sizes: Per stage.
        blocks_per_stage_encoder: Blocks in each encoder stage.
        blocks_per_stage_decoder: Blocks in each decoder stage, finest first: one stage fewer than in the encoder, or,
            with `skips` a block, as many stages, each with one block more than in the encoder.
        encoder_block: What an encoder stage is made of. "conv": convolution, norm, activation. "residual": two of
            them with a shortcut around both, the second activation after the sum, as in nnU-Net's residual encoder;
            a stem in front of the first stage. "preactivation": norm, activation, convolution, twice, and a shortcut,
            as in diffusion models; a bare convolution as the stem.
        decoder_block: The same for the decoder.
        conv_channels: Channels of each convolution of each encoder stage, the last as in `features_per_stage`; empty:
            all of a stage alike. Needs encoder_block "conv".
        stem_channels: Channels of the stem; None: those of the first stage.
        decoder_features_per_stage: Channels of each decoder stage; empty: those of the encoder.
        has_stage_shortcuts: Whether the input of a stage is added to the output of its convolutions (V-Net).
        squeezes: Whether residual blocks weigh their channels before the sum (squeeze and excitation).
        has_middle: Whether block, attention (where planned), block follow on the coarsest encoder stage.
        norm: Normalisation: over the voxels of one channel ("instance"), of a group of channels ("group"), of the
            whole batch ("batch"), or over the channels of one voxel ("layer").
        num_norm_groups: Groups of the group norm.
        norm_eps: Added to the variance.
        activation: Nonlinearity; "prelu" learns a slope a channel.
        dropout: Part of the channels (in preactivation blocks: of the values) that training sets to 0 in each block.
        has_conv_bias: Whether the convolutions of the blocks have a bias (a 1x1 shortcut in front of a norm has none).
        has_up_bias: Whether the convolutions of the steps up have one.
        downsampling: The step into a stage: "strided" is its first convolution (or the first residual block),
            "max_pool" and "average_pool" over the stride, "strided_layer" a convolution that does only this.
        downsampling_kernel: Of a strided layer: that of the stage, or as large as the stride.
        downsampling_widens: Whether a strided layer already gives the channels of its stage.
        upsampling: The step up: a transposed convolution with kernel = stride, interpolation and a convolution, or a
            convolution whose channels are dealt out to finer voxels ("pixel_shuffle").
        upsampling_kernel: Of the convolution of an interpolation, in front of it (1) or after it (3), or of a pixel
            shuffle.
        upsampled_channels: What the step up gives: the channels of the encoder stage it leads to ("level"), or those
            it gets ("below").
        has_active_resampling: Whether norm and activation follow on strided layers and steps up (V-Net).
        resamples_in_blocks: Whether preactivation blocks make the steps down and up, both branches resampled alike
            without a convolution for it; needs pooling and interpolation.
        skips: One a "stage", or one a "block": then the stem and each step down give one too, and each decoder block
            takes one.
        skip_join: How a skip enters: concatenated, added (after a 1x1 convolution where the channels differ), or
            weighed voxel by voxel by what comes from below, then concatenated ("gate": attention gate).
        head: "conv" is a 1x1 convolution, "norm_conv" norm, activation and a convolution with the kernel of stage 0.
        attention: Where the network attends.
        condition: What its blocks are told beside the image; None: nothing.
        has_null_condition: Whether stand-ins for an absent sequence, vector or class are learned, for training and
            guidance without a classifier.
        deep_supervision: Whether training sees an output at every decoder stage.
        checkpointed_stages: Stages (encoder and decoder) whose activations are computed again in the backward pass
            instead of kept: less memory, more time.
    """

    in_channels: int = Field(ge=1)
    num_classes: int = Field(ge=1)
    output: Literal["classes", "regions", "channels"] = "classes"
    patch_size: Ints
    features_per_stage: Ints
    strides: tuple[Ints, ...]
    kernel_sizes: tuple[Ints, ...]
    blocks_per_stage_encoder: Ints
    blocks_per_stage_decoder: Ints
    encoder_block: BlockKind = "conv"
    decoder_block: BlockKind = "conv"
    conv_channels: tuple[Ints, ...] = ()
    stem_channels: int | None = Field(default=None, ge=1)
    decoder_features_per_stage: Ints = ()
    has_stage_shortcuts: bool = False
    squeezes: bool = False
    has_middle: bool = False
    norm: NormKind = "instance"
    num_norm_groups: int = Field(default=32, ge=1)
    norm_eps: float = Field(default=1e-5, gt=0)
    activation: ActivationKind = "leaky_relu"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    has_conv_bias: bool = True
    has_up_bias: bool = True
    downsampling: DownsamplingKind = "strided"
    downsampling_kernel: Literal["stage", "stride"] = "stage"
    downsampling_widens: bool = False
    upsampling: UpsamplingKind = "transposed"
    upsampling_kernel: Literal[1, 3] = 1
    upsampled_channels: Literal["level", "below"] = "level"
    has_active_resampling: bool = False
    resamples_in_blocks: bool = False
    skips: Literal["stage", "block"] = "stage"
    skip_join: JoinKind = "concatenate"
    head: Literal["conv", "norm_conv"] = "conv"
    attention: AttentionPlan = AttentionPlan()
    condition: ConditionPlan | None = None
    has_null_condition: bool = False
    deep_supervision: bool = True
    checkpointed_stages: Ints = ()

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        network_rules.check(self)
        return self

    @property
    def dims(self) -> int:
        """2 or 3."""
        return len(self.patch_size)

    @property
    def num_stages(self) -> int:
        """Resolution stages, the bottleneck included."""
        return len(self.features_per_stage)

    @property
    def num_levels(self) -> int:
        """Decoder stages: one fewer than encoder stages, or as many with a skip a block."""
        return len(self.blocks_per_stage_decoder)

    @property
    def divisors(self) -> Ints:
        """Product of the strides along each axis: inputs must be divisible by it."""
        return self.divisors_at(self.num_stages - 1)

    def divisors_at(self, stage: int) -> Ints:
        """Product of the strides down to a stage, along each axis."""
        return tuple(prod(stride[axis] for stride in self.strides[: stage + 1]) for axis in range(self.dims))

    def size_at(self, stage: int) -> Ints:
        """Size of a stage's feature map when the input is one patch."""
        return tuple(size // step for size, step in zip(self.patch_size, self.divisors_at(stage), strict=True))

    @property
    def has_stem(self) -> bool:
        """Whether a convolution stands in front of the first stage."""
        return self.encoder_block != "conv" or self.skips == "block"

    @property
    def stem_features(self) -> int:
        """Channels that the first stage gets."""
        if not self.has_stem:
            return self.in_channels
        return self.stem_channels or self.features_per_stage[0]

    @property
    def decoder_features(self) -> Ints:
        """Channels of each decoder stage, finest first."""
        return self.decoder_features_per_stage or self.features_per_stage[: self.num_levels]

    @property
    def has_down_layers(self) -> bool:
        """Whether steps down are layers of their own and not part of a convolution."""
        return self.downsampling != "strided"

    def block_channels(self, stage: int) -> Ints:
        """Channels that each block of an encoder stage gives."""
        if self.conv_channels:
            return self.conv_channels[stage]
        return (self.features_per_stage[stage],) * self.blocks_per_stage_encoder[stage]

    def channels_into(self, stage: int) -> int:
        """Channels that the first block of an encoder stage gets."""
        if stage == 0:
            return self.stem_features
        return self.features_per_stage[stage if self.downsampling_widens else stage - 1]

    def features_below(self, level: int) -> int:
        """Channels that a decoder level gets from below, in front of its step up."""
        return self.decoder_features[level + 1] if level + 1 < self.num_levels else self.features_per_stage[-1]

    def upsampled_features(self, level: int) -> int:
        """Channels of a decoder level after its step up."""
        is_kept = self.upsampled_channels == "below" or level == self.num_stages - 1
        return self.features_below(level) if is_kept else self.features_per_stage[level]

    def skip_channels(self, level: int) -> Ints:
        """Channels of the skips of a decoder level, in the order of its blocks: what the encoder made last is first."""
        own = self.block_channels(level)
        return (own[-1],) if self.skips == "stage" else (*reversed(own), self.channels_into(level))

    @property
    def attention_stages(self) -> Ints:
        """Stages with attention, chosen by number or by resolution, finest first."""
        chosen = {stage for stage in range(self.num_stages) if max(self.size_at(stage)) in self.attention.resolutions}
        return tuple(sorted(chosen | set(self.attention.stages)))

    @property
    def has_attention(self) -> bool:
        """Whether any layer attends."""
        return bool(self.attention_stages) or (self.has_middle and self.attention.in_middle)

    @property
    def context_channels(self) -> int | None:
        """Channels of the condition sequence that the network takes; None: it takes none."""
        return self.attention.context_channels if self.has_attention else None

    def head_channels(self, stage: int, channels: int) -> int:
        """Channels of an attention head at a stage whose features have `channels`."""
        if self.attention.head_channels:
            return _entry(self.attention.head_channels, stage)
        return channels // _entry(self.attention.num_heads or (1,), stage)

    def transformer_depth(self, stage: int) -> int:
        """Transformer layers after each block of a stage."""
        return _entry(self.attention.depths, stage)

    @property
    def middle_depth(self) -> int:
        """Transformer layers of the middle block."""
        return self.attention.middle_depth or self.transformer_depth(self.num_stages - 1)

    @property
    def time_channels(self) -> int:
        """Channels of the sinusoids of the time step."""
        given = self.condition.time_channels if self.condition else None
        return given or self.features_per_stage[0]

    @property
    def embedding_channels(self) -> int:
        """Channels of the embedding that every block is told; 0 without one."""
        if self.condition is None:
            return 0
        return self.condition.embedding_channels or 4 * self.time_channels


def _entry(values: Ints, stage: int) -> int:
    """The value of a stage, where one entry stands for all."""
    return values[0] if len(values) == 1 else values[stage]
