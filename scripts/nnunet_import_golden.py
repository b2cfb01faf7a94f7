#!/usr/bin/env python3
"""Make tiny nnU-Net v2 models and what nnU-Net predicts with them, for `tests/golden/test_nnunet_import.py`.

Runs in nnU-Net's environment (see the header of `scripts/nnunet_oracle.py`):

    oracle/bin/python scripts/nnunet_import_golden.py tests/golden/nnunet_models

The trainers, networks and checkpoints are nnU-Net's own; nothing is trained, the weights are random numbers. Each model
has a small image of its own and, as nnU-Net predicts them with float32 accumulators, logits of some voxels and labels.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

SCRATCH = Path(tempfile.mkdtemp())
for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ[variable] = str(SCRATCH / variable)
os.environ["nnUNet_def_n_proc"] = "1"
os.environ["nnUNet_n_proc_DA"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from nnunet_parity import float32_predictor  # noqa: E402
from nnunetv2.inference.export_prediction import export_prediction_from_logits  # noqa: E402
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: E402
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # noqa: E402
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot  # noqa: E402

KEPT_VOXELS = 3
"""Of the logits every third voxel along each axis is kept."""

SPLINE = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


def resampling(**changes: Any) -> dict:
    """The entries of a configuration about resampling, as nnU-Net's default planner writes them."""
    entries: dict[str, Any] = {}
    for name, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        entries[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        entries[f"resampling_fn_{name}_kwargs"] = SPLINE | {"is_seg": name == "seg", "order": order}
    return entries | changes


def network(dims: int, strides: list, kernels: list, features: list, *, residual: bool = False) -> dict:
    """An architecture entry."""
    stages = len(features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet."
        + ("ResidualEncoderUNet" if residual else "PlainConvUNet"),
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": features,
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": kernels,
            "strides": strides,
            ("n_blocks_per_stage" if residual else "n_conv_per_stage"): [1, 2, 2][:stages],
            "n_conv_per_stage_decoder": [2, 1][: stages - 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def configuration(patch: list, spacing: list, schemes: list, masks: list, **more: Any) -> dict:
    """A configuration of the plans."""
    return {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": [20.0] * len(patch),
        "spacing": spacing,
        "normalization_schemes": schemes,
        "use_mask_for_norm": masks,
        "batch_dice": False,
        **resampling(),
        **more,
    }


def plans(name: str, configurations: dict, reader: str, transpose: list, channels: int = 1, **more: Any) -> dict:
    """Plans as nnU-Net writes them."""
    numbers = {"max": 900.0, "mean": 210.0, "median": 200.0, "min": -50.0}
    numbers |= {"percentile_00_5": 20.0, "percentile_99_5": 600.0, "std": 130.0}
    return {
        "dataset_name": name,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": reader,
        "transpose_forward": transpose,
        "transpose_backward": [transpose.index(axis) for axis in range(3)],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): numbers for channel in range(channels)},
        **more,
    }


def old_format(entry: dict) -> dict:
    """A configuration as nnU-Net before version 2.4 wrote it."""
    made = dict(entry)
    arguments = made.pop("architecture")["arch_kwargs"]
    return made | {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": arguments["features_per_stage"][0],
        "unet_max_num_features": arguments["features_per_stage"][-1],
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [2, 2, 2],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }


MODELS: dict[str, dict] = {
    # Two channels of different normalisation, anisotropic, axes transposed, two folds.
    "anisotropic": {
        "plans": plans(
            "Dataset901_Anisotropic",
            {
                "3d_fullres": configuration(
                    [8, 16, 16],
                    [3.5, 1.0, 1.1],
                    ["ZScoreNormalization", "CTNormalization"],
                    [True, False],
                    architecture=network(
                        3, [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]], [3, 5, 6]
                    ),
                )
            },
            "SimpleITKIO",
            [1, 0, 2],
            channels=2,
        ),
        "labels": {"background": 0, "a": 1, "b": 2},
        "folds": {"3d_fullres": [0, 1]},
        "mirror": (0, 1, 2),
        "spacing": (1.2, 4.0, 0.9),
        "shape": (26, 9, 24),
    },
    # Residual encoder, regions with an ignore label, images reoriented, plain order 1 by torch, one mirror axis.
    "regions": {
        "plans": plans(
            "Dataset902_Regions",
            {
                "3d_fullres": configuration(
                    [16, 16, 16],
                    [1.5, 1.5, 1.5],
                    ["ZScoreNormalization"],
                    [False],
                    architecture=network(
                        3, [[1, 1, 1], [2, 2, 2], [2, 2, 2]], [[3, 3, 3]] * 3, [3, 4, 6], residual=True
                    ),
                    **{
                        f"resampling_fn_{kind}": "resample_torch_fornnunet" for kind in ("data", "seg", "probabilities")
                    },
                    **{
                        f"resampling_fn_{kind}_kwargs": {
                            "is_seg": kind == "seg",
                            "force_separate_z": False,
                            "memefficient_seg_resampling": False,
                        }
                        for kind in ("data", "seg", "probabilities")
                    },
                )
            },
            "NibabelIOWithReorient",
            [0, 1, 2],
        ),
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3, "ignore": 4},
        "regions_class_order": [1, 2, 3],
        "folds": {"3d_fullres": [0]},
        "mirror": (1,),
        "trainer": "nnUNetTrainer_onlyMirror01",
        "spacing": (1.9, 1.1, 1.4),
        "shape": (18, 27, 22),
    },
    # 2D in the older format of plans, one model on all cases, never mirrored.
    "slices": {
        "plans": {
            key.replace("per_channel", "by_modality") if key.startswith("foreground") else key: value
            for key, value in plans(
                "Dataset903_Slices",
                {
                    "2d": old_format(
                        configuration(
                            [16, 24],
                            [1.3, 1.0],
                            ["RescaleTo01Normalization"],
                            [False],
                            architecture=network(2, [[1, 1], [2, 2], [2, 2]], [[3, 3]] * 3, [4, 8, 8]),
                        )
                    )
                },
                "NibabelIO",
                [0, 1, 2],
            ).items()
        },
        "labels": {"background": 0, "a": 1, "b": 2, "c": 3},
        "folds": {"2d": ["all"]},
        "mirror": None,
        "trainer": "nnUNetTrainerNoMirroring",
        "spacing": (1.0, 1.0, 2.0),
        "shape": (30, 33, 5),
    },
    # A cascade.
    "cascade": {
        "plans": plans(
            "Dataset904_Cascade",
            {
                "3d_fullres": configuration(
                    [16, 16, 16],
                    [1.0, 1.0, 1.0],
                    ["ZScoreNormalization"],
                    [False],
                    architecture=network(3, [[1, 1, 1], [2, 2, 2]], [[3, 3, 3]] * 2, [3, 5]),
                ),
                "3d_lowres": {
                    "inherits_from": "3d_fullres",
                    "spacing": [2.0, 2.0, 2.0],
                    "next_stage": "3d_cascade_fullres",
                },
                "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
            },
            "SimpleITKIOWithReorient",
            [0, 1, 2],
        ),
        "labels": {"background": 0, "a": 1, "b": 2},
        "folds": {"3d_lowres": [0], "3d_cascade_fullres": [0]},
        "mirror": (0, 1, 2),
        "spacing": (1.0, 1.3, 1.0),
        "shape": (30, 24, 20),
    },
}


