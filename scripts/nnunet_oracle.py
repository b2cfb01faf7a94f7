#!/usr/bin/env python3
"""Run nnU-Net v2 as an oracle: data sets, golden plans and reference trainings to compare autoseg with.

This script does not belong to the autoseg package and never imports it. It runs in an environment of its own:

    python3 -m venv oracle
    oracle/bin/pip install torch==2.13.0
    oracle/bin/pip install numpy scipy scikit-learn scikit-image pandas matplotlib SimpleITK nibabel tifffile blosc2 \\
        tqdm requests einops threadpoolctl imageio connected-components-3d fft_conv_pytorch numexpr unittest2 future
    oracle/bin/pip install --no-deps nnunetv2==2.8.1 dynamic-network-architectures==0.4.4 acvl-utils \\
        batchgenerators==0.25.5 batchgeneratorsv2==0.3.6 yacs graphviz seaborn imagecodecs

``--no-deps`` in the last line keeps timm and torchvision out, which nnU-Net's U-Nets do not need. On a machine without
a GPU add ``--index-url https://download.pytorch.org/whl/cpu`` to the line with torch.

Everything is kept below one folder (``--home``, or the three ``nnUNet_*`` variables where they are set):

    oracle/bin/python scripts/nnunet_oracle.py --home HOME prepare DATASET_FOLDER --id 4 --name hippocampus
    oracle/bin/python scripts/nnunet_oracle.py --home HOME fingerprint-and-plan --id 4 --golden tests/golden/nnunet
    oracle/bin/python scripts/nnunet_oracle.py --home HOME preprocess --id 4 --configuration 3d_fullres
    oracle/bin/python scripts/nnunet_oracle.py --home HOME train --id 4 --configuration 3d_fullres --fold 0 \\
        --steps 289 --out hippocampus.json

The training is nnU-Net's own (network, loss, augmentation, sampling, optimiser); only the length is cut: short epochs,
few validation batches, and the polynomial decay fitted into the given number of steps or seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {"raw": "nnUNet_raw", "preprocessed": "nnUNet_preprocessed", "results": "nnUNet_results"}


# --- folders ---------------------------------------------------------------------------------------------------------
def set_environment(args: argparse.Namespace) -> None:
    """Set nnU-Net's three variables from ``--home`` / ``--raw`` before anything of nnU-Net is imported."""
    for sub, variable in ENVIRONMENT.items():
        given = getattr(args, sub, None)
        if given:
            os.environ[variable] = str(Path(given).resolve())
        elif args.home:
            os.environ[variable] = str((Path(args.home) / sub).resolve())
        elif variable not in os.environ:
            sys.exit(f"give --home, --{sub} or the variable {variable}")
        Path(os.environ[variable]).mkdir(parents=True, exist_ok=True)


def dataset_folder(variable: str, number: int) -> Path:
    """Return the one folder DatasetNNN_* below the folder that a nnU-Net variable names."""
    found = sorted(Path(os.environ[variable]).glob(f"Dataset{number:03d}_*"))
    if len(found) != 1:
        sys.exit(f"expected one Dataset{number:03d}_* in {os.environ[variable]}, found {len(found)}")
    return found[0]


# --- prepare ---------------------------------------------------------------------------------------------------------
def read_labels(meta: dict) -> dict[str, int]:
    """Return {name: value} of a dataset.json that has either {"0": "background"} (MSD) or {"background": 0}."""
    labels = meta["labels"]
    if all(str(key).lstrip("-").isdigit() for key in labels):
        return {str(name): int(value) for value, name in labels.items()}
    return {str(name): int(value) for name, value in labels.items()}


def list_cases(folder: Path, meta: dict, channels: int, ending: str) -> list[tuple[str, list[Path], Path]]:
    """Return (case, images, label) of each training case, in MSD or in nnU-Net raw layout."""
    cases = []
    for label in sorted((folder / "labelsTr").iterdir()):
        if not label.name.endswith(ending) or label.name.startswith("."):
            continue
        case = label.name[: -len(ending)]
        whole = folder / "imagesTr" / label.name
        images = [folder / "imagesTr" / f"{case}_{c:04d}{ending}" for c in range(channels)]
        if whole.exists():
            images = [whole]
        elif ending == ".png" and not images[-1].exists():
            images = images[:1]  # the colour channels of one file
        missing = [str(image) for image in images if not image.exists()]
        if missing:
            sys.exit(f"{case}: {', '.join(missing)} missing")
        cases.append((case, images, label))
    if not cases:
        sys.exit(f"no case with a label in {folder}")
    return cases


