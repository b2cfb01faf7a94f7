"""A few real training steps in a process of their own: what they take in memory and in time.

Patches come from a made-up image, and go through the same reading, augmentation and learning as in a training. The
process is a new one because only a fresh heap shows what a training needs, and because a step that needs more memory
than there is must not take the caller with it.

Run as ``python -m autoseg.training.trial`` it reads a `TrialRequest` from standard input and writes a `TrialResult` to
standard output, both as JSON.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from autoseg import machine, runtime
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import TrainingPlan
from autoseg.domain.values import Value
from autoseg.errors import AutosegError, DeviceMemoryError
from autoseg.training.batches import BatchReader, Prefetcher, assemble
from autoseg.training.learner import Learner
from autoseg.training.records import PREFETCH_STEPS
from autoseg.training.sampling import CasePool, PatchCase, Sampler, patch_box
from autoseg.training.speed import made_up_regions

TIMED_SECONDS = 5.0
"""Steps are timed for about so long."""

MAX_STEPS = 12
"""More timed steps say nothing new. At least one is timed, after a first one that is not: that one makes the
optimiser's state and compiles kernels, and only the second is like all later ones, in memory too."""

TIME_LIMIT_S = 300.0
"""A trial that takes longer is ended: a training with such steps would be hopeless."""

_SOURCE_FACTOR = 2
"""The made-up image is so many times as long as a patch, so that turned and shrunk patches lie inside it."""

_CASE = "made up"
_NUM_LOCATIONS = 64
_NUM_LAST_WORDS = 3
_KILLED = -getattr(signal, "SIGKILL", 9)
"""Exit code of a process that the system ended, which it does to the one that asks for memory where none is left."""


class TrialRequest(Value):
    """What to try.

    Attributes:
        device: As for `runtime.pick_device`.
        precision: As for `runtime.pick_precision`.
        seconds: Steps are repeated for about so long.
        max_steps: No more timed steps than these.
        memory_limit_bytes: The process may take so much on a CPU; None sets no limit.
        seed: Of weights and patches.
    """

    network: NetworkPlan
    training: TrainingPlan
    device: str = "auto"
    precision: str = "auto"
    seconds: float = Field(default=TIMED_SECONDS, ge=0)
    max_steps: int = Field(default=MAX_STEPS, ge=1)
    memory_limit_bytes: int | None = None
    seed: int = 0


class TrialResult(Value):
    """What came of a trial.

    Attributes:
        outcome: "done"; "out_of_memory"; "too_slow": ended after the time limit.
        memory_bytes: Most memory that was taken at a time, what the process held before not counted; None where the
            system does not tell, and for trials that did not end well.
        step_seconds: Median over the steps after the first, reading and augmentation included.
        num_steps: Steps that were timed.
        num_threads: Threads that computed on the CPU.
        device: Where, resolved.
        precision: Resolved.
    """

    outcome: Literal["done", "out_of_memory", "too_slow"]
    memory_bytes: int | None = None
    step_seconds: float | None = None
    num_steps: int = 0
    num_threads: int = 0
    device: str = ""
    precision: str = ""


