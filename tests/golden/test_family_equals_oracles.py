"""Our networks against those of other libraries: the same weights, mapped by name, the same outputs.

dynamic-network-architectures 0.4.4 through golden files (scripts/unet_oracle.py), MONAI alive.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import DiffusionModelUNet, DynUNet
from torch import Tensor, nn

from autoseg.domain.network_plan import NetworkPlan
from autoseg.errors import ModelError
from autoseg.interop.monai_weights import from_monai_diffusion, from_monai_dynunet
from autoseg.interop.nnunet_weights import from_nnunet
from autoseg.network.unet import restore

TOLERANCE = 1e-5


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """Equal within 1e-5 of the largest value."""
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE * max(1.0, float(theirs.abs().max())), rtol=0)


def with_random_weights(network: nn.Module) -> nn.Module:
    """Weights that leave no branch at zero, with outputs of the order of 1."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
        else:
            centre = 1.0 if name.endswith("weight") else 0.0
            nn.init.normal_(parameter, mean=centre, std=0.3, generator=generator)
    return network


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plan_of(**fields: Any) -> NetworkPlan:
    """A plan; scalar kernels and strides count for every axis and stage."""
    dims, stages = len(fields["patch_size"]), len(fields["features_per_stage"])
    fields.setdefault("kernel_sizes", ((3,) * dims,) * stages)
    fields.setdefault("strides", ((1,) * dims, *((2,) * dims,) * (stages - 1)))
    return NetworkPlan.model_validate(fields)


