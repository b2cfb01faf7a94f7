"""Test-time mirroring: none, interleaved and full, by Dice against the reference labels and by seconds.

    python scripts/bench_tta.py RUN... --fold K --out OUT [--config NAME] [--cases N] [--arms none,interleaved,full]
        [--device cpu] [--precision auto] [--engine torch] [--patch 32x48x48] [--threads N]

For each run the model of the fold segments its validation cases, in every arm, the arms taking turns case by case; a
case is read and prepared once. Seconds are those of network, resampling and label map. "passes" are tiles that went
through the network. Further arms: "skip-empty" is none with --skip-empty, "strict" is interleaved without the rule
that tiles of clear background need no further pass. An arm with @0.25 behind its name weights the voxels of a tile by a
Gaussian whose sigma is that part of the patch, not the plan's. Ratios are against the first arm. --patch has tiles
smaller than the network was trained with, to have more of them. Writes OUT.json and OUT.md, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench_lines import markdown

from autoseg import runtime
from autoseg.domain.plan import Configuration
from autoseg.evaluation.crossval import evaluate_cases, tolerance_of
from autoseg.inference import interleaved
from autoseg.inference.predictor import Predictor
from autoseg.inference.sliding_window import make_grid
from autoseg.io.images import read_case, read_labels, write_labels
from autoseg.io.model import Model, load_model
from autoseg.io.run_folder import RunFolder

MODES = {"none": "none", "interleaved": "interleaved", "full": "full", "skip-empty": "none", "strict": "interleaved"}
CLEAR_LEAD = interleaved.CLEAR_LEAD


def compare(run: RunFolder, wanted: argparse.Namespace) -> dict[str, Any]:
    """All arms on the validation cases of one fold."""
    plan, dataset, splits = run.read_plan(), run.read_dataset(), run.read_splits()
    name = wanted.config or plan.default_configuration
    model = load_model(run.fold_folder(name, wanted.fold))
    if wanted.patch:
        model = _with_patch(model, tuple(int(word) for word in wanted.patch.split("x")))
    arms = wanted.arms.split(",")
    predictors = {
        arm: Predictor(
            [_with_sigma(model, arm.partition("@")[2])],
            device=wanted.device,
            precision=wanted.precision,
            tta=MODES[arm.partition("@")[0]],  # type: ignore[arg-type]
            skip_empty=arm == "skip-empty",
            engine=wanted.engine,
        )
        for arm in arms
    }
    cases = [dataset.case(case_id) for case_id in splits.folds[wanted.fold].validation][: wanted.cases]
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    differing: dict[str, list[int]] = {arm: [] for arm in arms}
    num_tiles, least_tiles, shapes = 0, None, []
    with TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            volume = read_case(case, len(plan.channels))
            for turn in range(len(arms)):
                arm = arms[(turn + number) % len(arms)]
                predictor = predictors[arm]
                prepared = predictor.prepare(volume)
                interleaved.CLEAR_LEAD = math.inf if arm == "strict" else CLEAR_LEAD
                started = time.perf_counter()
                labels = predictor.segment(prepared)
                seconds[arm].append(time.perf_counter() - started)
                write_labels(Path(folder) / arm / f"{case.id}.nii.gz", labels, volume.geometry)
            shapes.append(prepared.image.shape[1:])
            tiles = make_grid(shapes[-1], predictor.settings.network.patch_size, predictor.overlap).num_tiles
            num_tiles, least_tiles = num_tiles + tiles, min(tiles, least_tiles or tiles)
            base = arms[0]
            maps = {arm: read_labels(Path(folder) / arm / f"{case.id}.nii.gz")[0] for arm in arms}
            for arm in arms:
                differing[arm].append(int((maps[arm] != maps[base]).sum()))
            print(f"{run.root.name} {case.id}: {number + 1} of {len(cases)}", flush=True)
        scores = {arm: _score(run, cases, Path(folder) / arm) for arm in arms}
    settings = plan.configurations[name]
    return {
        "run": run.root.name,
        "dataset": dataset.name,
        "configuration": name,
        "fold": wanted.fold,
        "patch_size": model.card.settings.network.patch_size,
        "least_tiles": least_tiles,
        "mirrored_axes": settings.mirrored(settings.inference.mirror_axes),
        "median_shape": [statistics.median(sizes) for sizes in zip(*shapes, strict=True)],
        "num_cases": len(cases),
        "num_tiles": num_tiles,
        "arms": {
            arm: {
                "seconds": sum(seconds[arm]),
                "passes": predictors[arm].num_passes,
                "differing_voxels": sum(differing[arm]),
                **scores[arm],
            }
            for arm in arms
        },
    }


def _with_patch(model: Model, patch: tuple[int, ...]) -> Model:
    """The model with other tiles."""
    settings = model.card.settings
    return _with(
        model, settings.model_copy(update={"network": settings.network.model_copy(update={"patch_size": patch})})
    )


def _with_sigma(model: Model, sigma: str) -> Model:
    """The model with other weights of a tile's voxels; "": with its own."""
    if not sigma:
        return model
    settings = model.card.settings
    inference = settings.inference.model_copy(update={"gaussian_sigma_fraction": float(sigma)})
    return _with(model, settings.model_copy(update={"inference": inference}))


