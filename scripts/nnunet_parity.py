#!/usr/bin/env python3
"""Compare predictions of imported models with nnU-Net v2's own: one tile, whole-volume logits, label maps.

Two environments take part: nnU-Net's (see the header of `scripts/nnunet_oracle.py`), named by ``--oracle``, and
autoseg's, which runs this script:

    python scripts/nnunet_parity.py run --oracle oracle/bin/python --results HOME/results --images HOME/raw \\
        --work WORK --json docs/benchmarks/nnunet-import.json

Every trained configuration below ``--results`` is imported (its folds together) and predicts the first ``--cases``
images of its data set's ``imagesTs``, without mirroring and with every mirror combination:

- tile: output of the first fold's network for one tile, on the very input that nnU-Net's preprocessing gives;
- prepared: the image that the network sees, by both preprocessings, relative to its standard deviation;
- logits: of the whole volume, all folds, on the network's grid, each program from the image file on, against
  nnU-Net with float32 accumulators (`Float32Predictor`; stock nnU-Net sums in half precision);
- labels: Dice a class of the written label maps, against stock nnU-Net's and against those of its float32 sums.

The same command goes on where it was stopped: models that the JSON file has are not compared again.

Of a cascade both programs' logits are compared on the label maps that stock nnU-Net's previous stage made without
mirroring; for the labels each program goes the whole way by itself, both stages mirrored or neither.

What the plans may also say is tried with the tiny models of the tests: `variants` writes copies of them with other
plans, to be given to `run`:

    python scripts/nnunet_parity.py variants tests/golden/nnunet_models VARIANTS
    python scripts/nnunet_parity.py run --results VARIANTS/results --images VARIANTS/raw ...

The table is made of the JSON file:

    python scripts/nnunet_parity.py table docs/benchmarks/nnunet-import.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIRRORINGS = ("none", "full")


# --- nnU-Net's side --------------------------------------------------------------------------------------------------
def float32_predictor() -> type:
    """nnU-Net's predictor with sums in float32."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    class Float32Predictor(nnUNetPredictor):
        """Tiles, mirroring and networks are nnU-Net's; weights and sums of tiles are float32.

        Beside them the sums with weights in half precision, as stock nnU-Net has them, summed over the folds in
        `half_weights` (set it to 0 before a prediction).
        """

        half_weights: Any = 0

        @torch.inference_mode()
        def _internal_predict_sliding_window_return_logits(
            self, data: Any, slicers: Any, do_on_device: bool = True
        ) -> Any:
            patch = tuple(self.configuration_manager.patch_size)
            shape = (self.label_manager.num_segmentation_heads, *data.shape[1:])
            sums = []
            for dtype in (torch.float32, torch.half):
                weights = compute_gaussian(patch, 1.0 / 8, 10, dtype=dtype, device=torch.device("cpu"))
                sums.append((weights.float(), torch.zeros(shape), torch.zeros(shape[1:])))
            for place in slicers:
                tile = torch.clone(data[place][None], memory_format=torch.contiguous_format)
                output = self._internal_maybe_mirror_and_predict(tile)[0]
                for weights, logits, total in sums:
                    logits[place] += output * weights
                    total[place[1:]] += weights
            self.half_weights = self.half_weights + sums[1][1] / sums[1][2]
            return sums[0][1] / sums[0][2]

    return Float32Predictor


def tile_of(data: Any, patch: Any) -> Any:
    """A tile in the middle of a prepared image (C, D, H, W), padded where it is smaller; (1, C, *patch)."""
    import numpy as np

    size = [1] * (3 - len(patch)) + list(patch)
    pads = [(0, max(0, side - have)) for side, have in zip(size, data.shape[1:], strict=True)]
    data = np.pad(data, [(0, 0), *pads])
    place = [
        slice((have - side) // 2, (have - side) // 2 + side) for side, have in zip(size, data.shape[1:], strict=True)
    ]
    tile = data[(slice(None), *place)][None]
    return tile if len(patch) == 3 else tile[:, :, 0]


def middle_of(padded: Any, shape: Any) -> tuple[slice, ...]:
    """Where an image lies in its padded form, as nnU-Net pads it."""
    starts = [(have - size) // 2 for have, size in zip(padded, shape, strict=True)]
    return tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))


