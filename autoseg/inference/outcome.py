"""What came of predicting cases: label maps, and failures that stop nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from autoseg.domain.dataset import Case
from autoseg.domain.values import Value
from autoseg.errors import AutosegError, ConfigError, DatasetError, DeviceMemoryError
from autoseg.io.files import FULL_DISK
from autoseg.runtime import Progress, device_memory_errors

log = logging.getLogger("autoseg")

MEMORY_HINT = "Close other programs, or use a machine with more memory."

MOST_BUGS_IN_A_ROW = 3
"""One image may hit a bug and the next be fine; after so many in a row it is not the images: a GPU that has failed once
fails for ever."""

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
        num_bugs: How many of them by what is no error of the data: a bug.
        skipped: Label maps that were finished before.
        stopped: Why the other cases were not tried; "" where all were.
        num_untried: How many.
    """

    written: tuple[Path, ...]
    failures: tuple[str, ...]
    num_short_of_memory: int = 0
    num_bugs: int = 0
    skipped: tuple[Path, ...] = ()
    stopped: str = ""
    num_untried: int = 0

    def raise_failures(self) -> None:
        """Raise one error that lists the failed cases, if there are any.

        Raises:
            ConfigError: The others were not tried, because the disk is full.
            DeviceMemoryError: Every one failed for want of memory.
            AutosegError: Some failed by a bug.
            DatasetError: Some failed otherwise.
        """
        if not self.failures:
            return
        total = len(self.written) + len(self.failures) + len(self.skipped) + self.num_untried
        message = f"{len(self.failures)} of {total} cases could not be segmented"
        counts = []
        if 0 < self.num_short_of_memory < len(self.failures):
            counts.append(f"{self.num_short_of_memory} for want of memory")
        if self.num_bugs:
            counts.append(f"{self.num_bugs} by a bug of autoseg, which is told above")
        message += f" ({', '.join(counts)})" if counts else ""
        if self.stopped:
            raise (AutosegError if self.num_bugs else ConfigError)(
                f"{message}; {self.stopped}, and {self.num_untried} were not tried",
                problems=self.failures,
                hint="When that is mended, the same command goes on with what is missing.",
            )
        if self.num_bugs:
            raise AutosegError(message, problems=self.failures, hint="Report it with what is said above.")
        kind = DeviceMemoryError if self.num_short_of_memory == len(self.failures) else DatasetError
        raise kind(message, problems=self.failures)


class CaseResult(Value):
    """What came of one case.

    Attributes:
        case: Its id.
        written: What was written, the label map first; nothing where it failed.
        failure: Why it failed.
        is_short_of_memory: Whether for want of memory.
        is_bug: Whether by what is no error of the data.
        is_disk_full: Whether because the disk is full: every other case would fail too.
    """

    case: str
    written: tuple[str, ...] = ()
    failure: str | None = None
    is_short_of_memory: bool = False
    is_bug: bool = False
    is_disk_full: bool = False


class Tally:
    """Collects results of cases, tells of progress, and says when there is no use in going on.

    Args:
        cases: All that will be tried.
        progress: One step a case.
    """

    def __init__(self, cases: Sequence[Case], progress: Progress) -> None:
        self._order = {case.id: number for number, case in enumerate(cases)}
        self._progress = progress
        self._results: list[CaseResult] = []
        self._bugs_in_a_row = 0
        self._stopped = ""
        progress.start("Segmenting", len(cases))

    def add(self, result: CaseResult) -> bool:
        """Take a result; False when the other cases need not be tried."""
        self._results.append(result)
        self._progress.advance(note=result.case)
        self._bugs_in_a_row = self._bugs_in_a_row + 1 if result.is_bug else 0
        if result.is_disk_full:
            self._stopped = "the disk is full"
        elif self._bugs_in_a_row >= MOST_BUGS_IN_A_ROW:
            self._stopped = f"{MOST_BUGS_IN_A_ROW} cases in a row failed by a bug"
        return not self._stopped

    def outcome(self, skipped: Sequence[Path] = ()) -> PredictionOutcome:
        """Everything together, in the order of the cases."""
        results = sorted(self._results, key=lambda item: self._order[item.case])
        failed = [item for item in results if item.failure is not None]
        written = tuple(Path(item.written[0]) for item in results if item.failure is None)
        self._progress.finish(f"{len(written)} label maps")
        return PredictionOutcome(
            written=written,
            failures=tuple(f"{item.case}: {item.failure}" for item in failed),
            num_short_of_memory=sum(item.is_short_of_memory for item in failed),
            num_bugs=sum(item.is_bug for item in failed),
            skipped=tuple(skipped),
            stopped=self._stopped,
            num_untried=len(self._order) - len(results),
        )


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """What a step gave, or why it failed; see `CaseResult`."""

    value: T | None = None
    failure: str | None = None
    is_short_of_memory: bool = False
    is_bug: bool = False
    is_disk_full: bool = False

    def failed(self) -> Attempt[Any]:
        """The same failure, of a later step."""
        return Attempt(None, self.failure, self.is_short_of_memory, self.is_bug, self.is_disk_full)

    def result(self, case_id: str, written: Sequence[Path] = ()) -> CaseResult:
        """What came of the case with its last step, or with the one that failed."""
        return CaseResult(
            case=case_id,
            written=tuple(map(str, written)) if self.failure is None else (),
            failure=self.failure,
            is_short_of_memory=self.is_short_of_memory,
            is_bug=self.is_bug,
            is_disk_full=self.is_disk_full,
        )


def attempt(step: Callable[[], T]) -> Attempt[T]:
    """Take a step of one case; whatever may be wrong with that case becomes its failure.

    What nobody foresaw is told with its traceback, and is a failure of the case too: thousands of others may be fine.
    """
    try:
        with device_memory_errors("memory ran out", MEMORY_HINT):
            return Attempt(value=step())
    except _CASE_ERRORS as problem:
        failure = str(problem) or type(problem).__name__
        return Attempt(
            failure=failure,
            is_short_of_memory=isinstance(problem, DeviceMemoryError),
            is_disk_full=isinstance(problem, OSError) and problem.errno in FULL_DISK,
        )
    except Exception as bug:
        log.exception("a bug of autoseg")
        return Attempt(failure=f"{type(bug).__name__}: {bug}", is_bug=True)
