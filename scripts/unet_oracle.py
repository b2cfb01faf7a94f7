"""Write golden files of dynamic-network-architectures, the networks of nnU-Net.

Run in an environment of its own that has nnunetv2 (it brings dynamic-network-architectures):
    python scripts/unet_oracle.py tests/golden

- unet_NAME.npz: weights of a PlainConvUNet under autoseg's names, `input`, and `output.LEVEL`, finest first;
- family_NAME.npz: the same of both architectures and of many plans, weights under the oracle's own names
  (those of autoseg are the business of `autoseg.interop`);
- member_counts.json: parameters of the four networks that nnU-Net is known for, for the two large ones with the plan
  that nnU-Net's own planner makes.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

NETWORKS = {
    "unet_2d": {
        "patch": (16, 12), "strides": ((1, 1), (2, 2), (2, 1)), "kernels": ((3, 3), (3, 3), (3, 1)),
        "features": (4, 6, 8), "encoder": (2, 1, 2), "decoder": (2, 1), "in_channels": 2, "classes": 3,
    },
    "unet_3d": {
        "patch": (6, 16, 16), "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)), "features": (4, 6, 8), "encoder": (2, 2, 2), "decoder": (2, 2),
        "in_channels": 1, "classes": 2,
    },
}  # fmt: skip

FAMILY = {
    "plain_2d_deep": {
        "class": PlainConvUNet, "patch": (32, 48), "strides": ((1, 1), (2, 2), (2, 2), (2, 2), (1, 2)),
        "kernels": ((3, 3),) * 5, "features": (3, 4, 4, 5, 6), "encoder": (2, 1, 3, 2, 2), "decoder": (2, 1, 2, 3),
        "in_channels": 3, "classes": 4,
    },
    "plain_3d_isotropic": {
        "class": PlainConvUNet, "patch": (16, 16, 8), "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        "kernels": ((3, 3, 3),) * 4, "features": (3, 4, 5, 5), "encoder": (2, 2, 2, 2), "decoder": (2, 2, 2),
        "in_channels": 2, "classes": 3,
    },
    "residual_2d": {
        "class": ResidualEncoderUNet, "patch": (16, 24), "strides": ((1, 1), (2, 2), (2, 2), (2, 1)),
        "kernels": ((3, 3), (3, 3), (3, 1), (3, 3)), "features": (4, 6, 8, 8), "encoder": (1, 3, 2, 2),
        "decoder": (1, 2, 1), "in_channels": 1, "classes": 2,
    },
    "residual_3d_isotropic": {
        "class": ResidualEncoderUNet, "patch": (8, 16, 8), "strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
        "kernels": ((3, 3, 3),) * 3, "features": (4, 6, 6), "encoder": (1, 2, 2), "decoder": (1, 1),
        "in_channels": 2, "classes": 3,
    },
    "residual_3d_anisotropic": {
        "class": ResidualEncoderUNet, "patch": (3, 16, 24), "strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (3, 2, 2)),
        "kernels": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)), "features": (3, 3, 5, 6), "encoder": (1, 3, 1, 2),
        "decoder": (1, 1, 1), "in_channels": 1, "classes": 2,
    },
    "residual_3d_two_stages": {
        "class": ResidualEncoderUNet, "patch": (6, 6, 6), "strides": ((1, 1, 1), (2, 2, 2)),
        "kernels": ((3, 3, 3),) * 2, "features": (4, 6), "encoder": (2, 3), "decoder": (2,), "in_channels": 1,
        "classes": 2,
    },
}  # fmt: skip

LARGE_MEDIAN_SHAPE = (200, 300, 300)
"""Voxels of 1 mm: isotropic, and large enough for a patch not to be cut down to the images."""


def our_name(name: str, stages: int) -> str | None:
    """autoseg's name of a parameter; None for the aliases under which the oracle lists some parameters twice."""
    parts = name.split(".")
    if is_alias(name):
        return None
    if parts[0] == "encoder":
        _, _, stage, _, _, block, layer, leaf = parts
        return f"encoder.{stage}.{block}.{layer}.{leaf}"
    kind, index = parts[1], stages - 2 - int(parts[2])
    if kind == "transpconvs":
        return f"decoder.{index}.up.{parts[3]}"
    if kind == "seg_layers":
        return f"heads.{index}.{parts[3]}"
    _, _, _, _, block, layer, leaf = parts
    return f"decoder.{index}.blocks.{block}.{layer}.{leaf}"


def is_alias(name: str) -> bool:
    return ".all_modules." in name or name.startswith("decoder.encoder.")


