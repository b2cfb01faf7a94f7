"""Prediction of many volumes by a trained nnU-Net v2 model: nnU-Net's own command against autoseg's, alternately.

    python scripts/bench_predict_vs_nnunet.py MODEL IMAGES --nnunet ORACLE/bin --work WORK --out OUT
        [--labels LABELS] [--cases 40] [--folds 0] [--tta full] [--rounds 3] [--threads N]
        [--with-extras VENV/bin/python] [--without-extras VENV/bin/python] [--engine auto]

MODEL is a folder of nnU-Net's results (TRAINER__PLANS__CONFIGURATION), IMAGES a folder of images with endings _0000,
LABELS one of reference label maps. --nnunet names the folder of `nnUNetv2_predict_from_modelfolder` (see
`scripts/nnunet_oracle.py` for its environment). Each --with-extras and --without-extras is a Python with autoseg, with
and without the packages of [openvino] (default: this one, without a name). Whole command lines are timed, start-up and
all: nnU-Net's as its documentation has it, on the CPU, with mirroring unless --tta none; autoseg's with the run that
`autoseg import` made of MODEL, whose engines are not known in the first round and are in the later ones. The programs
take turns.

Compared are wall-clock (the least of the rounds, and the first), Dice against references (mean over classes of the mean
over cases that have the class), and agreement: the same Dice against nnU-Net's label maps. Writes OUT.json and OUT.md,
and prints the table.
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

from bench_dice import dice, mean_dice
from bench_lines import markdown

NNUNET = "nnU-Net"
PLAIN, EXTRAS = "autoseg", "autoseg[openvino]"


def run(words: list[str], env: dict[str, str], log: Path) -> float:
    """Run one command line, stop when it fails; its seconds."""
    print("$", *words, flush=True)
    started = time.monotonic()
    with log.open("ab") as handle:
        done = subprocess.run(words, env=env, stdout=handle, stderr=subprocess.STDOUT, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"error: the command failed, see {log}")
    print(f"  {seconds:.1f} s", flush=True)
    return seconds


def take_images(source: Path, target: Path, count: int) -> list[str]:
    """Links to the images of the first cases; their ids."""
    target.mkdir(parents=True, exist_ok=True)
    ids = sorted({path.name.rpartition("_")[0] for path in source.iterdir() if "_0000." in path.name})[:count]
    for path in source.iterdir():
        link = target / path.name
        if path.name.rpartition("_")[0] in ids and not link.exists():
            link.symlink_to(path.resolve())
    return ids


def lines(wanted: argparse.Namespace, images: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The command line of each program, without its output folder, and its environment."""
    threads = str(wanted.threads or len(os.sched_getaffinity(0)))
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    theirs = dict(env)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        theirs.setdefault(variable, str(wanted.work / "unused"))
    folds = wanted.folds.split(",")
    found = {
        NNUNET: (
            [
                *(str(wanted.nnunet / "nnUNetv2_predict_from_modelfolder"), "-i", str(images), "-m", str(wanted.model)),
                *("-f", *folds, "-device", "cpu", "--disable_progress_bar"),
                *(["--disable_tta"] if wanted.tta == "none" else []),
                "-o",
            ],
            theirs,
        )
    }
    pythons = {PLAIN: wanted.without_extras, EXTRAS: wanted.with_extras}
    if not any(pythons.values()):
        pythons[PLAIN] = sys.executable
    for name, python in pythons.items():
        if python is None:
            continue
        own = wanted.work / f"run of {name}"
        if not own.exists():
            run(
                [python, "-m", "autoseg", "import", "nnunet", str(wanted.model), "--out", str(own)],
                env,
                wanted.work / "log",
            )
        words = [python, "-m", "autoseg", "predict", str(own), str(images), "--fold", wanted.folds]
        found[name] = ([*words, "--tta", wanted.tta, "--device", "cpu", "--engine", wanted.engine, "--out"], env)
    return found


def score(folder: Path, ids: list[str], other: Path) -> dict[str, Any]:
    """Dice of label maps against those of another folder."""
    from autoseg.io.images import read_labels

    rows = []
    for case in ids:
        ours, theirs = (read_labels(next(place.glob(f"{case}.*")))[0] for place in (folder, other))
        rows.append(dice(ours, theirs))
    return {"mean": mean_dice(rows), "least": min(value for row in rows for value in row.values())}


def known_engines(own: Path) -> list[Any]:
    """What autoseg remembers of its engines."""
    return [json.loads(path.read_text()) for path in sorted(own.rglob("engines.json"))]


def table(found: dict[str, Any]) -> str:
    """A line a program."""
    head = ["program", "first, s", "best, s", "against nnU-Net", "Dice against references", "agreement", "least"]
    base = min(found["programs"][NNUNET]["seconds"])
    rows = []
    for name, item in found["programs"].items():
        reference, agreement = item["reference"], item["agreement"]
        rows.append(
            [
                name,
                f"{item['seconds'][0]:.1f}",
                f"{min(item['seconds']):.1f}",
                f"{min(item['seconds']) / base:.3f} (first {item['seconds'][0] / base:.3f})",
                "–" if reference is None else f"{reference['mean']:.4f}",
                f"{agreement['mean']:.4f}",
                f"{agreement['least']:.4f}",
            ]
        )
    return markdown(head, rows)


def main() -> None:
    """Let the programs take turns, compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--nnunet", type=Path, required=True, help="folder of nnU-Net's commands")
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and predictions, best a fresh one")
    parser.add_argument("--out", type=Path, required=True, help="without ending")
    parser.add_argument("--labels", type=Path, help="folder of references")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--folds", default="0")
    parser.add_argument("--tta", default="full", choices=["none", "full"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--with-extras", help="a Python with autoseg[openvino]")
    parser.add_argument("--without-extras", help="a Python with autoseg alone")
    parser.add_argument("--engine", default="auto")
    wanted = parser.parse_args()
    wanted.work.mkdir(parents=True, exist_ok=True)
    images = wanted.work / "images"
    ids = take_images(wanted.images, images, wanted.cases)
    commands = lines(wanted, images)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    names = list(commands)
    for round_ in range(wanted.rounds):
        for turn in range(len(names)):
            name = names[(turn + round_) % len(names)]
            words, env = commands[name]
            out = wanted.work / f"predictions of {name}"
            shutil.rmtree(out, ignore_errors=True)
            seconds[name].append(run([*words, str(out)], env, wanted.work / "log"))
    programs = {}
    for name in names:
        folder = wanted.work / f"predictions of {name}"
        programs[name] = {
            "command": " ".join(Path(word).name if "/" in word else word for word in commands[name][0]),
            "seconds": seconds[name],
            "reference": score(folder, ids, wanted.labels) if wanted.labels else None,
            "agreement": score(folder, ids, wanted.work / f"predictions of {NNUNET}"),
            "engines": known_engines(wanted.work / f"run of {name}"),
        }
    from autoseg.runtime import environment

    found = {
        "environment": environment(),
        "model": wanted.model.name,
        "num_cases": len(ids),
        "folds": wanted.folds,
        "tta": wanted.tta,
        "threads": wanted.threads,
        "programs": programs,
    }
    wanted.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    wanted.out.with_suffix(".md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