NNUNET = {
    "plain_2d_deep": plan_of(
        in_channels=3,
        num_classes=4,
        patch_size=(32, 48),
        features_per_stage=(3, 4, 4, 5, 6),
        strides=((1, 1), (2, 2), (2, 2), (2, 2), (1, 2)),
        blocks_per_stage_encoder=(2, 1, 3, 2, 2),
        blocks_per_stage_decoder=(3, 2, 1, 2),
    ),
    "plain_3d_isotropic": plan_of(
        in_channels=2,
        num_classes=3,
        patch_size=(16, 16, 8),
        features_per_stage=(3, 4, 5, 5),
        blocks_per_stage_encoder=(2, 2, 2, 2),
        blocks_per_stage_decoder=(2, 2, 2),
    ),
    "residual_2d": plan_of(
        in_channels=1,
        num_classes=2,
        patch_size=(16, 24),
        features_per_stage=(4, 6, 8, 8),
        strides=((1, 1), (2, 2), (2, 2), (2, 1)),
        kernel_sizes=((3, 3), (3, 3), (3, 1), (3, 3)),
        encoder_block="residual",
        blocks_per_stage_encoder=(1, 3, 2, 2),
        blocks_per_stage_decoder=(1, 2, 1),
    ),
    "residual_3d_isotropic": plan_of(
        in_channels=2,
        num_classes=3,
        patch_size=(8, 16, 8),
        features_per_stage=(4, 6, 6),
        encoder_block="residual",
        blocks_per_stage_encoder=(1, 2, 2),
        blocks_per_stage_decoder=(1, 1),
    ),
    "residual_3d_anisotropic": plan_of(
        in_channels=1,
        num_classes=2,
        patch_size=(3, 16, 24),
        features_per_stage=(3, 3, 5, 6),
        strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (3, 2, 2)),
        kernel_sizes=((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
        encoder_block="residual",
        blocks_per_stage_encoder=(1, 3, 1, 2),
        blocks_per_stage_decoder=(1, 1, 1),
    ),
    "residual_3d_two_stages": plan_of(
        in_channels=1,
        num_classes=2,
        patch_size=(6, 6, 6),
        features_per_stage=(4, 6),
        encoder_block="residual",
        blocks_per_stage_encoder=(2, 3),
        blocks_per_stage_decoder=(2,),
    ),
}


def golden(name: str) -> tuple[dict[str, Tensor], Tensor, list[Tensor]]:
    """Weights by nnU-Net's names, input, outputs finest first."""
    with np.load(Path(__file__).parent / f"family_{name}.npz", allow_pickle=False) as archive:
        stored = {key: torch.from_numpy(archive[key]) for key in archive.files}
    image = stored.pop("input")
    outputs = [stored.pop(key) for key in sorted(stored) if key.startswith("output.")]
    return stored, image, outputs


@pytest.mark.parametrize("name", NNUNET)
def test_nnunets_networks(name: str) -> None:
    weights, image, expected = golden(name)
    network = restore(NNUNET[name], from_nnunet(weights)).train()
    with torch.inference_mode():
        outputs = network(image)
    assert len(outputs) == len(expected) == NNUNET[name].num_stages - 1
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_equal(ours, theirs)


def test_names_that_nnunet_lists_twice_are_left_out() -> None:
    weights, _, _ = golden("residual_2d")
    aliases = {
        "encoder.stem.convs.0.all_modules.0.weight": weights["encoder.stem.convs.0.conv.weight"],
        "decoder.encoder.stem.convs.0.conv.weight": weights["encoder.stem.convs.0.conv.weight"],
    }
    assert from_nnunet(weights | aliases).keys() == from_nnunet(weights).keys()


def test_foreign_weights_are_refused() -> None:
    weights, _, _ = golden("residual_2d")
    with pytest.raises(ModelError, match=r"1 weight tensors are not those of a PlainConvUNet(?s:.*)  - decoder.extra"):
        from_nnunet(weights | {"decoder.extra": torch.zeros(1)})
    for convert in (from_nnunet, from_monai_dynunet, from_monai_diffusion):
        with pytest.raises(ModelError, match=r"the weights are not those of(?s:.*)  - foreign"):
            convert({"foreign": torch.zeros(1)})


@pytest.mark.parametrize(
    ("size", "features", "num_inputs", "num_classes"),
    [
        ((16, 16, 16), (4, 6, 8), 1, 2),
        ((16, 8, 24), (4, 6, 6, 8), 2, 3),
        ((32, 16), (4, 6, 8, 8, 8), 1, 4),
        ((12, 20), (5, 3, 4), 3, 2),
    ],
)
def test_monais_dynunet(size: tuple[int, ...], features: tuple[int, ...], num_inputs: int, num_classes: int) -> None:
    stages = len(features)
    plan = plan_of(
        in_channels=num_inputs,
        num_classes=num_classes,
        patch_size=size,
        features_per_stage=features,
        blocks_per_stage_encoder=(2,) * stages,
        blocks_per_stage_decoder=(2,) * (stages - 1),
        has_conv_bias=False,
        has_up_bias=False,
    )
    oracle = DynUNet(
        len(size),
        num_inputs,
        num_classes,
        plan.kernel_sizes,
        plan.strides,
        plan.strides[1:],
        filters=features,
        deep_supervision=True,
        deep_supr_num=stages - 2,
    )
    with_random_weights(oracle)
    network = restore(plan, from_monai_dynunet(oracle.state_dict())).train()
    image = randn(2, num_inputs, *size)
    with torch.inference_mode():
        outputs = network(image)
        expected = [oracle.eval()(image), *oracle.heads]
    assert len(outputs) == stages - 1
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_equal(ours, theirs)


def diffusion_plan(dims: int, kwargs: dict[str, Any]) -> NetworkPlan:
    """The plan of a DiffusionModelUNet with these arguments."""
    channels, blocks = kwargs["channels"], kwargs["num_res_blocks"]
    stages, groups, eps = len(channels), kwargs["norm_num_groups"], kwargs.get("norm_eps", 1e-6)
    in_blocks = kwargs.get("resblock_updown", False)
    return plan_of(
        in_channels=kwargs["in_channels"],
        num_classes=kwargs["out_channels"],
        output="channels",
        patch_size=(2**stages,) * dims,
        features_per_stage=channels,
        encoder_block="preactivation",
        decoder_block="preactivation",
        blocks_per_stage_encoder=blocks,
        blocks_per_stage_decoder=tuple(count + 1 for count in blocks),
        has_middle=True,
        norm="group",
        num_norm_groups=groups,
        norm_eps=eps,
        activation="silu",
        downsampling="average_pool" if in_blocks else "strided_layer",
        upsampling="nearest",
        upsampling_kernel=3,
        upsampled_channels="below",
        resamples_in_blocks=in_blocks,
        skips="block",
        head="norm_conv",
        attention={
            "kind": "transformer" if kwargs.get("with_conditioning") else "self",
            "stages": tuple(stage for stage, attends in enumerate(kwargs["attention_levels"]) if attends),
            "head_channels": kwargs["num_head_channels"],
            "depths": (kwargs.get("transformer_num_layers", 1),),
            "context_channels": kwargs.get("cross_attention_dim"),
            "num_norm_groups": groups,
            "norm_eps": eps,
        },
        condition={"num_classes": kwargs.get("num_class_embeds") or 0},
        deep_supervision=False,
    )


PLAIN = {"in_channels": 2, "out_channels": 3, "norm_num_groups": 4}
DIFFUSION = {
    "no_attention": PLAIN
    | {
        "channels": (8, 8, 16),
        "num_res_blocks": (1, 2, 1),
        "attention_levels": (False,) * 3,
        "num_head_channels": (8, 8, 8),
    },
    "attention": PLAIN
    | {
        "channels": (8, 12, 16),
        "num_res_blocks": (2, 1, 2),
        "attention_levels": (False, True, True),
        "num_head_channels": (8, 6, 8),
        "norm_eps": 1e-5,
    },
    "attention_combined_and_resampled_in_blocks": PLAIN
    | {
        "channels": (8, 8, 16),
        "num_res_blocks": (1, 1, 1),
        "attention_levels": (True, False, True),
        "num_head_channels": (4, 4, 4),
        "resblock_updown": True,
        "use_combined_linear": True,
    },
    "context": PLAIN
    | {
        "channels": (8, 16),
        "num_res_blocks": (1, 2),
        "attention_levels": (False, True),
        "num_head_channels": (4, 8),
        "with_conditioning": True,
        "cross_attention_dim": 5,
        "transformer_num_layers": 2,
    },
    "context_and_classes": PLAIN
    | {
        "channels": (8, 8),
        "num_res_blocks": (1, 1),
        "attention_levels": (True, True),
        "num_head_channels": (4, 4),
        "with_conditioning": True,
        "cross_attention_dim": 6,
        "num_class_embeds": 5,
    },
}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", DIFFUSION)
def test_monais_diffusion_unet(name: str, dims: int) -> None:
    kwargs = DIFFUSION[name]
    oracle = with_random_weights(DiffusionModelUNet(spatial_dims=dims, **kwargs)).eval()
    network = restore(diffusion_plan(dims, kwargs), from_monai_diffusion(oracle.state_dict()))
    image, time = randn(2, kwargs["in_channels"], *(8,) * dims), torch.tensor([3, 741])
    context = randn(2, 4, kwargs["cross_attention_dim"]) if kwargs.get("with_conditioning") else None
    classes = torch.tensor([4, 0]) if kwargs.get("num_class_embeds") else None
    with torch.inference_mode():
        ours = network(image, time=time, context=context, classes=classes)
        theirs = oracle(image, timesteps=time, context=context, class_labels=classes)
        other = network(image, time=time + 100, context=context, classes=classes)
    assert_equal(ours, theirs)
    assert not torch.allclose(other, ours, atol=1e-2)


def test_additional_residuals_enter_where_monais_do() -> None:
    kwargs = DIFFUSION["attention"]
    oracle = with_random_weights(DiffusionModelUNet(spatial_dims=2, **kwargs)).eval()
    network = restore(diffusion_plan(2, kwargs), from_monai_diffusion(oracle.state_dict()))
    image, time = randn(1, 2, 8, 8), torch.tensor([17])
    # Skips in the order they are made: the stem, and per stage the step into it and its blocks.
    shapes = [(8, 8), (8, 8), (8, 8), (8, 4), (12, 4), (12, 2), (16, 2), (16, 2)]
    residuals = tuple(randn(1, width, edge, edge, seed=index) for index, (width, edge) in enumerate(shapes))
    middle = randn(1, 16, 2, 2, seed=99)
    with torch.inference_mode():
        ours = network(image, time=time, skip_residuals=residuals, middle_residual=middle)
        theirs = oracle(
            image, timesteps=time, down_block_additional_residuals=residuals, mid_block_additional_residual=middle
        )
        without = network(image, time=time)
    assert_equal(ours, theirs)
    assert not torch.allclose(without, ours, atol=1e-2)
