"""One large volume: time and memory of nnU-Net's own command and of autoseg's, alternately.

    python scripts/bench_large_volumes.py IMAGE --model MODEL --nnunet ORACLE/bin --work WORK --out OUT
        [--sizes 256x256x200,512x512x200] [--classes 3,40] [--change 1.5]
        [--programs nnunet,autoseg,autoseg-again,nnunet-1] [--rounds 1] [--threads N]
        [--limit-s 3600] [--memory-gb 20] [--python VENV/bin/python]
        [--weights trained|random] [--features 32,64,128,256,320,320 --patch 128,128,128] [--estimate-only]

MODEL is a trained model of nnU-Net v2 (folder TRAINER__PLANS__CONFIGURATION, 3D, one channel). For another number of
classes than its own, or another width or patch, `scripts/nnunet_untrained.py` makes one of it. --nnunet names the
folder of nnU-Net's commands (see `scripts/nnunet_oracle.py` for its environment). Volumes are made of IMAGE, a case of
MODEL's data set, by repeating it in mirror images; their voxels are --change times finer than those the model works on,
so that both programs resample the image, and the logits back (1.0: neither does).

Programs, all on the CPU and without mirroring, whole command lines, start-up and all:

    nnunet         nnUNetv2_predict_from_modelfolder -device cpu --disable_tta, as it comes (-npp 3 -nps 3)
    nnunet-1       the same with -npp 1 -nps 1, its least memory
    autoseg        `autoseg predict` as it comes, by the run that `autoseg import` made: a model's first prediction,
                   which tries engines where that pays
    autoseg-again  the same command again: the engine is known

Memory is the peak of the proportional set size summed over all processes of a command, looked at five times a second,
without what `import torch` takes in the same environment. A program that fails is a result: the table says how, and so
do its last lines below it. --memory-gb stops a program before the machine is out of memory, --limit-s one that takes
too long. An estimate of nnU-Net's time comes first. OUT.json and OUT.md are written after every measurement; what
OUT.json has already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from bench_large_models import Models
from bench_lines import markdown
from bench_processes import GB, OK, end_with_this, import_torch_bytes, watch

T = TypeVar("T")
Row = dict[str, Any]

NNUNET, NNUNET_1, AUTOSEG, AGAIN = "nnunet", "nnunet-1", "autoseg", "autoseg-again"
PROGRAMS = (NNUNET, AUTOSEG, AGAIN, NNUNET_1)
OF_NNUNET = (NNUNET, NNUNET_1)

NOT_SETTINGS = ("image", "nnunet", "work", "out", "sizes", "classes", "programs", "rounds", "python", "estimate_only")
"""What may change between two runs that write the same file, and where things lie."""

START_S = 15.0
"""Of nnU-Net: starting processes, reading, preparing, writing; a guess."""

CASE = "volume"


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own that ends with it.

    This one must not load torch: pages that it shared with a program would count for that only in part.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# --- volumes ---------------------------------------------------------------------------------------------------------
def volume(wanted: argparse.Namespace, models: Models, shape: tuple[int, ...], classes: int) -> Path:
    """The folder of a volume's only image; made when missing."""
    folder = Path(wanted.work / f"images {name_of(shape)}")
    file = folder / f"{CASE}_0000.nii.gz"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        apart(_make_volume, wanted.image, shape, file, models.spacing(classes), wanted.change)
    return folder


def _make_volume(source: Path, shape: tuple[int, ...], path: Path, spacing: tuple[float, ...], finer: float) -> None:
    from bench_volumes import make_volume

    make_volume(source, shape, path, spacing_mm=spacing, finer=finer)


def name_of(shape: tuple[int, ...]) -> str:
    """A size in words."""
    return "x".join(map(str, shape))


