#!/usr/bin/env python3
"""Train the small nnU-Net v2 models that `scripts/nnunet_parity.py` compares predictions of, one of each kind.

Runs in nnU-Net's environment (see the header of `scripts/nnunet_oracle.py`) on the folder of real data sets:

    oracle/bin/python scripts/nnunet_parity_models.py --home HOME --data ../shared/data            # all of them
    oracle/bin/python scripts/nnunet_parity_models.py --home HOME --data ../shared/data --only cascade_lowres cascade

They are trained for a few dozen steps: predictions must be equal, not good. Everything of nnU-Net's lies below HOME:
HOME/results/DatasetNNN_NAME/nnUNetTrainer__PLANS__CONFIGURATION/fold_X/checkpoint_final.pth and so on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import nnunet_oracle

NARROW = 8
"""Channels of the first stage where the width of the network is not what is compared."""


# --- data sets -------------------------------------------------------------------------------------------------------
def _raw_folder(number: int, name: str) -> Path:
    folder = Path(os.environ["nnUNet_raw"]) / f"Dataset{number:03d}_{name}"
    for sub in ("imagesTr", "labelsTr", "imagesTs"):
        shutil.rmtree(folder / sub, ignore_errors=True)
        (folder / sub).mkdir(parents=True)
    return folder


def _describe(folder: Path, meta: dict, count: int) -> None:
    (folder / "dataset.json").write_text(json.dumps(meta | {"numTraining": count}, indent=2))


def _sources(source: Path, train: int, test: int) -> tuple[dict, list, list]:
    """The description of a data set, and (case, images, label) of its first cases and of others, for prediction."""
    meta = json.loads((source / "dataset.json").read_text())
    names = meta.get("channel_names") or meta["modality"]
    meta = {"channel_names": names, "labels": nnunet_oracle.read_labels(meta), "file_ending": meta["file_ending"]} | {
        key: meta[key] for key in ("licence", "reference", "name") if key in meta
    }
    cases = nnunet_oracle.list_cases(source, meta, len(names), meta["file_ending"])
    return meta, cases[:train], cases[-test:]


def _load(path: Path) -> tuple[Any, Any]:
    import nibabel as nib
    import numpy as np

    image: Any = nib.load(path)
    array = np.asanyarray(image.dataobj)
    return array, image.affine


def _save(path: Path, array: Any, affine: Any) -> None:
    import nibabel as nib

    nib.save(nib.Nifti1Image(array, affine), path)


Change = Callable[[Any, Any], tuple[Any, Any]]
"""(array, affine) to (array, affine), of images and of label maps."""


def make_set(
    number: int,
    name: str,
    source: Path,
    train: int,
    test: int,
    *,
    change: Change | None = None,
    relabel: Callable[[Any], Any] | None = None,
    **entries: Any,
) -> None:
    """Make a raw data set of some cases of a real one; imagesTs gets others that nothing is trained on."""
    import numpy as np

    meta, training, testing = _sources(source, train, test)
    folder, ending = _raw_folder(number, name), meta["file_ending"]
    channels = len(meta["channel_names"])
    keep: Change = lambda array, affine: (array, affine)  # noqa: E731
    for group, cases in (("Tr", training), ("Ts", testing)):
        for case, images, label in cases:
            for channel, image in enumerate(images):
                target = folder / f"images{group}" / f"{case}_{channel:04d}{ending}"
                if ending == ".png":
                    nnunet_oracle.prepare_png(image, target, channels)
                elif change is None:
                    nnunet_oracle.link(image, target)
                else:
                    array, affine = change(*_load(image))
                    _save(target, array.astype(np.float32), affine)
            if group == "Ts":
                continue
            target = folder / "labelsTr" / f"{case}{ending}"
            if ending == ".png":
                nnunet_oracle.link(label, target)
                continue
            array, affine = (change or keep)(*_load(label))
            array = np.rint(array).astype(np.uint8)
            _save(target, relabel(array) if relabel else array, affine)
    _describe(folder, meta | entries, len(training))


def halved(array: Any, affine: Any) -> tuple[Any, Any]:
    """Every second voxel along each axis."""
    import numpy as np

    return array[::2, ::2, ::2], affine @ np.diag([2, 2, 2, 1])


def turned(array: Any, affine: Any) -> tuple[Any, Any]:
    """The same image in another axis order: the file's first axis is the body's last, and runs against it."""
    import numpy as np

    order = np.zeros((4, 4))
    order[3, 3] = 1
    for new, old in enumerate((2, 0, 1)):
        order[old, new] = 1
    order[2, 0], order[2, 3] = -1, array.shape[2] - 1
    return array.transpose(2, 0, 1)[::-1], affine @ order


def with_ignored_slab(array: Any) -> Any:
    """The label map with value 3 in the last third of the slices, as if nobody had annotated them."""
    array = array.copy()
    array[..., -(array.shape[-1] // 3) :] = 3
    return array


REGIONS = {
    "background": 0,
    "brain": [1, 2, 3, 4, 5, 6, 7, 8],
    "csf": [2, 4],
    "grey_matter": [5, 6],
    "hindbrain": [3, 7],
}


def make_sets(data: Path, wanted: set[int]) -> None:
    """The raw data sets."""
    sets: dict[int, Callable[[], None]] = {
        501: lambda: make_set(501, "Hippocampus", data / "hippocampus", 24, 6),
        502: lambda: make_set(502, "Sarcoma", data / "sarcoma", 8, 4),
        503: lambda: make_set(503, "HeadNeck", data / "headneck_ct", 8, 3),
        504: lambda: make_set(
            504,
            "FetalRegions",
            data / "fetal_brain",
            9,
            3,
            change=halved,
            labels=REGIONS,
            regions_class_order=[1, 2, 5, 3],
        ),
        505: lambda: make_set(
            505,
            "HippocampusIgnore",
            data / "hippocampus",
            20,
            6,
            relabel=with_ignored_slab,
            labels={"background": 0, "Anterior": 1, "Posterior": 2, "ignore": 3},
        ),
        506: lambda: make_set(506, "Nuclei", data / "nuclei", 16, 6),
        507: lambda: make_set(507, "SarcomaTurned", data / "sarcoma", 6, 3, change=turned),
        508: lambda: make_set(508, "HeadNeckHalved", data / "headneck_ct", 8, 3, change=halved),
    }
    for number, make in sets.items():
        if number in wanted:
            make()


# --- plans -----------------------------------------------------------------------------------------------------------
def plan(
    number: int, planner: str = "ExperimentPlanner", memory_gb: float | None = None, name: str = "nnUNetPlans"
) -> Path:
    """Plan with one of nnU-Net's planners; returns the file of the plans."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, plan_experiments

    os.environ["nnUNet_n_proc_DA"] = "1"  # the planner takes it for a number of threads, which 0 is not
    done = Path(os.environ["nnUNet_preprocessed"])
    if not list(done.glob(f"Dataset{number:03d}_*/dataset_fingerprint.json")):
        extract_fingerprint_dataset(number, num_processes=1, check_dataset_integrity=True, show_progress_bar=False)
    plan_experiments([number], planner, memory_gb, overwrite_plans_name=name)
    return nnunet_oracle.dataset_folder("nnUNet_preprocessed", number) / f"{name}.json"


