"""Where a training is logged besides metrics.jsonl: one small protocol, and loggers that can never stop a training."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from autoseg.errors import ConfigError
from autoseg.training.records import EpochRecord, Status

log = logging.getLogger("autoseg")

LOGS_FOLDER = "logs"
"""What loggers write of themselves lies here, in the fold folder, unless the user sends it elsewhere."""

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""The module that each logger needs, by its name, which is also that of the extra."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known of a training when it starts.

    Attributes:
        name: For people.
        folder: For the logger's own files.
        classes: Names of the foreground classes or regions.
        facts: Settings and machine by name, as plain JSON.
        done: The learning curve so far, where a training goes on.
    """

    name: str
    folder: Path
    classes: tuple[str, ...]
    facts: dict[str, Any]
    done: Sequence[EpochRecord] = ()


class Logger(Protocol):
    """Follows one start of a training. May raise whatever it likes: it is then switched off with a warning."""

    def start(self, run: RunFacts) -> None:
        """The training starts, or goes on."""

    def log(self, record: EpochRecord) -> None:
        """An epoch has ended."""

    def finish(self, status: Status) -> None:
        """The start is over."""


class Loggers:
    """Several loggers as one that never raises; leaving its context finishes them.

    Args:
        loggers: By name.

    Attributes:
        status: How the training is; "interrupted" when it leaves while it runs.
    """

    def __init__(self, loggers: dict[str, Logger]) -> None:
        self._loggers = loggers
        self.status: Status = "running"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status: Status = "interrupted" if self.status == "running" else self.status
        self._each(lambda logger: logger.finish(status))

    def start(self, run: RunFacts) -> None:
        """The training starts, or goes on."""
        self._each(lambda logger: logger.start(run))

    def log(self, record: EpochRecord) -> None:
        """An epoch has ended."""
        self._each(lambda logger: logger.log(record))

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as problem:
                # Somebody else's server, disk or library: nothing of it is worth a training.
                log.warning("logging to %s failed and is switched off: %s: %s", name, type(problem).__name__, problem)
                del self._loggers[name]


def require(names: Sequence[str]) -> None:
    """Say what to install.

    Raises:
        ConfigError: A logger's package is not installed; all of them named.
    """
    missing = [name for name in names if find_spec(PACKAGES[name]) is None]
    if missing:
        raise ConfigError(
            f"logging to {' and '.join(missing)} needs packages that are not installed",
            hint=f"Install them with: pip install 'autoseg-unet[{','.join(missing)}]'",
        )


def scalars(record: EpochRecord, classes: Sequence[str]) -> dict[str, float]:
    """The numbers of an epoch by name, those that there are.

    Args:
        record: Of the epoch.
        classes: Names of the foreground classes or regions.
    """
    values: dict[str, float | None] = {
        "loss/train": record.train_loss,
        "loss/validation": record.validation_loss,
        "dice/mean": record.mean_pseudo_dice,
        "dice/running_mean": record.ema_pseudo_dice,
        **_by_class("dice", record.pseudo_dice, classes),
        "whole_dice/mean": record.mean_whole_dice,
        **_by_class("whole_dice", record.whole_dice, classes),
        "training/epoch": record.epoch,
        "training/learning_rate": record.learning_rate,
        "training/momentum": record.momentum,
        "training/minutes": record.seconds / 60,
        "training/seconds_per_step": record.seconds_per_step,
        "training/skipped_steps": record.num_bad_steps,
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def _by_class(kind: str, values: Sequence[float | None], classes: Sequence[str]) -> dict[str, float | None]:
    # MLflow takes no other characters; the same names everywhere are worth more than the others'.
    names = [re.sub(r"[^\w .-]", "_", name) for name in classes]
    return {f"{kind}/{name}": value for name, value in zip(names, values, strict=False)}
