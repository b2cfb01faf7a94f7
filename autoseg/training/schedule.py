"""How far a training is and what follows from it: the learning rate, the end, the ends of epochs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

from autoseg.domain.plan import TrainingPlan
from autoseg.domain.values import Value

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

REJOIN_FRACTION = 0.1
"""Part of what is left in which a training that got another length comes to where it would have been with that length
from the start. Source: decision 27."""


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
    """How a step learns.

    Attributes:
        rate: Learning rate.
        momentum: Of the optimiser.
        fraction: How much of the training is done, by which the rate decays; 0 ... 1.
    """

    rate: float
    momentum: float
    fraction: float = 0.0


class Knot(Value):
    """A point of a training: how much of it is done there.

    Attributes:
        at: Epochs, or seconds of a time budget.
        fraction: 0 ... 1.
    """

    at: float
    fraction: float


class Course(Value):
    """How a training deviates from the straight way, on which the fraction done is position / length.

    Attributes:
        knots: Between these, the start and the end, the fraction goes straight.
        end: Where it ends, in epochs or seconds of a time budget; None: as was asked for.
        since: The epoch in which it got its length: looks of earlier ones, at a learning rate that fell towards another
            end, do not tell whether the measure still rises.
    """

    knots: tuple[Knot, ...] = ()
    end: float | None = None
    since: int = 0

    @classmethod
    def falling(cls, at: float, fraction: float, within: float) -> Self:
        """From here straight to the end.

        Args:
            at: Epochs done, or seconds used.
            fraction: Done there.
            within: Epochs or seconds from there to the end.
        """
        return cls(knots=(Knot(at=at, fraction=fraction),), end=at + within)


STRAIGHT = Course()


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
        course: How it deviates from the straight way to that length.

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
    course: Course = STRAIGHT

    @classmethod
    def of(cls, training: TrainingPlan, num_epochs: int | None, budget_s: float | None) -> Self:
        """The straight way of a plan to a number of epochs, or through a time budget."""
        return cls(
            training.learning_rate,
            training.decay_power,
            training.steps_per_epoch,
            num_epochs,
            budget_s,
            training.momentum,
            training.adapts_momentum,
            training.warm_up_steps,
        )

    @property
    def length(self) -> float:
        """Epochs, or seconds of a time budget, until the end."""
        asked = self.budget_s if self.num_epochs is None else self.num_epochs
        return (asked or 0.0) if self.course.end is None else self.course.end

    @property
    def epoch_s(self) -> float:
        """Seconds of an epoch under a time budget."""
        return max(MIN_EPOCH_S, (self.budget_s or 0.0) / EPOCHS_PER_BUDGET)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole training, where they are known."""
        return None if self.num_epochs is None else round(self.length * self.steps_per_epoch)

    def position(self, step: int, used_s: float) -> float:
        """Whole epochs done, or seconds of a time budget used."""
        return used_s if self.num_epochs is None else step // self.steps_per_epoch

    def fraction(self, step: int, used_s: float, reserve_s: float) -> float:
        """How much of the training is done, 0 ... 1.

        Args:
            step: Steps done.
            used_s: Seconds used.
            reserve_s: Seconds kept free at the end.
        """
        position, end = self.position(step, used_s), self._end(reserve_s)
        points = [(0.0, 0.0), *((knot.at, knot.fraction) for knot in self.course.knots), (end, 1.0)]
        for (low, before), (high, after) in pairwise(points):
            if position < high:
                return before + (after - before) * ((position - low) / (high - low))
        return 1.0

    def rejoined(self, fraction: float, step: int, used_s: float, reserve_s: float) -> Course:
        """The course of a training that goes on with this length and had another one before.

        The fraction begins where it was, so that the learning rate does not jump, and comes within `REJOIN_FRACTION` of
        what is left to where it would be with this length from the start.

        Args:
            fraction: Of the last step.
            step: Steps done.
            used_s: Seconds used.
            reserve_s: Seconds kept free at the end.
        """
        position, end = self.position(step, used_s), self._end(reserve_s)
        if position >= end:
            return STRAIGHT
        joint = position + REJOIN_FRACTION * (end - position)
        return Course(knots=(Knot(at=position, fraction=fraction), Knot(at=joint, fraction=joint / end)))

    def rate(self, fraction: float) -> float:
        """The learning rate at that fraction; 0 at the end."""
        return float(self.learning_rate * (1 - fraction) ** self.power)

    def pace(self, step: int, used_s: float, reserve_s: float) -> Pace:
        """Learning rate and momentum of the next step; arguments as for `fraction`."""
        return self.pace_at(self.fraction(step, used_s, reserve_s), step)

    def pace_at(self, fraction: float, step: int) -> Pace:
        """Learning rate and momentum of a step.

        Args:
            fraction: How much of the training is done.
            step: Steps done before.
        """
        momentum, factor = self.momentum, 1.0
        if self.adapts_momentum:
            momentum, factor = adapted_momentum(momentum, step)
        if step < self.warm_up_steps:
            factor *= (step + 1) / (self.warm_up_steps + 1)
        return Pace(self.rate(fraction) * factor, momentum, fraction)

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
        return step > 0 and used_s + step_s / 2 >= self._end(reserve_s)

    def ends_epoch(self, steps_in_epoch: int, seconds_in_epoch: float) -> bool:
        """Whether an epoch of so many steps and seconds is over."""
        if self.num_epochs is not None:
            return steps_in_epoch >= self.steps_per_epoch
        return seconds_in_epoch >= self.epoch_s

    def left_s(self, step: int, used_s: float, step_s: float, look_s: float = 0.0) -> float:
        """Seconds until the end, as far as one can tell.

        Args:
            step: Steps done.
            used_s: Seconds used.
            step_s: Expected seconds of a step.
            look_s: What each epoch takes besides its steps; a time budget holds that already.
        """
        if self.total_steps is not None:
            return max(0.0, (self.total_steps - step) * (step_s + look_s / self.steps_per_epoch))
        return max(0.0, self.length - used_s)

    def _end(self, reserve_s: float) -> float:
        """Epochs, or the budget without the reserve, of which a tiny budget gives at most half."""
        return self.length if self.num_epochs is not None else self.length - min(reserve_s, self.length / 2)
