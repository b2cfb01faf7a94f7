"""Processes that are threads: what several processes do together, without starting any."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from autoseg.errors import ProcessLost

R = TypeVar("R")

PATIENCE_S = 60.0
"""Longer than any test takes: a thread that waits so long waits for ever."""


class _Table:
    """Where the threads lay down what they give, round after round."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._given: dict[int, dict[int, Any]] = defaultdict(dict)
        self._has_ended = False
        self._changed = threading.Condition()

    def exchange(self, number: int, rank: int, given: Any) -> list[Any]:
        """What all threads give in a round; ProcessLost when one has ended before it."""
        with self._changed:
            found = self._given[number]
            found[rank] = given
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(found) == self.world_size or self._has_ended, PATIENCE_S)
            if len(found) < self.world_size:
                raise ProcessLost("another thread has ended")
            return [found[other] for other in range(self.world_size)]

    def end(self) -> None:
        """A thread has ended with an error: what it has not given, it never will."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()


class ThreadedProcesses:
    """One of the threads."""

    def __init__(self, rank: int, table: _Table) -> None:
        self.rank, self._table = rank, table
        self.world_size = table.world_size
        self._round = 0
        self.is_main = rank == 0
        self.have_parted = False

    @classmethod
    def of(cls, rank: int, world_size: int) -> ThreadedProcesses:
        """One that has nobody to talk to."""
        return cls(rank, _Table(world_size))

    def part(self) -> None:
        self.have_parted = True

    def _exchange(self, given: Any) -> list[Any]:
        self._round += 1
        try:
            return self._table.exchange(self._round, self.rank, given)
        except ProcessLost:
            self.part()
            raise

    def broadcast(self, value: Any = None) -> Any:
        # Through JSON and back, as between real processes.
        return json.loads(self._exchange(json.dumps(value))[0])

    def copy_from_main(self, tensor: torch.Tensor) -> None:
        source = self._exchange(tensor.detach().clone())[0]
        assert (source.shape, source.dtype) == (tensor.shape, tensor.dtype)
        with torch.no_grad():
            tensor.copy_(source)

    def add_up(self, tensor: torch.Tensor) -> None:
        found = self._exchange(tensor.detach().clone())
        assert len({(one.shape, one.dtype) for one in found}) == 1
        with torch.no_grad():
            tensor.copy_(sum(found[1:], found[0]))

    def sums(self, *numbers: float) -> tuple[float, ...]:
        return tuple(map(sum, zip(*self._exchange(numbers), strict=True)))


def together(world_size: int, work: Callable[[ThreadedProcesses], R]) -> list[R | BaseException]:
    """Do the same work in so many threads; what each returned or raised."""
    table = _Table(world_size)

    def one(rank: int) -> R | BaseException:
        torch.set_num_threads(1)
        try:
            return work(ThreadedProcesses(rank, table))
        except BaseException as problem:
            # As a connection that breaks when a process ends.
            table.end()
            return problem

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))