def oracle(args: argparse.Namespace) -> None:
    """Predict some images with nnU-Net: everything that is compared goes to OUT."""
    os.environ.setdefault("nnUNet_def_n_proc", "1")
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(variable, str(Path(args.out) / "unused"))
    import numpy as np
    import torch
    from nnunetv2.inference import predict_from_raw_data
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    folds = [fold if fold == "all" else int(fold) for fold in args.folds.split(",")]
    kinds = {"stock": nnUNetPredictor, "float32": float32_predictor()}
    predictors = {}
    # Which trainer it was makes no difference to predictions, and nnU-Net may not have it here.
    find_trainer = predict_from_raw_data.recursive_find_trainer_class_by_name
    predict_from_raw_data.recursive_find_trainer_class_by_name = lambda name: find_trainer("nnUNetTrainer")
    for name, kind in kinds.items():
        predictors[name] = kind(device=torch.device("cpu"), allow_tqdm=False)
        predictors[name].initialize_from_trained_model_folder(args.model, folds)
    stock = predictors["stock"]
    configuration, plans = stock.configuration_manager, stock.plans_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    for case, files in json.loads(args.cases).items():
        previous = (
            None if args.previous is None else str(Path(args.previous) / f"{case}{stock.dataset_json['file_ending']}")
        )
        data, seg, properties = preprocessor.run_case(files, previous, plans, configuration, stock.dataset_json)
        stored: dict[str, Any] = {"image": data}
        if previous is not None:
            foreground = stock.label_manager.foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], foreground, data.dtype)))
        tile = tile_of(data, configuration.patch_size)
        stored["tile"] = tile
        with torch.inference_mode():
            stock.network.load_state_dict(stock.list_of_parameters[0])
            stored["tile_output"] = stock.network.eval()(torch.from_numpy(tile)).numpy()
        for mirroring in MIRRORINGS:
            for name, predictor in predictors.items():
                predictor.use_mirroring = mirroring == "full" and predictor.allowed_mirroring_axes is not None
                predictor.half_weights = 0
                logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
                if name == "float32":
                    stored[f"logits_float32_{mirroring}"] = logits.numpy()
                    padded = (predictor.half_weights / len(folds)).numpy()
                    stored[f"logits_half_{mirroring}"] = padded[middle_of(padded.shape, logits.shape)]
                target = out / name / mirroring / case
                target.parent.mkdir(parents=True, exist_ok=True)
                export_prediction_from_logits(
                    logits, properties, configuration, plans, stock.dataset_json, str(target), False, 1
                )
        np.savez(out / f"{case}.npz", **stored)
        print(f"oracle {case}", flush=True)


# --- autoseg's side --------------------------------------------------------------------------------------------------
def largest(difference: Any) -> float:
    """The largest absolute value."""
    return float(abs(difference).max())


def compare_case(predictor: Any, first: Any, case: Any, stored: Any, previous: Path | None, mirrored: Any) -> dict:
    """Tile, prepared image and logits of one case."""
    import numpy as np
    import torch

    from autoseg.inference.sliding_window import make_grid
    from autoseg.io.images import read_case, read_labels

    volume = read_case(case, predictor.num_channels)
    prepared = predictor.prepare(volume)
    expected = stored["image"]
    found: dict[str, Any] = {
        "shape": list(expected.shape[1:]),
        "network_grid_equal": prepared.image.shape == expected.shape,
    }
    with torch.inference_mode():
        output = first(torch.from_numpy(stored["tile"])).numpy()
    found["tile"] = largest(output - stored["tile_output"])
    found["tile_logit_range"] = float(np.ptp(stored["tile_output"]))
    if not found["network_grid_equal"]:
        return found
    spread = expected.reshape(len(expected), -1).std(axis=1).clip(1e-8)
    found["prepared"] = max(largest(a - b) / float(s) for a, b, s in zip(prepared.image, expected, spread, strict=True))
    earlier = None
    if previous is not None:
        earlier = predictor.previous_map(read_labels(previous, volume.geometry)[0], prepared)
    for mirroring, forward in mirrored.items():
        predictor._forward = forward
        with torch.inference_mode():
            axis, stream = predictor.logits(prepared, earlier)
            whole = torch.cat([slab.clone() for _, _, slab in stream], dim=axis + 1).numpy()
        for name in ("half", "float32"):
            difference = np.abs(whole - stored[f"logits_{name}_{mirroring}"])
            found[f"logits_{name}_{mirroring}"] = largest(difference)
            found[f"logits_{name}_{mirroring}_p999"] = float(np.quantile(difference, 0.999))
    found["tiles"] = make_grid(
        prepared.image.shape[1:], predictor.settings.network.patch_size, predictor.overlap
    ).num_tiles
    return found


