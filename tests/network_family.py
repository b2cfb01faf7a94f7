"""Tiny members of the U-Net family, each with what one real one has, in 2D and 3D."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autoseg.domain.network_plan import AttentionPlan, ConditionPlan, NetworkPlan
from autoseg.network.unet import UNet

DIFFUSION: dict[str, Any] = {
    "output": "channels",
    "num_classes": 1,
    "encoder_block": "preactivation",
    "decoder_block": "preactivation",
    "blocks_per_stage_encoder": (1, 2, 1),
    "blocks_per_stage_decoder": (2, 3, 2),
    "skips": "block",
    "downsampling": "strided_layer",
    "upsampling": "nearest",
    "upsampling_kernel": 3,
    "upsampled_channels": "below",
    "has_middle": True,
    "head": "norm_conv",
    "norm": "group",
    "num_norm_groups": 2,
    "norm_eps": 1e-6,
    "activation": "silu",
    "deep_supervision": False,
    "attention": AttentionPlan(stages=(1,), num_heads=(2,), num_norm_groups=2),
    "condition": ConditionPlan(),
}

TRANSFORMER = AttentionPlan(
    kind="transformer", stages=(1, 2), head_channels=(2,), context_channels=6, num_norm_groups=2, depths=(1, 1, 2)
)

FAMILY: dict[str, dict[str, Any]] = {
    "nnunet": {},
    "resenc": {"encoder_block": "residual", "blocks_per_stage_encoder": (1, 2, 1), "blocks_per_stage_decoder": (1, 1)},
    "resenc pooled, squeezed": {
        "encoder_block": "residual",
        "decoder_block": "residual",
        "squeezes": True,
        "downsampling": "average_pool",
        "upsampling": "linear",
        "norm": "batch",
        "activation": "relu",
    },
    "preactivation, strided": {
        "encoder_block": "preactivation",
        "decoder_block": "preactivation",
        "norm": "layer",
        "activation": "gelu",
        "upsampling": "pixel_shuffle",
        "stem_channels": 6,
    },
    "2015": {"norm": "none", "activation": "relu", "downsampling": "max_pool", "deep_supervision": False},
    "2016": {
        "norm": "batch",
        "activation": "relu",
        "downsampling": "max_pool",
        "conv_channels": ((2, 4), (4, 8), (8, 16)),
        "decoder_features_per_stage": (8, 16),
        "upsampled_channels": "below",
        "has_up_bias": False,
        "deep_supervision": False,
    },
    "vnet": {
        "in_channels": 2,
        "norm": "batch",
        "activation": "prelu",
        "blocks_per_stage_encoder": (1, 2, 2),
        "decoder_features_per_stage": (8, 16),
        "downsampling": "strided_layer",
        "downsampling_kernel": "stride",
        "downsampling_widens": True,
        "has_active_resampling": True,
        "has_stage_shortcuts": True,
        "kernel_sizes": 5,
        "deep_supervision": False,
    },
    "vnet of three channels": {
        "in_channels": 3,
        "norm": "none",
        "downsampling": "max_pool",
        "has_stage_shortcuts": True,
    },
    "attention gates": {"skip_join": "gate", "dropout": 0.2, "norm": "group", "num_norm_groups": 2},
    "added skips": {"skip_join": "add", "has_conv_bias": False, "activation": "silu"},
    "widths": {"skip_join": "add", "decoder_features_per_stage": (6, 10), "upsampled_channels": "below"},
    "attending segmentation": {
        "attention": AttentionPlan(resolutions=(4,), num_heads=(1,), num_norm_groups=1),
        "has_middle": True,
        "checkpointed_stages": (0, 1, 2),
    },
    "conditioned segmentation": {
        "encoder_block": "residual",
        "condition": ConditionPlan(kind="scale_shift", vector_channels=(3, 2), num_classes=4),
        "has_null_condition": True,
        "deep_supervision": False,
    },
    "conditioned, added": {"condition": ConditionPlan(), "deep_supervision": False, "upsampling": "nearest"},
    "ddpm": DIFFUSION,
    "ddpm, scale and shift": {
        **DIFFUSION,
        "condition": ConditionPlan(kind="scale_shift", sinusoid="sin_cos", frequency_shift=1),
        "dropout": 0.1,
    },
    "adm": {**DIFFUSION, "resamples_in_blocks": True, "downsampling": "average_pool"},
    "latent diffusion": {
        **DIFFUSION,
        "attention": TRANSFORMER,
        "condition": ConditionPlan(vector_channels=(5,)),
        "has_null_condition": True,
    },
    "skips a block of convolutions": {
        "blocks_per_stage_encoder": (2, 1, 1),
        "blocks_per_stage_decoder": (3, 2, 2),
        "skips": "block",
        "skip_join": "gate",
        "downsampling": "max_pool",
        "deep_supervision": False,
    },
    "skips a block, added": {
        **DIFFUSION,
        "skip_join": "add",
        "condition": None,
        "attention": AttentionPlan(stages=(0, 2), num_heads=(2,), num_norm_groups=2, in_middle=False),
    },
}


def member(name: str, dims: int = 3, **changes: Any) -> NetworkPlan:
    """A tiny member with three stages, the second step leaving the first axis alone."""
    settings: dict[str, Any] = {
        "in_channels": 1,
        "num_classes": 2,
        "patch_size": (8, 16, 8)[:dims],
        "features_per_stage": (4, 8, 16),
        "strides": ((1,) * dims, (2,) * dims, (1, 2, 2)[:dims]),
        "kernel_sizes": 3,
        "blocks_per_stage_encoder": (2, 2, 2),
        "blocks_per_stage_decoder": (2, 2),
        **FAMILY[name],
        **changes,
    }
    size = settings["kernel_sizes"]
    settings["kernel_sizes"] = ((size,) * dims,) * len(settings["features_per_stage"])
    return NetworkPlan.model_validate(settings)


def conditions(plan: NetworkPlan, batch: int = 1, seed: int = 7) -> dict[str, Any]:
    """What the network is to be told beside the image, at random."""
    generator = torch.Generator().manual_seed(seed)
    told: dict[str, Any] = {}
    if plan.condition is not None:
        told["time"] = torch.rand(batch, generator=generator) * 999
        told["vectors"] = [torch.randn(batch, width, generator=generator) for width in plan.condition.vector_channels]
        if plan.condition.num_classes:
            told["classes"] = torch.randint(plan.condition.num_classes, (batch,), generator=generator)
    if plan.context_channels is not None:
        told["context"] = torch.randn(batch, 3, plan.context_channels, generator=generator)
        told["context_mask"] = torch.tensor([[True, True, False]] * batch)
    return told


def image(plan: NetworkPlan, *size: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Noise for the network."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, plan.in_channels, *(size or plan.patch_size), generator=generator)


def awake(network: UNet, seed: int = 3) -> UNet:
    """The network with every weight that starts at zero or one drawn at random, so that all its parts count."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and (parameter == parameter.flatten()[0]).all():
            start = float(parameter.detach().flatten()[0])
            spread = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(start + spread if "norm" in name or start else spread)
    return network
