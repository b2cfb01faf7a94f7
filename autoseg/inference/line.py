"""Consecutive cases on one line: while the network works on one, the next is read and the last one written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from autoseg.domain.dataset import Case
from autoseg.inference.outcome import Attempt, PredictionOutcome, attempt
from autoseg.runtime import Progress, one_core_each

R = TypeVar("R")
S = TypeVar("S")


def run_line(
    cases: Sequence[Case],
    targets: Sequence[Path],
    read: Callable[[Case], R],
    segment: Callable[[R], S],
    write: Callable[[Case, Path, S], None],
    progress: Progress,
) -> PredictionOutcome:
    """Read, segment and write in three threads, one case apart: at most three cases are in memory.

    A case that fails does not stop the others.

    Args:
        cases: In this order.
        targets: Where each is written.
        read: In a thread of its own, one case ahead.
        segment: In the calling thread.
        write: In a thread of its own, while the next case is segmented.
        progress: One step a case.
    """
    progress.start("Segmenting", len(cases))
    written: list[Path] = []
    failures: list[tuple[str, bool]] = []

    def note(case: Case, target: Path, outcome: Attempt[Any]) -> None:
        if outcome.failure is None:
            written.append(target)
        else:
            failures.append((f"{case.id}: {outcome.failure}", outcome.is_short_of_memory))
        progress.advance(note=case.id)

    beside = one_core_each()
    with ThreadPoolExecutor(1, "read", beside) as reader, ThreadPoolExecutor(1, "write", beside) as writer:
        coming = [reader.submit(_attempt, read, case) for case in cases[:1]]
        writing: list[tuple[Case, Path, Future[Attempt[None]]]] = []
        for number, (case, target) in enumerate(zip(cases, targets, strict=True)):
            ready = coming.pop().result()
            coming += [reader.submit(_attempt, read, later) for later in cases[number + 1 : number + 2]]
            outcome = _segment(segment, ready)
            del ready
            while writing:
                _note_written(writing.pop(), note)
            if outcome.value is None:
                note(case, target, outcome)
                continue
            writing.append((case, target, writer.submit(_attempt, write, case, target, outcome.value)))
            # Else it would be in memory until the next one is there.
            del outcome
        while writing:
            _note_written(writing.pop(), note)
    progress.finish(f"{len(written)} label maps")
    num_short_of_memory = sum(is_short for _, is_short in failures)
    return PredictionOutcome(tuple(written), tuple(text for text, _ in failures), num_short_of_memory)


def _attempt(step: Callable[..., R], *arguments: Any) -> Attempt[R]:
    return attempt(lambda: step(*arguments))


def _segment(segment: Callable[[R], S], ready: Attempt[R]) -> Attempt[S]:
    if ready.value is None:
        return Attempt(failure=ready.failure, is_short_of_memory=ready.is_short_of_memory)
    return _attempt(segment, ready.value)


def _note_written(
    item: tuple[Case, Path, Future[Attempt[None]]], note: Callable[[Case, Path, Attempt[Any]], None]
) -> None:
    case, target, future = item
    note(case, target, future.result())
