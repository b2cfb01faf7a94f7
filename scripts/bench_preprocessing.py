"""Measuring, planning and preprocessing beside nnU-Net v2: seconds, and the most memory that all processes take.

Both read the same folder in nnU-Net's layout, on the same machine, alternately. nnU-Net lives in an environment of its
own and runs twice: with its default number of processes, and with one for each core. Memory is the sum of the
proportional set sizes of a command and of everything that it started, looked at several times a second; what a command
shares with nobody counts whole, shared pages count once.

    python scripts/bench_preprocessing.py RAW --nnunet VENV --out FOLDER --datasets Dataset004_hippocampus
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench_lines import markdown

from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.training import prepare
from autoseg.runtime import num_cpus

LOOK_INTERVAL_S = 0.1
CONFIGURATION = "3d_fullres"


def session_of(pid: str) -> int:
    """The session a process belongs to; 0 when it is gone."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    return 0


def session_bytes(session: int) -> tuple[int, int]:
    """Proportional set size of all processes of a session, and their number."""
    total, count = 0, 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if session_of(pid) != session:
            continue
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total, count = total + int(line.split()[1]) * 1024, count + 1
    return total, count


def run(command: list[str], environment: dict[str, str], log: Path) -> dict[str, Any]:
    """Run a command to its end: seconds, peak bytes, most processes."""
    print("$", *command, flush=True)
    started, peak, most = time.monotonic(), 0, 0
    with log.open("a") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )
        while process.poll() is None:
            found, count = session_bytes(process.pid)
            peak, most = max(peak, found), max(most, count)
            time.sleep(LOOK_INTERVAL_S)
    if process.returncode:
        sys.exit(f"it failed, see {log}")
    return {"seconds": time.monotonic() - started, "peak_bytes": peak, "processes": most}


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def autoseg_arm(raw: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    plan = run([sys.executable, "-m", "autoseg", "plan", str(raw), "--out", str(out)], {}, log)
    cases = run([sys.executable, __file__, "--prepare", str(out)], {}, log)
    return {"plan": plan, "cases": cases, "disk_bytes": folder_bytes(out / "cache")}


def nnunet_arm(raw: Path, out: Path, venv: Path, processes: int | None) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True)
    log, number = out.with_suffix(".log"), str(int(raw.name[7:10]))
    environment = {
        "nnUNet_raw": str(raw.parent),
        "nnUNet_preprocessed": str(out),
        "nnUNet_results": str(out / "results"),
    }
    count = [] if processes is None else ["-np", str(processes)]

    def nnunet(name: str, *words: str) -> dict[str, Any]:
        return run([str(venv / "bin" / f"nnUNetv2_{name}"), "-d", number, *words], environment, log)

    steps = [nnunet("extract_fingerprint", *count), nnunet("plan_experiment")]
    plan = {
        "seconds": sum(step["seconds"] for step in steps),
        "peak_bytes": max(step["peak_bytes"] for step in steps),
        "processes": max(step["processes"] for step in steps),
    }
    cases = nnunet("preprocess", "-c", CONFIGURATION, *count)
    return {"plan": plan, "cases": cases, "disk_bytes": folder_bytes(out / raw.name / f"nnUNetPlans_{CONFIGURATION}")}


def middle(arms: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds and gigabytes in the middle of the repetitions."""
    plan, cases = ([arm[part]["seconds"] for arm in arms] for part in ("plan", "cases"))
    return {
        "plan_s": statistics.median(plan),
        "cases_s": statistics.median(cases),
        "total_s": statistics.median(map(sum, zip(plan, cases, strict=True))),
        "plan_gb": statistics.median(arm["plan"]["peak_bytes"] for arm in arms) / 1e9,
        "cases_gb": statistics.median(arm["cases"]["peak_bytes"] for arm in arms) / 1e9,
        "disk_gb": statistics.median(arm["disk_bytes"] for arm in arms) / 1e9,
    }


def table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    rows = []
    for name, arms in found.items():
        ours = middle(arms["autoseg"])
        for arm, repetitions in arms.items():
            row = middle(repetitions)
            peak, our_peak = (max(part["plan_gb"], part["cases_gb"]) for part in (row, ours))
            ratios = (
                ("", "") if arm == "autoseg" else (f"{ours['total_s'] / row['total_s']:.2f}", f"{our_peak / peak:.2f}")
            )
            times = (f"{row[key]:.1f}" for key in ("plan_s", "cases_s", "total_s"))
            sizes = (f"{row[key]:.2f}" for key in ("plan_gb", "cases_gb", "disk_gb"))
            rows.append([name, arm, *times, *sizes, *ratios])
    header = ["set", "arm", "plan s", "cases s", "total s", "plan GB", "cases GB", "disk GB", "time", "peak"]
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, nargs="?", help="folder of data sets in nnU-Net's layout")
    parser.add_argument("--nnunet", type=Path, help="nnU-Net's environment")
    parser.add_argument("--out", type=Path, help="where runs and results go")
    parser.add_argument("--datasets", nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prepare", type=Path, help="only preprocess the cases of this run folder")
    wanted = parser.parse_args()
    if wanted.prepare:
        folder = RunFolder(wanted.prepare)
        prepare(folder, folder.read_dataset(), folder.read_plan(), CONFIGURATION)
        return
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in wanted.datasets:
        raw = wanted.raw / name
        for file in raw.rglob("*.nii.gz"):
            # Nobody is to pay for the first reading from the disk.
            file.read_bytes()
        arms = found.setdefault(name, {"autoseg": [], "nnU-Net": [], "nnU-Net, a process a core": []})
        for _ in range(wanted.repeats):
            arms["autoseg"].append(autoseg_arm(raw, wanted.out / name / "autoseg"))
            arms["nnU-Net"].append(nnunet_arm(raw, wanted.out / name / "nnunet", wanted.nnunet, None))
            arms["nnU-Net, a process a core"].append(
                nnunet_arm(raw, wanted.out / name / "nnunet_np", wanted.nnunet, num_cpus())
            )
            (wanted.out / "preprocessing.json").write_text(
                json.dumps({"cores": num_cpus(), "results": found}, indent=2) + "\n"
            )
            print(table(found), flush=True)


if __name__ == "__main__":
    main()
