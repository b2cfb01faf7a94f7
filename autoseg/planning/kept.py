"""What a training step keeps for its backward pass, tensor by tensor, and how many weights a network has.

Written beside the layers of `network` and the loss of `training`, which it must follow: a test compares it with what
autograd saves, to the byte.
"""

from __future__ import annotations

from math import prod

from autoseg.domain.network_plan import Ints, NetworkPlan

FLOAT32_BYTES = 4
HALF_BYTES = 2
INDEX_BYTES = 8
"""Class indices in the loss and positions in a max pooling are 64-bit integers."""

_OVERWRITING = ("relu", "leaky_relu")
"""Activations that overwrite what they get: their output alone is kept, and the next convolution keeps the same."""

_UNKNOWN_LAYERS = (
    "decoder_block",
    "conv_channels",
    "has_stage_shortcuts",
    "squeezes",
    "has_middle",
    "dropout",
    "downsampling_widens",
    "upsampled_channels",
    "has_active_resampling",
    "resamples_in_blocks",
    "skips",
    "skip_join",
    "head",
    "condition",
    "checkpointed_stages",
)
"""Fields of a network that must have their defaults for the count to know its layers."""


def is_known(network: NetworkPlan) -> bool:
    """Whether every layer of a network is known here: those of the segmentation networks that the planner makes.

    Known are convolution and residual blocks, with every kind of step down, transposed or interpolating steps up, and
    concatenated skips.
    """
    defaults = NetworkPlan.model_fields
    return (
        all(getattr(network, name) == defaults[name].default for name in _UNKNOWN_LAYERS)
        and network.encoder_block in ("conv", "residual")
        and network.norm != "layer"
        and network.activation != "prelu"
        and network.upsampling != "pixel_shuffle"
        and not network.has_attention
    )