def build(spec: dict, architecture: type[nn.Module]) -> nn.Module:
    """A network of the oracle as nnU-Net sets it up."""
    dims = len(spec["patch"])
    return architecture(
        spec["in_channels"], len(spec["features"]), spec["features"], nn.Conv3d if dims == 3 else nn.Conv2d,
        spec["kernels"], spec["strides"], spec["encoder"], spec["classes"], spec["decoder"], conv_bias=True,
        norm_op=nn.InstanceNorm3d if dims == 3 else nn.InstanceNorm2d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip


def write(network: nn.Module, spec: dict, names: dict[str, str], path: Path) -> None:
    """Random weights, an input and the outputs; `names` are those the weights are stored under."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = network.state_dict()
    tensors = {name: state[key].contiguous() for key, name in names.items()}
    image = torch.randn(2, spec["in_channels"], *spec["patch"])
    with torch.no_grad():
        outputs = network(image)
    tensors["input"] = image
    for level, output in enumerate(outputs):
        tensors[f"output.{level}"] = output.contiguous()
    np.savez_compressed(path, **{key: value.numpy() for key, value in tensors.items()})


def write_networks(folder: Path) -> None:
    for name, spec in NETWORKS.items():
        torch.manual_seed(0)
        network = build(spec, PlainConvUNet)
        names = {key: our_name(key, len(spec["features"])) for key in network.state_dict() if not is_alias(key)}
        write(network, spec, names, folder / f"{name}.npz")
    for name, spec in FAMILY.items():
        torch.manual_seed(0)
        network = build(spec, spec["class"])
        names = {key: key for key in network.state_dict() if not is_alias(key)}
        write(network, spec, names, folder / f"family_{name}.npz")


def planned_specs() -> dict[str, dict]:
    """The networks of nnU-Net's large residual presets for images of LARGE_MEDIAN_SHAPE, by its own planner."""
    home = Path(tempfile.mkdtemp())
    for variable in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{variable}"] = str(home / variable)
    meta = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "foreground": 1}, "numTraining": 1,
            "file_ending": ".nii.gz", "dataset": {}}  # fmt: skip
    for variable, name, data in (
        ("raw", "dataset.json", meta),
        ("preprocessed", "dataset_fingerprint.json", {"median_relative_size_after_cropping": 1}),
    ):
        target = home / variable / "Dataset001_Any" / name
        target.parent.mkdir(parents=True)
        target.write_text(json.dumps(data))
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as module

    specs = {}
    planners = {"nnunet-resenc-l": module.nnUNetPlannerResEncL, "nnunet-resenc-xl": module.nnUNetPlannerResEncXL}
    for name, planner in planners.items():
        plan = planner("Dataset001_Any").get_plans_for_configuration([1.0] * 3, LARGE_MEDIAN_SHAPE, "any", 1e12, {})
        architecture = plan["architecture"]["arch_kwargs"]
        specs[name] = {
            "class": ResidualEncoderUNet, "patch": tuple(int(size) for size in plan["patch_size"]),
            "strides": architecture["strides"], "kernels": architecture["kernel_sizes"],
            "features": architecture["features_per_stage"], "encoder": architecture["n_blocks_per_stage"],
            "decoder": architecture["n_conv_per_stage_decoder"], "in_channels": 1, "classes": 2,
        }  # fmt: skip
    return specs


def write_member_counts(path: Path) -> None:
    cube = {"patch": (128,) * 3, "strides": ((1,) * 3, *((2,) * 3,) * 5), "kernels": ((3,) * 3,) * 6,
            "features": (32, 64, 128, 256, 320, 320), "in_channels": 1, "classes": 2}  # fmt: skip
    specs = {
        "nnunet": {**cube, "class": PlainConvUNet, "encoder": (2,) * 6, "decoder": (2,) * 5},
        "nnunet-resenc-m": {**cube, "class": ResidualEncoderUNet, "encoder": (1, 3, 4, 6, 6, 6), "decoder": (1,) * 5},
        **planned_specs(),
    }
    counts = {}
    for name, spec in specs.items():
        with torch.device("meta"):
            network = build(spec, spec["class"])
        fields = {key: value for key, value in spec.items() if key != "class"}
        counts[name] = fields | {"parameters": sum(parameter.numel() for parameter in network.parameters())}
    path.write_text(json.dumps(counts, indent=1) + "\n")


def main(folder: Path) -> None:
    write_networks(folder)
    write_member_counts(folder / "member_counts.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
