"""A polite stop: SIGINT and SIGTERM let the running step end, so that the state can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A stop was asked for in the middle of something that changes nothing and can be done again."""


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `is_set`; a second one acts as it did before.

    Outside the main thread Python delivers no signals, and nothing changes.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """Leave what is going on where a stop was asked for.

        Raises:
            Stopped: It was.
        """
        if self.is_set:
            raise Stopped

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
