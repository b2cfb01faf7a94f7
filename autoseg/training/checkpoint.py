"""Checkpoints: everything needed to go on, whole or not at all, the two newest kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from torch import Tensor

from autoseg.domain.values import Value
from autoseg.errors import AutosegError, ModelError
from autoseg.io.files import atomic_path, file_digest, read_text, write_text
from autoseg.io.tensors import read_tensors, write_tensors
from autoseg.training.pretrained import Pretrained
from autoseg.training.schedule import STEP_SMOOTHING, STRAIGHT, Course

log = logging.getLogger("autoseg")

SCHEMA_VERSION = 1

RESUME_FOLDER = "resume"
KEPT = 2
"""Checkpoints kept: the newest, and one before it in case the newest cannot be read."""

STEP_DIGITS = 9
_TENSORS_FILE = "state.safetensors"
_COUNTERS_FILE = "state.json"

_REPLACED = ".replaced"
"""Ending of a checkpoint while another of the same step takes its place, so that one of the two is always there."""

_FORGOTTEN = ".tmp-forgotten"
"""Name of the folder of checkpoints while it is removed; taken away with other leftovers."""


class Counters(Value):
    """Where a training is, besides its tensors.

    Attributes:
        configuration_digest: Of the configuration that was trained.
        network_digest: Of the network's plan: the tensors fit no other.
        cases_digest: Of the fold's cases; empty in checkpoints that did not record it.
        previous_weights: SHA-256 of the previous stage's weights by fold; empty without such a stage.
        pretrained: What the training began with; None where all weights were fresh.
        seed: Of the run.
        num_epochs: Length that was asked for when it was written: epochs ...
        time_budget_s: ... or seconds; both None in checkpoints that did not record it.
        fraction: How much of that was done at the last step; None in checkpoints that did not record it.
        course: How the training deviates from the straight way to that length.
        step: Steps done.
        epoch: The epoch that is running.
        used_s: Seconds used.
        epoch_steps: Steps done of this epoch.
        epoch_loss_sum: Sum of their losses.
        epoch_s: Seconds of this epoch so far.
        epoch_step_s: Seconds of its steps alone.
        step_s: Running mean of seconds a step.
        validation_s: Seconds spent on validation so far.
        validation_cost_s: Seconds of the last validation.
        whole_s: Seconds spent on looks at whole cases so far.
        whole_cost_s: Seconds of the last of them.
        ema_pseudo_dice: Running mean of the pseudo-Dice.
        best_ema_pseudo_dice: The best of it so far.
        best_epoch: Where that was.
        bad_steps: Numbers of the last steps that were skipped because they gave no finite numbers.
        num_bad_steps: How many there were in all.
        epoch_bad_steps: How many of this epoch's steps.
        loss_scale: Of the gradient scaler (fp16).
        loss_scale_growth: Its good steps since the last change.
    """

    schema_version: int = SCHEMA_VERSION
    configuration_digest: str = ""
    network_digest: str = ""
    cases_digest: str = ""
    previous_weights: dict[str, str] = Field(default_factory=dict)
    pretrained: Pretrained | None = None
    seed: int = 0
    num_epochs: int | None = None
    time_budget_s: float | None = None
    fraction: float | None = None
    course: Course = STRAIGHT
    step: int = 0
    epoch: int = 0
    used_s: float = 0.0
    epoch_steps: int = 0
    epoch_loss_sum: float = 0.0
    epoch_s: float = 0.0
    epoch_step_s: float = 0.0
    step_s: float = 0.0
    validation_s: float = 0.0
    validation_cost_s: float = 0.0
    whole_s: float = 0.0
    whole_cost_s: float = 0.0
    ema_pseudo_dice: float | None = None
    best_ema_pseudo_dice: float | None = None
    best_epoch: int | None = None
    bad_steps: tuple[int, ...] = ()
    num_bad_steps: int = 0
    epoch_bad_steps: int = 0
    loss_scale: float | None = None
    loss_scale_growth: int = 0

    @property
    def epoch_loss(self) -> float | None:
        """Mean loss of this epoch's steps; None where all of them were skipped."""
        counted = self.epoch_steps - self.epoch_bad_steps
        return self.epoch_loss_sum / counted if counted else None

    def after_step(self, loss: float, fraction: float, now_s: float, took_s: float) -> Counters:
        """Where the training is after one more step.

        Args:
            loss: What counts of its loss: 0 where it was skipped.
            fraction: See `Pace`.
            now_s: Seconds used.
            took_s: Seconds of the step.
        """
        # The first step is slower than all others.
        step_s = took_s if self.step <= 1 else (1 - STEP_SMOOTHING) * self.step_s + STEP_SMOOTHING * took_s
        return self.model_copy(
            update={
                "step": self.step + 1,
                "used_s": now_s,
                "fraction": fraction,
                "epoch_steps": self.epoch_steps + 1,
                "epoch_loss_sum": self.epoch_loss_sum + loss,
                "epoch_s": self.epoch_s + took_s,
                "epoch_step_s": self.epoch_step_s + took_s,
                "step_s": step_s,
            }
        )


