"""Folds trained several at once, each by `autoseg train` in a process of its own.

Each takes what a fold has to itself: its folder, a device (or a share of the cores), a log. One that fails stops the
others as a person would, so that all of them can go on.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from autoseg.config import Settings, TrainSettings
from autoseg.domain.plan import Plan
from autoseg.errors import (
    AutosegError,
    ConfigError,
    DatasetError,
    DeviceMemoryError,
    ModelError,
    TrainingInterrupted,
)
from autoseg.io.run_folder import RunFolder, fold_name
from autoseg.machine import device_memory_bytes
from autoseg.pipeline.cases import SILENT
from autoseg.pipeline.forecast import earlier_forecast
from autoseg.pipeline.host import Target
from autoseg.runtime import Progress, num_cpus, pick_device
from autoseg.training.interrupt import StopRequest

log = logging.getLogger("autoseg")

_LOOK_INTERVAL_S = 0.2
_LOG_LINES = 12
"""Of the log of a process that failed: its message, with the problems it lists."""

_ERRORS = {kind.exit_code: kind for kind in (ConfigError, DatasetError, ModelError, DeviceMemoryError)}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Job:
    """A fold to train.

    Attributes:
        configuration: Its name.
        fold: A number, or "all".
    """

    configuration: str
    fold: str

    @property
    def name(self) -> str:
        """For people, and of its log."""
        return f"{self.configuration} {fold_name(self.fold)}"


def devices_of(settings: TrainSettings) -> tuple[str, ...]:
    """Devices that folds are spread over: every CUDA device, unless one is named."""
    device = pick_device(settings.device)
    if settings.device in ("auto", "cuda") and device.type == "cuda":
        return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    return (str(device),)


def num_at_a_time(run: RunFolder, configurations: Sequence[str], settings: TrainSettings, wanted: int | None) -> int:
    """How many folds are trained at a time.

    Args:
        run: A planned run, whose forecast says what a training takes.
        configurations: That are trained.
        settings: Device and precision.
        wanted: As asked for; None is one on each CUDA device, and one on a CPU, which a single training fills.

    Returns:
        At least 1; less than was asked for where the memory does not allow it.
    """
    devices = devices_of(settings)
    if wanted is None:
        return len(devices)
    forecast = earlier_forecast(run, Target.of(settings))
    needed = (
        max((forecast.configurations[name].training.total for name in configurations), default=0) if forecast else 0
    )
    found = device_memory_bytes(pick_device(devices[0]))
    if not needed or found is None:
        return wanted
    fitting = max(1, int(found[0] // needed)) * len(devices)
    if fitting < wanted:
        log.warning(
            "%d folds at a time instead of %d: each takes about %.1f GB, and %.1f GB are free on %s",
            fitting,
            wanted,
            needed / 1e9,
            found[0] / 1e9,
            " and ".join(devices),
        )
    return min(wanted, fitting)


def waves(planned: Plan, names: Sequence[str], jobs: Sequence[Job]) -> tuple[tuple[Job, ...], ...]:
    """Jobs in groups of which each needs those before it: previous stages, then the others."""
    stages = {planned.configurations[name].previous_stage for name in names}
    first = tuple(job for job in jobs if job.configuration in stages)
    rest = tuple(job for job in jobs if job.configuration not in stages)
    return tuple(group for group in (first, rest) if group)


def train_together(
    run: RunFolder,
    jobs: Sequence[Job],
    settings: TrainSettings,
    at_a_time: int,
    *,
    restart: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Train folds, some at a time; what is finished is not done again.

    Args:
        run: The run; the cases of every configuration are best prepared before.
        jobs: What to train, in any order.
        settings: Of all of them.
        at_a_time: How many.
        restart: Forget what was trained.
        progress: One step a fold.

    Raises:
        AutosegError: One failed; of the kind that it left with, with the end of its log. The others were stopped.
        TrainingInterrupted: A stop was asked for; all of them can go on.
    """
    progress.start(f"Training, {at_a_time} at a time", len(jobs))
    with _settings_file(settings) as file, StopRequest() as stop:
        crew = _Crew(run, jobs, devices_of(settings), at_a_time, file, restart)
        try:
            while crew.is_busy:
                for job in crew.look():
                    progress.advance(note=job.name)
                if stop.is_set:
                    raise TrainingInterrupted(
                        "the training was stopped; everything is saved", hint="The same command goes on."
                    )
                time.sleep(_LOOK_INTERVAL_S)
        finally:
            crew.stop()
    progress.finish(f"{len(jobs)} folds")


@contextmanager
def _settings_file(settings: TrainSettings) -> Iterator[Path]:
    """The settings as a file, so that each process has all of them."""
    with tempfile.TemporaryDirectory(prefix="autoseg-") as folder:
        path = Path(folder) / "settings.yaml"
        # JSON is YAML.
        path.write_text(json.dumps(Settings(train=settings).model_dump(mode="json")), encoding="utf-8")
        yield path


def command(run: RunFolder, job: Job, device: str, settings_file: Path, *, restart: bool) -> list[str]:
    """The command line of one process."""
    # Without -P a folder called autoseg in the working folder would be imported instead.
    words = [sys.executable, "-P", "-m", "autoseg", "train", str(run.root)]
    words += ["--config", job.configuration, "--fold", job.fold, "--device", device]
    words += ["--config-file", str(settings_file)]
    return [*words, "--restart"] if restart else words


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    job: Job
    device: str
    log: Path
    process: subprocess.Popen[bytes]


class _Crew:
    """The processes at work."""

    def __init__(
        self, run: RunFolder, jobs: Sequence[Job], devices: Sequence[str], at_a_time: int, file: Path, restart: bool
    ) -> None:
        self._run, self._file, self._restart = run, file, restart
        self._waiting = deque(jobs)
        self._devices = devices
        self._at_a_time = at_a_time
        self._running: list[_Running] = []

    @property
    def is_busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._waiting or self._running)

    def look(self) -> list[Job]:
        """Start what there is room for; those that have finished since.

        Raises:
            AutosegError: One failed.
        """
        finished = []
        for item in list(self._running):
            code = item.process.poll()
            if code is None:
                continue
            self._running.remove(item)
            if code:
                raise _failure(item, code)
            finished.append(item.job)
        while self._waiting and len(self._running) < self._at_a_time:
            self._running.append(self._start(self._waiting.popleft()))
        return finished

    def _start(self, job: Job) -> _Running:
        taken = [item.device for item in self._running]
        device = min(self._devices, key=taken.count)
        path = self._run.root / "logs" / f"{job.name.replace(' ', '-')}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        threads = {} if device != "cpu" else dict.fromkeys(_THREADS, str(max(1, num_cpus() // self._at_a_time)))
        with path.open("ab") as output:
            process = subprocess.Popen(
                command(self._run, job, device, self._file, restart=self._restart),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | threads,
            )
        log.info("%s on %s: %s", job.name, device, path)
        return _Running(job, device, path, process)

    def stop(self) -> None:
        """Ask whoever is still at work to save and end, and wait for it."""
        for item in self._running:
            item.process.send_signal(signal.SIGTERM)
        for item in self._running:
            item.process.wait()
        self._running.clear()


def _failure(item: _Running, code: int) -> AutosegError:
    lines = item.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    kind = _ERRORS.get(code, AutosegError)
    ended = f"was ended by signal {-code}" if code < 0 else f"failed (exit code {code})"
    return kind(
        f"training {item.job.name} on {item.device} {ended}; the end of {item.log}:",
        problems=[line.strip() for line in lines if line.strip()],
        hint="The others are stopped and saved; the same command goes on.",
    )