# --- estimate --------------------------------------------------------------------------------------------------------
def estimate(wanted: argparse.Namespace, models: Models) -> list[Row]:
    """About how long nnU-Net takes for each volume, by its network's time for a tile; prints it."""
    rows = []
    for classes in wanted.classes:
        times, part = models.timings(classes, wanted.threads), models.plan(classes)
        for shape in wanted.sizes:
            tiles = apart(_num_tiles, shape, part["patch_size"], wanted.change)
            voxels = shape[0] * shape[1] * shape[2]
            export_s = 0.0 if wanted.change == 1 else classes * voxels * times["resampled_voxel_s"]
            row = {"shape": name_of(shape), "classes": classes, "tiles": tiles, "network_s": tiles * times["tile_s"]}
            rows.append(row | {"export_s": export_s, "seconds": row["network_s"] + export_s + START_S})
            print(
                f"estimate: {row['shape']}, {classes} classes: {tiles} tiles of {times['tile_s']:.2f} s, "
                f"{export_s:.0f} s of resampling: nnU-Net takes about {rows[-1]['seconds'] / 60:.1f} minutes",
                flush=True,
            )
    runs = sum(program in OF_NNUNET for program in wanted.programs) * wanted.rounds
    minutes = sum(row["seconds"] for row in rows) * runs / 60
    print(f"estimate: {minutes:.0f} minutes of nnU-Net in all; autoseg's runs come on top", flush=True)
    return rows


def _num_tiles(shape: tuple[int, ...], patch: list[int], change: float) -> int:
    from autoseg.inference.tiles import make_grid

    return make_grid([round(size / change) for size in reversed(shape)], patch, 0.5).num_tiles


# --- measurement -----------------------------------------------------------------------------------------------------
def command(
    wanted: argparse.Namespace, models: Models, program: str, images: Path, classes: int
) -> tuple[list[str], dict[str, str]]:
    """A program's command line, without its output folder, and its environment."""
    threads = str(wanted.threads)
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    fold = models.fold(classes)
    if program in OF_NNUNET:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            env.setdefault(variable, str(wanted.work / "unused"))
        words = [str(wanted.nnunet / "nnUNetv2_predict_from_modelfolder"), "-i", str(images)]
        words += ["-m", str(models.folder(classes)), "-f", fold, "-device", "cpu", "--disable_tta"]
        words += ["--disable_progress_bar", *(("-npp", "1", "-nps", "1") if program == NNUNET_1 else ())]
        return [*words, "-o"], env
    words = [wanted.python, "-m", "autoseg", "predict", str(models.run(classes)), str(images)]
    return [*words, "--fold", fold, "--device", "cpu", "--tta", "none", "--out"], env


