"""The same plan, train, predict, evaluate line on several data sets, against a trivial baseline of each.

    python scripts/bench_datasets.py DATA_FOLDER --out OUT [--sets NAME ...] [--fold 0] [--time-budget 5m]

The score is that of the final weights of one fold on the fold's validation cases, which training never saw. The
baseline sees the same training cases: in 3D the mean training label map, stretched onto the image's grid; in 2D Otsu's
threshold (multi-Otsu for several classes). The threshold of the mean map and the order of Otsu's levels are chosen on
them.
Where a step at the default budget takes longer than 5 s, the set is planned again with 1 GB. Writes OUT/results.json
and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from bench_lines import autoseg, markdown
from numpy.typing import NDArray
from skimage.filters import threshold_multiotsu
from skimage.transform import resize

from autoseg import runtime
from autoseg.domain.dataset import Case, Dataset
from autoseg.domain.plan import Configuration
from autoseg.io.images import read_case, read_labels
from autoseg.io.run_folder import RunFolder
from autoseg.training.batches import Batch
from autoseg.training.learner import Learner

SETS = ("headneck_ct", "sarcoma", "fetal_brain", "mouse_brain", "membrane", "nuclei", "axon_sem")
COMMON_GRID = (96, 96, 96)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
PRESENT_FRACTION = 0.5
SLOW_STEP_S = 5.0
SMALL_BUDGET = "1GB"
TIMED_STEPS = 3
LISTED_CLASSES = 3


def load(case: Case, dataset: Dataset) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Image (C, I, J, K) and class indices (I, J, K)."""
    volume = read_case(case, len(dataset.channels))
    labels, _ = read_labels(Path(str(case.labels)), volume.geometry)
    return volume.array.astype(np.float32), dataset.labels.encode(labels)


def mean_dice(pairs: list[tuple[NDArray[np.int16], NDArray[np.int16]]], num_classes: int) -> float:
    """Mean over classes of the mean over the cases that contain the class."""
    by_class = []
    for index in range(1, num_classes):
        scores = [
            2 * np.sum((a == index) & (b == index)) / (np.sum(a == index) + np.sum(b == index))
            for a, b in pairs
            if (b == index).any()
        ]
        if scores:
            by_class.append(float(np.mean(scores)))
    return float(np.mean(by_class))


def mean_map_baseline(training: list[Case], dataset: Dataset, validation: list[Case]) -> float:
    """Dice of the mean training label map on the validation cases."""
    num_classes = dataset.labels.num_classes
    mean = np.zeros((num_classes, *COMMON_GRID), np.float32)
    truths = [load(case, dataset)[1] for case in training]
    for labels in truths:
        for index in range(num_classes):
            part = (labels == index).astype(np.float32)
            mean[index] += resize(part, COMMON_GRID, order=1, mode="edge", anti_aliasing=False) / len(truths)
    winner, foreground = mean[1:].argmax(0) + 1, 1 - mean[0]

    def place(shape: tuple[int, ...], threshold: float) -> NDArray[np.int16]:
        flat = np.where(foreground > threshold, winner, 0)
        return resize(flat, shape, order=0, mode="edge", anti_aliasing=False, preserve_range=True).astype(np.int16)

    best = max(
        THRESHOLDS, key=lambda value: mean_dice([(place(item.shape, value), item) for item in truths], num_classes)
    )
    scored = [load(case, dataset)[1] for case in validation]
    return mean_dice([(place(item.shape, best), item) for item in scored], num_classes)


def otsu_baseline(training: list[Case], dataset: Dataset, validation: list[Case]) -> float:
    """Dice of Otsu's levels, assigned to classes in the order that is best on the training cases."""
    num_classes = dataset.labels.num_classes

    def levels(case: Case) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        image, labels = load(case, dataset)
        grey = image.mean(axis=0)
        return np.digitize(grey, threshold_multiotsu(grey, classes=num_classes)).astype(np.int16), labels

    fitted = [levels(case) for case in training]
    order = max(
        permutations(range(num_classes)),
        key=lambda item: mean_dice([(np.asarray(item, np.int16)[a], b) for a, b in fitted], num_classes),
    )
    table = np.asarray(order, np.int16)
    return mean_dice([(table[a], b) for a, b in map(levels, validation)], num_classes)


def step_seconds(planned: Configuration) -> float:
    """Seconds of a training step on this machine, the quickest of a few, on random numbers."""
    runtime.configure_allocator()
    device = runtime.pick_device("auto")
    network, batch_size = planned.network, planned.training.batch_size
    precision = runtime.pick_precision("auto", device)
    learner = Learner(network, planned.training, device=device, precision=precision, seed=0)
    images = torch.randn(batch_size, network.in_channels, *network.patch_size, device=device)
    labels = torch.randint(0, network.num_classes, (batch_size, *network.patch_size), device=device)
    batch = Batch(images, labels.to(torch.int16), ("random",) * batch_size)
    seconds = []
    for number in range(TIMED_STEPS):
        started = time.monotonic()
        learner.step(batch, planned.training.learning_rate, number)
        seconds.append(time.monotonic() - started)
    return min(seconds)


