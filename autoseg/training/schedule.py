"""How far a training is and what follows from it: the learning rate, the end, the ends of epochs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

MIN_EPOCH_S = 10.0
"""Shortest epoch under a time budget: a shorter one would spend its time on checkpoints."""

EPOCHS_PER_BUDGET = 60
"""Points of the learning curve under a time budget."""

STEP_SMOOTHING = 0.2
"""Weight of the newest step in the running mean of seconds a step."""

FINAL_WORK_S = 1.0
"""Seconds kept free at the end of a budget for writing the weights, besides the last validation."""


SHORTEST_MEMORY = 10.0
"""Steps that the momentum remembers at the start. Source: decision 9."""

REMEMBERED_FRACTION = 0.1
"""Part of the steps done so far that the momentum remembers, until it is as planned. Source: decision 9."""


def adapted_momentum(momentum: float, step: int) -> tuple[float, float]:
    """The momentum of a step, and the factor on the learning rate that goes with it.

    Momentum averages gradients over about 1 / (1 - momentum) steps. A network that has hardly begun has nothing worth
    remembering so long: the velocity builds up slowly, and meanwhile it settles on predicting background. So the memory
    starts short and grows with the steps done. The factor keeps learning rate / (1 - momentum), the size of a step in
    the long run, as it was.

    Args:
        momentum: As planned.
        step: Steps done before.

    Source: decision 9.
    """
    planned = 1 / (1 - momentum)
    memory = min(planned, max(SHORTEST_MEMORY, REMEMBERED_FRACTION * step))
    return (momentum, 1.0) if memory == planned else (1 - 1 / memory, planned / memory)


class Pace(NamedTuple):
    """How a step learns: its learning rate and its momentum."""

    rate: float
    momentum: float


@dataclass(slots=True)
class Clock:
    """Seconds that a training has used, over all its starts.

    Attributes:
        used_before_s: Seconds of earlier starts.
        now: Monotonic seconds.
    """

    used_before_s: float = 0.0
    now: Callable[[], float] = time.monotonic
    _started: float = 0.0

    def __post_init__(self) -> None:
        self._started = self.now()

    def used_s(self) -> float:
        """Seconds used so far."""
        return self.used_before_s + self.now() - self._started


@dataclass(frozen=True, slots=True)
class Schedule:
    """The length of a training: a number of epochs, or seconds (exactly one of the two).

    Attributes:
        learning_rate: At the start.
        power: Exponent of the polynomial decay.
        steps_per_epoch: Steps of an epoch when epochs are counted; also the unit of random keys.
        num_epochs: Epochs, or None.
        budget_s: Seconds, or None.
        momentum: As planned.
        adapts_momentum: See `adapted_momentum`.
        warm_up_steps: The learning rate rises linearly over so many steps.

    Source: polynomial decay with 0.9, once an epoch: nnU-Net v2. Under a budget it follows the seconds, so that it is
    complete when they are used.
    """

    learning_rate: float
    power: float
    steps_per_epoch: int
    num_epochs: int | None = None
    budget_s: float | None = None
    momentum: float = 0.0
    adapts_momentum: bool = False
    warm_up_steps: int = 0

    @property
    def epoch_s(self) -> float:
        """Seconds of an epoch under a time budget."""
        return max(MIN_EPOCH_S, (self.budget_s or 0.0) / EPOCHS_PER_BUDGET)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole training, where they are known."""
        return None if self.num_epochs is None else self.num_epochs * self.steps_per_epoch

    def fraction(self, step: int, used_s: float, reserve_s: float) -> float:
        """How much of the training is done, 0 ... 1.

        Args:
            step: Steps done.
            used_s: Seconds used.
            reserve_s: Seconds kept free at the end.
        """
        if self.num_epochs is not None:
            return min(1.0, (step // self.steps_per_epoch) / self.num_epochs)
        return min(1.0, used_s / max(self._usable_s(reserve_s), 1e-9))

    def rate(self, fraction: float) -> float:
        """The learning rate at that fraction; 0 at the end."""
        return float(self.learning_rate * (1 - fraction) ** self.power)

    def pace(self, step: int, used_s: float, reserve_s: float) -> Pace:
        """Learning rate and momentum of the next step; arguments as for `fraction`."""
        momentum, factor = self.momentum, 1.0
        if self.adapts_momentum:
            momentum, factor = adapted_momentum(momentum, step)
        if step < self.warm_up_steps:
            factor *= (step + 1) / (self.warm_up_steps + 1)
        return Pace(self.rate(self.fraction(step, used_s, reserve_s)) * factor, momentum)

    def is_over(self, step: int, used_s: float, reserve_s: float, step_s: float) -> bool:
        """Whether no step is left, or the next one would end closer to after the budget than before it.

        Args:
            step: Steps done.
            used_s: Seconds used.
            reserve_s: Seconds kept free at the end.
            step_s: Expected seconds of a step.
        """
        if self.total_steps is not None:
            return step >= self.total_steps
        return step > 0 and used_s + step_s / 2 >= self._usable_s(reserve_s)

    def ends_epoch(self, steps_in_epoch: int, seconds_in_epoch: float) -> bool:
        """Whether an epoch of so many steps and seconds is over."""
        if self.num_epochs is not None:
            return steps_in_epoch >= self.steps_per_epoch
        return seconds_in_epoch >= self.epoch_s

    def left_s(self, step: int, used_s: float, step_s: float) -> float:
        """Seconds until the end, as far as one can tell."""
        if self.total_steps is not None:
            return max(0.0, (self.total_steps - step) * step_s)
        return max(0.0, (self.budget_s or 0.0) - used_s)

    def _usable_s(self, reserve_s: float) -> float:
        """The budget without the reserve, of which a tiny budget gives at most half."""
        budget = self.budget_s or 0.0
        return budget - min(reserve_s, budget / 2)
