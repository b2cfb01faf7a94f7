"""Consecutive cases on one line: while the network works on one, the next is read and the last one written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from autoseg.domain.dataset import Case
from autoseg.inference.outcome import Attempt, CaseResult, attempt
from autoseg.runtime import one_core_each

R = TypeVar("R")
S = TypeVar("S")

Written = Sequence[Path]
"""The files of a case, its label map first."""

Writing = tuple[Case, Future[Attempt[Written]]]


def run_line(
    cases: Iterable[Case],
    read: Callable[[Case], R],
    segment: Callable[[R], S],
    write: Callable[[Case, S], Written],
    note: Callable[[CaseResult], bool],
) -> None:
    """Read, segment and write in three threads, one case apart: at most three cases are in memory.

    A case that fails does not stop the others.

    Args:
        cases: In this order; asked for in the thread that reads, one case ahead.
        read: In a thread of its own, one case ahead.
        segment: In the calling thread.
        write: In a thread of its own, while the next case is segmented.
        note: Told what came of each case, in the calling thread and in the order of the cases; False stops the line.
    """
    source = iter(cases)

    def pull() -> tuple[Case, Attempt[R]] | None:
        case = next(source, None)
        return None if case is None else (case, _attempt(read, case))

    beside = one_core_each()
    with ThreadPoolExecutor(1, "read", beside) as reader, ThreadPoolExecutor(1, "write", beside) as writer:
        coming, writing, goes_on = reader.submit(pull), list[Writing](), True
        while goes_on and (pulled := coming.result()) is not None:
            coming = reader.submit(pull)
            case, ready = pulled
            outcome = _segment(segment, ready)
            # Else they would be in memory until the next ones are there.
            del ready, pulled
            goes_on = _note_written(writing, note)
            if outcome.value is None:
                goes_on &= note(outcome.result(case.id))
                continue
            writing.append((case, writer.submit(_attempt, write, case, outcome.value)))
            del outcome
        _note_written(writing, note)


def _attempt(step: Callable[..., R], *arguments: Any) -> Attempt[R]:
    return attempt(lambda: step(*arguments))


def _segment(segment: Callable[[R], S], ready: Attempt[R]) -> Attempt[S]:
    return ready.failed() if ready.value is None else _attempt(segment, ready.value)


def _note_written(writing: list[Writing], note: Callable[[CaseResult], bool]) -> bool:
    """Wait for what is being written; whether to go on."""
    goes_on = True
    while writing:
        case, future = writing.pop()
        outcome = future.result()
        goes_on &= note(outcome.result(case.id, outcome.value or ()))
    return goes_on