def write_image(folder: Path, spec: dict, rng: np.random.Generator) -> list[str]:
    """Smooth noise with an empty margin, whose axes point to strange places; returns the files of the channels."""
    from scipy import ndimage

    first = next(iter(spec["plans"]["configurations"].values()))
    shape, channels = spec["shape"], len(first["normalization_schemes"])
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(((1, -1), (2, 1), (0, -1))):
        affine[world, axis] = sign * spec["spacing"][axis]
    affine[:3, 3] = (3.5, -7.25, 11.0)
    affine[3, 3] = 1
    files = []
    for channel in range(channels):
        values = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
        array = np.round(300 + 900 * values / values.std() / 3).astype(np.int16)
        array[:2], array[:, :1], array[..., -1:] = 0, 0, 0
        array[8:11, 3:5, 1:3] = 0  # a corner that is empty inside the box: the mask is none
        files.append(str(folder / f"case_{channel:04d}.nii.gz"))
        image = nib.Nifti1Image(array, affine)
        image.header.set_sform(affine, 1)
        image.header.set_qform(affine, 1)
        nib.save(image, files[-1])
    return files


def save_checkpoints(folder: Path, spec: dict, name: str, meta: dict, seed: int) -> None:
    """What nnU-Net leaves of a training of one configuration, with random weights."""
    prepared = SCRATCH / "nnUNet_preprocessed" / spec["plans"]["dataset_name"] / "x"
    prepared.mkdir(parents=True, exist_ok=True)
    (prepared / "case.b2nd").touch()  # the trainer looks what kind of files there are
    for fold in spec["folds"][name]:
        trainer = nnUNetTrainer(
            json.loads(json.dumps(spec["plans"])) | {"continue_training": False}, name, fold, meta, torch.device("cpu")
        )
        trainer.initialize()
        generator = torch.Generator().manual_seed(seed + (7 if fold == "all" else fold))
        with torch.no_grad():
            for parameter_name, parameter in trainer.network.named_parameters():
                if parameter.ndim > 1:
                    scale = (2 / parameter[0].numel()) ** 0.5
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
                elif parameter_name.endswith("norm.weight"):
                    parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
                else:
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        trainer.inference_allowed_mirroring_axes = spec["mirror"]
        trainer._best_ema = np.float64(0.25)
        trainer.logger.log("train_losses", np.float32(1.5), 0)
        trainer.logger.log("ema_fg_dice", np.float64(0.5), 0)
        target = folder / f"fold_{fold}"
        target.mkdir(parents=True)
        trainer.save_checkpoint(str(target / "checkpoint_final.pth"))
    (folder / "plans.json").write_text(json.dumps(spec["plans"], indent=1))
    (folder / "dataset.json").write_text(json.dumps(meta, indent=1))