def edit(path: Path, features: int | None, batch_size: int) -> dict:
    """Make the networks of a plan narrow and the batches small; returns the plans."""
    plans = json.loads(path.read_text())
    for configuration in plans["configurations"].values():
        if "architecture" not in configuration:
            continue
        network = configuration["architecture"]["arch_kwargs"]
        if features is not None:
            widest = max(network["features_per_stage"]) * features // network["features_per_stage"][0]
            stages = range(network["n_stages"])
            network["features_per_stage"] = [min(features * 2**stage, widest) for stage in stages]
        configuration["batch_size"] = min(configuration["batch_size"], batch_size)
    path.write_text(json.dumps(plans, indent=1))
    return plans


def preprocess(number: int, name: str, configuration: str) -> None:
    """Preprocess one configuration, unless that is done."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    preprocess_dataset(
        number, plans_identifier=name, configurations=[configuration], num_processes=[1], show_progress_bar=False
    )


# --- training --------------------------------------------------------------------------------------------------------
def train(
    number: int, plans_name: str, configuration: str, fold: int | str, steps: int, *, validates: bool = False
) -> None:
    """Train a fold for some steps; `validates` also predicts for the next stage of a cascade."""
    import torch
    from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerVanillaAdam1en3

    os.environ["nnUNet_n_proc_DA"] = "0"  # augment in this very process
    folder = nnunet_oracle.dataset_folder("nnUNet_preprocessed", number)
    plans = json.loads((folder / f"{plans_name}.json").read_text()) | {"continue_training": False}
    # nnU-Net's own trainer with Adam, which finds the foreground within a few dozen steps. Called by the name of the
    # usual one, because nnU-Net looks the trainer up when it predicts.
    kind = type("nnUNetTrainer", (nnunet_oracle.make_trainer_class(), nnUNetTrainerVanillaAdam1en3), {})
    trainer = kind(plans, configuration, fold, json.loads((folder / "dataset.json").read_text()), torch.device("cpu"))
    history = Path(trainer.output_folder) / "history.json"
    trainer.budget = {"steps": steps, "seconds": None, "epoch_steps": 10, "val_batches": 1, "history": str(history)}
    trainer.run_training()
    if validates:
        trainer.perform_actual_validation(False)


def make_models(args: argparse.Namespace) -> None:
    """Train everything that was asked for."""
    models: dict[str, tuple[int, Callable[[], None]]] = {}

    def model(name: str, number: int) -> Callable[[Callable[[], None]], None]:
        return lambda make: models.update({name: (number, make)})

    def simple(
        name: str,
        number: int,
        configuration: str,
        folds: tuple[int | str, ...] = (0,),
        *,
        planner: str = "ExperimentPlanner",
        plans: str = "nnUNetPlans",
        features: int | None = NARROW,
        batch_size: int = 2,
        steps: int = args.steps,
        memory_gb: float | None = None,
    ) -> None:
        @model(name, number)
        def make() -> None:
            edit(plan(number, planner, memory_gb, plans), features, batch_size)
            preprocess(number, plans, configuration)
            for fold in folds:
                train(number, plans, configuration, fold, steps)

    simple("plain", 501, "3d_fullres", (0, 1), features=None)
    simple("resenc", 501, "3d_fullres", planner="nnUNetPlannerResEncM", plans="nnUNetResEncUNetMPlans", features=16)
    simple("slices", 501, "2d", features=16, batch_size=16)
    simple("anisotropic", 502, "3d_fullres", memory_gb=1.0)
    simple("regions", 504, "3d_fullres", memory_gb=1.5)
    simple("ignore", 505, "3d_fullres", features=16)
    simple("pictures", 506, "2d", batch_size=4, memory_gb=1.0)
    simple("turned", 507, "3d_fullres", memory_gb=1.0)

    def cascade(name: str, number: int, memory_gb: float) -> None:
        @model(name, number)
        def make() -> None:
            edit(plan(number, memory_gb=memory_gb), NARROW, 2)
            for configuration in ("3d_lowres", "3d_cascade_fullres"):
                preprocess(number, "nnUNetPlans", configuration)
            train(number, "nnUNetPlans", "3d_lowres", "all", args.steps, validates=True)
            train(number, "nnUNetPlans", "3d_cascade_fullres", 0, args.steps)

    cascade("cascade", 503, 0.5)
    # An eighth of the tiles: affordable to train until its networks have made up their minds.
    cascade("cascade_halved", 508, 0.1)

    unknown = sorted(set(args.only or ()) - set(models))
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; there are {', '.join(models)}")
    chosen = {name: models[name] for name in models if not args.only or name in args.only}
    have = {int(path.parent.name[7:10]) for path in Path(os.environ["nnUNet_raw"]).glob("Dataset*/dataset.json")}
    make_sets(Path(args.data), {number for number, _ in chosen.values()} - have)
    for name, (_, make) in chosen.items():
        began = time.perf_counter()
        make()
        print(f"MODEL {name}: {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", required=True, help="folder that gets raw/, preprocessed/ and results/")
    parser.add_argument("--data", required=True, help="folder of the real data sets")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of the models to train")
    args = parser.parse_args()
    nnunet_oracle.set_environment(args)
    os.environ.setdefault("nnUNet_def_n_proc", "1")
    import torch

    torch.set_num_threads(args.threads)
    make_models(args)


if __name__ == "__main__":
    main()