def link(source: Path, target: Path) -> None:
    """Point target at source (or copy it where links are not allowed)."""
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def prepare_png(source: Path, target: Path, channels: int) -> str:
    """Write a PNG so that nnU-Net's reader returns exactly ``channels`` channels; return what was done."""
    import numpy as np
    from skimage import io

    image = io.imread(source)
    found = 1 if image.ndim == 2 else image.shape[-1]
    if found == channels:
        link(source, target)
        return "linked"
    done = []
    if found in (2, 4):
        image = image[..., :-1]
        done.append("alpha dropped")
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    if channels == 1 and image.ndim == 3:
        if not (np.all(image[..., 0] == image[..., 1]) and np.all(image[..., 0] == image[..., 2])):
            sys.exit(f"{source}: one channel declared, but the file has colours")
        image = image[..., 0]
        done.append("grey kept once")
    if channels == 3 and image.ndim == 2:
        image = np.stack([image] * 3, -1)
        done.append("grey repeated")
    if (1 if image.ndim == 2 else image.shape[-1]) != channels:
        sys.exit(f"{source}: {found} channels where {channels} are declared")
    target.unlink(missing_ok=True)
    io.imsave(target, np.ascontiguousarray(image), check_contrast=False)
    return ", ".join(done)


def prepare_label(source: Path, target: Path, mapping: dict[int, int]) -> str:
    """Link a label file, or write it anew as integers with consecutive values; return what was done."""
    import numpy as np

    png = source.name.endswith(".png")
    if png:
        from skimage import io

        data = io.imread(source)
        if data.ndim == 3:
            sys.exit(f"{source}: a label with {data.shape[-1]} channels")
    else:
        import nibabel as nib

        file: Any = nib.load(source)
        data = np.asanyarray(file.dataobj)
    values = np.unique(data)
    if not np.all(np.isfinite(values)) or not np.array_equal(values, np.round(values)):
        sys.exit(f"{source}: values that are no integers")
    unknown = [int(value) for value in values if int(value) not in mapping]
    if unknown:
        sys.exit(f"{source}: undeclared label values {unknown}")
    remap = any(mapping[int(value)] != int(value) for value in values)
    if not remap and data.dtype.kind in "iu":
        link(source, target)
        return "linked"
    done = [] if data.dtype.kind in "iu" else [f"{data.dtype} cast to integers"]
    if remap:
        done.append("values made consecutive")
    out = np.zeros(data.shape, np.uint8 if max(mapping.values()) < 256 else np.uint16)
    for value in values:
        out[data == value] = mapping[int(value)]
    target.unlink(missing_ok=True)
    if png:
        io.imsave(target, out, check_contrast=False)
    else:
        header = file.header.copy()
        header.set_data_dtype(out.dtype)
        header.set_slope_inter(1, 0)
        nib.save(nib.Nifti1Image(out, None, header), target)
    return ", ".join(done)


def prepare(args: argparse.Namespace) -> None:
    """Make a nnU-Net raw data set out of an MSD or nnU-Net raw folder."""
    folder = Path(args.folder)
    meta = json.loads((folder / args.dataset_json).read_text())
    names = meta.get("channel_names") or meta["modality"]
    ending = meta.get("file_ending", ".nii.gz")
    labels = read_labels(meta)
    mapping = {value: rank for rank, value in enumerate(sorted(set(labels.values())))}
    cases = list_cases(folder, meta, len(names), ending)

    out = Path(os.environ["nnUNet_raw"]) / f"Dataset{args.id:03d}_{args.name or folder.name}"
    for sub in ("imagesTr", "labelsTr"):
        shutil.rmtree(out / sub, ignore_errors=True)
        (out / sub).mkdir(parents=True)
    counts: dict[str, int] = {}

    def count(kind: str, done: str) -> None:
        counts[f"{kind}: {done}"] = counts.get(f"{kind}: {done}", 0) + 1

    for case, images, label in cases:
        for channel, image in enumerate(images):
            target = out / "imagesTr" / f"{case}_{channel:04d}{ending}"
            if ending == ".png":
                count("image", prepare_png(image, target, len(names) if len(images) == 1 else 1))
            else:
                link(image, target)
                count("image", "linked")
        count("label", prepare_label(label, out / "labelsTr" / f"{case}{ending}", mapping))
    (out / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": names,
                "labels": {name: mapping[value] for name, value in sorted(labels.items(), key=lambda item: item[1])},
                "numTraining": len(cases),
                "file_ending": ending,
            },
            indent=2,
        )
    )
    print(f"{out.name}: {len(cases)} cases; " + "; ".join(f"{what} {number}" for what, number in counts.items()))