def run_set(
    source: Path, out: Path, number: int, time_budget: str, vram: str | None, extra: list[str]
) -> dict[str, object]:
    """Plan, train a fold, predict its validation cases, evaluate, and compare with the baseline."""
    run, predictions = out / "run", out / "predictions"
    autoseg("plan", str(source), "--out", str(run), *(["--vram", vram] if vram else []), *extra)
    planned = RunFolder(run).read_plan()
    timed_s = step_seconds(planned.configurations[planned.default_configuration])
    print(f"{source.name}: {timed_s:.2f} s a step at {planned.vram_gb:g} GB", flush=True)
    if vram is None and timed_s > SLOW_STEP_S:
        vram = SMALL_BUDGET
        autoseg("plan", str(source), "--out", str(run), "--vram", vram, *extra)
    autoseg("train", str(run), "--fold", str(number), "--time-budget", time_budget)
    folder = RunFolder(run)
    dataset, fold, plan = folder.read_dataset(), folder.read_splits().folds[number], folder.read_plan()
    validation = [dataset.case(case_id) for case_id in fold.validation]
    started = time.monotonic()
    images = [file for case in validation for file in case.images]
    autoseg("predict", str(run), *images, "--fold", str(number), "--out", str(predictions))
    predict_s = time.monotonic() - started
    autoseg("evaluate", str(predictions), str(source), "--json", str(out / "evaluation.json"))
    evaluation = json.loads((out / "evaluation.json").read_text())
    training = [dataset.case(case_id) for case_id in fold.train]
    name = plan.default_configuration
    is_2d = plan.configurations[name].network.dims == 2
    baseline = (otsu_baseline if is_2d else mean_map_baseline)(training, dataset, validation)
    network = plan.configurations[name].network
    record = json.loads((folder.fold_folder(name, number) / "run.json").read_text())
    return {
        "set": source.name,
        "fold": number,
        "configuration": name,
        "vram": vram or "8GB",
        "patch_size": network.patch_size,
        "batch_size": plan.configurations[name].training.batch_size,
        "num_training": len(training),
        "num_validation": len(validation),
        "num_steps": record["steps"],
        "seconds_per_step": record["seconds"] / record["steps"],
        "seconds_per_step_at_first_budget": timed_s,
        "preset": plan.preset,
        "predict_s": round(predict_s, 1),
        "dice": evaluation["summary"]["mean_foreground_dice"],
        "baseline": baseline,
        "missing_classes": missing_classes(evaluation),
    }


def missing_classes(evaluation: dict) -> list[str]:  # type: ignore[type-arg]
    """Classes in more than half of the cases that no prediction holds a voxel of."""
    summary, num_cases = evaluation["summary"], evaluation["summary"]["num_cases"]
    return [
        item["name"]
        for item in summary["classes"]
        if item["num_present"] > PRESENT_FRACTION * num_cases and item["num_missed"] == item["num_present"]
    ]


def table(results: list[dict[str, object]]) -> str:
    """The results as Markdown."""
    header = ["set, time", "configuration, memory", "patch, batch", "steps (s each)", "cases (train / scored)"]
    rows = []
    for item in results:
        names: list[str] = item["missing_classes"]  # type: ignore[assignment]
        missing = ", ".join(names[:LISTED_CLASSES]) or "-"
        if len(names) > LISTED_CLASSES:
            missing += f" and {len(names) - LISTED_CLASSES} others"
        rows.append(
            [
                f"{item['set']} fold {item.get('fold', 0)}, {item['time_budget']}",
                f"{item['configuration']}, {item['vram']}",
                f"{'×'.join(map(str, item['patch_size']))}, {item['batch_size']}",  # type: ignore[call-overload]
                f"{item['num_steps']} ({item['seconds_per_step']:.2f})",
                f"{item['num_training']} / {item['num_validation']}",
                f"{item['dice']:.3f}",
                f"{item['baseline']:.3f}",
                missing,
            ]
        )
    return markdown([*header, "Dice", "baseline", "never predicted"], rows)


def main() -> None:
    """Parse, run each set, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--time-budget", default="5m")
    parser.add_argument("--vram", nargs="*", default=[], metavar="SET=1GB", help="smaller budgets, set by set")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--set", dest="extra", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    budgets = dict(item.split("=", 1) for item in arguments.vram)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results_file = arguments.out / "results.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else []
    extra = ["--preset", arguments.preset]
    extra += [word for item in arguments.extra for word in ("--set", item)]
    for name in arguments.sets:
        done = [item for item in results if item["set"] != name]
        outcome = run_set(
            arguments.data / name,
            arguments.out / name,
            arguments.fold,
            arguments.time_budget,
            budgets.get(name),
            extra,
        )
        results = [*done, outcome | {"time_budget": arguments.time_budget}]
        results_file.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