class Ledger:
    """The network gone through layer by layer, adding up.

    Args:
        network: One that `is_known`.
        batch_size: Samples.
        is_half: Whether features are 16-bit numbers (weights are float32 in any case).
        pools_in_float32: Whether 3D pooling makes 16-bit features float32 first, as PyTorch's autocast on the CPU does.

    Attributes:
        kept_bytes: What the layers keep, the input image included.
        num_weights: That learn.
        num_convolved: Those of convolutions: in 16 bit a copy of each is kept.
    """

    def __init__(
        self, network: NetworkPlan, batch_size: int, *, is_half: bool = False, pools_in_float32: bool = False
    ) -> None:
        self._network = network
        self._batch_size = batch_size
        self._pools_in_float32 = is_half and pools_in_float32 and network.dims == 3
        self._value_bytes = HALF_BYTES if is_half else FLOAT32_BYTES
        self.kept_bytes = self.num_weights = self.num_convolved = 0
        self._voxels = [prod(network.size_at(stage)) for stage in range(network.num_stages)]
        self._keep(network.in_channels, self._voxels[0])
        if network.has_stem:
            self._conv_block(network.in_channels, network.stem_features, 0)
        for stage in range(network.num_stages):
            self._encoder_stage(stage)
        for level in reversed(range(network.num_levels)):
            self._decoder_level(level)
        features = network.decoder_features or network.features_per_stage
        for level in range(max(network.num_levels, 1) if network.deep_supervision else 1):
            self._convolution(features[level], network.num_classes, (1,), has_bias=True)
        if is_half:
            self.kept_bytes += self.num_convolved * HALF_BYTES

    def _keep(self, channels: int, voxels: int) -> None:
        self.kept_bytes += self._batch_size * channels * voxels * self._value_bytes

    def _convolution(self, channels: int, given: int, kernel: Ints, *, has_bias: bool) -> None:
        products = channels * given * prod(kernel)
        self.num_convolved += products
        self.num_weights += products + (given if has_bias else 0)

    def _norm(self, channels: int, voxels: int) -> None:
        """Keeps its input, and a mean and a deviation for whatever it normalises over."""
        kind = self._network.norm
        if kind == "none":
            return
        groups = {"instance": channels, "group": self._network.num_norm_groups}
        statistics = self._batch_size * groups[kind] if kind in groups else channels
        self.num_weights += 2 * channels
        self._keep(channels, voxels)
        self.kept_bytes += 2 * statistics * FLOAT32_BYTES

    def _activation(self, channels: int, voxels: int) -> None:
        """Its output is kept by the next layer in any case."""
        self._keep(channels, voxels)
        if self._network.activation not in _OVERWRITING:
            self._keep(channels, voxels)

    def _conv_block(self, channels: int, given: int, stage: int) -> None:
        network, voxels = self._network, self._voxels[stage]
        self._convolution(channels, given, network.kernel_sizes[stage], has_bias=network.has_conv_bias)
        self._norm(given, voxels)
        self._activation(given, voxels)

    def _pooling(self, channels: int, stage: int) -> None:
        """What it keeps of its input, beyond what other layers keep anyway."""
        if self._pools_in_float32:
            self.kept_bytes += self._batch_size * channels * self._voxels[stage - 1] * FLOAT32_BYTES

    def _residual_block(self, channels: int, given: int, stage: int, *, is_first: bool) -> None:
        network, voxels = self._network, self._voxels[stage]
        is_strided = stage > 0 and is_first and not network.has_down_layers
        is_pooled_in_float32 = stage > 0 and is_first and self._pools_in_float32 and "pool" in network.downsampling
        self._conv_block(channels, given, stage)
        self._convolution(given, given, network.kernel_sizes[stage], has_bias=network.has_conv_bias)
        self._norm(given, voxels)
        if is_strided:
            self._pooling(channels, stage)
        if channels != given:
            if is_strided or is_pooled_in_float32:
                self._keep(channels, voxels)  # the mean over the stride, or another copy of it in 16 bit
            self._convolution(channels, given, (1,), has_bias=False)
            self._norm(given, voxels)
        self._activation(given, voxels)

    def _encoder_stage(self, stage: int) -> None:
        network = self._network
        channels, features = network.channels_into(stage), network.features_per_stage[stage]
        if stage > 0 and network.has_down_layers:
            self._step_down(stage)
        for index in range(network.blocks_per_stage_encoder[stage]):
            if network.encoder_block == "residual":
                self._residual_block(channels, features, stage, is_first=index == 0)
            else:
                self._conv_block(channels, features, stage)
            channels = features

    def _step_down(self, stage: int) -> None:
        """A layer of its own, whose output the next convolution keeps."""
        network, voxels = self._network, self._voxels[stage]
        channels, given = network.features_per_stage[stage - 1], network.channels_into(stage)
        self._keep(given, voxels)
        if network.downsampling != "strided_layer":
            self._pooling(channels, stage)
        if network.downsampling == "max_pool":
            self.kept_bytes += self._batch_size * channels * voxels * INDEX_BYTES
        elif network.downsampling == "strided_layer":
            is_whole = network.downsampling_kernel == "stride"
            kernel = network.strides[stage] if is_whole else network.kernel_sizes[stage]
            self._convolution(channels, given, kernel, has_bias=True)

    def _decoder_level(self, level: int) -> None:
        network, voxels = self._network, self._voxels[level]
        below, given = network.features_below(level), network.upsampled_features(level)
        if network.upsampling == "transposed":
            self._convolution(below, given, network.strides[level + 1], has_bias=network.has_up_bias)
        else:
            kernel = (network.upsampling_kernel,) * network.dims
            self._convolution(below, given, kernel, has_bias=network.has_up_bias)
            if network.upsampling_kernel > 1:
                self._keep(below, voxels)  # interpolated in front of the convolution
        channels = given + sum(network.skip_channels(level))
        self._keep(channels, voxels)
        for _ in range(network.blocks_per_stage_decoder[level]):
            self._conv_block(channels, network.decoder_features[level], level)
            channels = network.decoder_features[level]


def loss_bytes(network: NetworkPlan, batch_size: int, *, batch_dice: bool) -> int:
    """What Dice + cross-entropy keeps, over every output of deep supervision that has a weight.

    Of classes: log-probabilities and probabilities in float32, the labels as indices, and masks. Of regions: logits and
    probabilities in float32, and masks.
    """
    num_outputs = max(network.num_levels, 1) if network.deep_supervision else 1
    outputs = network.num_classes
    if network.output == "regions":
        scored, labels, weights = outputs, 0, 0
    else:
        # Dice leaves the background out; the cross-entropy keeps its sum of weights.
        scored, labels, weights = outputs - 1, INDEX_BYTES, FLOAT32_BYTES
    a_voxel = outputs * FLOAT32_BYTES + scored * FLOAT32_BYTES + labels + scored + 1
    # A numerator and a denominator of Dice for each class; the number of voxels of the cross-entropy.
    a_level = 2 * (1 if batch_dice else batch_size) * scored * FLOAT32_BYTES + weights + INDEX_BYTES
    return sum(
        batch_size * prod(network.size_at(level)) * a_voxel + a_level
        # The coarsest output has the weight 0.
        for level in range(max(num_outputs - 1, 1))
    )