def forget_engines(run: Path) -> None:
    """As if the model had never predicted."""
    for path in [*run.rglob("engines.json"), *run.rglob("engines")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def known_engines(run: Path) -> list[Row]:
    """What autoseg remembers of its trials."""
    found: list[Row] = []
    for path in run.rglob("engines.json"):
        for item in json.loads(path.read_text())["remembered"]:
            found += item["trials"]
    return found


def measure(wanted: argparse.Namespace, models: Models, program: str, shape: tuple[int, ...], classes: int) -> Row:
    """Run one program on one volume."""
    images = volume(wanted, models, shape, classes)
    words, env = command(wanted, models, program, images, classes)
    if program == AUTOSEG:
        forget_engines(models.run(classes))
    out = predictions(wanted, program, shape, classes)
    shutil.rmtree(out, ignore_errors=True)
    print("$", *words, out, flush=True)
    watched = watch(
        [*words, str(out)],
        env,
        wanted.work / f"log of {program}",
        limit_s=wanted.limit_s,
        most_bytes=wanted.memory_gb * GB,
    )
    print(f"  {watched.ended}: {watched.seconds:.1f} s, {watched.peak_bytes / GB:.2f} GB", flush=True)
    shown = [Path(word).name if "/" in word else word for word in words]
    lines = [line.replace(f"{wanted.work}/", "") for line in watched.last_lines]
    row = asdict(watched) | {"last_lines": lines, "command": " ".join(shown), "label_map": any(out.glob(f"{CASE}.*"))}
    return row if program in OF_NNUNET else row | {"engines": known_engines(models.run(classes))}


def predictions(wanted: argparse.Namespace, program: str, shape: tuple[int, ...], classes: int) -> Path:
    """Where a program's label map of a volume lies."""
    return Path(wanted.work / f"predictions {name_of(shape)} {classes} {program}")


def agreement(ours: Path, theirs: Path) -> Row | None:
    """Dice of two label maps and the part of equal voxels; None where one is missing."""
    from bench_dice import dice, mean_dice

    from autoseg.io.images import read_labels

    files = [next(folder.glob(f"{CASE}.nii.gz"), None) for folder in (ours, theirs)]
    if None in files:
        return None
    first, second = (read_labels(file)[0] for file in files if file is not None)
    scores = dice(first, second)
    return {"dice": mean_dice([scores]), "equal": float((first == second).mean()), "classes_found": len(scores)}


# --- report ----------------------------------------------------------------------------------------------------------
HEAD = (
    *("voxels", "classes", "program", "ended", "s", "against nnU-Net", "peak GB", "without import torch GB"),
    *("against nnU-Net", "against nnU-Net -npp 1", "agreement"),
)


def best_of_rounds(rows: list[Row]) -> dict[tuple[str, int, str], Row]:
    """By size, classes and program: the quickest round that ended well, with the highest peak of all rounds."""
    best: dict[tuple[str, int, str], Row] = {}
    for row in rows:
        key = (row["shape"], row["classes"], row["program"])
        old = best.get(key, row)
        quicker = min(old, row, key=lambda item: (item["ended"] != OK, item["seconds"]))
        best[key] = quicker | {name: max(old[name], row[name]) for name in ("peak_bytes", "own_bytes")}
    return best


def ratio(row: Row, other: Row | None, key: str) -> str:
    """Of two programs; with a "<" where the other one did not come to its end."""
    if other is None or row["ended"] != OK:
        return "–"
    return f"{'' if other['ended'] == OK else '< '}{row[key] / other[key]:.3f}"


def table(found: Row) -> str:
    """A line a program and volume."""
    best = best_of_rounds(found["measurements"])
    lines = []
    for (shape, classes, program), row in best.items():
        theirs, leanest = (best.get((shape, classes, other)) for other in (NNUNET, NNUNET_1))
        agreed = row.get("agreement")
        cells = [shape, str(classes), program, row["ended"], f"{row['seconds']:.0f}", ratio(row, theirs, "seconds")]
        cells += [f"{row[key] / GB:.2f}" for key in ("peak_bytes", "own_bytes")]
        cells += [ratio(row, other, "own_bytes") for other in (theirs, leanest)]
        lines.append([*cells, f"{agreed['dice']:.4f}" if agreed and agreed["dice"] is not None else "–"])
    return markdown(HEAD, lines)


def report(found: Row) -> str:
    """The table, what was compared, and what failed."""
    words = [f"Models: {'; '.join(found['models'].values())}.", *command_lines(found["measurements"])]
    failed = [row for row in found["measurements"] if row["ended"] != OK]
    for row in failed:
        words.append(f"{row['program']}, {row['shape']}, {row['classes']} classes: {row['ended']}. Its last lines:")
        words.append("\n".join(f"    {line}" for line in row["last_lines"]))
    baselines = ", ".join(f"{name} {value / GB:.2f} GB" for name, value in found["import_torch_bytes"].items())
    words.append(f"`import torch` alone: {baselines}.")
    settings = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in found["settings"].items())
    return "\n\n".join([f"`{settings}`", table(found), *words])


def command_lines(rows: list[Row]) -> list[str]:
    """One of each program."""
    shown = {row["program"]: row["command"] for row in rows}
    return ["\n".join(f"    {command}" for command in shown.values())] if shown else []


def write(wanted: argparse.Namespace, found: Row) -> None:
    """Both files."""
    wanted.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    wanted.out.with_suffix(".md").write_text(report(found) + "\n")


# --- main ------------------------------------------------------------------------------------------------------------
def begun(wanted: argparse.Namespace) -> Row:
    """What OUT.json has, or a beginning."""
    file = wanted.out.with_suffix(".json")
    settings = {name: str(value) for name, value in vars(wanted).items() if name not in NOT_SETTINGS and value}
    settings["model"] = wanted.model.name
    if not file.is_file():
        return {"settings": settings, "models": {}, "import_torch_bytes": {}, "estimates": [], "measurements": []}
    found: Row = json.loads(file.read_text())
    if found["settings"] != settings:
        sys.exit(f"error: {file} was made with {found['settings']}, not {settings}: choose another --out")
    return found


