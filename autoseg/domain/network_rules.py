"""Which U-Nets can be built: every rule that spans fields of a `NetworkPlan`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoseg.domain.network_plan import Ints, NetworkPlan

MOST_STAGES = 16
"""Stages of the deepest network. Published networks have 2 to 8; nnU-Net's rules plan 10 for large pictures and up to
14 for an axis of tens of thousands of voxels."""


def check(plan: NetworkPlan) -> None:
    """Refuse a network that cannot be built.

    Raises:
        ValueError: What is wrong, got against expected; the first that is found.
    """
    _check_shape(plan)
    _check_patch(plan)
    _check_blocks(plan)
    _check_resampling(plan)
    _check_norms(plan)
    _check_attention(plan)
    _check_condition(plan)
    _check_output(plan)


def _check_shape(plan: NetworkPlan) -> None:
    """Numbers of axes and stages."""
    dims, stages = plan.dims, plan.num_stages
    if dims not in (2, 3) or any(size < 1 for size in plan.patch_size):
        raise ValueError(f"patch_size needs 2 or 3 positive entries, got {plan.patch_size}")
    if not 1 <= stages <= MOST_STAGES or any(features < 1 for features in plan.features_per_stage):
        raise ValueError(f"features_per_stage needs 1 to {MOST_STAGES} positive entries, got {plan.features_per_stage}")
    for name, rows in (("strides", plan.strides), ("kernel_sizes", plan.kernel_sizes)):
        if len(rows) != stages or any(len(row) != dims or min(row) < 1 for row in rows):
            raise ValueError(f"{name} needs {stages} rows of {dims} positive entries, got {rows}")
    if any(size % 2 == 0 for kernel in plan.kernel_sizes for size in kernel):
        raise ValueError(f"kernel sizes must be odd, got {plan.kernel_sizes}")
    if set(plan.strides[0]) != {1}:
        raise ValueError(f"the first stage cannot have a stride, got {plan.strides[0]}")


def _check_patch(plan: NetworkPlan) -> None:
    for axis, (size, divisor) in enumerate(zip(plan.patch_size, plan.divisors, strict=True)):
        if size % divisor:
            raise ValueError(
                f"patch_size[{axis}] = {size} must be divisible by {divisor}, the product of the strides; "
                f"{size // divisor * divisor} or {(size // divisor + 1) * divisor} would be"
            )


def _check_blocks(plan: NetworkPlan) -> None:
    stages, encoder, decoder = plan.num_stages, plan.blocks_per_stage_encoder, plan.blocks_per_stage_decoder
    levels = stages if plan.skips == "block" else stages - 1
    if len(encoder) != stages or len(decoder) != levels or any(count < 1 for count in encoder + decoder):
        raise ValueError(
            f"{stages} stages need {stages} encoder and {levels} decoder entries of at least 1 block, got "
            f"{encoder} and {decoder}"
        )
    if plan.skips == "block" and decoder != tuple(count + 1 for count in encoder):
        raise ValueError(
            f"with a skip a block each decoder stage has one block more than its encoder stage: expected "
            f"{tuple(count + 1 for count in encoder)}, got {decoder}"
        )
    if plan.decoder_features_per_stage and len(plan.decoder_features_per_stage) != levels:
        raise ValueError(f"decoder_features_per_stage needs {levels} entries, got {plan.decoder_features_per_stage}")
    if plan.stem_channels is not None and not plan.has_stem:
        raise ValueError("stem_channels is for residual and preactivation encoders: this encoder has no stem")
    if plan.squeezes and {plan.encoder_block, plan.decoder_block} == {"conv"}:
        raise ValueError("squeezes is for residual and preactivation blocks, got encoder and decoder blocks 'conv'")
    if plan.has_stage_shortcuts and {plan.encoder_block, plan.decoder_block} != {"conv"}:
        raise ValueError(
            f"has_stage_shortcuts is for blocks without shortcuts of their own ('conv'), got {plan.encoder_block!r} "
            f"and {plan.decoder_block!r}"
        )
    if plan.has_stage_shortcuts and plan.skips == "block":
        raise ValueError("has_stage_shortcuts needs a skip a stage, got a skip a block")
    if plan.has_stage_shortcuts and not plan.has_down_layers:
        raise ValueError(
            "has_stage_shortcuts needs steps down that are layers of their own, so that a stage has one size; got "
            "downsampling 'strided'"
        )
    _check_conv_channels(plan)


def _check_conv_channels(plan: NetworkPlan) -> None:
    rows = plan.conv_channels
    if not rows:
        return
    if plan.encoder_block != "conv":
        raise ValueError(f"conv_channels needs encoder_block 'conv', got {plan.encoder_block!r}")
    expected = list(zip(plan.blocks_per_stage_encoder, plan.features_per_stage, strict=True))
    if [(len(row), row[-1] if row else 0) for row in rows] != expected or any(min(row) < 1 for row in rows):
        raise ValueError(
            f"conv_channels needs a row a stage with {plan.blocks_per_stage_encoder} positive entries that end in "
            f"{plan.features_per_stage}, got {rows}"
        )


def _check_resampling(plan: NetworkPlan) -> None:
    is_layer = plan.downsampling == "strided_layer"
    if not is_layer and (plan.downsampling_widens or plan.downsampling_kernel != "stage"):
        raise ValueError(
            "downsampling_kernel and downsampling_widens are for downsampling 'strided_layer', "
            f"got {plan.downsampling!r}"
        )
    if plan.upsampling == "transposed" and plan.upsampling_kernel != 1:
        raise ValueError(
            "a transposed convolution has kernel = stride (a larger one gives checkerboards): leave upsampling_kernel "
            f"at 1, got {plan.upsampling_kernel}"
        )
    if plan.skips == "block" and not plan.has_down_layers:
        raise ValueError("a skip a block needs steps down that are layers of their own, got downsampling 'strided'")
    if not plan.resamples_in_blocks:
        return
    got = (plan.encoder_block, plan.decoder_block, plan.downsampling, plan.upsampling, plan.upsampled_channels)
    if not (
        got[:2] == ("preactivation", "preactivation")
        and got[2] in ("max_pool", "average_pool")
        and got[3] in ("linear", "nearest")
        and got[4] == "below"
    ):
        raise ValueError(
            "resamples_in_blocks needs preactivation blocks, pooling, interpolation and upsampled_channels 'below', "
            f"got {', '.join(got)}"
        )


def _check_norms(plan: NetworkPlan) -> None:
    if plan.norm == "group":
        _check_groups(
            "num_norm_groups",
            plan.num_norm_groups,
            (*plan.features_per_stage, *plan.decoder_features, *_flat(plan.conv_channels), *_stem(plan)),
        )
    if plan.norm == "batch" and plan.condition is not None:
        raise ValueError(
            "norm 'batch' cannot go with a condition: its statistics, gathered over all noise levels of the training, "
            "would depend on the noise level of the batch; expected 'group' (or instance, layer, none)"
        )
    _check_added_condition(plan)
    if plan.norm == "batch" and plan.checkpointed_stages:
        raise ValueError(
            "norm 'batch' cannot go with checkpointed_stages: computing a stage again would count its batch twice in "
            "the running statistics; expected another norm or no checkpointed stages"
        )
    if any(not 0 <= stage < plan.num_stages for stage in plan.checkpointed_stages):
        raise ValueError(f"checkpointed_stages must be below {plan.num_stages}, got {plan.checkpointed_stages}")


def _check_added_condition(plan: NetworkPlan) -> None:
    """What is added to a whole channel must not be taken out by a norm over that channel alone."""
    is_added = plan.condition is not None and plan.condition.kind == "add"
    if not is_added or "preactivation" not in (plan.encoder_block, plan.decoder_block):
        return
    widths = (*plan.features_per_stage, *plan.decoder_features)
    if plan.norm == "instance" or (plan.norm == "group" and plan.num_norm_groups in widths):
        raise ValueError(
            f"condition.kind 'add' has no effect in preactivation blocks with norm {plan.norm!r} over single channels: "
            "the norm takes out what was added to a channel; expected kind 'scale_shift' or groups of several channels"
        )


def _stem(plan: NetworkPlan) -> Ints:
    return (plan.stem_features,) if plan.has_stem else ()


def _flat(rows: Iterable[Ints]) -> Ints:
    return tuple(value for row in rows for value in row)


def _check_groups(name: str, groups: int, channels: Iterable[int]) -> None:
    for count in channels:
        if count % groups:
            raise ValueError(f"{name} = {groups} must divide all channels that are normalised, got {count} channels")


def _check_attention(plan: NetworkPlan) -> None:
    attention, stages = plan.attention, plan.num_stages
    if any(not 0 <= stage < stages for stage in attention.stages):
        raise ValueError(f"attention.stages must be below {stages}, got {attention.stages}")
    sizes = [max(plan.size_at(stage)) for stage in range(stages)]
    for resolution in attention.resolutions:
        if resolution not in sizes:
            raise ValueError(f"attention.resolutions: no stage has size {resolution}; the stages have {sizes}")
    if attention.num_heads and attention.head_channels:
        raise ValueError("attention needs num_heads or head_channels, got both")
    for name in ("num_heads", "head_channels", "depths"):
        values: Ints = getattr(attention, name)
        if values and len(values) not in (1, stages):
            raise ValueError(f"attention.{name} needs 1 or {stages} entries, got {values}")
    if attention.context_channels is not None and attention.kind != "transformer":
        raise ValueError(f"attention.context_channels needs kind 'transformer', got {attention.kind!r}")
    if attention.context_channels is not None and not plan.has_attention:
        raise ValueError("attention.context_channels needs a stage or a middle block with attention, got none")
    for stage in plan.attention_stages:
        widths = {*plan.block_channels(stage), *plan.decoder_features[stage : stage + 1]}
        for channels in sorted(widths):
            _check_heads(plan, stage, channels)
        if attention.kind == "transformer" and plan.transformer_depth(stage) < 1:
            raise ValueError(f"attention.depths must be at least 1 in stage {stage}, which is chosen; got 0")
    if plan.has_middle and attention.in_middle:
        _check_heads(plan, stages - 1, plan.features_per_stage[-1])
        if attention.kind == "transformer" and plan.middle_depth < 1:
            raise ValueError("attention.middle_depth must be given where the coarsest stage has depth 0")


def _check_heads(plan: NetworkPlan, stage: int, channels: int) -> None:
    _check_groups("attention.num_norm_groups", plan.attention.num_norm_groups, (channels,))
    attention = plan.attention
    values = attention.head_channels or attention.num_heads or (1,)
    value = values[0] if len(values) == 1 else values[stage]
    if value < 1 or channels % value:
        name = "head_channels" if attention.head_channels else "num_heads"
        raise ValueError(f"attention.{name} must divide the {channels} channels of stage {stage}, got {value}")


def _check_condition(plan: NetworkPlan) -> None:
    takes_more = plan.context_channels is not None or (
        plan.condition is not None and (plan.condition.vector_channels or plan.condition.num_classes)
    )
    if plan.has_null_condition and not takes_more:
        raise ValueError(
            "has_null_condition needs a condition that can be absent: attention.context_channels, "
            "condition.vector_channels or condition.num_classes; got none"
        )
    if plan.condition is None:
        return
    if plan.time_channels % 2:
        raise ValueError(f"the time step needs an even number of sinusoids, got {plan.time_channels}")
    if any(channels < 1 for channels in plan.condition.vector_channels):
        raise ValueError(f"condition.vector_channels must be positive, got {plan.condition.vector_channels}")


def _check_output(plan: NetworkPlan) -> None:
    if plan.output == "classes" and plan.num_classes < 2:
        raise ValueError(f"num_classes needs at least 2 classes (background is one), got {plan.num_classes}")
    if not plan.deep_supervision:
        return
    reasons = {
        "output 'channels', which have no coarse targets": plan.output == "channels",
        "a condition: what a denoiser predicts has no coarse target": plan.condition is not None,
        "a skip a block": plan.skips == "block",
        "head 'norm_conv'": plan.head == "norm_conv",
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"deep_supervision cannot go with {reason}; expected deep_supervision false")
