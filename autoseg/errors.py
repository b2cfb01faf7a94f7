"""The tree of errors autoseg raises on purpose, each with the exit code of the command line.

A message says what is wrong, where (case and file, or key) and what was got against what was expected; `hint` says what
to do next.
"""

from __future__ import annotations

from collections.abc import Sequence


class AutosegError(Exception):
    """An error with a message for a person, a hint, and the exit code of the command line.

    Args:
        message: What is wrong and where, got against expected.
        hint: What to do next; empty when the message says it already.
        problems: Single findings, when several were collected and are raised once.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {problem}" for problem in self.problems)]
        if self.hint:
            lines.append(self.hint)
        return "\n".join(lines)


class ConfigError(AutosegError):
    """Wrong usage or configuration: an option, a key, a value."""

    exit_code = 2


class DatasetError(AutosegError):
    """Something is wrong with the data: a missing label, an unreadable file, an undeclared value."""

    exit_code = 3


class GeometryError(DatasetError):
    """An affine that is degenerate, or grids that do not match."""


class PlanError(AutosegError):
    """No valid plan exists for these measurements and this budget, or a plan file is not valid."""

    exit_code = 4


class ModelError(AutosegError):
    """A model folder or its weights cannot be used."""

    exit_code = 5


class DeviceMemoryError(AutosegError):
    """The device has too little memory for what was asked."""

    exit_code = 6


class TrainingDiverged(AutosegError):
    """The loss or its gradient is no longer a finite number: the data or the settings drove it there, not a bug."""

    exit_code = 3


class TrainingInterrupted(AutosegError):
    """Training was asked to stop; everything is saved and the same command goes on."""

    exit_code = 130


class ProcessLost(AutosegError):
    """Another process of the same training has ended, or does not answer: its own message says why."""


class LeaderStopped(AutosegError):
    """The first process of a training has stopped with an error, which it has told; the others leave like it.

    Args:
        message: What the first process said.
        exit_code: With which it leaves.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
