"""Several devices at one list of cases: a process each, which takes the next cases as soon as it has room for them.

A process that dies takes its cases with it, at most three. They are tried again when the others are done, alone and on
another device, so that whichever ends its process a second time is known; the device goes on with another process if
the first had done anything. So nothing hangs, and no case ends more than two processes.

Source: docs/decisions/0039.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from subprocess import Popen, TimeoutExpired

from autoseg.domain.dataset import Case
from autoseg.errors import AutosegError, ConfigError, DatasetError, DeviceMemoryError, ModelError
from autoseg.inference.outcome import CaseResult, Tally
from autoseg.pipeline.device_worker import Order, Refusal, Report
from autoseg.pipeline.predicting import Predicting
from autoseg.pipeline.workers import end_process, in_words, pipes, start_process
from autoseg.runtime import num_cpus, pick_device

log = logging.getLogger("autoseg")

EVERY_CUDA_DEVICE = "cuda:all"

_MODULE = "autoseg.pipeline.device_worker"

_AHEAD = 3
"""Cases that a process has: one is read, one segmented, one written."""

_STOP_S = 10.0
"""A process that was told to stop, and takes longer to tidy up, is killed."""

_MEMORY = DeviceMemoryError.exit_code

_ERRORS = {kind.exit_code: kind for kind in (ConfigError, DatasetError, ModelError, DeviceMemoryError)}


def parse_devices(text: str) -> tuple[str, ...]:
    """Read the device, or several: "cuda:0,cuda:1", "cpu,cpu", "cuda:all".

    Raises:
        ConfigError: This machine does not have one of them.
    """
    if text == EVERY_CUDA_DEVICE:
        import torch

        pick_device("cuda")
        return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        pick_device(name)
    return names


def predict_on(task: Predicting, devices: Sequence[str], cases: Sequence[Case], tally: Tally) -> None:
    """Segment cases on several devices.

    Args:
        task: What to do.
        devices: A process each.
        cases: What to do it with.
        tally: Told what came of each case.

    Raises:
        AutosegError: No device can work, of the kind that the first one says.
    """
    crew = _Crew(task, devices, cases, tally)
    try:
        crew.run()
    except BaseException:
        crew.stop()
        raise


@dataclass(slots=True, eq=False)
class _Hand:
    """A process at work.

    Attributes:
        place: On which of the devices, counted; two may be the same one.
        process: Itself.
        at_work: Cases that it has, by id.
        num_done: Cases that it has done.
        has_last: Whether it was told that no more cases come.
    """

    place: int
    process: Popen[str]
    at_work: dict[str, Case] = field(default_factory=dict)
    num_done: int = 0
    has_last: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Lost:
    """A case whose process has ended: where, and why."""

    case: Case
    place: int
    reason: str
    is_short_of_memory: bool


class _Crew:
    """The processes, what they share, and what became of them.

    Args:
        task: See `predict_on`.
        devices: See `predict_on`.
        cases: See `predict_on`.
        tally: See `predict_on`.
    """

    def __init__(self, task: Predicting, devices: Sequence[str], cases: Sequence[Case], tally: Tally) -> None:
        self._task = task
        self._devices = tuple(devices)
        self._waiting = deque(cases)
        self._tally = tally
        self._lost: list[_Lost] = []
        self._refusals: dict[int, Refusal] = {}
        self._told: set[str] = set()
        self._processes: list[Popen[str]] = []
        self._lock = threading.Lock()
        self._is_open = True

    def run(self) -> None:
        """Do all cases; whenever nobody goes on, those whose process has died, alone."""
        while self._waiting and self._is_open:
            self._together()
            if (self._waiting or self._lost) and not self._usable and self._is_open:
                raise self._nobody_left()
            self._alone()

    def stop(self) -> None:
        """End all processes; the threads that listen to them end with them."""
        with self._lock:
            self._is_open = False
            processes = tuple(self._processes)
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(_STOP_S)
            except TimeoutExpired:
                process.kill()

    @property
    def _usable(self) -> list[int]:
        """Places where a process has not refused to work."""
        return [place for place in range(len(self._devices)) if place not in self._refusals]

    def _together(self) -> None:
        with ThreadPoolExecutor(len(self._devices), "device") as pool:
            futures = [pool.submit(self._work, place) for place in self._usable]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stop()
                raise

    def _work(self, place: int) -> None:
        """Have processes on a device work, one after the other has died, as long as they get something done."""
        while self._waiting and self._is_open:
            hand = self._serve(place, self._waiting)
            if hand is None or not hand.num_done or place in self._refusals:
                return

    def _alone(self) -> None:
        """Try the cases again whose process has died: whatever is lost now has failed."""
        lost, self._lost = self._lost, []
        for item in lost:
            usable = self._usable
            if not self._is_open or not usable:
                self._waiting.append(item.case)
                continue
            log.warning("case %s is tried again, alone", item.case.id)
            self._serve(next((place for place in usable if place != item.place), usable[0]), deque([item.case]))
            again, self._lost = self._lost, []
            for failed in again:
                first, second = self._devices[item.place], self._devices[failed.place]
                self._note(
                    CaseResult(
                        case=failed.case.id,
                        failure=f"{failed.reason} ({second}), and before ({first}): {item.reason}",
                        is_short_of_memory=failed.is_short_of_memory,
                        is_bug=not failed.is_short_of_memory,
                    )
                )

    def _serve(self, place: int, waiting: deque[Case]) -> _Hand | None:
        """Start a process, feed it and listen to it until it ends; cases that it had then are lost."""
        hand = self._start(place)
        if hand is None:
            return None
        report = Report()
        while not (report.is_over or report.refusal):
            self._feed(hand, waiting)
            # Ends with the process, whatever ends that.
            line = pipes(hand.process)[1].readline()
            if not line.endswith("\n"):
                break
            report = Report.model_validate_json(line)
            self._tell(report)
            if report.result is not None:
                hand.at_work.pop(report.result.case)
                hand.num_done += 1
                self._note(report.result)
        self._end(hand, report)
        return hand

    def _end(self, hand: _Hand, report: Report) -> None:
        """Note what became of a process and of the cases that it still had."""
        returncode, refusal, device = end_process(hand.process), report.refusal, self._devices[hand.place]
        reason = in_words(returncode) if refusal is None else refusal.message
        is_short = returncode == -signal.SIGKILL or (refusal is not None and refusal.exit_code == _MEMORY)
        with self._lock:
            self._processes.remove(hand.process)
            self._lost += [_Lost(case, hand.place, reason, is_short) for case in hand.at_work.values()]
            if refusal is not None:
                self._refusals[hand.place] = refusal
        if refusal is not None:
            log.warning("%s is left out: %s", device, reason)
        elif not report.is_over and self._is_open:
            had = ", ".join(hand.at_work) or "none"
            log.warning("%s: %s; the cases it had (%s) are tried again later", device, reason, had)

    def _start(self, place: int) -> _Hand | None:
        num_threads = max(1, num_cpus() // len(self._devices))
        with self._lock:
            if not self._is_open:
                return None
            process = start_process(_MODULE, num_threads)
            self._processes.append(process)
        order = Order(task=self._task, device=self._devices[place], num_threads=num_threads)
        with suppress(BrokenPipeError):
            pipes(process)[0].write(order.model_dump_json() + "\n")
        return _Hand(place, process)

    def _feed(self, hand: _Hand, waiting: deque[Case]) -> None:
        """Give a process as many cases as it may have, and say when there are no more."""
        incoming = pipes(hand.process)[0]
        with suppress(BrokenPipeError):
            while len(hand.at_work) < _AHEAD and not hand.has_last:
                with self._lock:
                    case = waiting.popleft() if waiting and self._is_open else None
                if case is not None:
                    hand.at_work[case.id] = case
                hand.has_last = case is None
                incoming.write("\n" if case is None else case.model_dump_json() + "\n")
            incoming.flush()

    def _tell(self, report: Report) -> None:
        for warning in report.warnings:
            with self._lock:
                is_new = warning not in self._told
                self._told.add(warning)
            if is_new:
                log.warning("%s", warning)

    def _note(self, result: CaseResult) -> None:
        with self._lock:
            if not self._tally.add(result):
                self._is_open = False

    def _nobody_left(self) -> AutosegError:
        first = next(iter(self._refusals.values()))
        return _ERRORS.get(first.exit_code, AutosegError)(
            "no device can go on",
            problems=[f"{self._devices[place]}: {refusal.message}" for place, refusal in self._refusals.items()],
        )