# --- fingerprint, plan, golden ---------------------------------------------------------------------------------------
def golden_configuration(configuration: dict) -> dict:
    """Return the part of one configuration of nnU-Net's plans that autoseg's planner must reproduce."""
    network = configuration["architecture"]["arch_kwargs"]
    keys = ("spacing", "patch_size", "batch_size", "batch_dice", "median_image_size_in_voxels")
    out = {key: configuration[key] for key in keys}
    out |= {key: network[key] for key in ("n_stages", "features_per_stage", "kernel_sizes", "strides")}
    out |= {key: network[key] for key in ("n_conv_per_stage", "n_conv_per_stage_decoder")}
    return out | {key: configuration[key] for key in ("normalization_schemes", "use_mask_for_norm")}


def dump_golden(golden: dict, path: Path) -> None:
    """Write JSON with one line an entry of the two upper levels: compact, and yet fit for a diff."""
    blocks = []
    for key, value in golden.items():
        lines = [f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in value.items()]
        blocks.append(f" {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def fingerprint_and_plan(args: argparse.Namespace) -> None:
    """Run nnU-Net's fingerprint extraction and default planner and write the golden file."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    raw = dataset_folder("nnUNet_raw", args.id)
    began = time.perf_counter()
    extract_fingerprint_dataset(
        args.id, num_processes=args.processes, check_dataset_integrity=True, show_progress_bar=False
    )
    seconds = time.perf_counter() - began
    target = {"gpu_memory_target_in_gb": args.vram} if args.vram else {}
    ExperimentPlanner(args.id, **target).plan_experiment()
    if not args.golden:
        return
    done = dataset_folder("nnUNet_preprocessed", args.id)
    plans = json.loads((done / "nnUNetPlans.json").read_text())
    meta = json.loads((raw / "dataset.json").read_text())
    configurations = plans["configurations"]
    golden = {
        "fingerprint": json.loads((done / "dataset_fingerprint.json").read_text()),
        "dataset": {key: meta[key] for key in ("channel_names", "labels", "numTraining", "file_ending")},
        "plans": {
            "transpose_forward": plans["transpose_forward"],
            "transpose_backward": plans["transpose_backward"],
            "configurations": sorted(configurations),
            **{
                name: golden_configuration(configurations[name])
                for name in ("2d", "3d_fullres", "3d_lowres")
                if name in configurations
            },
        },
    }
    path = Path(args.golden) / f"{args.golden_name or raw.name.split('_', 1)[1]}.json"
    dump_golden(golden, path)
    print(f"{path.name}: configurations {sorted(configurations)}, fingerprint in {seconds:.1f} s")


def preprocess(args: argparse.Namespace) -> None:
    """Run nnU-Net's preprocessing of one configuration."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    began = time.perf_counter()
    preprocess_dataset(
        args.id, configurations=[args.configuration], num_processes=[args.processes], show_progress_bar=False
    )
    print(f"preprocessed in {time.perf_counter() - began:.1f} s")


# --- train -----------------------------------------------------------------------------------------------------------
def make_trainer_class() -> type:
    """Return a trainer of nnU-Net that stops after a given number of steps or seconds."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class BudgetTrainer(nnUNetTrainer):
        """nnU-Net's trainer with short epochs, its decay fitted into ``budget`` (to be set after construction)."""

        budget: dict  # steps or seconds, epoch_steps, val_batches, history (a file)

        def used(self) -> float:
            """Return the part of the budget that is spent, 0 to 1."""
            if self.budget["seconds"]:
                return min(1.0, (time.perf_counter() - self.began) / self.budget["seconds"])
            return self.steps_done / self.budget["steps"]

        def configure_optimizers(self) -> tuple:
            """Keep nnU-Net's optimiser; its decay, once an epoch, follows the spent part of the budget."""
            optimizer, scheduler = super().configure_optimizers()

            def step(epoch: int | None = None) -> None:
                for group in optimizer.param_groups:
                    group["lr"] = self.initial_lr * (1 - self.used()) ** 0.9

            scheduler.step = step
            return optimizer, scheduler

        def run_training(self) -> None:
            """Train until the budget is spent; write the history after each epoch."""
            import numpy as np
            import torch

            budget = self.budget
            self.num_epochs = sys.maxsize if budget["seconds"] else math.ceil(budget["steps"] / budget["epoch_steps"])
            self.steps_done, self.history = 0, []
            self.began = time.perf_counter()
            self.on_train_start()
            self.logger.plot_progress_png = lambda folder: None  # it would cost more than the short epochs' own work
            while self.used() < 1:
                self.on_epoch_start()
                self.on_train_epoch_start()
                started, loading, outputs = time.perf_counter(), 0.0, []
                while len(outputs) < budget["epoch_steps"] and self.used() < 1:
                    mark = time.perf_counter()
                    batch = next(self.dataloader_train)
                    loading += time.perf_counter() - mark
                    outputs.append(self.train_step(batch))
                    self.steps_done += 1
                seconds = time.perf_counter() - started
                self.on_train_epoch_end(outputs)
                with torch.no_grad():
                    self.on_validation_epoch_start()
                    self.on_validation_epoch_end(
                        [self.validation_step(next(self.dataloader_val)) for _ in range(budget["val_batches"])]
                    )
                self.on_epoch_end()
                self.history.append(
                    {
                        "epoch": len(self.history),
                        "steps": self.steps_done,
                        "epoch_steps": len(outputs),
                        "lr": self.optimizer.param_groups[0]["lr"],
                        "seconds": round(seconds, 3),
                        "loading_seconds": round(loading, 3),
                        "since_start": round(time.perf_counter() - self.began, 3),
                        "train_loss": float(np.mean([output["loss"] for output in outputs])),
                        "val_loss": float(self.logger.get_value("val_losses", step=-1)),
                        "pseudo_dice": [float(d) for d in self.logger.get_value("dice_per_class_or_region", step=-1)],
                    }
                )
                Path(budget["history"]).write_text(json.dumps(self.history, indent=1))
            self.on_train_end()

    return BudgetTrainer


def validate(trainer: Any, mirroring: bool, save_to: Path | None = None) -> dict:
    """Predict the validation cases of the fold with the present weights; return the Dice of each case and class."""
    import numpy as np
    import torch
    from nnunetv2.inference import export_prediction
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=mirroring, device=trainer.device, allow_tqdm=False
    )
    plans, configuration = trainer.plans_manager, trainer.configuration_manager
    axes = trainer.inference_allowed_mirroring_axes
    if axes is None:
        axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1]
    predictor.manual_initialization(
        trainer.network, plans, configuration, None, trainer.dataset_json, type(trainer).__name__, axes
    )
    _, keys = trainer.do_split()
    data_set = trainer.dataset_class(trainer.preprocessed_dataset_folder, keys)
    reader = plans.image_reader_writer_class()
    truth_folder = Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"
    labels = trainer.label_manager.foreground_labels
    cases, began = {}, time.perf_counter()
    for key in data_set.identifiers:
        data, _, _, properties = data_set.load_case(key)
        with torch.no_grad():
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.array(data[:]))).cpu()
        found = export_prediction.convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plans, configuration, trainer.label_manager, properties, num_threads_torch=torch.get_num_threads()
        )
        truth = reader.read_seg(str(truth_folder / f"{key}{trainer.dataset_json['file_ending']}"))[0][0]
        if save_to is not None:
            save_to.mkdir(parents=True, exist_ok=True)
            reader.write_seg(found, str(save_to / f"{key}{trainer.dataset_json['file_ending']}"), properties)
        cases[key] = {}
        for label in labels:
            a, b = found == label, truth == label
            total = int(a.sum()) + int(b.sum())
            cases[key][str(label)] = 2 * int((a & b).sum()) / total if total else None
    seconds = time.perf_counter() - began
    trainer.set_deep_supervision_enabled(True)
    per_class = {}
    for label in map(str, labels):
        values = [case[label] for case in cases.values() if case[label] is not None]
        per_class[label] = sum(values) / len(values) if values else None
    known = [value for value in per_class.values() if value is not None]
    return {
        "mirroring": mirroring,
        "seconds": round(seconds, 2),
        "mean_dice": sum(known) / len(known),
        "mean_dice_per_class": per_class,
        "dice_per_case": cases,
    }


