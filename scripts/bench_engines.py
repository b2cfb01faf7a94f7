"""Engines: seconds, and how near they are to PyTorch in float32, on real images.

    python scripts/bench_engines.py MODEL IMAGES --out OUT [--config NAME] [--fold 0] [--cases N] [--tta none]
        [--rounds 3] [--threads N] [--labels FOLDER]
        [--ways torch:fp32,torch:bf16,compile:bf16,openvino:fp32,openvino:bf16,openvino:int8,onnx:fp32]

MODEL is a run or a fold folder. Every way segments every image, the ways taking turns image by image and round by
round; an image is read and prepared once. Seconds are those of network, resampling and label map, the least of the
rounds, all images together; "set up" is what the way takes before its first tile, the first time and once its form is
kept. Dice is that of the label maps against those of PyTorch in float32 (mean over classes of the mean over images that
have the class), and with --labels against references (FOLDER/CASE.ending). Ways whose packages are missing are left
out. openvino:int8 is calibrated with tiles of the last images; give more images than are predicted, so that it does not
see those. Writes OUT.json and OUT.md, and prints the
table.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bench_dice import dice, mean_dice
from bench_lines import markdown

from autoseg import runtime
from autoseg.inference.calibration import NUM_TILES
from autoseg.inference.engines import ENGINES, Loaded, installed
from autoseg.inference.engines.base import Way, package_versions
from autoseg.inference.engines.parity import compare
from autoseg.inference.inputs import find_cases, output_ending
from autoseg.inference.predictor import Predictor
from autoseg.inference.sliding_window import make_grid, middle_tiles
from autoseg.io.images import read_case, read_labels
from autoseg.pipeline.prediction import load_models

INT8 = Way("openvino", "int8")
WAYS = "torch:fp32,torch:bf16,compile:bf16,openvino:fp32,openvino:bf16,openvino:int8,onnx:fp32"


def set_up(models: Any, way: Way, batch: int, tiles: list[torch.Tensor]) -> tuple[Any, dict[str, Any]]:
    """Models in an engine, and seconds to bring them there: now, and again where that was kept."""
    settings, cpu = models[0].card.settings, torch.device("cpu")

    if way == INT8:
        # Not kept: people's own predictions are not to use what these images have calibrated.
        models = [replace(model, folder=None) for model in models]

    def load() -> Loaded:
        return Loaded(models, settings, way, cpu, batch, lambda _: tiles)

    started = time.perf_counter()
    loaded = load()
    first = time.perf_counter() - started
    loaded.keep()
    started = time.perf_counter()
    load()
    return loaded, {"set_up_s": first, "set_up_again_s": time.perf_counter() - started}


def some_tiles(predictor: Predictor, cases: Any, number: int) -> list[torch.Tensor]:
    """A tile in the middle of each of the last images."""
    tiles = []
    for case in cases[-number:]:
        prepared = predictor.prepare(read_case(case, len(predictor.channels)))
        grid = make_grid(prepared.image.shape[1:], predictor.settings.network.patch_size, predictor.overlap)
        tiles.append(middle_tiles(torch.from_numpy(prepared.image), grid, 1))
    return tiles


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    """Every way on every image."""
    models = load_models(wanted.model, wanted.config, wanted.fold)
    plan = models[0].card.plan
    ways = [Way(*word.split(":")) for word in wanted.ways.split(",")]
    ways = [way for way in ways if way.engine in installed() and (way != INT8 or find_spec("nncf"))]
    rows: dict[Way, dict[str, Any]] = {}
    predictors = {}
    probe = Predictor(models, device="cpu", precision="fp32", engine="torch")
    every_case = find_cases([wanted.images], len(plan.channels))
    tiles = some_tiles(probe, every_case, NUM_TILES) if INT8 in ways else []
    for way in ways:
        loaded, seconds = set_up(models, way, probe.tile_batch, tiles)
        rows[way] = seconds | {"seconds": [], "dice": [], "reference": [], "parity": []}
        predictors[way] = Predictor(models, device="cpu", engine="torch", precision="fp32", tta=wanted.tta)
        predictors[way]._running._use(loaded)
        print(way, {key: round(value, 2) for key, value in seconds.items()}, flush=True)
    cases = every_case[: wanted.cases]
    num_tiles = 0
    for number, case in enumerate(cases):
        prepared = predictors[ways[0]].prepare(read_case(case, len(plan.channels)))
        grid = make_grid(prepared.image.shape[1:], probe.settings.network.patch_size, probe.overlap)
        num_tiles += grid.num_tiles
        taken: dict[Way, list[float]] = {way: [] for way in ways}
        maps: dict[Way, Any] = {}
        for round_ in range(wanted.rounds):
            for turn in range(len(ways)):
                way = ways[(turn + number + round_) % len(ways)]
                started = time.perf_counter()
                maps[way] = predictors[way].segment(prepared)
                taken[way].append(time.perf_counter() - started)
        tile = middle_tiles(torch.from_numpy(prepared.image), grid, 1)
        with torch.inference_mode():
            logits = {way: predictors[way]._running(tile) for way in ways}
        exact = Way("torch", "fp32")
        for way in ways:
            rows[way]["seconds"].append(min(taken[way]))
            rows[way]["dice"].append(dice(maps[way], maps[exact]))
            parity = compare(logits[way], logits[exact], is_regions=plan.labels.has_regions)
            rows[way]["parity"].append([parity.same_labels, parity.largest_difference, parity.mean_difference])
            if wanted.labels:
                reference = read_labels(wanted.labels / f"{case.id}{output_ending(case)}")[0]
                rows[way]["reference"].append(dice(maps[way], reference))
        print(f"{case.id}: {number + 1} of {len(cases)}", flush=True)
    for way, row in rows.items():
        row |= {"engine": way.engine, "precision": way.precision}
        row["dice_mean"], row["reference_mean"] = mean_dice(row["dice"]), mean_dice(row["reference"])
        row["dice_least"] = min((score for item in row["dice"] for score in item.values()), default=None)
    return {
        "model": str(wanted.model.name),
        "dataset": plan.dataset,
        "configuration": models[0].card.configuration,
        "patch_size": models[0].card.settings.network.patch_size,
        "num_models": len(models),
        "num_cases": len(cases),
        "num_tiles": num_tiles,
        "tta": wanted.tta,
        "rows": list(rows.values()),
    }


def table(found: dict[str, Any]) -> str:
    """A line a way."""
    head = [
        "engine",
        "precision",
        "s",
        "against the first",
        "set up, s",
        "again, s",
        "Dice against torch fp32, mean",
        "least",
        "largest difference of a probability",
        "Dice against references",
    ]
    rows, first = [], sum(found["rows"][0]["seconds"])
    for row in found["rows"]:
        seconds = sum(row["seconds"])
        reference = row["reference_mean"]
        rows.append(
            [
                row["engine"],
                row["precision"],
                f"{seconds:.2f}",
                f"{seconds / first:.2f}",
                f"{row['set_up_s']:.1f}",
                f"{row['set_up_again_s']:.1f}",
                "–" if row["dice_mean"] is None else f"{row['dice_mean']:.4f}",
                "–" if row["dice_least"] is None else f"{row['dice_least']:.4f}",
                f"{max(item[1] for item in row['parity']):.1e}",
                "–" if reference is None else f"{reference:.4f}",
            ]
        )
    return markdown(head, rows)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="without ending")
    parser.add_argument("--config")
    parser.add_argument("--fold", help="of a run: one number, several as 0,1")
    parser.add_argument("--cases", type=int, help="the first N images")
    parser.add_argument("--tta", default="none", choices=["none", "interleaved", "full"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch and the engines")
    parser.add_argument("--ways", default=WAYS, help="engine:precision, the first one is torch:fp32")
    parser.add_argument("--labels", type=Path, help="folder of reference label maps")
    wanted = parser.parse_args()
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    runtime.configure_allocator(share_arena=True)
    found = measure(wanted)
    environment = runtime.environment()
    environment["versions"] |= package_versions(tuple(ENGINES.values()))
    wanted.out.with_suffix(".json").write_text(json.dumps({"environment": environment, **found}, indent=2) + "\n")
    wanted.out.with_suffix(".md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
