"""What goes in and out of a training: settings of one start, the record of the run, one record an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from autoseg.domain.plan import TrainingPlan
from autoseg.domain.trained_on import TrainedOn
from autoseg.domain.values import Value, digest_of
from autoseg.errors import ConfigError
from autoseg.io.files import read_text, write_text
from autoseg.io.model import Model
from autoseg.training.pretrained import Pretrained
from autoseg.training.schedule import STRAIGHT, Course

SCHEMA_VERSION = 1

CHECKPOINT_INTERVAL_S = 60.0
"""Longest time between two checkpoints, so that a crash never costs more."""

PREFETCH_STEPS = 3
"""Steps read ahead: enough to hide a slow read, little enough to cost no memory."""

Fold = int | Literal["all"]
"""Number of a fold, or every case at once."""

Status = Literal["running", "finished", "interrupted", "diverged"]

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"

VALIDATION_FOLDER = "validation"
"""Predictions of the fold's validation cases by its final weights."""

VALIDATION_SUMMARY_FILE = "summary.json"
"""Their scores, with the checksum of the weights that predicted."""


Layout = Literal["contiguous", "channels_last"]
"""How images lie in memory: channel by channel, or voxel by voxel."""

Compile = Literal["auto", "always", "never"]
"""Whether the network is compiled; "auto": where a long training on a GPU gains by it."""


class Choices(Value):
    """How a training computes, beside its precision: found out once by its first start, and kept.

    Attributes:
        layout: Of images and features.
        is_compiled: Whether torch.compile is used.
        micro_batch: Most samples of a process at a time; None: all. Lowered when memory runs out.
        timings_s: What was timed for the choice: seconds by what was tried; empty where rules decided.
    """

    layout: Layout = "contiguous"
    is_compiled: bool = False
    micro_batch: int | None = None
    timings_s: dict[str, float] = Field(default_factory=dict)


def known_choices(device_type: str, precision: str) -> Choices:
    """What is known to be quick without timing anything.

    Source: decision 7 (training in bf16 on a CPU: channels last).
    """
    return Choices(layout="channels_last" if (device_type, precision) == ("cpu", "bf16") else "contiguous")


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What one start of a training is asked to do.

    Attributes:
        num_epochs: Train so many epochs ...
        time_budget_s: ... or so many seconds, the whole learning-rate decay included. With neither, the plan's epochs
            on a GPU and its recommended budget on a CPU.
        device: As for `runtime.pick_device`.
        precision: As for `runtime.pick_precision`; "auto" is resolved once and kept when the training goes on.
        seed: Of everything random.
        restart: Forget what was trained before instead of going on.
        checkpoint_interval_s: Longest time between two checkpoints.
        prefetch: Steps read ahead by a thread; 0: none.
        log: Where to log besides metrics.jsonl; names of `loggers.PACKAGES`.
        pretrained: A model whose weights the training begins with where they fit.
        compile: See `Compile`.
        planned_speed: Operations a second by which the plan foresaw its steps on this machine; None: not known.
        trained_on: What the images are like, for the model's card; None: not known.
    """

    num_epochs: int | None = None
    time_budget_s: float | None = None
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0
    restart: bool = False
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    prefetch: int = PREFETCH_STEPS
    log: tuple[str, ...] = ()
    pretrained: Model | None = None
    compile: Compile = "auto"
    planned_speed: float | None = None
    trained_on: TrainedOn | None = None

    def __post_init__(self) -> None:
        if self.num_epochs is not None and self.time_budget_s is not None:
            raise ConfigError("a number of epochs and a time budget were both given", hint="Give one of them.")
        if self.num_epochs is not None and self.num_epochs < 1:
            raise ConfigError(f"the number of epochs must be at least 1, got {self.num_epochs}")
        if self.time_budget_s is not None and not self.time_budget_s > 0:
            raise ConfigError(f"the time budget must be above 0 seconds, got {self.time_budget_s}")

    def with_length(self, plan: TrainingPlan, device_type: str) -> TrainSettings:
        """These settings with a length: without one, the plan's budget on a CPU and its epochs elsewhere."""
        if self.num_epochs is not None or self.time_budget_s is not None:
            return self
        if device_type == "cpu":
            return replace(self, time_budget_s=plan.cpu_time_budget_s)
        return replace(self, num_epochs=plan.num_epochs)


@dataclass(frozen=True, slots=True)
class FoldCases:
    """The cases of a fold, and what predicted the maps that a cascade sees of them.

    Attributes:
        train: Ids to learn from.
        validation: Ids to look at; may be empty.
        previous_weights: SHA-256 of the previous stage's weights by fold; empty without such a stage.
        annotated: Of the cases in which not every class was annotated: for each class whether it was.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    previous_weights: Mapping[str, str] = field(default_factory=dict)
    annotated: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Tells two sets of cases apart, and what was annotated in them; their order does not count."""
        ids = {*self.train, *self.validation}
        own = {case_id: row for case_id, row in self.annotated.items() if case_id in ids}
        # Without such cases it is what it was before there could be any.
        return digest_of([sorted(self.train), sorted(self.validation), *([own] if own else [])])


