"""Mirroring from left to right where classes come in pairs: left out, with the labels swapped, or naive.

    python scripts/bench_mirroring.py DATA --out OUT [--sets mouse_brain,headneck_ct] [--vram 1GB] [--epochs 10]
        [--steps 250] [--folds 0] [--seeds 1,2] [--tta] [--set KEY=VALUE]

Trains the same folds of the same plan for the same number of steps in each arm and with each seed, and scores the
validation cases of the folds as training leaves them; with --tta they are also predicted with test-time mirroring, each
arm as it trained. The arms differ in `sides.mirror_pairs` alone: patches and their order are the same in "swap" and
"naive" (in "leave_out" one random number fewer is drawn for each patch). Every training has a run folder of its own
below OUT; what is finished is not done again, and what was interrupted goes on. Writes OUT/results.json and
OUT/results.md, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_lines import autoseg, markdown

from autoseg.evaluation.crossval import evaluate_cases, tolerance_of
from autoseg.io.run_folder import RunFolder

ARMS = ("leave_out", "swap", "naive")
CONFIGURATION = "3d_fullres"
RESULTS = "results.json"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all arms share.

    Attributes:
        epochs: Of each training.
        steps: Of an epoch.
        with_tta: Whether test-time mirroring is scored too.
        settings: Further plan keys, as KEY=VALUE.
    """

    data: Path
    out: Path
    vram: str
    epochs: int
    steps: int
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    with_tta: bool
    settings: tuple[str, ...]


def make_run(what: Comparison, name: str, arm: str, seed: int) -> RunFolder:
    """The run of one arm and seed, planned if it is not yet; the splits do not depend on the seed of a training."""
    run = RunFolder(what.out / name / f"{arm}_seed{seed}")
    cache = what.out / name / "cache"
    if not run.plan_file.is_file():
        keys = (f"{CONFIGURATION}.sides.mirror_pairs={arm}", f"training.steps_per_epoch={what.steps}", *what.settings)
        settings = [word for key in keys for word in ("--set", key)]
        autoseg("plan", str(what.data / name), "--out", str(run.root), "--vram", what.vram, *settings)
    planned = run.read_plan().configurations[CONFIGURATION].training.steps_per_epoch
    if planned != what.steps:
        sys.exit(f"error: {run.root} was planned with {planned} steps an epoch; delete it, or use --steps {planned}")
    if not (run.root / "cache").exists():
        # The arms see the same images: what is preprocessed once serves all.
        cache.mkdir(parents=True, exist_ok=True)
        os.symlink(cache.resolve(), run.root / "cache")
    return run


def train(what: Comparison, run: RunFolder, fold: int, seed: int) -> None:
    """One training with that seed; nothing where it is finished."""
    words = ("--config", CONFIGURATION, "--fold", str(fold), "--epochs", str(what.epochs), "--seed", str(seed))
    autoseg("train", str(run.root), *words)


def score_with_tta(run: RunFolder, fold: int) -> dict[str, Any]:
    """Scores of the fold's validation cases with test-time mirroring."""
    file = run.fold_folder(CONFIGURATION, fold) / "tta.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    dataset = run.read_dataset()
    cases = [dataset.case(case_id) for case_id in run.read_splits().folds[fold].validation]
    out = run.root / f"tta_fold{fold}"
    images = [image for case in cases for image in case.images]
    options = ("--config", CONFIGURATION, "--fold", str(fold), "--tta", "full")
    autoseg("predict", str(run.root), *images, "--out", str(out), *options)
    pairs = [(case.id, out / f"{case.id}{dataset.file_ending}", Path(case.labels or "")) for case in cases]
    evaluation = evaluate_cases(pairs, dataset.labels, tolerance_of(run.read_fingerprint()))
    file.write_text(evaluation.to_json())
    return evaluation.model_dump(mode="json")


def outcome(what: Comparison, run: RunFolder, name: str, arm: str, seed: int, fold: int) -> dict[str, Any]:
    """What one training came to, the classes of pairs apart from the others."""
    folder = run.fold_folder(CONFIGURATION, fold)
    record = json.loads((folder / "run.json").read_text())
    plan = run.read_plan()
    evaluation = json.loads((folder / "validation" / "summary.json").read_text())["evaluation"]
    sided = {side for pair in plan.labels.sided_pairs for side in pair}
    return {
        "set": name,
        "arm": arm,
        "seed": seed,
        "fold": fold,
        "num_cases": evaluation["summary"]["num_cases"],
        "steps": record["steps"],
        "seconds_per_step": record["seconds"] / record["steps"],
        "patch_size": plan.configurations[CONFIGURATION].network.patch_size,
        "batch_size": plan.configurations[CONFIGURATION].training.batch_size,
        **_dice(evaluation, sided, ""),
        **(_dice(score_with_tta(run, fold), sided, "_tta") if what.with_tta else {}),
    }


def _dice(evaluation: dict[str, Any], sided: set[str], suffix: str) -> dict[str, Any]:
    summary = evaluation["summary"]
    by_class = {item["name"]: item["metrics"][0]["mean"] for item in summary["classes"]}

    def mean(names: set[str]) -> float | None:
        values = [by_class[name] for name in names if by_class[name] is not None]
        return sum(values) / len(values) if values else None

    return {
        f"dice{suffix}": summary["mean_foreground_dice"],
        f"dice_sided{suffix}": mean(sided),
        f"dice_others{suffix}": mean(set(by_class) - sided),
        f"dice_by_class{suffix}": by_class,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown; a line a training."""

    def cell(item: dict[str, Any], key: str) -> str:
        value = item.get(key)
        return "–" if value is None else f"{value:.3f}"

    columns = ("dice", "dice_sided", "dice_others", "dice_tta", "dice_sided_tta")
    head = ("set", "arm", "seed", "fold", "steps", "s a step", "Dice", "sided", "others", "Dice, TTA", "sided, TTA")
    rows = []
    for item in sorted(results, key=lambda item: (item["set"], ARMS.index(item["arm"]), item["seed"], item["fold"])):
        facts = [str(item[key]) for key in ("set", "arm", "seed", "fold", "steps")]
        rows.append([*facts, f"{item['seconds_per_step']:.2f}", *(cell(item, column) for column in columns)])
    return markdown(head, rows)


def main() -> None:
    """Train, score, write and print, after each training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default="mouse_brain,headneck_ct")
    parser.add_argument("--vram", default="1GB")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--folds", default="0")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--tta", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further keys of the plan")
    given = parser.parse_args()
    folds, seeds = (tuple(int(item) for item in text.split(",")) for text in (given.folds, given.seeds))
    what = Comparison(
        given.data, given.out, given.vram, given.epochs, given.steps, folds, seeds, given.tta, tuple(given.set)
    )
    results: list[dict[str, Any]] = []
    # Seed by seed, so that the arms can be compared before everything is finished.
    for seed, name, fold, arm in [
        (s, n, f, a) for s in seeds for n in given.sets.split(",") for f in folds for a in ARMS
    ]:
        run = make_run(what, name, arm, seed)
        train(what, run, fold, seed)
        results.append(outcome(what, run, name, arm, seed, fold))
        what.out.joinpath(RESULTS).write_text(json.dumps(results, indent=2) + "\n")
        what.out.joinpath("results.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