def predict(folder: Path, folds: list, files: list[str], out: Path, previous: str | None) -> dict:
    """Logits on the network's grid, and label maps, as nnU-Net predicts them."""
    stored = {}
    for mirroring in ("none", "full"):
        predictors = {}
        for kind in (nnUNetPredictor, float32_predictor()):
            predictor = kind(device=torch.device("cpu"), allow_tqdm=False)
            predictor.initialize_from_trained_model_folder(str(folder), folds)
            predictor.use_mirroring = mirroring == "full" and predictor.allowed_mirroring_axes is not None
            predictors[len(predictors)] = predictor
        stock = predictors[0]
        plan, settings = stock.plans_manager, stock.configuration_manager
        data, seg, properties = settings.preprocessor_class(verbose=False).run_case(
            files, previous, plan, settings, stock.dataset_json
        )
        if previous is not None:
            foreground = stock.label_manager.foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], foreground, data.dtype)))
        logits = [item.predict_logits_from_preprocessed_data(torch.from_numpy(data)) for item in predictors.values()]
        target = str(out.parent / f"{out.name}_{mirroring}")
        export_prediction_from_logits(logits[1], properties, settings, plan, stock.dataset_json, target, False, 1)
        half, single = (item.float().numpy() for item in logits)
        largest = abs(half - single).max()
        print(f"{out} {mirroring}: {single.shape}, stock differs by {largest:.1e} of {np.ptp(single):.1f}")
        kept = (slice(None), *(slice(None, None, KEPT_VOXELS),) * 3)
        stored[f"logits_{mirroring}"] = single[kept]
        stored["shape"] = np.array(data.shape[1:])
    return stored


def rename_trainer(model: Path, trainer: str) -> None:
    """Let a model say that another trainer made it (which nnU-Net would have to have at hand to predict)."""
    for path in model.glob("fold_*/checkpoint_final.pth"):
        content = torch.load(path, weights_only=False)
        content["trainer_name"] = trainer
        torch.save(content, path)
    model.rename(model.with_name(model.name.replace("nnUNetTrainer", trainer, 1)))


def main() -> None:
    """Write every model, its image and what nnU-Net predicts."""
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for number, (name, spec) in enumerate(MODELS.items()):
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files = write_image(folder, spec, np.random.default_rng(number))
        meta = {
            "channel_names": {str(channel): f"channel {channel}" for channel in range(len(files))},
            "labels": spec["labels"],
            "numTraining": 3,
            "file_ending": ".nii.gz",
            "licence": f"of the model {name}",
        }
        if "regions_class_order" in spec:
            meta["regions_class_order"] = spec["regions_class_order"]
        previous = None
        for order, configuration_name in enumerate(spec["folds"]):
            model = folder / f"nnUNetTrainer__nnUNetPlans__{configuration_name}"
            save_checkpoints(model, spec, configuration_name, meta, 10 * number + order)
            out = folder / configuration_name
            stored = predict(model, spec["folds"][configuration_name], files, out, previous)
            np.savez_compressed(folder / f"{configuration_name}.npz", **stored)
            previous = str(folder / f"{configuration_name}_none.nii.gz")
            rename_trainer(model, spec.get("trainer", "nnUNetTrainer"))
    shutil.rmtree(SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    main()
