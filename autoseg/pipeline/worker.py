"""A process that does a task with one case after the other: what its caller keeps of it when memory runs out.

Run as ``python -m autoseg.pipeline.worker`` it reads the task from the first line of standard input and a case from
each further line, and writes an `Answer` to standard output for each case, all as JSON. It ends when standard input
does, whatever it is doing then: a caller that dies leaves nothing running.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import TextIO

import torch

from autoseg.domain.dataset import Case
from autoseg.domain.values import Value
from autoseg.errors import AutosegError
from autoseg.io.files import LockHeld
from autoseg.pipeline.tasks import TASK, Measuring, Preparing, PreparingMaps
from autoseg.runtime import is_out_of_memory

_FIRST_VICTIM = "1000"
"""Linux ends the process of the highest such score first when memory runs out: this one, never its caller."""

_GRACE_S = 5.0
"""To take temporary files and locks away once the caller is gone."""


class Problem(Value):
    """Why a case failed.

    Attributes:
        kind: "busy": another process is at it. "memory": there was not enough. "system": a file could not be read or
            written. "data": anything else that is wrong with the case.
        message: For a person.
        hint: What to do next.
        number: Of a "system" problem, the system's own (errno).
        file: Of a "system" problem.
    """

    kind: str
    message: str
    hint: str = ""
    number: int | None = None
    file: str | None = None


class Answer(Value):
    """What came of one case.

    Attributes:
        result: Of the task, as JSON; empty where it failed.
        problem: Why it failed.
        warnings: That were logged meanwhile.
    """

    result: str = ""
    problem: Problem | None = None
    warnings: tuple[str, ...] = ()


def answer_of(task: Measuring | Preparing | PreparingMaps, case: Case) -> Answer:
    """Do the task with a case; problems that a case can have become part of the answer."""
    try:
        return Answer(result=task.run(case).model_dump_json())
    except LockHeld as held:
        return Answer(problem=Problem(kind="busy", message=held.message, hint=held.hint))
    except AutosegError as error:
        return Answer(problem=Problem(kind="data", message=error.message, hint=error.hint))
    except OSError as error:
        problem = Problem(
            kind="system",
            message=error.strerror or str(error) or type(error).__name__,
            number=error.errno,
            file=None if error.filename is None else str(error.filename),
        )
        return Answer(problem=problem)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Answer(problem=Problem(kind="memory", message=str(error)))


class KeptWarnings(logging.Handler):
    """Keeps what is logged until the next answer, tracebacks included; nobody else gets autoseg's log from now on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[str] = []
        log = logging.getLogger("autoseg")
        log.addHandler(self)
        log.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self._kept.append(self.format(record))

    def take(self) -> tuple[str, ...]:
        """Everything since the last call."""
        kept, self._kept = tuple(self._kept), []
        return kept


def _read_lines(lines: queue.SimpleQueue[str]) -> None:
    """Pass on standard input; when it ends, have the main thread end, and see to it that it does."""
    for line in sys.stdin:
        lines.put(line)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


def _end(*_: object) -> None:
    # Locks and temporary files go on the way out.
    raise SystemExit(0)


def settle_down() -> tuple[TextIO, queue.SimpleQueue[str]]:
    """Make this process one that works for another: it ends with its caller, and before it when memory runs out.

    Returns:
        Standard output for answers alone (what a library prints goes to standard error), and the lines of standard
        input as they come.
    """
    # Ctrl-C reaches every process of a terminal; what becomes of this one its caller decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
        score.write(_FIRST_VICTIM)
    lines = queue.SimpleQueue[str]()
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()
    return _own_output(), lines


def _own_output() -> TextIO:
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return output


def main() -> None:
    """Answer until standard input ends."""
    output, lines = settle_down()
    warnings = KeptWarnings()
    torch.set_num_threads(1)
    task = TASK.validate_json(lines.get())
    while True:
        case = Case.model_validate_json(lines.get())
        answer = answer_of(task, case).model_copy(update={"warnings": warnings.take()})
        output.write(answer.model_dump_json() + "\n")
        output.flush()


if __name__ == "__main__":
    main()
