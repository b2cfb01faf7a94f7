"""Work over the cases of a data set: as many at a time as there are cores and memory, every failure collected."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from autoseg.domain.dataset import Case
from autoseg.domain.values import Value
from autoseg.errors import AutosegError, DatasetError, DeviceMemoryError
from autoseg.io.files import FULL_DISK
from autoseg.machine import MemoryGate, host_memory_bytes
from autoseg.pipeline.tasks import labels_of
from autoseg.pipeline.worker import Answer, Problem
from autoseg.pipeline.workers import Processes, Task, Threads, WorkerEnded, Workers
from autoseg.runtime import NoProgress, Progress, num_cpus, one_core_each

__all__ = ["SILENT", "annotated_names", "labels_of", "map_cases"]

R = TypeVar("R", bound=Value)
SILENT = NoProgress()

log = logging.getLogger("autoseg")

_THREADS_FRACTION = 0.25
"""Threads work where all cases in work together take at most this part of the free memory: then nothing will be killed,
and nobody waits for processes to start. Source: docs/benchmarks/cache.md."""

_THREADS_BYTES = 2_000_000_000
"""The same where the system does not tell how much is free."""

_MEMORY_FRACTION = 0.8
"""Part of the free memory that the cases in work may take together."""

_BUSY_INTERVAL_S = 0.2
"""Between two looks at cases that other processes are at."""

_TELL_INTERVAL_S = 30.0
"""Between two messages about them: their owner may have died on another host."""


class _CaseMap:
    """One go over the cases.

    Args:
        task: What to do.
        needs: Bytes of memory that each case takes.
        progress: One step a case.
        after_each: Called when a case is done.
    """

    def __init__(
        self, task: Task, needs: Mapping[str, int], progress: Progress, after_each: Callable[[], None] | None
    ) -> None:
        self._needs = needs
        self._progress = progress
        self._after_each = after_each
        self.results: dict[str, str] = {}
        self.problems: list[str] = []
        self.too_large: list[str] = []
        self._busy: list[Case] = []
        self._killed: list[Case] = []
        memory = host_memory_bytes()
        self._free = None if memory is None else memory[0]
        self.workers: Workers = Threads(task) if self._is_small() else Processes(task)
        self._gate = MemoryGate(None if self._free is None else int(self._free * _MEMORY_FRACTION))

    def _is_small(self) -> bool:
        at_a_time = sum(sorted(self._needs.values(), reverse=True)[: num_cpus()])
        return at_a_time <= (_THREADS_BYTES if self._free is None else self._free * _THREADS_FRACTION)

    def run(self, cases: Sequence[Case]) -> None:
        """Do all cases: first those that nobody else is at, then those; last, alone, those that were killed."""
        self._warn_of_large(cases)
        self._together(cases)
        self._wait_for_others()
        killed, self._killed = self._killed, []
        self.workers.rest()
        for case in killed:
            log.warning("case %s is tried again, alone", case.id)
            self._collect(case, self._ask(case), is_last_try=True)
            self._wait_for_others(is_last_try=True)

    def _wait_for_others(self, *, is_last_try: bool = False) -> None:
        """Do the cases that other processes were at, as soon as they are not."""
        told_at = time.monotonic() + _TELL_INTERVAL_S
        while self._busy:
            time.sleep(_BUSY_INTERVAL_S)
            busy, self._busy = self._busy, []
            is_time = time.monotonic() >= told_at
            self._together(busy, tell_busy=is_time, is_last_try=is_last_try)
            if is_time:
                told_at += _TELL_INTERVAL_S

    def _together(self, cases: Sequence[Case], *, tell_busy: bool = False, is_last_try: bool = False) -> None:
        settle = one_core_each()
        pool = ThreadPoolExecutor(max_workers=min(num_cpus(), len(cases)), initializer=settle)
        try:
            futures = {pool.submit(self._ask, case): case for case in cases}
            for future in as_completed(futures):
                self._collect(futures[future], future.result(), tell_busy=tell_busy, is_last_try=is_last_try)
        except BaseException:
            # Whoever stops does not wait for what is in work: ending the processes ends the calls.
            pool.shutdown(wait=False, cancel_futures=True)
            self.workers.stop()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, case: Case) -> Answer | WorkerEnded:
        with self._gate.room(self._needs.get(case.id, 0) + self.workers.overhead_bytes):
            try:
                return self.workers.ask(case)
            except WorkerEnded as ended:
                return ended

    def _collect(
        self, case: Case, answer: Answer | WorkerEnded, *, is_last_try: bool = False, tell_busy: bool = False
    ) -> None:
        if isinstance(answer, WorkerEnded):
            if not answer.is_signal:
                raise AutosegError(
                    f"case {case.id}: {answer}, which is a bug of autoseg", hint="Report it with what is said above."
                )
            self._out_of_memory(case, str(answer), is_last_try=is_last_try)
            return
        for warning in answer.warnings:
            log.warning("%s", warning)
        problem = answer.problem
        if problem is not None and problem.kind == "busy":
            if tell_busy:
                log.warning("waiting: %s. %s", problem.message, problem.hint)
            self._busy.append(case)
            return
        if problem is not None and problem.kind == "memory":
            self._out_of_memory(case, f"there was not enough memory ({problem.message})", is_last_try=is_last_try)
            return
        if problem is None:
            self.results[case.id] = answer.result
        else:
            self._note(case, problem)
        self._progress.advance()
        if self._after_each is not None:
            self._after_each()

    def _note(self, case: Case, problem: Problem) -> None:
        if problem.number in FULL_DISK:
            # Every other case would say the same.
            raise OSError(problem.number, problem.message, problem.file)
        self.problems.append(f"{case.id}: {problem.message}{f' ({problem.file})' if problem.file else ''}")

    def _out_of_memory(self, case: Case, reason: str, *, is_last_try: bool) -> None:
        if not is_last_try:
            log.warning("case %s: %s; it will be tried again when the others are done", case.id, reason)
            self._killed.append(case)
            return
        need, memory = self._needs.get(case.id, 0), host_memory_bytes()
        free = "" if memory is None else f", {_gigabytes(memory[0])} are free"
        self.too_large.append(f"{case.id}: {reason}, even alone; it needs about {_gigabytes(need)}{free}")
        self._progress.advance()

    def _warn_of_large(self, cases: Iterable[Case]) -> None:
        if self._free is None:
            return
        for case in cases:
            need = self._needs.get(case.id, 0) + self.workers.overhead_bytes
            if need > self._free:
                log.warning(
                    "case %s needs about %s of memory, %s are free: it is tried with nothing else beside it",
                    case.id,
                    _gigabytes(need),
                    _gigabytes(self._free),
                )


def map_cases(
    task: Task,
    kind: type[R],
    cases: Sequence[Case],
    needs: Mapping[str, int],
    *,
    description: str,
    progress: Progress = SILENT,
    after_each: Callable[[], None] | None = None,
) -> tuple[R, ...]:
    """Do a task with every case, as many at a time as there are cores and memory; results in the order of the cases.

    Every failing case is collected, so that one run names them all. Cases that other processes are at are left for
    last. Where memory could run out each case is done in a process of its own: one that the system kills is named and
    tried again with nothing beside it.

    Args:
        task: What to do with a case.
        kind: Of its results.
        cases: All of them.
        needs: Bytes of memory that each case takes, by its id.
        description: Of the task, for people.
        progress: One step a case.
        after_each: Called when a case is done; what it raises stops the work.

    Raises:
        DatasetError: Some cases failed; each is a problem of it.
        DeviceMemoryError: Cases need more memory than there is, even alone.
        OSError: The disk is full.
    """
    progress.start(description, len(cases))
    if not cases:
        progress.finish("0 cases")
        return ()
    work = _CaseMap(task, needs, progress, after_each)
    with work.workers:
        work.run(cases)
    if work.problems:
        raise DatasetError(
            f"{len(work.problems) + len(work.too_large)} of {len(cases)} cases cannot be used",
            problems=sorted(work.problems + work.too_large),
            hint="Repair or remove them; `autoseg check` lists everything that is wrong with a data set.",
        )
    if work.too_large:
        raise DeviceMemoryError(
            f"{len(work.too_large)} of {len(cases)} cases need more memory than there is; the others are done",
            problems=sorted(work.too_large),
            hint="Stop what else uses the memory, use a larger machine, or take these cases out of the data set; the "
            "same command goes on with what is missing.",
        )
    progress.finish(f"{len(cases)} cases")
    return tuple(kind.from_json(work.results[case.id], f"the result of case {case.id}") for case in cases)


def annotated_names(cases: Iterable[Case]) -> dict[str, tuple[str, ...]]:
    """The classes that were annotated, of the cases in which not all were, by case id."""
    return {case.id: case.annotated for case in cases if case.annotated is not None}


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