def measure_all(wanted: argparse.Namespace, models: Models, found: Row) -> None:
    """Whatever is missing, one program after the other."""
    rows = found["measurements"]
    done = {(row["round"], row["shape"], row["classes"], row["program"]) for row in rows}
    for number in range(wanted.rounds):
        for shape in wanted.sizes:
            for classes in wanted.classes:
                # Each round begins with another one; what is known of engines stays from the round before.
                programs = (
                    wanted.programs[number % len(wanted.programs) :] + wanted.programs[: number % len(wanted.programs)]
                )
                for program in programs:
                    if (number, name_of(shape), classes, program) in done:
                        continue
                    row = {"round": number, "shape": name_of(shape), "classes": classes, "program": program}
                    row |= measure(wanted, models, program, shape, classes)
                    base = found["import_torch_bytes"]["nnU-Net" if program in OF_NNUNET else "autoseg"]
                    rows.append(row | {"own_bytes": row["peak_bytes"] - base})
                    write(wanted, found)
                add_agreement(wanted, rows, shape, classes)
                write(wanted, found)


def add_agreement(wanted: argparse.Namespace, rows: list[Row], shape: tuple[int, ...], classes: int) -> None:
    """Compare the label maps of a volume with nnU-Net's, where both are there."""
    theirs = next((name for name in OF_NNUNET if any(predictions(wanted, name, shape, classes).glob("*.nii.gz"))), None)
    for row in rows:
        is_of_volume = (row["shape"], row["classes"]) == (name_of(shape), classes)
        if theirs is None or not is_of_volume or row["ended"] != OK or "agreement" in row:
            continue
        ours, reference = (predictions(wanted, name, shape, classes) for name in (row["program"], theirs))
        row["agreement"] = apart(agreement, ours, reference)


def shapes(text: str) -> list[tuple[int, ...]]:
    """Sizes as in 256x256x200,512x512x200."""
    return [tuple(int(size) for size in word.split("x")) for word in text.split(",")]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="of one channel")
    parser.add_argument("--model", type=Path, required=True, help="TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--nnunet", type=Path, required=True, help="folder of nnU-Net's commands and its python")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, volumes and predictions")
    parser.add_argument("--out", type=Path, required=True, help="without ending")
    parser.add_argument("--python", default=sys.executable, help="with autoseg")
    parser.add_argument("--sizes", type=shapes, default="256x256x200,512x512x200")
    parser.add_argument("--classes", type=lambda text: [int(word) for word in text.split(",")], default="3,40")
    parser.add_argument("--change", type=float, default=1.5)
    parser.add_argument("--programs", type=lambda text: text.split(","), default=",".join(PROGRAMS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--limit-s", type=float, default=3600.0)
    parser.add_argument("--memory-gb", type=float, default=20.0)
    parser.add_argument("--weights", choices=("trained", "random"), default="trained")
    parser.add_argument("--features")
    parser.add_argument("--patch")
    parser.add_argument("--estimate-only", action="store_true")
    wanted = parser.parse_args()
    unknown = sorted(set(wanted.programs) - set(PROGRAMS))
    if unknown:
        parser.error(f"unknown programs: {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
    for name in ("image", "model", "nnunet", "work", "out"):
        setattr(wanted, name, getattr(wanted, name).absolute())
    wanted.work.mkdir(parents=True, exist_ok=True)
    return wanted


def _environment() -> Row:
    from autoseg.runtime import environment

    return environment()


def main() -> None:
    """Estimate, measure, write and print."""
    wanted = parse()
    end_with_this()
    found, models = begun(wanted), Models(wanted)
    found["models"] |= {str(classes): models.words(classes) for classes in wanted.classes}
    found["estimates"] = estimate(wanted, models)
    if wanted.estimate_only:
        return
    found["environment"] = apart(_environment)
    if not found["import_torch_bytes"]:
        pythons = {"nnU-Net": str(wanted.nnunet / "python"), "autoseg": wanted.python}
        found["import_torch_bytes"] = {name: import_torch_bytes(python) for name, python in pythons.items()}
    measure_all(wanted, models, found)
    print(report(found))


if __name__ == "__main__":
    main()