@dataclass(frozen=True, slots=True)
class _MadeUpCase:
    """An image of noise with every label value in it, which takes no memory: all its rows are the same one."""

    shape: tuple[int, int, int]
    channels: int
    num_values: int

    @property
    def foreground(self) -> Mapping[int, NDArray[np.int32]]:
        """A few positions of each class, anywhere."""
        rng = np.random.default_rng(0)
        return {
            label: rng.integers(0, self.shape, (_NUM_LOCATIONS, 3), dtype=np.int32)
            for label in range(1, self.num_values)
        }

    def read(
        self, start: tuple[int, int, int], stop: tuple[int, int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Noise, and labels that have nothing to do with it."""
        rng = np.random.default_rng(start)
        size = tuple(high - low for low, high in zip(start, stop, strict=True))
        row = rng.standard_normal(size[-1], np.float32)
        labels = rng.integers(0, self.num_values, size[-1]).astype(np.int16)
        return np.array(np.broadcast_to(row, (self.channels, *size))), np.array(np.broadcast_to(labels, size))


@dataclass(frozen=True, slots=True)
class _MadeUpStore:
    case: _MadeUpCase

    def open(self, case_id: str) -> PatchCase:
        """The one case there is."""
        return self.case


def run_trial(request: TrialRequest, time_limit_s: float = TIME_LIMIT_S) -> TrialResult:
    """Try a few steps in a new process.

    Args:
        request: What to try.
        time_limit_s: Seconds after which the process is ended.

    Raises:
        AutosegError: The process ended in a way that has nothing to do with memory or time; its last words are given.
    """
    # Without -P a folder called autoseg in the working folder would be imported instead.
    command = [sys.executable, "-P", "-m", __name__]
    try:
        done = subprocess.run(
            command, input=request.model_dump_json(), capture_output=True, text=True, timeout=time_limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return TrialResult(outcome="too_slow")
    if done.returncode == _KILLED:
        return TrialResult(outcome="out_of_memory")
    if done.returncode != 0:
        last_words = done.stderr.strip().splitlines()[-_NUM_LAST_WORDS:]
        raise AutosegError(
            f"a trial of the training step failed with exit code {done.returncode}",
            problems=last_words,
            hint="Plan without --measure, and report this.",
        )
    return TrialResult.from_json(done.stdout, "the answer of the trial", AutosegError)


def try_steps(request: TrialRequest) -> TrialResult:
    """Try a few steps in this process, whose memory is best fresh.

    Raises:
        ConfigError: The device or the precision is not possible here.
    """
    runtime.configure_allocator()
    device = runtime.pick_device(request.device)
    precision = runtime.pick_precision(request.precision, device)
    if request.memory_limit_bytes is not None and device.type == "cpu":
        machine.limit_memory(request.memory_limit_bytes)
    facts = TrialResult(
        outcome="out_of_memory", num_threads=torch.get_num_threads(), device=str(device), precision=precision
    )
    out_of_memory = runtime.device_memory_errors("the trial ran out of memory", hint="Plan for less memory.")
    try:
        with out_of_memory, machine.PeakMemory(device) as peak:
            seconds = _step_seconds(request, device, precision)
    except DeviceMemoryError:
        return facts
    done = {"memory_bytes": peak.bytes, "step_seconds": median(seconds), "num_steps": len(seconds)}
    return facts.model_copy(update={"outcome": "done", **done})


def _step_seconds(request: TrialRequest, device: torch.device, precision: str) -> tuple[float, ...]:
    """Seconds of each step after the first: waiting for what was read ahead, augmenting, learning."""
    network, training = request.network, request.training
    regions = made_up_regions(network)
    learner = Learner(network, training, device=device, precision=precision, seed=request.seed, regions=regions)
    numbers = count()
    with Prefetcher(made_up_reader(request).read, 0, PREFETCH_STEPS) as ahead:

        def step() -> None:
            # Learning ends with reading the loss, so the device's work is done when it returns.
            learner.step(assemble(ahead.take(), device), training.learning_rate, next(numbers))

        return runtime.seconds_per_call(step, seconds=request.seconds, most=request.max_steps)


def made_up_reader(request: TrialRequest) -> BatchReader:
    """Reads and augments patches of an image of noise, as a training reads those of its cases."""
    network, training = request.network, request.training
    box = patch_box(network.patch_size)
    depth, height, width = (_SOURCE_FACTOR * size for size in box)
    num_values = network.num_classes + (network.output == "regions")
    store = _MadeUpStore(_MadeUpCase((depth, height, width), network.in_channels, num_values))
    sampler = Sampler((_CASE,), box, training.batch_size, training.foreground_fraction, request.seed)
    # Its first steps stand for a whole training, most of which is augmented as planned.
    augmentation = training.augmentation.model_copy(update={"warm_up_steps": 0})
    return BatchReader(sampler, CasePool(store), network.dims, augmentation, training.steps_per_epoch)


def main() -> None:
    """Answer the request on standard input."""
    request = TrialRequest.from_json(sys.stdin.read(), "the request of a trial")
    sys.stdout.write(try_steps(request).to_json())


if __name__ == "__main__":
    main()