def _with(model: Model, part: Configuration) -> Model:
    """The model with other settings of its configuration."""
    card = model.card
    plan = card.plan.model_copy(update={"configurations": card.plan.configurations | {card.configuration: part}})
    return replace(model, card=card.model_copy(update={"plan": plan}))


def _score(run: RunFolder, cases: list[Any], folder: Path) -> dict[str, Any]:
    dataset = run.read_dataset()
    pairs = [(case.id, folder / f"{case.id}.nii.gz", Path(case.labels or "")) for case in cases]
    summary = evaluate_cases(pairs, dataset.labels, tolerance_of(run.read_fingerprint())).summary
    by_class = {item.name: item.metrics[0].mean for item in summary.classes}
    return {"dice": summary.mean_foreground_dice, "dice_by_class": by_class}


def table(found: list[dict[str, Any]]) -> str:
    """A line for each run and arm."""
    head = ["set", "patch", "tiles a case", "arm", "passes a tile", "Dice", "against the first", "s a case", "time"]
    rows = []
    for item in found:
        arms = item["arms"]
        first = next(iter(arms.values()))
        for arm, row in arms.items():
            dice, base = row["dice"], first["dice"]
            rows.append(
                [
                    item["dataset"],
                    "×".join(map(str, item["patch_size"])),
                    f"{item['num_tiles'] / item['num_cases']:.0f}",
                    arm,
                    f"{row['passes'] / item['num_tiles']:.2f}",
                    "–" if dice is None else f"{dice:.4f}",
                    "–" if dice is None or base is None else f"{dice - base:+.4f}",
                    f"{row['seconds'] / item['num_cases']:.2f}",
                    f"{row['seconds'] / first['seconds']:.2f}",
                ]
            )
    return markdown(head, rows)


def main() -> None:
    """Compare, write and print after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--config")
    parser.add_argument("--out", type=Path, required=True, help="without ending")
    parser.add_argument("--cases", type=int, help="the first N validation cases")
    parser.add_argument("--arms", default="none,interleaved,full")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--patch", help="of a tile, e.g. 32x48x48, divisible by the strides")
    parser.add_argument("--threads", type=int, help="of torch")
    wanted = parser.parse_args()
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    runtime.configure_allocator()
    found: list[dict[str, Any]] = []
    for path in wanted.runs:
        found.append(compare(RunFolder(path), wanted))
        content = {"environment": runtime.environment(), "results": found}
        wanted.out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
        wanted.out.with_suffix(".md").write_text(table(found) + "\n")
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
