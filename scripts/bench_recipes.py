"""Arms of the training: the same fold for the same steps or seconds, with other settings.

    python scripts/bench_recipes.py DATA --out OUT --set-name hippocampus --fold 1 --seeds 1,2
        (--steps 280 | --seconds 300) [--plan "--vram 1GB"] --arm sgd: --arm "adamw:training.optimiser=adamw;..."

An arm is NAME:KEY=VALUE;KEY=VALUE with keys of the plan (`network.` and `training.` of every configuration, or
`3d_fullres.training.` of one). Each training has a run folder of its own below OUT with one cache for all; what is
finished is not done again. The score is that of the final weights on the fold's validation cases. With --steps the arms
do the same number of steps, however long these take: other programs may run beside it. With --seconds they get the same
time, and nothing else may run. Writes OUT/results.json and prints a table with the curve of the pseudo-Dice.

Keys with `first.` before them make a first training, with these keys, of half of the steps or of `first.steps`; the
training itself begins with its final weights (`--pretrained`) and has the rest of the steps, and its curve is the one
shown. So a patch can grow: --arm "growing:first.network.patch_size=[24,32,24];first.training.decay_power=0.01".
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_lines import autoseg, markdown

from autoseg.io.run_folder import RunFolder

EPOCHS = 8
"""Points of the curve where steps are counted."""

VALIDATION_STEPS = 3

FIRST = "first."
"""Before the keys of a first training, whose weights the training itself begins with."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all arms share."""

    data: Path
    out: Path
    configuration: str
    fold: int
    steps: int | None
    seconds: float | None
    plan_words: tuple[str, ...]


def make_run(what: Comparison, arm: str, keys: tuple[str, ...], seed: int, steps: int | None) -> RunFolder:
    """The run of one arm and seed, planned if it is not yet."""
    run = RunFolder(what.out / what.data.name / f"{arm}_seed{seed}")
    if not run.plan_file.is_file():
        settings = [f"training.validation_steps_per_epoch={VALIDATION_STEPS}", *keys]
        if steps is not None:
            settings.append(f"training.steps_per_epoch={steps // EPOCHS}")
        words = [word for key in settings for word in ("--set", key)]
        autoseg("plan", str(what.data), "--out", str(run.root), *what.plan_words, *words)
    cache = what.out / what.data.name / "cache"
    if not (run.root / "cache").exists():
        cache.mkdir(parents=True, exist_ok=True)
        os.symlink(cache.resolve(), run.root / "cache")
    return run


def train_arm(what: Comparison, arm: str, keys: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Train an arm, and before it what it begins with, if it begins with something."""
    first = tuple(key.removeprefix(FIRST) for key in keys if key.startswith(FIRST))
    own = tuple(key for key in keys if not key.startswith(FIRST))
    if not first:
        return train(what, make_run(what, arm, own, seed, what.steps), arm, seed)
    if what.steps is None:
        sys.exit("error: a first training needs --steps")
    counts = [int(key.partition("=")[2]) for key in first if key.startswith("steps=")]
    steps = counts[0] if counts else what.steps // 2
    first_keys = (*own, *(key for key in first if not key.startswith("steps=")))
    before = make_run(what, f"{arm}_first", first_keys, seed, steps)
    begun = train(what, before, f"{arm}, first", seed)
    run = make_run(what, arm, own, seed, what.steps - steps)
    found = train(what, run, arm, seed, "--pretrained", str(before.fold_folder(what.configuration, what.fold)))
    return found | {"steps": begun["steps"] + found["steps"], "seconds": begun["seconds"] + found["seconds"]}


def train(what: Comparison, run: RunFolder, arm: str, seed: int, *words: str) -> dict[str, Any]:
    """Train and read what it came to."""
    length = ("--epochs", str(EPOCHS)) if what.steps is not None else ("--time-budget", f"{what.seconds:g}s")
    autoseg(
        *("train", str(run.root), "--config", what.configuration, "--fold", str(what.fold)),
        *("--seed", str(seed), *length, *words),
    )
    folder = run.fold_folder(what.configuration, what.fold)
    record = json.loads((folder / "run.json").read_text())
    summary = json.loads((folder / "validation" / "summary.json").read_text())["evaluation"]["summary"]
    curve = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "set": what.data.name,
        "fold": what.fold,
        "arm": arm,
        "seed": seed,
        "steps": record["steps"],
        "seconds": record["seconds"],
        "dice": summary["mean_foreground_dice"],
        "dice_by_class": {item["name"]: item["metrics"][0]["mean"] for item in summary["classes"]},
        "curve": [
            {key: item[key] for key in ("step", "seconds", "train_loss", "validation_loss", "mean_pseudo_dice")}
            for item in curve
        ],
    }


def table(results: list[dict[str, Any]]) -> str:
    """A line a training: its score and its curve."""
    rows = []
    for item in results:
        points = " ".join(f"{point['mean_pseudo_dice'] or 0:.3f}" for point in item["curve"])
        rows.append(
            [
                item["set"],
                str(item["fold"]),
                item["arm"],
                str(item["seed"]),
                str(item["steps"]),
                f"{item['seconds'] / item['steps']:.2f}",
                f"{item['curve'][-1]['train_loss']:.3f}",
                f"{item['dice']:.4f}",
                points,
            ]
        )
    return markdown(("set", "fold", "arm", "seed", "steps", "s a step", "loss", "Dice", "pseudo-Dice"), rows)


def main() -> None:
    """Train every arm with every seed, and print after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that holds the data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set-name", default="hippocampus")
    parser.add_argument("--config", default="3d_fullres")
    parser.add_argument("--fold", type=int, default=1)
    parser.add_argument("--seeds", default="1")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int)
    length.add_argument("--seconds", type=float)
    parser.add_argument("--plan", default="", help="further words for autoseg plan")
    parser.add_argument("--arm", action="append", required=True, metavar="NAME:KEY=VALUE;...")
    given = parser.parse_args()
    what = Comparison(
        *(given.data / given.set_name, given.out, given.config, given.fold, given.steps, given.seconds),
        tuple(shlex.split(given.plan)),
    )
    results: list[dict[str, Any]] = []
    for seed in (int(text) for text in given.seeds.split(",")):
        for text in given.arm:
            arm, _, keys = text.partition(":")
            results.append(train_arm(what, arm, tuple(key for key in keys.split(";") if key), seed))
            (given.out / f"results_{given.set_name}_{given.fold}.json").write_text(json.dumps(results, indent=1) + "\n")
            print(table(results), flush=True)


if __name__ == "__main__":
    main()
