"""Dice after some minutes of training as a new user would train: `autoseg plan` and `autoseg train`, no other options.

    python scripts/bench_budgets.py DATA/hippocampus --out OUT [--minutes 5,12,25] [--seeds 1,2] [--fold 0]
        [--one-core-each] [--nnunet NNUNET.json --nnunet-seconds-per-step 3.8] [--figure FIGURE.svg]

Every training has a run folder of its own, planned anew. They run one after the other on all cores, or with
--one-core-each as many seeds at a time as there are cores, each pinned to one: half of what the same budget holds on
two cores, but both seeds take no longer than one. What is finished is not done again. Writes OUT/results.json with the
final weights' Dice on the fold's validation cases and the curves on the way, and prints a table.

NNUNET.json is what `scripts/nnunet_oracle.py train` wrote of nnU-Net's training of the same fold. Its curve is put on
this machine's clock by the seconds of one of its steps here (`scripts/bench_step_vs_nnunet.py`). --figure needs
matplotlib, which autoseg itself does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_lines import markdown

SECONDS_A_MINUTE = 60


def train(
    data: Path, run: Path, minutes: int, seed: int, fold: int, core: int | None
) -> subprocess.Popen[bytes] | None:
    """Plan and begin a training in the background; None where it is finished."""
    if (run / "models" / "3d_fullres" / f"fold_{fold}" / "validation" / "summary.json").is_file():
        return None
    words = [sys.executable, "-m", "autoseg"]
    lines = [
        [*words, "plan", str(data), "--out", str(run)],
        [*words, "train", str(run), "--fold", str(fold), "--time-budget", f"{minutes}m", "--seed", str(seed)],
    ]
    environment = dict(os.environ)
    if core is not None:
        lines = [["taskset", "-c", str(core), *line] for line in lines]
        environment["OMP_NUM_THREADS"] = "1"
    script = " && ".join(map(shlex.join, lines))
    print("$", script, flush=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / f"{run.name}.log").open("wb") as log:
        return subprocess.Popen(["sh", "-c", script], env=environment, stdout=log, stderr=log)


def result(run: Path, minutes: int, seed: int, fold: int, cores: int) -> dict[str, Any]:
    """What came of one training."""
    folder = run / "models" / "3d_fullres" / f"fold_{fold}"
    record = json.loads((folder / "run.json").read_text())
    summary = json.loads((folder / "validation" / "summary.json").read_text())["evaluation"]["summary"]
    part = json.loads((run / "plan.json").read_text())["configurations"]["3d_fullres"]
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["seconds"], row["mean_pseudo_dice"]) for row in epochs if row["mean_pseudo_dice"] is not None]
    return {
        "minutes": minutes,
        "seed": seed,
        "cores": cores,
        "patch_size": part["network"]["patch_size"],
        "features_per_stage": part["network"]["features_per_stage"],
        "batch_size": part["training"]["batch_size"],
        "steps": record["steps"],
        "seconds": record["seconds"],
        "dice": summary["mean_foreground_dice"],
        "dice_by_class": {item["name"]: item["metrics"][0]["mean"] for item in summary["classes"]},
        "curve": curve,
    }


def their_curve(path: Path, seconds_per_step: float) -> list[tuple[float, float]]:
    """Seconds and mean pseudo-Dice of nnU-Net's epochs."""
    found = json.loads(path.read_text())
    if "nnunet" in found:
        return [(steps * seconds_per_step, dice) for _, steps, dice in found["nnunet"]["curve"]]
    return [
        (item["steps"] * seconds_per_step, sum(item["pseudo_dice"]) / len(item["pseudo_dice"]))
        for item in found["history"]
    ]


def draw(rows: list[dict[str, Any]], theirs: list[tuple[float, float]], path: Path) -> None:
    """All curves in one figure: pseudo-Dice on the way as lines, the final weights' Dice as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    budgets = sorted({row["minutes"] for row in rows})
    for row in rows:
        colour = f"C{budgets.index(row['minutes'])}"
        minutes = [seconds / SECONDS_A_MINUTE for seconds, _ in row["curve"]]
        is_first = row["seed"] == rows[0]["seed"]
        label = f"autoseg, {row['minutes']} min ({row['cores']} core)" if is_first else None
        axes.plot(minutes, [dice for _, dice in row["curve"]], color=colour, lw=0.8, label=label)
        axes.plot(row["seconds"] / SECONDS_A_MINUTE, row["dice"], "o", color=colour)
    if theirs:
        axes.plot(
            [s / SECONDS_A_MINUTE for s, _ in theirs], [d for _, d in theirs], "k--", label="nnU-Net v2 (2 cores)"
        )
    axes.set(xlabel="minutes of training", ylabel="mean Dice", ylim=(0.6, 0.92), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title="lines: pseudo-Dice on the way\ndots: final weights, whole cases")
    figure.savefig(path)


def main() -> None:
    """Train what is missing; write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", default="5,12,25")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--one-core-each", action="store_true")
    parser.add_argument("--nnunet", type=Path)
    parser.add_argument("--nnunet-seconds-per-step", type=float)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    at_a_time = len(cores) if arguments.one_core_each else 1
    num_cores = 1 if arguments.one_core_each else len(cores)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows = []
    for minutes in (int(item) for item in arguments.minutes.split(",")):
        for first in range(0, len(seeds), at_a_time):
            together = seeds[first : first + at_a_time]
            runs = [(seed, arguments.out / f"minutes{minutes}_seed{seed}_cores{num_cores}") for seed in together]
            running = [
                train(arguments.data, run, minutes, seed, arguments.fold, core if arguments.one_core_each else None)
                for (seed, run), core in zip(runs, cores, strict=False)
            ]
            if any(process.wait() for process in running if process is not None):
                sys.exit(f"error: a training of {minutes} minutes failed, see the logs in {arguments.out}")
            rows += [result(run, minutes, seed, arguments.fold, num_cores) for seed, run in runs]
    theirs = their_curve(arguments.nnunet, arguments.nnunet_seconds_per_step) if arguments.nnunet else []
    record = {"trainings": rows, "nnunet": {"curve": theirs, "seconds_per_step": arguments.nnunet_seconds_per_step}}
    (arguments.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    if arguments.figure is not None:
        draw(rows, theirs, arguments.figure)
    header = ["minutes", "cores", "seed", "batch", "steps", "Dice", *rows[0]["dice_by_class"]]
    lines = [
        [str(row[key]) for key in ("minutes", "cores", "seed", "batch_size", "steps")]
        + [f"{row['dice']:.4f}", *(f"{value:.3f}" for value in row["dice_by_class"].values())]
        for row in rows
    ]
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