class _Stored(Value):
    """state.json: counters and the checksum of the tensors beside it."""

    counters: Counters
    tensors_sha256: str


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A state to go on from.

    Attributes:
        counters: Where the training is.
        tensors: Weights, running mean and momentum by name.
    """

    counters: Counters
    tensors: Mapping[str, Tensor]


def save(fold_folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and remove those that are no longer kept, or of later steps and thus passed over.

    A process that is killed here leaves what was there before or what is there now.

    Raises:
        OSError: The folder cannot be written.
    """
    root = fold_folder / RESUME_FOLDER
    target = root / f"{checkpoint.counters.step:0{STEP_DIGITS}d}"
    replaced = target.with_suffix(_REPLACED)
    with atomic_path(target) as temporary:
        temporary.mkdir(parents=True)
        write_tensors(temporary / _TENSORS_FILE, checkpoint.tensors)
        stored = _Stored(counters=checkpoint.counters, tensors_sha256=file_digest(temporary / _TENSORS_FILE))
        write_text(temporary / _COUNTERS_FILE, stored.to_json())
        if target.is_dir():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
    shutil.rmtree(replaced, ignore_errors=True)
    folders = _folders(root)
    place = folders.index(target)
    for old in folders[:place] + folders[place + KEPT :]:
        shutil.rmtree(old)
    return target


def newest(fold_folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, None when there never was one; one that is not is named in a warning.

    Raises:
        ModelError: There are checkpoints, and none is whole. To begin anew would quietly lose the training.
    """
    problems = []
    for folder in _folders(fold_folder / RESUME_FOLDER):
        try:
            return _read(folder)
        except AutosegError as problem:
            log.warning("checkpoint %s is passed over: %s", folder.name, problem.message)
            problems.append(f"{folder.name}: {problem.message}")
    if problems:
        raise ModelError(
            f"none of the checkpoints in {fold_folder / RESUME_FOLDER} can be read",
            problems=problems,
            hint="Put back a copy of one of them, or use --restart to train from the beginning.",
        )
    return None


def clear(fold_folder: Path) -> None:
    """Remove every checkpoint, all at once."""
    root, forgotten = fold_folder / RESUME_FOLDER, fold_folder / _FORGOTTEN
    shutil.rmtree(forgotten, ignore_errors=True)
    if root.is_dir():
        root.rename(forgotten)
        shutil.rmtree(forgotten, ignore_errors=True)


def remove_leftovers(fold_folder: Path) -> None:
    """Remove what a killed process was writing; only the owner of the fold's lock may do this."""
    for folder in (fold_folder, fold_folder / RESUME_FOLDER):
        for leftover in folder.glob(".tmp-*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _folders(root: Path) -> list[Path]:
    """Checkpoints, newest first; of two of the same step the one that is being replaced comes second."""
    if not root.is_dir():
        return []
    found = [item for item in root.iterdir() if item.stem.isdigit() and item.suffix in ("", _REPLACED)]
    return sorted(found, key=lambda item: (item.stem, item.suffix == ""), reverse=True)


def _read(folder: Path) -> Checkpoint:
    path = folder / _COUNTERS_FILE
    stored = _Stored.from_json(read_text(path, ModelError), path, ModelError)
    tensors_path = folder / _TENSORS_FILE
    if not tensors_path.is_file():
        raise ModelError(f"{tensors_path} is missing")
    try:
        checksum = file_digest(tensors_path)
    except OSError as problem:
        raise ModelError(f"{tensors_path} cannot be read: {problem}") from None
    if checksum != stored.tensors_sha256:
        raise ModelError(f"{tensors_path} is corrupt: its checksum is not the one in {path.name}")
    return Checkpoint(stored.counters, read_tensors(tensors_path))
