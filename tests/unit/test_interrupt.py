"""A polite stop: one request may come as several signals, a later signal means it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from autoseg.training.interrupt import SAME_REQUEST_S, SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Both signals raise KeyboardInterrupt, as SIGINT does in Python."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, which the test moves on."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_signals_at_the_same_time_are_one_request(
    clock: list[float], first: signal.Signals, second: signal.Signals
) -> None:
    with StopRequest() as stop:
        assert not stop.is_set
        signal.raise_signal(first)
        assert stop.is_set
        clock[0] += SAME_REQUEST_S
        signal.raise_signal(second)
        clock[0] += SAME_REQUEST_S / 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert all(signal.getsignal(number) is signal.default_int_handler for number in SIGNALS)


def test_what_another_process_asked_for_counts_as_the_first(clock: list[float]) -> None:
    clock[0] = 100.0
    with StopRequest() as stop:
        stop.ask()
        assert stop.is_set
        signal.raise_signal(signal.SIGTERM)
        clock[0] += 2 * SAME_REQUEST_S
        stop.ask()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