class EpochRecord(Value):
    """One line of metrics.jsonl.

    Attributes:
        epoch: From 0.
        step: Steps done at its end.
        seconds: Seconds of training used at its end, over all starts.
        seconds_per_step: Mean over the epoch, validation and checkpoints left out.
        learning_rate: Of its last step.
        momentum: Of its last step.
        train_loss: Mean over its steps; None where all of them were skipped.
        num_bad_steps: Steps that were skipped because their loss or gradient was not finite.
        validation_loss: Of the finest output on the fixed validation patches; None when they were not looked at.
        pseudo_dice: A foreground class or region each: Dice over all fixed validation patches together; None where it
            is neither there nor predicted, or was not annotated.
        mean_pseudo_dice: Mean of those that are defined.
        ema_pseudo_dice: Its running mean, by which `best` is chosen.
        whole_dice: A foreground class or region each: Dice of whole validation cases, the mean over those of the cases
            looked at that contain it; None where none does. Empty after an epoch without such a look.
        mean_whole_dice: Mean of those that are defined.
        num_whole_cases: Cases that were looked at.
        ends_at: Where the training will end, in epochs or seconds, when that changed because of a plateau; else None.
        memory_bytes: Highest memory so far, as in `RunRecord`; None in records that did not hold it.
    """

    epoch: int
    step: int
    seconds: float
    seconds_per_step: float
    learning_rate: float
    train_loss: float | None
    momentum: float | None = None
    num_bad_steps: int = 0
    validation_loss: float | None = None
    pseudo_dice: tuple[float | None, ...] = ()
    mean_pseudo_dice: float | None = None
    ema_pseudo_dice: float | None = None
    whole_dice: tuple[float | None, ...] = ()
    mean_whole_dice: float | None = None
    num_whole_cases: int = 0
    ends_at: float | None = None
    memory_bytes: int | None = None


class Start(Value):
    """One start of a training.

    Attributes:
        at: When, in UTC.
        num_epochs: It was asked for so many epochs ...
        time_budget_s: ... or so many seconds.
        step: Steps done before.
        seconds: Seconds of training before.
        device: Where it ran.
        precision: Of the network.
    """

    at: str
    num_epochs: int | None
    time_budget_s: float | None
    step: int
    seconds: float
    device: str
    precision: str


class RunRecord(Value):
    """run.json of a fold: resolved settings, machine, and how far it came.

    Attributes:
        status: "running" also describes a training that was killed.
        precision: Chosen at the first start, kept afterwards.
        choices: The same; None in records that did not hold them.
        num_processes: Processes that shared the last start.
        cases_digest: Of the fold's cases; empty in records that did not hold it.
        previous_weights: SHA-256 of the weights, by fold, that predicted the maps which a cascade learned from.
        pretrained: What it began with; None where all weights were fresh.
        validation_patches: Fixed patches that are looked at after an epoch; chosen once, kept afterwards.
        whole_cases: Validation cases that are looked at as wholes; chosen once, kept afterwards; None: not chosen yet.
        seconds: Training seconds over all starts.
        num_bad_steps: Steps that were skipped because their loss or gradient was not finite.
        course: How it deviates from the straight way to the length that was asked for.
        starts: Every start that trained.
        peak_memory_bytes: Of the process; of the device where it is a GPU.
        environment: Versions, processor, threads.
    """

    schema_version: int = SCHEMA_VERSION
    configuration: str
    fold: Fold
    plan_digest: str
    seed: int
    num_epochs: int | None
    time_budget_s: float | None
    device: str
    precision: str
    choices: Choices | None = None
    num_processes: int = 1
    status: Status
    num_training_cases: int
    num_validation_cases: int
    cases_digest: str = ""
    previous_weights: dict[str, str] = Field(default_factory=dict)
    pretrained: Pretrained | None = None
    validation_patches: int | None = None
    whole_cases: tuple[str, ...] | None = None
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    seconds_per_step: float | None = None
    best_epoch: int | None = None
    best_ema_pseudo_dice: float | None = None
    num_bad_steps: int = 0
    course: Course = STRAIGHT
    starts: tuple[Start, ...] = ()
    peak_memory_bytes: int = 0
    environment: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a start of a training came to.

    Attributes:
        folder: The fold folder, which holds the final weights.
        epochs: Epochs done over all starts.
        steps: Steps done over all starts.
        seconds: Training seconds over all starts.
        did_train: False when the fold was finished before and nothing was left to do.
        last: The last epoch's record.
    """

    folder: Path
    epochs: int
    steps: int
    seconds: float
    did_train: bool
    last: EpochRecord | None


def read_metrics(folder: Path) -> tuple[EpochRecord, ...]:
    """The learning curve of a fold; empty when there is none yet. A last line cut short by a crash is left out."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return ()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1].splitlines()
    return tuple(EpochRecord.from_json(line, path) for line in whole)


def write_metrics(folder: Path, records: tuple[EpochRecord, ...]) -> None:
    """Write the whole learning curve, one JSON object a line."""
    write_text(folder / METRICS_FILE, "".join(record.model_dump_json() + "\n" for record in records))


def read_run(folder: Path) -> RunRecord | None:
    """The record of a fold's training, None when it never began.

    Raises:
        ConfigError: It is there but not valid.
    """
    path = folder / RUN_FILE
    return RunRecord.from_json(read_text(path), path) if path.is_file() else None


def write_run(folder: Path, record: RunRecord) -> None:
    """Write run.json."""
    write_text(folder / RUN_FILE, record.to_json())
