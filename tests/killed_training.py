"""Kills a training at every moment at which it changes a name on the disk, and lets it go on. Run as a program:

python killed_training.py FOLDER EVERY

FOLDER is for its files; EVERY says to try each moment (1), every second one (2), ... It prints one JSON object a line:
the moment, what was about to happen, and whether what was started again ended with the same bytes. The trainings are
children made by fork, so that torch is imported once; the parent itself computes nothing, because a process that has
cannot be forked safely.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from toy_training import fill_store, toy_plan, train_toy

from autoseg.io.store import CaseStore
from autoseg.training.records import TrainSettings, read_metrics

EPOCHS = 2
STEPS = 2
CHANGES = ("replace", "rename", "unlink", "rmdir")
"""Functions of `os` by which names change: renaming a whole file or folder to its place, and taking old ones away."""


def train(folder: Path, store: Path) -> None:
    settings = TrainSettings(num_epochs=EPOCHS, device="cpu", precision="fp32", checkpoint_interval_s=0.0)
    plan = toy_plan(ema_decay=0.9, batch_size=2, steps_per_epoch=STEPS)
    train_toy(folder, CaseStore(store), settings, plan)


def die_at(moment: int, log: Path) -> None:
    """From now on: kill this process just before the change of that number."""
    left = moment

    def watched(name: str, change: Callable[..., None]) -> Callable[..., None]:
        def act(*paths: object, **more: object) -> None:
            nonlocal left
            if left == 0:
                log.write_text(f"{name} {' '.join(Path(str(path)).name for path in paths)}")
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            change(*paths, **more)

        return act

    for name in CHANGES:
        setattr(os, name, watched(name, getattr(os, name)))


def in_child(work: Callable[[], None]) -> int:
    """Run it in a process of its own; the status as `os.waitstatus_to_exitcode` gives it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> tuple[object, ...]:
    curve = [(record.epoch, record.step, record.train_loss, record.ema_pseudo_dice) for record in read_metrics(folder)]
    return (folder / "weights.safetensors").read_bytes(), (folder / "best.safetensors").read_bytes(), curve


def main(root: Path, every: int) -> None:
    torch.set_num_threads(1)
    store, whole, killed, log = root / "store", root / "whole", root / "killed", root / "log"
    fill_store(store)
    assert in_child(lambda: train(whole, store)) == 0
    expected = outcome(whole)
    moment = 0
    while True:
        shutil.rmtree(killed, ignore_errors=True)

        def until_killed(moment: int = moment) -> None:
            die_at(moment, log)
            train(killed, store)

        if in_child(until_killed) == 0:
            break
        status = in_child(lambda: train(killed, store))
        is_same = status == 0 and outcome(killed) == expected
        print(json.dumps({"moment": moment, "change": log.read_text(), "status": status, "is_same": is_same}))
        moment += every
    print(json.dumps({"moments": moment}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
