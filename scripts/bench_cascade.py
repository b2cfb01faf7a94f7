"""A cascade against full resolution alone, in the same time for a fold.

    python scripts/bench_cascade.py DATASET --out OUT [--vram 1GB] [--fold 3] [--minutes 10]

Trains every fold of `3d_lowres` and one of `3d_cascade` for the minutes given each, and the same fold of `3d_fullres`
for twice as long: in a whole cross-validation a cascade spends two trainings on a fold. Each is scored on the fold's
validation cases as training leaves them, which neither a fold's network nor the lowres network whose map it was given
has learned from. Then the fold's validation cases are predicted with `autoseg predict`, for its seconds only: there
every fold of `3d_lowres` takes part, and these have seen the cases. Goes on where it was stopped; writes
OUT/results.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench_lines import autoseg, markdown

from autoseg.io.run_folder import RunFolder

LOWRES, CASCADE, FULLRES = "3d_lowres", "3d_cascade", "3d_fullres"


def outcome(run: RunFolder, configuration: str, fold: int) -> dict[str, Any]:
    """Length of a training and the scores of its validation cases."""
    folder = run.fold_folder(configuration, fold)
    record = json.loads((folder / "run.json").read_text())
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    found, planned = summary["evaluation"]["summary"], run.read_plan().configurations[configuration]
    return {
        "configuration": configuration,
        "fold": fold,
        "spacing_mm": planned.preprocess.target_spacing,
        "patch_size": planned.network.patch_size,
        "batch_size": planned.training.batch_size,
        "time_budget_s": record["time_budget_s"],
        "num_steps": record["steps"],
        "seconds_per_step": record["seconds"] / record["steps"],
        "num_cases": found["num_cases"],
        "dice": found["mean_foreground_dice"],
        "dice_by_class": {item["name"]: item["metrics"][0]["mean"] for item in found["classes"]},
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    names = list(results[0]["dice_by_class"])
    rows = [
        [
            f"{item['configuration']}, {item['fold']}",
            f"{item['time_budget_s'] / 60:g} min",
            " × ".join(f"{value:.2f}" for value in item["spacing_mm"]),
            f"{item['num_steps']} ({item['seconds_per_step']:.2f})",
            f"{item['dice']:.3f}",
            *(f"{item['dice_by_class'][name]:.3f}" for name in names),
        ]
        for item in results
    ]
    return markdown(["configuration, fold", "time", "spacing (mm)", "steps (s each)", "Dice", *names], rows)


def main() -> None:
    """Train, predict, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vram", default="1GB")
    parser.add_argument("--fold", type=int, default=3)
    parser.add_argument("--minutes", type=int, default=10)
    arguments = parser.parse_args()
    run, fold, minutes = RunFolder(arguments.out / "run"), arguments.fold, arguments.minutes
    autoseg("plan", str(arguments.dataset), "--out", str(run.root), "--vram", arguments.vram)
    if CASCADE not in run.read_plan().configurations:
        sys.exit(f"error: {arguments.dataset} at {arguments.vram} has no {CASCADE}; try a smaller --vram")
    autoseg("train", str(run.root), "--config", LOWRES, "--time-budget", f"{minutes}m")
    for name, budget in ((CASCADE, minutes), (FULLRES, 2 * minutes)):
        autoseg("train", str(run.root), "--config", name, "--fold", str(fold), "--time-budget", f"{budget}m")
    dataset, folds = run.read_dataset(), run.read_splits().folds
    images = [str(file) for case_id in folds[fold].validation for file in dataset.case(case_id).images]
    predict_s = {}
    for name in (FULLRES, CASCADE):
        out = arguments.out / f"predictions_{name}"
        words = ("predict", str(run.root), *images, "--config", name, "--fold", str(fold), "--out", str(out))
        predict_s[name] = autoseg(*words)
    trained = [*((LOWRES, number) for number in range(len(folds))), (CASCADE, fold), (FULLRES, fold)]
    results = [outcome(run, name, number) for name, number in trained]
    found = {"trainings": results, "predict_s": predict_s, "num_predicted": len(images)}
    (arguments.out / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(results))
    print(
        f"predicting {len(images)} images: " + ", ".join(f"{name} {value:.0f} s" for name, value in predict_s.items())
    )


if __name__ == "__main__":
    main()
