"""autoseg and nnU-Net v2 side by side: the same fold of the same sets, planned for the same memory, for the same time.

    python scripts/bench_side_by_side.py DATA --oracle ORACLE/bin/python --home HOME --out OUT
        [--sets headneck_ct,sarcoma,fetal_brain,membrane] [--vram 1] [--minutes 20] [--fold 0] [--seed 1] [--together]
        [--mirroring off] [--only-prepare]

Each set is planned by both for the same memory; autoseg's `splits.json` becomes nnU-Net's `splits_final.json`. Then
both train the fold for the same time: one after the other on all cores, or with --together at the same time, each on a
core of its own, so that what disturbs the machine meets both. nnU-Net trains with epochs of 20 steps and its own
polynomial decay fitted into the time (`scripts/nnunet_oracle.py`, which also says how to make its environment). The
validation cases of the fold are predicted by the final weights and scored by the same code; nnU-Net with and without
mirroring, autoseg as its training leaves them. What is finished is not done again. Writes OUT/results.json and prints
a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from bench_lines import autoseg, markdown

from autoseg.evaluation.crossval import evaluate_cases, tolerance_of
from autoseg.io.run_folder import RunFolder

ORACLE = Path(__file__).with_name("nnunet_oracle.py")
FIRST_ID = 100
EPOCH_STEPS = 20
VALIDATION_BATCHES = 2
SECONDS_A_MINUTE = 60


@dataclass(frozen=True, slots=True)
class Comparison:
    """What all sets share."""

    data: Path
    oracle: str
    home: Path
    out: Path
    vram: float
    minutes: float
    fold: int
    seed: int
    is_together: bool
    mirroring: str
    plan_words: tuple[str, ...]


def nnunet(what: Comparison, command: str, number: int, *words: str) -> list[str]:
    """A command line of the oracle."""
    return [what.oracle, str(ORACLE), "--home", str(what.home), command, "--id", str(number), *words]


def prepare(what: Comparison, name: str, number: int) -> tuple[RunFolder, str]:
    """Plan with both, give nnU-Net the splits, and preprocess; autoseg's run and the name of the configuration."""
    run = RunFolder(what.out / name / "run")
    if not run.plan_file.is_file():
        # What may not be more than a core's work is planned with one: the plan is for the speed that was measured.
        cores = sorted(os.sched_getaffinity(0))
        if what.is_together:
            os.sched_setaffinity(0, cores[-1:])
        autoseg("plan", str(what.data / name), "--out", str(run.root), "--vram", f"{what.vram:g}GB", *what.plan_words)
        os.sched_setaffinity(0, cores)
    configuration = run.read_plan().default_configuration
    done = what.out / name / "nnunet_prepared"
    if not done.exists():
        for words in (
            nnunet(what, "prepare", number, str(what.data / name), "--name", name),
            nnunet(what, "fingerprint-and-plan", number, "--vram", f"{what.vram:g}"),
            nnunet(what, "preprocess", number, "--configuration", configuration),
        ):
            subprocess.run(words, check=True)
        folds = [{"train": list(fold.train), "val": list(fold.validation)} for fold in run.read_splits().folds]
        target = what.home / "preprocessed" / f"Dataset{number:03d}_{name}" / "splits_final.json"
        target.write_text(json.dumps(folds, indent=1))
        done.touch()
    return run, configuration


def train(what: Comparison, name: str, number: int, run: RunFolder, configuration: str) -> None:
    """Train both, and predict the validation cases."""
    seconds = what.minutes * SECONDS_A_MINUTE
    threads = 1 if what.is_together else len(os.sched_getaffinity(0))
    theirs_out = what.out / name / "nnunet.json"
    theirs = nnunet(
        *(what, "train", number, "--configuration", configuration, "--fold", str(what.fold)),
        *("--seconds", f"{seconds:g}", "--epoch-steps", str(EPOCH_STEPS), "--val-batches", str(VALIDATION_BATCHES)),
        *("--threads", str(threads), "--seed", str(what.seed), "--mirroring", what.mirroring, "--out", str(theirs_out)),
    )
    ours = [sys.executable, "-m", "autoseg", "train", str(run.root), "--config", configuration]
    ours += ["--fold", str(what.fold), "--time-budget", f"{seconds:g}s", "--seed", str(what.seed)]
    lines = [ours] if (theirs_out.is_file() and '"validation": [' in theirs_out.read_text()) else [theirs, ours]
    cores = sorted(os.sched_getaffinity(0))
    running = []
    for core, line in zip(cores, lines, strict=False):
        one = os.environ | {"OMP_NUM_THREADS": str(threads)}
        pinned = ["taskset", "-c", str(core), *line] if what.is_together else line
        print("$", *pinned, flush=True)
        running.append(subprocess.Popen(pinned, env=one))
        if not what.is_together:
            running[-1].wait()
    if any(process.wait() for process in running):
        sys.exit(f"error: a training of {name} failed")


