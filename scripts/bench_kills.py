"""What kills cost a training: nothing of its result, little of its time.

    taskset -c 1 python scripts/bench_kills.py RUN [--kills 20] [--epochs 40] [--time-budget 60s]
        [--seed 0] [--modes epochs,budget,long,corrupt,sigterm] [--out FOLDER]

RUN is a planned run; where there is none it is planned from the demo's data with a small network. Each training is that
of fold 0 in a copy of RUN beside it, on the CPU in fp32. Five questions (--modes chooses):

- epochs: `kill -9` at random moments of one training with --epochs. Are the final weights those of a training that
  nobody disturbed, bit for bit? One kill in five comes while the program starts, the others at moments spread
  evenly over the epochs.
- budget: the same with --time-budget. How many seconds of work are lost each time? Then in a budget of hours, whose
  epochs are longer than the checkpoint interval, which is set to 5 s.
- long: in a budget of hours with the interval as it is (60 s), killed once after more than a minute.
- corrupt: the newest checkpoint is cut short, or a bit of it is flipped. Is there a warning, and are the final weights
  the same? With every checkpoint cut short: does it stop with an error?
- sigterm: how long until the program has left, and is there a checkpoint of the step it had reached?

Writes OUT/kills.json and prints tables.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_lines import markdown

from autoseg.config import PlanSettings, Settings, parse_duration_s
from autoseg.io.files import file_digest
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.demo import copy_demo_data
from autoseg.pipeline.planning import plan
from autoseg.pipeline.training import prepare
from autoseg.training.records import CHECKPOINT_INTERVAL_S
from autoseg.training.trainer import LOCK_FILE

CONFIGURATION = "3d_fullres"
FOLD = 0
MODES = ("epochs", "budget", "long", "corrupt", "sigterm")

SMALL: dict[str, Any] = {
    "network.strides": [[1, 1, 1], [2, 2, 2]],
    "network.kernel_sizes": [[3, 3, 3]] * 2,
    "network.features_per_stage": [8, 16],
    "network.blocks_per_stage_encoder": [1, 1],
    "network.blocks_per_stage_decoder": [1],
    "network.patch_size": [16, 16, 16],
    "training.batch_size": 2,
    "training.steps_per_epoch": 20,
    "training.validation_steps_per_epoch": 2,
    "training.ema_decay": 0.9,
}
"""A network whose steps take hundredths of a second, with a running mean, so that every part of a checkpoint counts."""

POLL_S = 0.005
PATIENCE_S = 600.0
START_FRACTION = 0.2
"""Part of the kills that come while the program starts."""

SPARE_EPOCHS = 2
LONGEST_EPOCH_S = 1.0
SHORT_INTERVAL_S = 5.0
LONG_BUDGET = "2h"
SHORT_KILLS = 6
LONG_WAIT_S = (62.0, 75.0)
SIGNALS = 3
SIGNAL_WAIT_S = (1.0, 5.0)


class Training:
    """One training in a run folder of its own, started again and again by the same command."""

    def __init__(self, run: RunFolder, words: Sequence[str]) -> None:
        self.run, self.fold = run, run.fold_folder(CONFIGURATION, FOLD)
        self.log = run.root.with_suffix(".log")
        self.log.unlink(missing_ok=True)
        self.command = [sys.executable, "-m", "autoseg", "train", str(run.root), "--fold", str(FOLD), *words]
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = self.used_before_s = 0.0

    def start(self) -> None:
        self.started_at, self.used_before_s = time.time(), self.counters()["used_s"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if one is given, and wait until the program has left; its exit code."""
        assert self.process is not None
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait()

    def finish(self) -> None:
        """Let a start run to the end."""
        self.start()
        if self.end():
            sys.exit(f"error: the training failed, see {self.log}")

    def wait_until(self, condition: Callable[[], bool]) -> None:
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                sys.exit(f"error: the training has left or does nothing, see {self.log}")
            time.sleep(POLL_S)

    def has_begun(self) -> bool:
        """Whether the present start has come to its first step."""
        run = self.fold / "run.json"
        return run.is_file() and run.stat().st_mtime >= self.started_at

    def used_s(self) -> float:
        """Seconds of training used until now: what the checkpoint said, and those since this start took the lock."""
        try:
            began_at = (self.fold / LOCK_FILE).stat().st_mtime
        except FileNotFoundError:
            return self.used_before_s
        return self.used_before_s + (time.time() - began_at if began_at >= self.started_at else 0.0)

    def checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.fold / "resume").glob("*") if path.name.isdigit())

    def last_epoch_s(self) -> float:
        """Seconds between the two newest checkpoints, which lie an epoch apart where epochs are short."""
        times = [path.stat().st_mtime for path in self.checkpoints()[-2:]]
        return min(times[-1] - times[0], LONGEST_EPOCH_S) if times else 0.0

    def counters(self) -> dict[str, Any]:
        """Of the newest checkpoint; where there is none, zeros."""
        for path in reversed(self.checkpoints()):
            try:
                found: dict[str, Any] = json.loads((path / "state.json").read_text())["counters"]
            except FileNotFoundError:
                continue  # it is just being removed
            return found
        return {"step": 0, "epoch": 0, "used_s": 0.0}

    def kill(self) -> dict[str, Any]:
        """kill -9, and what that cost."""
        was_training = self.has_begun()
        used_s = self.used_s()
        self.end(signal.SIGKILL)
        kept = self.counters()
        lost_s = max(0.0, used_s - kept["used_s"])
        return {"while": "training" if was_training else "starting", "kept_step": kept["step"], "lost_s": lost_s}

    def passed_over(self) -> list[int]:
        """Steps of the checkpoints that a warning says were passed over."""
        text = " ".join(self.log.read_text(errors="replace").split())
        return [int(step) for step in re.findall(r"WARNING checkpoint (\d+) is passed over", text)]

    def digests(self) -> dict[str, str]:
        return {name: file_digest(self.fold / f"{name}.safetensors") for name in ("weights", "best")}


