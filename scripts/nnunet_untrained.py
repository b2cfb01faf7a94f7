#!/usr/bin/env python3
"""Make nnU-Net v2 model folders that were not trained: with more classes, another width or another patch.

Runs in nnU-Net's environment (see the header of `scripts/nnunet_oracle.py`) on a trained model's folder
(TRAINER__PLANS__CONFIGURATION, 3D), which is left alone:

    oracle/bin/python scripts/nnunet_untrained.py make MODEL OUT --classes 40
    oracle/bin/python scripts/nnunet_untrained.py make MODEL OUT --classes 40 --weights random \\
        --features 32,64,128,256,320,320 --patch 128,128,128
    oracle/bin/python scripts/nnunet_untrained.py time MODEL --threads 2

`make` writes OUT/{plans.json, dataset.json, fold_0/checkpoint_final.pth}; the network is built by nnU-Net's own code.
With --weights trained it has MODEL's weights, and the classes beyond MODEL's get weights at random and so low a bias
that they never win: the labels are those of MODEL, the work is that of all classes. A network with weights at random
decides hardly anything: nearly equal logits make labels that rounding changes, in either program.

`time` prints as JSON how long nnU-Net's network takes for a tile, and nnU-Net's resampling for a voxel of a class.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

NEVER = -30.0
"""Bias of a class that never wins: trained logits are rarely beyond 20, and nnU-Net sums them in half precision."""

TIMED_CALLS = 2
RESAMPLED_VOXELS = 48
"""Along each axis, for timing; they become half as many again."""

HEADS = ".seg_layers."


def load(model: Path, fold: str) -> Any:
    """nnU-Net's predictor with a trained model's network."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,))
    return predictor


def edit_plans(plans: dict, configuration: str, features: list[int] | None, patch: list[int] | None) -> None:
    """Another width and depth, or another patch, for one configuration of the plans."""
    part = plans["configurations"][configuration]
    if patch is not None:
        part["patch_size"] = patch
    if features is not None:
        stages = len(features)
        part["architecture"]["arch_kwargs"] |= {
            "n_stages": stages,
            "features_per_stage": features,
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
        }


def take_over(trained: dict, fresh: dict) -> dict:
    """Fresh weights, with the trained ones where there are any; further classes never win."""
    import torch

    weights = {}
    for name, values in fresh.items():
        old = trained[name]
        if values.shape == old.shape:
            weights[name] = old
            continue
        if HEADS not in name:
            raise SystemExit(f"{name}: the trained network has shape {tuple(old.shape)}, wanted {tuple(values.shape)}")
        further = values[len(old) :]
        weights[name] = torch.cat([old, torch.full_like(further, NEVER) if name.endswith(".bias") else further])
    return weights


def make(args: argparse.Namespace) -> None:
    """Write the model folder."""
    import torch
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.manual_seed(args.seed)
    predictor = load(args.model, args.fold)
    configuration = args.model.name.rpartition("__")[2]
    plans = json.loads((args.model / "plans.json").read_text())
    edit_plans(plans, configuration, args.features, args.patch)
    description = json.loads((args.model / "dataset.json").read_text())
    names = list(description["labels"])
    description["labels"] = {
        name: number for number, name in enumerate([*names, *(f"class {n}" for n in range(len(names), args.classes))])
    }
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    network = trainer_of(predictor).build_network_architecture(
        manager,
        settings,
        determine_num_input_channels(manager, settings, description),
        manager.get_label_manager(description).num_segmentation_heads,
        enable_deep_supervision=False,
    )
    weights = network.state_dict()
    if args.weights == "trained":
        weights = take_over(predictor.list_of_parameters[0], weights)
    fold = args.out / "fold_0"
    fold.mkdir(parents=True)
    (args.out / "plans.json").write_text(json.dumps(plans, indent=1))
    (args.out / "dataset.json").write_text(json.dumps(description, indent=1))
    checkpoint = {
        "network_weights": {name: values.clone() for name, values in weights.items()},
        "init_args": {"plans": plans, "configuration": configuration, "fold": 0, "dataset_json": description},
        "trainer_name": predictor.trainer_name,
        "inference_allowed_mirroring_axes": predictor.allowed_mirroring_axes,
        "current_epoch": 0,
    }
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    print(f"{args.out}: {args.classes} classes, patch {settings.patch_size}, weights: {args.weights}")


def trainer_of(predictor: Any) -> Any:
    """The class that trained: it builds the network."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"
    return recursive_find_python_class(str(folder), predictor.trainer_name, "nnunetv2.training.nnUNetTrainer")


def seconds_of(call: Any) -> float:
    """The quickest of a few calls."""
    found = []
    for _ in range(TIMED_CALLS):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def measure(args: argparse.Namespace) -> None:
    """Time a tile and a resampled voxel as nnU-Net does them."""
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    predictor = load(args.model, args.fold)
    settings = predictor.configuration_manager
    network = predictor.network.eval()
    channels = len(predictor.dataset_json["channel_names"])
    tile = torch.randn(1, channels, *settings.patch_size)
    logits = np.random.default_rng(0).normal(size=(1, *(RESAMPLED_VOXELS,) * 3)).astype(np.float16)
    wanted = [round(1.5 * RESAMPLED_VOXELS)] * 3
    with torch.inference_mode():
        tile_s = seconds_of(lambda: network(tile))
    voxel_s = seconds_of(lambda: settings.resampling_fn_probabilities(logits, wanted, [1.5] * 3, [1.0] * 3)) / np.prod(
        wanted
    )
    found = {
        "tile_s": tile_s,
        "resampled_voxel_s": float(voxel_s),
        "parameters": sum(values.numel() for values in network.parameters()),
    }
    print(json.dumps(found))


def numbers(text: str) -> list[int]:
    """Numbers separated by commas."""
    return [int(word) for word in text.split(",")]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("make", help="write a model folder")
    sub.add_argument("model", type=Path)
    sub.add_argument("out", type=Path, help="must not exist")
    sub.add_argument("--classes", type=int, default=40, help="with background")
    sub.add_argument("--weights", choices=("trained", "random"), default="trained")
    sub.add_argument("--features", type=numbers, help="of each stage; needs --weights random")
    sub.add_argument("--patch", type=numbers)
    sub.add_argument("--fold", default="0")
    sub.add_argument("--seed", type=int, default=0)
    sub.set_defaults(function=make)
    sub = commands.add_parser("time", help="time a tile, and resampling")
    sub.add_argument("model", type=Path)
    sub.add_argument("--fold", default="0")
    sub.add_argument("--threads", type=int, default=os.cpu_count())
    sub.set_defaults(function=measure)
    args = parser.parse_args()
    if args.command == "make" and args.features and args.weights == "trained":
        parser.error("trained weights do not fit other --features: add --weights random")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, "unused")
    args.function(args)


if __name__ == "__main__":
    main()
