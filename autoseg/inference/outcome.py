"""What came of predicting cases: label maps, and failures that stop nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from autoseg.errors import AutosegError, DatasetError, DeviceMemoryError
from autoseg.runtime import device_memory_errors

MEMORY_HINT = "Close other programs, or use a machine with more memory."

# What may be wrong with one case while the next can still be fine.
_CASE_ERRORS = (AutosegError, OSError)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PredictionOutcome:
    """What came of predicting several cases.

    Attributes:
        written: Label maps, in the order of the cases.
        failures: One line a failed case, naming it.
        num_short_of_memory: How many of them failed for want of memory.
    """

    written: tuple[Path, ...]
    failures: tuple[str, ...]
    num_short_of_memory: int = 0

    def raise_failures(self) -> None:
        """Raise one error that lists the failed cases, if there are any.

        Raises:
            DeviceMemoryError: Every one failed for want of memory.
            DatasetError: Some failed otherwise.
        """
        if not self.failures:
            return
        kind = DeviceMemoryError if self.num_short_of_memory == len(self.failures) else DatasetError
        total = len(self.written) + len(self.failures)
        raise kind(f"{len(self.failures)} of {total} cases could not be segmented", problems=self.failures)


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """What a step gave, or why it failed."""

    value: T | None = None
    failure: str | None = None
    is_short_of_memory: bool = False


def attempt(step: Callable[[], T]) -> Attempt[T]:
    """Take a step of one case; whatever may be wrong with that case becomes its failure."""
    try:
        with device_memory_errors("memory ran out", MEMORY_HINT):
            return Attempt(value=step())
    except _CASE_ERRORS as problem:
        failure = str(problem) or type(problem).__name__
        return Attempt(failure=failure, is_short_of_memory=isinstance(problem, DeviceMemoryError))
