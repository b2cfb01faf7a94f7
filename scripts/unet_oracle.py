"""Write tests/golden/unet_*.npz: weights, input and outputs of dynamic-network-architectures' PlainConvUNet.

Run in an environment of its own that has nnunetv2 (it brings dynamic-network-architectures):
    python scripts/unet_oracle.py tests/golden
The weights are stored under autoseg's names; the outputs as `output.LEVEL`, finest first.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
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


def our_name(name: str, stages: int) -> str | None:
    """autoseg's name of a parameter; None for the aliases under which the oracle lists some parameters twice."""
    parts = name.split(".")
    if "all_modules" in parts or parts[:2] == ["decoder", "encoder"]:
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


def main(folder: Path) -> None:
    for name, spec in NETWORKS.items():
        torch.manual_seed(0)
        dims = len(spec["patch"])
        network = PlainConvUNet(
            spec["in_channels"], len(spec["features"]), spec["features"], nn.Conv3d if dims == 3 else nn.Conv2d,
            spec["kernels"], spec["strides"], spec["encoder"], spec["classes"], spec["decoder"], conv_bias=True,
            norm_op=nn.InstanceNorm3d if dims == 3 else nn.InstanceNorm2d, norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
        )  # fmt: skip
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
        stages = len(spec["features"])
        tensors = {our_name(key, stages): value.contiguous() for key, value in network.state_dict().items()}
        tensors.pop(None, None)
        image = torch.randn(2, spec["in_channels"], *spec["patch"])
        with torch.no_grad():
            outputs = network(image)
        tensors["input"] = image
        for level, output in enumerate(outputs):
            tensors[f"output.{level}"] = output.contiguous()
        np.savez_compressed(folder / f"{name}.npz", **{key: value.numpy() for key, value in tensors.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
