"""Who does a task with the cases: threads of this process, or processes of their own that memory may kill."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import IO, Protocol, Self

from autoseg.domain.dataset import Case
from autoseg.pipeline.tasks import Measuring, Preparing, PreparingMaps
from autoseg.pipeline.worker import Answer, answer_of

WORKER_BYTES = 300_000_000
"""Memory of a worker process before it has done anything: Python and its libraries.

Source: docs/benchmarks/cache.md."""

_STOP_S = 10.0
"""A worker that was told to stop, and takes longer to tidy up, is killed."""

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""The cores are shared out among the workers; libraries that start a team of threads each would need them all."""

Task = Measuring | Preparing | PreparingMaps


class WorkerEnded(Exception):
    """A worker process ended before it had answered.

    Args:
        returncode: Of the process; the negative number of the signal that ended it.
    """

    def __init__(self, returncode: int) -> None:
        super().__init__(in_words(returncode))
        self.returncode = returncode

    @property
    def is_signal(self) -> bool:
        """Whether the system, or somebody, ended it; else it ended by itself, with an error."""
        return self.returncode < 0


def in_words(returncode: int) -> str:
    """How a process ended."""
    if returncode >= 0:
        return f"its process ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    reason = ", as the system does when memory runs out" if -returncode == signal.SIGKILL else ""
    return f"its process was ended by {name}{reason}"


class Workers(Protocol):
    """Does a task with cases; `ask` may be called by several threads at a time."""

    overhead_bytes: int

    def ask(self, case: Case) -> Answer:
        """Do the task with a case; WorkerEnded when the process that did it is gone."""

    def rest(self) -> None:
        """Give back the memory that is kept for later calls."""

    def stop(self) -> None:
        """Have calls in work end soon where they can; later ones fail."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Threads:
    """The calling threads do the work themselves."""

    overhead_bytes = 0

    def __init__(self, task: Task) -> None:
        self._task = task

    def ask(self, case: Case) -> Answer:
        """Do the task with a case."""
        return answer_of(self._task, case)

    def rest(self) -> None:
        """Nothing is kept."""

    def stop(self) -> None:
        """A thread cannot be stopped: it ends with its case."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return


class Processes:
    """Each call has a process to itself, which is kept for later calls; leaving the context ends them all."""

    overhead_bytes = WORKER_BYTES

    def __init__(self, task: Task) -> None:
        self._first_line = task.model_dump_json() + "\n"
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._all: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._is_open = True

    def ask(self, case: Case) -> Answer:
        """Do the task with a case.

        Raises:
            WorkerEnded: The process is gone. Another call starts a new one.
        """
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = self._start()
        incoming, outgoing = pipes(process)
        line = ""
        with suppress(BrokenPipeError):
            incoming.write(case.model_dump_json() + "\n")
            incoming.flush()
            line = outgoing.readline()
        if not line.endswith("\n"):
            raise WorkerEnded(end_process(process))
        self._idle.put(process)
        return Answer.model_validate_json(line)

    def rest(self) -> None:
        """End the processes that have nothing to do."""
        with suppress(queue.Empty):
            while True:
                process = self._idle.get_nowait()
                process.terminate()
                end_process(process)

    def stop(self) -> None:
        """End all processes; calls in work fail with WorkerEnded."""
        with self._lock:
            self._is_open = False
        for process in self._all:
            # Rather than by closing the pipe, which a thread may be writing to.
            process.terminate()
        for process in self._all:
            end_process(process)

    def _start(self) -> subprocess.Popen[str]:
        with self._lock:
            if not self._is_open:
                raise WorkerEnded(-signal.SIGTERM)
            process = start_process("autoseg.pipeline.worker", 1)
            self._all.append(process)
        with suppress(BrokenPipeError):
            pipes(process)[0].write(self._first_line)
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def start_process(module: str, num_threads: int) -> subprocess.Popen[str]:
    """Start a module of autoseg's as a process that is spoken to by lines.

    Args:
        module: Its name.
        num_threads: Of libraries that start a team each.
    """
    # Without -P a folder called autoseg in the working folder would be imported instead.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | dict.fromkeys(_THREAD_VARIABLES, str(num_threads)),
    )


def pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """Standard input and output of a process."""
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def end_process(process: subprocess.Popen[str]) -> int:
    """Wait for the process, kill it where that takes too long; its exit code."""
    try:
        returncode = process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        returncode = process.wait()
    for pipe in pipes(process):
        # What was not written any more cannot be.
        with suppress(BrokenPipeError):
            pipe.close()
    return returncode