class Bench:
    """The trainings of one run; the one that nobody disturbs is made once."""

    def __init__(self, root: Path, seed: int, epochs: int) -> None:
        self.run, self.epochs = RunFolder(root), epochs
        self.random = random.Random(seed)
        if not self.run.plan_file.is_file():
            data = root.with_name(f"{root.name}-data")
            copy_demo_data(data)
            overrides = {f"{CONFIGURATION}.{key}": value for key, value in SMALL.items()}
            plan(data, root, Settings(plan=PlanSettings(overrides=overrides)))
        prepare(self.run, self.run.read_dataset(), self.run.read_plan(), CONFIGURATION)
        self.whole = self.training("whole", *self.by_epochs)
        self.whole.start()
        self.whole.wait_until(self.whole.has_begun)
        self.startup_s = time.time() - self.whole.started_at
        if self.whole.end():
            sys.exit(f"error: the training failed, see {self.whole.log}")
        self.epoch_s = self.whole.counters()["used_s"] / epochs

    @property
    def by_epochs(self) -> tuple[str, ...]:
        return "--epochs", str(self.epochs)

    def training(
        self, name: str, *words: str, interval_s: float = CHECKPOINT_INTERVAL_S, run: RunFolder | None = None
    ) -> Training:
        """A new training in a copy of the run without models."""
        source = (run or self.run).root
        target = self.run.root.with_name(f"{self.run.root.name}-{name}")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("models"))
        settings = target / "settings.yaml"
        settings.write_text(f"train:\n  checkpoint_interval_s: {interval_s}\n")
        return Training(
            RunFolder(target), ("--device", "cpu", "--precision", "fp32", "--config-file", str(settings), *words)
        )

    def kills_by_epochs(self, kills: int) -> dict[str, Any]:
        training = self.training("killed", *self.by_epochs)
        early = set(self.random.sample(range(kills), round(START_FRACTION * kills)))
        # The last epochs are left out: a training that ends before its kill cannot be killed.
        places = sorted(self.random.uniform(0, self.epochs - SPARE_EPOCHS) for _ in range(kills - len(early)))
        rows = []
        for number in range(kills):
            training.start()
            if number in early:
                time.sleep(self.random.uniform(0, self.startup_s))
            else:
                place = places.pop(0)
                training.wait_until(training.has_begun)
                training.wait_until(lambda epoch=int(place): training.counters()["epoch"] >= epoch)  # type: ignore[misc]
                time.sleep(place % 1 * training.last_epoch_s())
            rows.append(training.kill())
            print(f"kill {number + 1}: {rows[-1]}", flush=True)
        training.finish()
        return {"epochs": self.epochs, "kills": rows, **self.compared(training)}

    def compared(self, training: Training) -> dict[str, Any]:
        mine, whole = training.digests(), self.whole.digests()
        return {"weights_sha256": mine["weights"], "undisturbed_sha256": whole["weights"], "is_same": mine == whole}

    def kills_by_budget(self, budget: str, kills: int) -> dict[str, Any]:
        """Killed at random moments of the budget; then the rest goes to the end."""
        training = self.training("budget", "--time-budget", budget)
        total_s = parse_duration_s(budget)
        rows = []
        for moment in sorted(self.random.uniform(0, total_s - 1) for _ in range(kills)):
            training.start()
            training.wait_until(training.has_begun)
            time.sleep(max(0.0, moment - training.used_s()))
            rows.append(training.kill())
            print(f"at {moment:.1f} s: {rows[-1]}", flush=True)
        training.finish()
        record = json.loads((training.fold / "run.json").read_text())
        return {"budget_s": total_s, "kills": rows, "used_s": record["seconds"], "status": record["status"]}

    def kills_between_epochs(self, waits_s: Sequence[float], interval_s: float) -> dict[str, Any]:
        """Killed so long after each start, in epochs that are longer than the interval between checkpoints."""
        training = self.training("long", "--time-budget", LONG_BUDGET, interval_s=interval_s)
        rows = []
        for wait_s in waits_s:
            training.start()
            training.wait_until(training.has_begun)
            time.sleep(wait_s)
            rows.append(training.kill())
            print(f"after {wait_s:.1f} s: {rows[-1]}", flush=True)
        return {"interval_s": interval_s, "kills": rows}

    def corrupted(self) -> list[dict[str, Any]]:
        rows = []
        for damage in ("cut short", "bit flipped"):
            training = self.training("corrupt", *self.by_epochs)
            training.start()
            training.wait_until(lambda: training.counters()["epoch"] >= self.epochs // 2)  # noqa: B023
            training.end(signal.SIGKILL)
            previous, newest = (path.name for path in training.checkpoints()[-2:])
            spoil(training.checkpoints()[-1], damage)
            training.finish()
            rows.append(
                {
                    "damage": damage,
                    "newest_step": int(newest),
                    "went_on_at_step": int(previous),
                    "passed_over": training.passed_over(),
                    **self.compared(training),
                }
            )
            print(rows[-1], flush=True)
        training = self.training("corrupt", *self.by_epochs)
        training.start()
        training.wait_until(lambda: training.counters()["epoch"] >= self.epochs // 2)
        training.end(signal.SIGKILL)
        for path in training.checkpoints():
            spoil(path, "cut short")
        training.start()
        code = training.end()
        is_kept = len(training.checkpoints()) > 0
        rows.append({"damage": "every checkpoint cut short", "exit_code": code, "are_checkpoints_kept": is_kept})
        print(rows[-1], flush=True)
        return rows

    def signalled(self) -> list[dict[str, Any]]:
        """SIGTERM in the small run, and in one that is planned as it is without any option."""
        plain = RunFolder(self.run.root.with_name(f"{self.run.root.name}-plain"))
        if not plain.plan_file.is_file():
            plan(self.run.root.with_name(f"{self.run.root.name}-data"), plain.root, Settings())
            prepare(plain, plain.read_dataset(), plain.read_plan(), CONFIGURATION)
        rows = []
        for name, run in (("small", self.run), ("as planned by default", plain)):
            training = self.training("signalled", "--time-budget", LONG_BUDGET, run=run)
            for _ in range(SIGNALS):
                training.start()
                training.wait_until(training.has_begun)
                time.sleep(self.random.uniform(*SIGNAL_WAIT_S))
                before = training.counters()["step"]
                asked_at = time.monotonic()
                code = training.end(signal.SIGTERM)
                took_s = time.monotonic() - asked_at
                after = training.counters()
                record = json.loads((training.fold / "run.json").read_text())
                rows.append(
                    {
                        "network": name,
                        "seconds_per_step": after["step_s"],
                        "left_after_s": took_s,
                        "exit_code": code,
                        "step_before": before,
                        "checkpoint_step": after["step"],
                        "is_last_step": record["steps"] == after["step"],
                    }
                )
                print(rows[-1], flush=True)
        return rows


def spoil(checkpoint: Path, damage: str) -> None:
    path = checkpoint / "state.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "bit flipped":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)


def tables(found: dict[str, Any]) -> str:
    """Everything that was found, for a page."""
    parts = []
    if "epochs" in found:
        part = found["epochs"]
        early = sum(row["while"] == "starting" for row in part["kills"])
        answer = "the same, bit for bit" if part["is_same"] else "DIFFERENT"
        cells = [str(part["epochs"]), f"{len(part['kills'])} ({early} while starting)", answer]
        parts.append(markdown(["epochs", "kills", "final and best weights"], [cells]))
    rows = [
        [
            title,
            f"{part['interval_s']:.0f} s",
            str(len(part["kills"])),
            ", ".join(f"{row['lost_s']:.1f}" for row in part["kills"]),
            f"{max(row['lost_s'] for row in part['kills']):.1f} s",
        ]
        for title, part in found.get("lost", {}).items()
    ]
    if rows:
        parts.append(markdown(["training", "checkpoints", "kills", "lost each time (s)", "most"], rows))
    if "corrupt" in found:
        rows = [
            [
                row["damage"],
                f"at step {row['went_on_at_step']} instead of {row['newest_step']}"
                if "newest_step" in row
                else f"no, exit code {row['exit_code']}",
                f"for {', '.join(map(str, row['passed_over']))}" if "passed_over" in row else "",
                {True: "the same, bit for bit", False: "DIFFERENT", None: ""}[row.get("is_same")],
            ]
            for row in found["corrupt"]
        ]
        parts.append(markdown(["newest checkpoint", "goes on", "warning", "final and best weights"], rows))
    if "sigterm" in found:
        rows = [
            [
                row["network"],
                f"{row['seconds_per_step']:.2f}",
                f"{row['left_after_s']:.1f}",
                str(row["exit_code"]),
                f"{row['checkpoint_step']}" if row["is_last_step"] else "NONE of the last step",
            ]
            for row in found["sigterm"]
        ]
        header = ["network", "s a step", "left after s", "exit code", "checkpoint of step"]
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--time-budget", default="60s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    modes = wanted.modes.split(",")
    began = time.monotonic()
    bench = Bench(wanted.run, wanted.seed, wanted.epochs)
    found: dict[str, Any] = {"epoch_s": bench.epoch_s, "startup_s": bench.startup_s, "lost": {}}
    if "epochs" in modes:
        found["epochs"] = bench.kills_by_epochs(wanted.kills)
    if "budget" in modes:
        part = bench.kills_by_budget(wanted.time_budget, SHORT_KILLS)
        found["lost"][f"--time-budget {wanted.time_budget}"] = part | {"interval_s": CHECKPOINT_INTERVAL_S}
        waits = [bench.random.uniform(0, 2 * SHORT_INTERVAL_S) for _ in range(SHORT_KILLS)]
        title = f"--time-budget {LONG_BUDGET}, interval of 5 s"
        found["lost"][title] = bench.kills_between_epochs(waits, SHORT_INTERVAL_S)
    if "long" in modes:
        waits = [bench.random.uniform(*LONG_WAIT_S)]
        found["lost"][f"--time-budget {LONG_BUDGET}"] = bench.kills_between_epochs(waits, CHECKPOINT_INTERVAL_S)
    if "corrupt" in modes:
        found["corrupt"] = bench.corrupted()
    if "sigterm" in modes:
        found["sigterm"] = bench.signalled()
    found["seconds"] = time.monotonic() - began
    out = wanted.out or wanted.run.parent
    out.mkdir(parents=True, exist_ok=True)
    (out / "kills.json").write_text(json.dumps(found, indent=2) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
