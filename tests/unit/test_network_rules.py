"""Networks that cannot be built are refused, with what was got and what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
from network_family import member
from pydantic import ValidationError

from autoseg.domain.network_plan import AttentionPlan, ConditionPlan


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nnunet", {"patch_size": (8, 18)}, "patch_size[1] = 18 must be divisible by 4"),
        ("nnunet", {"num_classes": 1}, "at least 2 classes (background is one), got 1"),
        ("nnunet", {"blocks_per_stage_decoder": (1, 1, 1)}, "3 stages need 3 encoder and 2 decoder entries"),
        ("nnunet", {"blocks_per_stage_encoder": (0, 1, 1)}, "at least 1 block"),
        ("nnunet", {"decoder_features_per_stage": (4,)}, "decoder_features_per_stage needs 2 entries, got (4,)"),
        ("nnunet", {"stem_channels": 4}, "this encoder has no stem"),
        ("nnunet", {"squeezes": True}, "squeezes is for residual and preactivation blocks"),
        ("nnunet", {"has_stage_shortcuts": True}, "layers of their own"),
        ("resenc", {"has_stage_shortcuts": True}, "blocks without shortcuts of their own ('conv'), got 'residual'"),
        ("nnunet", {"conv_channels": ((4, 4), (8, 8), (8, 8))}, "end in (4, 8, 16)"),
        ("resenc", {"conv_channels": ((4,), (8,), (16,))}, "needs encoder_block 'conv', got 'residual'"),
        ("nnunet", {"downsampling_widens": True}, "are for downsampling 'strided_layer', got 'strided'"),
        ("nnunet", {"upsampling_kernel": 3}, "a larger one gives checkerboards"),
        ("nnunet", {"resamples_in_blocks": True}, "needs preactivation blocks, pooling, interpolation"),
        ("ddpm", {"downsampling": "strided"}, "steps down that are layers of their own"),
        ("ddpm", {"blocks_per_stage_decoder": (2, 2, 2)}, "expected (2, 3, 2), got (2, 2, 2)"),
        ("nnunet", {"norm": "group", "num_norm_groups": 3}, "num_norm_groups = 3 must divide all channels"),
        ("ddpm", {"norm": "batch"}, "would depend on the noise level"),
        ("conditioned, added", {"norm": "batch"}, "would depend on the noise level"),
        ("ddpm", {"norm": "instance"}, "the norm takes out what was added"),
        ("ddpm", {"num_norm_groups": 4}, "the norm takes out what was added"),
        ("2016", {"checkpointed_stages": (0,)}, "count its batch twice"),
        ("nnunet", {"checkpointed_stages": (3,)}, "checkpointed_stages must be below 3, got (3,)"),
        ("nnunet", {"attention": AttentionPlan(stages=(3,))}, "attention.stages must be below 3"),
        ("nnunet", {"attention": AttentionPlan(resolutions=(5,))}, "no stage has size 5; the stages have [16, 8, 4]"),
        ("nnunet", {"attention": AttentionPlan(stages=(1,))}, "attention.num_norm_groups = 32 must divide"),
        (
            "nnunet",
            {"attention": AttentionPlan(stages=(1,), num_heads=(3,), num_norm_groups=1)},
            "num_heads must divide the 8 channels of stage 1, got 3",
        ),
        ("nnunet", {"attention": AttentionPlan(num_heads=(1,), head_channels=(1,))}, "got both"),
        ("nnunet", {"attention": AttentionPlan(depths=(1, 2))}, "attention.depths needs 1 or 3 entries, got (1, 2)"),
        ("nnunet", {"attention": AttentionPlan(context_channels=4)}, "needs kind 'transformer', got 'self'"),
        ("nnunet", {"attention": AttentionPlan(kind="transformer", context_channels=4)}, "got none"),
        (
            "nnunet",
            {"attention": AttentionPlan(kind="transformer", stages=(1,), depths=(1, 0, 1), num_norm_groups=1)},
            "at least 1 in stage 1, which is chosen; got 0",
        ),
        ("nnunet", {"has_null_condition": True}, "needs a condition that can be absent"),
        ("ddpm", {"condition": ConditionPlan(time_channels=3)}, "an even number of sinusoids, got 3"),
        ("ddpm", {"condition": ConditionPlan(vector_channels=(0,))}, "must be positive, got (0,)"),
        ("ddpm", {"deep_supervision": True}, "output 'channels', which have no coarse targets"),
        ("conditioned, added", {"deep_supervision": True}, "a condition: what a denoiser predicts"),
        ("skips a block of convolutions", {"deep_supervision": True}, "a skip a block"),
        ("nnunet", {"head": "norm_conv"}, "head 'norm_conv'"),
        (
            "nnunet",
            {
                "features_per_stage": (2,) * 17,
                "strides": ((1, 1),) * 17,
                "blocks_per_stage_encoder": (1,) * 17,
                "blocks_per_stage_decoder": (1,) * 16,
            },
            "1 to 16 positive entries",
        ),
    ],
)
def test_impossible_networks_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        member(name, 2, **changes)


def test_nested_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="num_head"):
        member("nnunet", 2, attention={"num_head": (1,)})


def test_the_embedding_is_four_times_its_sinusoids_unless_said_otherwise() -> None:
    assert member("ddpm").embedding_channels == 4 * member("ddpm").features_per_stage[0]
    assert member("ddpm", condition=ConditionPlan(time_channels=6, embedding_channels=10)).embedding_channels == 10
    assert member("nnunet").embedding_channels == 0