def scores(what: Comparison, name: str, number: int, run: RunFolder, configuration: str) -> list[dict[str, Any]]:
    """A row for each way to predict, scored by the same code."""
    dataset = run.read_dataset()
    cases = [dataset.case(case_id) for case_id in run.read_splits().folds[what.fold].validation]
    folder = run.fold_folder(configuration, what.fold)
    record = json.loads((folder / "run.json").read_text())
    theirs = json.loads((what.out / name / "nnunet.json").read_text())
    trained = what.home / "results" / f"Dataset{number:03d}_{name}"
    found = next(trained.glob(f"*__{configuration}/fold_{what.fold}"))
    ways = [
        ("autoseg", folder / "validation", record["steps"], record["seconds"]),
        ("nnU-Net", found / "validation_plain", theirs["steps"], theirs["training_seconds"]),
        ("nnU-Net, mirroring", found / "validation_mirrored", theirs["steps"], theirs["training_seconds"]),
    ]
    rows = []
    for way, predictions, steps, seconds in ways:
        if not predictions.is_dir():
            continue
        pairs = [(case.id, predictions / f"{case.id}{dataset.file_ending}", Path(case.labels or "")) for case in cases]
        summary = evaluate_cases(pairs, dataset.labels, tolerance_of(run.read_fingerprint())).summary
        rows.append(
            {
                "set": name,
                "fold": what.fold,
                "configuration": configuration,
                "way": way,
                "cores": 1 if what.is_together else len(os.sched_getaffinity(0)),
                "steps": steps,
                "seconds": seconds,
                "num_cases": summary.num_cases,
                "dice": summary.mean_foreground_dice,
                "dice_by_class": {item.name: item.metrics[0].mean for item in summary.classes},
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    head = ("set", "configuration", "way", "cores", "minutes", "steps", "s a step", "cases", "Dice")
    return markdown(
        head,
        [
            [
                *(item["set"], item["configuration"], item["way"], str(item["cores"])),
                *(f"{item['seconds'] / SECONDS_A_MINUTE:.1f}", str(item["steps"])),
                *(f"{item['seconds'] / item['steps']:.2f}", str(item["num_cases"]), f"{item['dice']:.4f}"),
            ]
            for item in rows
        ],
    )


def main() -> None:
    """Prepare, train and score set by set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--oracle", required=True, help="python of the environment that has nnunetv2")
    parser.add_argument("--home", type=Path, required=True, help="folder for nnU-Net's data and results")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default="headneck_ct,sarcoma,fetal_brain,membrane")
    parser.add_argument("--vram", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="both at the same time, a core each")
    parser.add_argument(
        "--mirroring", default="both", help="nnU-Net's when it predicts: off or both, one, or one a set"
    )
    parser.add_argument("--only-prepare", action="store_true", help="plan, preprocess for nnU-Net, and stop")
    parser.add_argument("--plan", default="", help="further words for autoseg plan")
    given = parser.parse_args()
    what = Comparison(
        *(given.data, given.oracle, given.home.resolve(), given.out, given.vram, given.minutes, given.fold, given.seed),
        given.together,
        "",
        tuple(given.plan.split()),
    )
    results: list[dict[str, Any]] = []
    names, mirrorings = given.sets.split(","), given.mirroring.split(",")
    for offset, (name, mirroring) in enumerate(zip(names, cycle(mirrorings), strict=False)):
        number, what = FIRST_ID + offset, replace(what, mirroring=mirroring)
        run, configuration = prepare(what, name, number)
        if given.only_prepare:
            continue
        train(what, name, number, run, configuration)
        results += scores(what, name, number, run, configuration)
        given.out.joinpath("results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
