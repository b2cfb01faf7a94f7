"""A folder of volumes whose prediction is killed again and again: is every label map whole, and is any made twice?

    python scripts/bench_many_volumes.py IMAGES --out OUT.json [--model MODEL] [--volumes 200] [--kills 5] [--seed 0]
        [--device cpu] [--tta none] [--work FOLDER]

IMAGES is a folder of volumes of one channel; --volumes copies of them, one after the other, are predicted by
`autoseg predict MODEL`. Without --model a network with weights at random is used. First the command is left alone: its
label maps are the reference, and its memory (VmRSS) is looked at several times a second, by the number of finished
volumes. Then the same is done in another folder, and killed by SIGKILL --kills times: each time when a number of
volumes is finished that was drawn beforehand, and a random part of a second later; then it is started again.

After every kill each label map is read to its end and compared with the reference byte for byte, and its inode and time
are noted: whoever has others at the end was made twice. Writes OUT.json and prints a summary; exits 1 when anything is
not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LOOK_INTERVAL_S = 0.1
MOST_DELAY_S = 1.0
TENTHS = 10
MB = 1e6
RECORDS = ".autoseg"

Stamp = tuple[int, int]
"""Inode and time of change."""


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def copies(images: Path, folder: Path, count: int) -> None:
    files = sorted(path for path in images.iterdir() if path.name.endswith((".nii.gz", ".nii")))
    if not files:
        sys.exit(f"{images} holds no NIfTI files")
    folder.mkdir()
    for number in range(count):
        source = files[number % len(files)]
        shutil.copy2(source, folder / f"volume-{number:04d}{''.join(source.suffixes)}")


def make_model(folder: Path) -> Path:
    """A small network with weights at random, for one channel of 1 mm and two classes."""
    from bench_predict_memory import make_model as make

    wanted = argparse.Namespace(features="16,32,64", patch=40, change=1.0)
    make(folder, wanted, 3)
    return folder


def start(model: Path, images: Path, out: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "autoseg", "predict", str(model), str(images), "--out", str(out)]
    log = (out.parent / f"{out.name}.log").open("ab")
    more = ["--device", args.device, "--tta", args.tta]
    return subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)


def finished(out: Path) -> set[str]:
    """Volumes with a record; one that was being written when the process was killed is none."""
    folder = out / RECORDS
    return {path.stem for path in folder.glob("volume-*.json")} if folder.is_dir() else set()


def stamps(out: Path) -> dict[str, Stamp]:
    found = {}
    for path in out.glob("volume-*"):
        status = path.stat()
        found[path.name.split(".")[0]] = (status.st_ino, status.st_mtime_ns)
    return found


def broken(out: Path, reference: Path) -> list[str]:
    """Label maps that cannot be read to their end, or differ from those of the undisturbed run."""
    from autoseg.errors import AutosegError
    from autoseg.io.images import read_labels

    problems = []
    for path in sorted(out.glob("volume-*")):
        try:
            read_labels(path)
        except AutosegError as problem:
            problems.append(f"{path.name}: {problem}")
            continue
        if path.read_bytes() != (reference / path.name).read_bytes():
            problems.append(f"{path.name}: differs from the undisturbed run")
    return problems


def undisturbed(model: Path, images: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The reference, and its memory by the number of finished volumes."""
    began = time.monotonic()
    process = start(model, images, out, args)
    samples: list[tuple[int, int]] = []
    while process.poll() is None:
        samples.append((len(finished(out)), rss_bytes(process.pid)))
        time.sleep(LOOK_INTERVAL_S)
    if process.returncode:
        sys.exit("the undisturbed run failed:\n" + (out.parent / f"{out.name}.log").read_text())
    tenths: list[list[int]] = [[] for _ in range(TENTHS)]
    for count, size in samples:
        if size and count:
            tenths[min(TENTHS - 1, count * TENTHS // args.volumes)].append(size)
    medians = [round(statistics.median(sizes) / MB, 1) if sizes else None for sizes in tenths]
    known = [value for value in medians[1:] if value is not None]
    return {
        "seconds": round(time.monotonic() - began, 1),
        "rss_mb_by_tenth": medians,
        "rss_peak_mb": round(max(size for _, size in samples) / MB, 1),
        "rss_growth_mb": round(known[-1] - known[0], 1) if known else None,
    }


def killed(model: Path, images: Path, out: Path, reference: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The same with kills."""
    rng = random.Random(args.seed)
    moments = sorted(rng.sample(range(1, args.volumes), args.kills))
    before: dict[str, Stamp] = {}
    with_record: set[str] = set()
    kills, twice, problems = [], 0, []
    for moment in [*moments, None]:
        process = start(model, images, out, args)
        while process.poll() is None and (moment is None or len(finished(out)) < moment):
            time.sleep(LOOK_INTERVAL_S)
        delay = rng.uniform(0, MOST_DELAY_S)
        if moment is not None:
            time.sleep(delay)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        after, records = stamps(out), finished(out)
        # What had no record when the process died was in flight, and is made again by right.
        again = sorted(name for name in with_record if after.get(name) != before[name])
        in_flight = sorted(name for name in before if name not in with_record and after.get(name) != before[name])
        twice += len(again)
        found = broken(out, reference)
        problems += found + [f"{name}: made twice" for name in again]
        entry = {
            "finished": len(records),
            "label_maps_without_record": sorted(set(after) - records),
            "leftovers": sum(1 for _ in out.rglob(".tmp-*")),
            "made_twice": again,
            "in_flight_made_again": in_flight,
            "broken": found,
        }
        if moment is not None:
            kills.append({"after": moment, "delay_s": round(delay, 2), **entry})
        else:
            kills.append({"after": None, "exit_code": process.returncode, **entry})
        before, with_record = after, records
    last = kills[-1]
    if last["exit_code"] or last["finished"] != args.volumes or last["leftovers"]:
        problems.append(f"the last run: {last}")
    return {"moments": moments, "runs": kills, "made_twice": twice, "problems": problems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--volumes", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tta", default="none")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    from autoseg.runtime import environment

    with TemporaryDirectory(prefix="many-volumes-", dir=args.work) as temporary:
        work = Path(temporary)
        images, reference, out = work / "images", work / "reference", work / "killed"
        copies(args.images, images, args.volumes)
        model = args.model or make_model(work / "model")
        alone = undisturbed(model, images, reference, args)
        disturbed = killed(model, images, out, reference, args)
    result = {
        "volumes": args.volumes,
        "kills": args.kills,
        "seed": args.seed,
        "device": args.device,
        "tta": args.tta,
        "environment": environment(),
        "undisturbed": alone,
        "killed": disturbed,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"undisturbed: {args.volumes} volumes in {alone['seconds']} s; MB by tenth {alone['rss_mb_by_tenth']}")
    for run in disturbed["runs"]:
        what = "finished" if run["after"] is None else f"killed after {run['after']}"
        print(f"{what}: {run['finished']} finished, {len(run['broken'])} broken, {len(run['made_twice'])} made twice")
    for problem in disturbed["problems"]:
        print(f"  - {problem}")
    sys.exit(bool(disturbed["problems"]))


if __name__ == "__main__":
    main()