def train(args: argparse.Namespace) -> None:
    """Train nnU-Net within a budget, validate the fold with the final weights and write one JSON."""
    if bool(args.steps) == bool(args.seconds):
        sys.exit("give one of --steps and --seconds")
    os.environ["nnUNet_n_proc_DA"] = str(args.workers)
    os.environ.setdefault("nnUNet_def_n_proc", str(args.threads))
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    folder = dataset_folder("nnUNet_preprocessed", args.id)
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    out = Path(args.out)
    trainer = make_trainer_class()(
        plans,
        args.configuration,
        args.fold,
        json.loads((folder / "dataset.json").read_text()),
        torch.device(args.device),
    )
    trainer.budget = {
        "steps": args.steps,
        "seconds": args.seconds,
        "epoch_steps": args.epoch_steps,
        "val_batches": args.val_batches,
        "history": str(out.with_name(out.stem + "_history.json")),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    trainer.run_training()
    result = {
        "data_set": folder.name,
        "configuration": args.configuration,
        "fold": args.fold,
        "steps": trainer.steps_done,
        "seed": args.seed,
        "threads": args.threads,
        "device": args.device,
        "torch": torch.__version__,
        "batch_size": trainer.batch_size,
        "patch_size": list(trainer.configuration_manager.patch_size),
        "training_seconds": round(time.perf_counter() - began, 2),
        "step_seconds": round(sum(epoch["seconds"] for epoch in trainer.history), 2),
        "history": trainer.history,
        "validation": [],
    }
    for mirroring in {"off": [False], "on": [True], "both": [False, True]}[args.mirroring]:
        save_to = Path(trainer.output_folder) / ("validation_mirrored" if mirroring else "validation_plain")
        result["validation"].append(validate(trainer, mirroring, save_to))
        out.write_text(json.dumps(result, indent=1))
        print({key: value for key, value in result["validation"][-1].items() if key != "dice_per_case"})


# --- main ------------------------------------------------------------------------------------------------------------
def main() -> None:
    """Read the command line and run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", help="folder that gets raw/, preprocessed/ and results/")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=(function.__doc__ or "").splitlines()[0])
        sub.set_defaults(function=function)
        sub.add_argument("--id", type=int, required=True, help="number of the data set in nnU-Net")
        for folder in ENVIRONMENT:
            sub.add_argument(f"--{folder}", help=f"instead of HOME/{folder}")
        sub.add_argument("--processes", type=int, default=2)
        return sub

    sub = command("prepare", prepare)
    sub.add_argument("folder", help="data set folder in MSD or nnU-Net raw layout")
    sub.add_argument("--name", help="name of the data set (default: that of the folder)")
    sub.add_argument("--dataset-json", default="dataset.json", help="another description inside the folder")
    sub = command("fingerprint-and-plan", fingerprint_and_plan)
    sub.add_argument("--golden", help="folder for NAME.json; without it no golden file is written")
    sub.add_argument("--vram", type=float, help="memory target in GB (default: nnU-Net's own, 8)")
    sub.add_argument("--golden-name")
    sub = command("preprocess", preprocess)
    sub.add_argument("--configuration", default="3d_fullres")
    sub = command("train", train)
    sub.add_argument("--configuration", default="3d_fullres")
    sub.add_argument("--fold", type=int, default=0)
    sub.add_argument("--steps", type=int)
    sub.add_argument("--seconds", type=float)
    sub.add_argument("--epoch-steps", type=int, default=20)
    sub.add_argument("--val-batches", type=int, default=4)
    sub.add_argument("--workers", type=int, default=0, help="augmentation processes (0: in the training process)")
    sub.add_argument("--threads", type=int, default=os.cpu_count())
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--mirroring", choices=("off", "on", "both"), default="off", help="mirroring at validation")
    sub.add_argument("--out", required=True, help="JSON with the history and the Dice of each case")
    args = parser.parse_args()
    set_environment(args)
    args.function(args)


if __name__ == "__main__":
    main()