def dice_per_class(ours: Path, theirs: Path) -> dict[str, float]:
    """Of two label maps, each value that occurs in either."""
    import numpy as np

    from autoseg.io.images import read_labels

    (a, _), (b, geometry) = read_labels(ours), read_labels(theirs)
    read_labels(ours, geometry)  # on one grid, or this fails
    scores = {}
    for value in sorted({int(v) for v in np.unique(a)} | {int(v) for v in np.unique(b)} - {0}):
        if value:
            x, y = a == value, b == value
            scores[str(value)] = 2 * int((x & y).sum()) / (int(x.sum()) + int(y.sum()))
    return scores


def compare_model(args: argparse.Namespace, folder: Path, work: Path, images: Path) -> dict:
    """Import a trained configuration, let both programs predict, compare."""
    import numpy as np

    from autoseg.inference.cases import predict_cases
    from autoseg.inference.inputs import find_cases
    from autoseg.inference.predictor import Predictor
    from autoseg.inference.tta import with_mirroring
    from autoseg.interop.nnunet import import_nnunet
    from autoseg.network.unet import restore
    from autoseg.pipeline.cascade import load_previous
    from autoseg.pipeline.prediction import load_models

    began = time.perf_counter()
    run = work / "run"
    imported = import_nnunet(folder, run)
    configuration = folder.name.split("__")[2]
    name = "3d_cascade" if configuration == "3d_cascade_fullres" else configuration
    models = load_models(run, name, None)
    plan = models[0].card.plan
    cases = find_cases([images], len(plan.channels))[: args.cases]
    previous_folder = None
    oracles = dict.fromkeys(MIRRORINGS, work / "oracle")
    if models[0].card.settings.previous_stage is not None:
        lowres = folder.with_name(folder.name.replace(configuration, models[0].card.settings.previous_stage))
        predict_by_nnunet(args, lowres, cases, work / "lowres", None)
        previous_folder = work / "lowres" / "stock" / "none"
        # Whoever mirrors does so in both stages.
        oracles["full"] = work / "oracle after mirroring"
        predict_by_nnunet(args, folder, cases, oracles["full"], work / "lowres" / "stock" / "full")
    predict_by_nnunet(args, folder, cases, work / "oracle", previous_folder)
    predictor = Predictor(models, device="cpu", engine="torch")
    mirrored = {"none": predictor._forward, "full": with_mirroring(predictor._forward, predictor.settings)}
    first = restore(models[0].card.settings.network, models[0].weights)
    result: dict[str, Any] = {
        "data_set": folder.parent.name,
        "model": folder.name,
        "folds": [str(fold) for fold in imported.folds[name]],
        "precision": predictor.precision,
        "mirror_axes": list(predictor.settings.inference.mirror_axes),
        "patch_size": list(predictor.settings.network.patch_size),
        "cases": {},
    }
    for case in cases:
        with np.load(work / "oracle" / f"{case.id}.npz") as stored:
            ending = next((work / "oracle" / "stock" / "none").glob(f"{case.id}.*")).name.removeprefix(case.id)
            previous = None if previous_folder is None else previous_folder / f"{case.id}{ending}"
            result["cases"][case.id] = compare_case(predictor, first, case, stored, previous, mirrored)
    for mirroring in MIRRORINGS:
        out = work / "autoseg" / mirroring
        previous_models = load_previous(models)
        predict_cases(
            models, cases, out, device="cpu", tta=mirroring, engine="torch", previous=previous_models
        ).raise_failures()
        for case in cases:
            ours = next(out.glob(f"{case.id}.*"))
            for name in ("stock", "float32"):
                theirs = next((oracles[mirroring] / name / mirroring).glob(f"{case.id}.*"))
                result["cases"][case.id][f"dice_{name}_{mirroring}"] = dice_per_class(ours, theirs)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def predict_by_nnunet(args: argparse.Namespace, folder: Path, cases: Any, out: Path, previous: Path | None) -> None:
    """Run this script in nnU-Net's environment."""
    found = sorted(path.parent.name for path in folder.glob("fold_*/checkpoint_final.pth"))
    command = [
        args.oracle,
        str(Path(__file__).resolve()),
        "oracle",
        "--model",
        str(folder),
        "--folds",
        ",".join(name.removeprefix("fold_") for name in found),
        "--cases",
        json.dumps({case.id: list(case.images) for case in cases}),
        "--out",
        str(out),
        "--threads",
        str(args.threads),
        *([] if previous is None else ["--previous", str(previous)]),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def run(args: argparse.Namespace) -> None:
    """Compare every model and write one JSON file."""
    import torch

    torch.set_num_threads(args.threads)
    folders = sorted(path.parent.parent for path in Path(args.results).glob("*/*__*__*/fold_*/checkpoint_final.pth"))
    folders = [
        folder for folder in dict.fromkeys(folders) if not args.only or any(part in str(folder) for part in args.only)
    ]
    target = Path(args.json)
    results = json.loads(target.read_text()) if target.is_file() else []
    done = {(result["data_set"], result["model"]) for result in results}
    for folder in folders:
        if (folder.parent.name, folder.name) in done:
            continue
        images = Path(args.images) / folder.parent.name.split("@")[0] / "imagesTs"
        results.append(compare_model(args, folder, Path(args.work) / folder.parent.name / folder.name, images))
        print(line_of(results[-1]), flush=True)
        target.write_text(json.dumps(results, indent=1) + "\n")


# --- other plans -----------------------------------------------------------------------------------------------------
SPLINE, TORCH, NONE = "resample_data_or_seg_to_shape", "resample_torch_fornnunet", "no_resampling_hack"


def resampling(function: str, **arguments: Any) -> dict:
    """Entries of a configuration: images and probabilities are resampled so, labels by the same function."""
    out: dict[str, Any] = {}
    for name in ("data", "seg", "probabilities"):
        own = {} if function == NONE else {"is_seg": name == "seg"} | arguments
        if function == SPLINE:
            order = arguments.get("order", 3) if name == "data" else 1
            own |= {"order": order} | ({"order_z": 0} if name == "seg" else {})
            if name == "probabilities":
                own["order_z"] = min(1, arguments.get("order_z", 0))
        out |= {f"resampling_fn_{name}": function, f"resampling_fn_{name}_kwargs": own}
    return out


VARIANTS: dict[str, tuple[str, dict, dict]] = {
    # Name: model, changes of the configuration, changes of the plans.
    "order1": ("anisotropic", resampling(SPLINE, order=1, order_z=0, force_separate_z=None), {}),
    "order0": ("anisotropic", resampling(SPLINE, order=0, order_z=0, force_separate_z=None), {}),
    "order_z1": ("anisotropic", resampling(SPLINE, order=3, order_z=1, force_separate_z=None), {}),
    "order_z3": ("anisotropic", resampling(SPLINE, order=3, order_z=3, force_separate_z=None), {}),
    "never_apart": ("anisotropic", resampling(SPLINE, order=3, order_z=0, force_separate_z=False), {}),
    "always_apart": ("cascade", resampling(SPLINE, order=3, order_z=0, force_separate_z=True), {}),
    "threshold": (
        "cascade",
        resampling(SPLINE, order=3, order_z=0, force_separate_z=None, separate_z_anisotropy_threshold=1.2),
        {},
    ),
    "defaults": ("anisotropic", resampling(SPLINE), {}),
    "torch_apart": ("anisotropic", resampling(TORCH, force_separate_z=None), {}),
    "torch_linear": ("anisotropic", resampling(TORCH, force_separate_z=None, aniso_axis_mode="linear"), {}),
    "not_resampled": ("anisotropic", resampling(NONE), {}),
    "rescaled": ("anisotropic", {"normalization_schemes": ["RescaleTo01Normalization", "NoNormalization"]}, {}),
    "unmasked": ("anisotropic", {"use_mask_for_norm": [False, False]}, {}),
    "reoriented_by_itk": ("anisotropic", {}, {"image_reader_writer": "SimpleITKIOWithReorient"}),
    "reoriented_by_nibabel": ("anisotropic", {}, {"image_reader_writer": "NibabelIOWithReorient"}),
    "native_by_nibabel": ("regions", {}, {"image_reader_writer": "NibabelIO"}),
    "transposed": ("regions", {}, {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}),
    "transposed_slices": ("slices", {}, {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}),
}


def variants(args: argparse.Namespace) -> None:
    """Write copies of the tiny models with other plans."""
    out = Path(args.out)
    for name, (model, configuration, plans) in VARIANTS.items():
        for folder in sorted((Path(args.models) / model).glob("*__*__*")):
            if model == "cascade" and "lowres" not in folder.name:
                continue
            content = json.loads((folder / "plans.json").read_text())
            data_set = content["dataset_name"]
            for entry in content["configurations"].values():
                entry.update(configuration if "inherits_from" not in entry else {})
            # The trainer may be one that nnU-Net cannot find here; what it predicts with is the plans.
            target = out / "results" / f"{data_set}@{name}" / "__".join(["nnUNetTrainer", *folder.name.split("__")[1:]])
            shutil.copytree(folder, target, dirs_exist_ok=True)
            (target / "plans.json").write_text(json.dumps(content | plans))
        images = out / "raw" / data_set / "imagesTs"
        images.mkdir(parents=True, exist_ok=True)
        for file in (Path(args.models) / model).glob("case_*.nii.gz"):
            shutil.copy(file, images)


# --- the table -------------------------------------------------------------------------------------------------------
def line_of(result: dict) -> str:
    """One line a model: the worst over its cases."""
    cases = result["cases"].values()

    def worst(key: str) -> str:
        values = [case[key] for case in cases if key in case]
        return f"{max(values):.1e}" if values else "-"

    def dice(name: str, mirroring: str) -> str:
        values = [score for case in cases for score in case.get(f"dice_{name}_{mirroring}", {}).values()]
        return f"{min(values):.5f}" if values else "-"

    logits = " | ".join(worst(f"logits_{name}_{mirroring}") for name in ("float32", "half") for mirroring in MIRRORINGS)
    tiles = max(case.get("tiles", 0) for case in cases)
    cells = (
        result["data_set"][11:],
        result["model"].split("__", 1)[1],
        " ".join(result["folds"]),
        len(result["cases"]),
        tiles,
        worst("tile"),
        worst("prepared"),
        logits,
        *(dice(name, mirroring) for name in ("stock", "float32") for mirroring in MIRRORINGS),
    )
    return f"| {' | '.join(map(str, cells))} |"


def table(args: argparse.Namespace) -> None:
    """Print the table of a JSON file."""
    logits, dice = "logits | mirrored | half weights | mirrored", "Dice | mirrored | Dice, float32 | mirrored"
    print(f"| data set | model | folds | cases | tiles | tile | prepared | {logits} | {dice} |")
    print(f"|{'---|' * 15}")
    for result in json.loads(Path(args.json).read_text()):
        print(line_of(result))


def main() -> None:
    """Read the command line and run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("oracle", help="nnU-Net's side, in its environment")
    for name in ("--model", "--folds", "--cases", "--out"):
        sub.add_argument(name, required=True)
    sub.add_argument("--previous", help="folder of the label maps of a cascade's previous stage")
    sub.add_argument("--threads", type=int, default=1)
    sub.set_defaults(function=oracle)
    sub = commands.add_parser("run", help="compare every model, in autoseg's environment")
    for name in ("--oracle", "--results", "--images", "--work", "--json"):
        sub.add_argument(name, required=True)
    sub.add_argument("--cases", type=int, default=2)
    sub.add_argument("--threads", type=int, default=1)
    sub.add_argument("--only", nargs="*", help="parts of the paths of the models to compare")
    sub.set_defaults(function=run)
    sub = commands.add_parser("variants", help="copies of the tiny models with other plans")
    sub.add_argument("models")
    sub.add_argument("out")
    sub.set_defaults(function=variants)
    sub = commands.add_parser("table", help="print the table of a JSON file")
    sub.add_argument("json")
    sub.set_defaults(function=table)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    sys.exit(main())
