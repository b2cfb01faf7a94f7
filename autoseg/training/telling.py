"""How a training goes, in words: once what it will do and when it ends, then a short note after every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil, floor, log10

from autoseg.domain.plan import Configuration
from autoseg.planning.flops import NetworkShape, count_training_flops
from autoseg.training.checkpoint import Counters
from autoseg.training.records import EpochRecord
from autoseg.training.schedule import FINAL_WORK_S, Schedule
from autoseg.training.validation import TIME_FRACTION

ANNOUNCED_AFTER_STEPS = 5
"""Steps of a start after which its speed is told: the first ones are slower."""

LEAST_STEPS = 300
"""Fewer leave much of what could be learned: in five minutes 318 steps reached a Dice of 0.861 where 84 reached 0.520.

Source: docs/benchmarks/seven-sets.md.
"""

LEAST_SLOWDOWN = 1.1
"""How many times as long as planning foresees a step takes where nothing else is known: augmentation, reading."""

_DIGITS = 2


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a training is.

    Attributes:
        schedule: Its length.
        counters: Steps, losses and pseudo-Dice so far.
        used_s: Seconds used so far.
        look_s: Seconds of the looks after each epoch, which epochs have on top of their steps.
        now: The time.
    """

    schedule: Schedule
    counters: Counters
    used_s: float
    look_s: float
    now: datetime

    @property
    def left_s(self) -> float:
        """Seconds until the end, as far as one can tell."""
        return self.schedule.left_s(self.counters.step, self.used_s, self.counters.step_s, self.look_s)

    @property
    def end(self) -> str:
        """When that is; the date only where it is not today."""
        end = self.now + timedelta(seconds=self.left_s)
        return f"{end:%H:%M}" if end.date() == self.now.date() else f"{end:%Y-%m-%d %H:%M}"

    @property
    def expected_steps(self) -> int:
        """Steps of the whole training."""
        total = self.schedule.total_steps
        if total is not None:
            return total
        looks = 1 - TIME_FRACTION
        return self.counters.step + round(looks * self.left_s / max(self.counters.step_s, 1e-9))


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes:02d} min"


def announcement(where: str, moment: Moment, *, device: str, precision: str) -> str:
    """What the training will do and when it will end, judged by its first steps.

    Args:
        where: Fold and configuration.
        moment: After these steps.
        device: Where it runs.
        precision: Of the network.
    """
    schedule, step_s = moment.schedule, moment.counters.step_s
    if schedule.total_steps is None:
        length = f"{duration(schedule.length)}, about {moment.expected_steps:,} steps"
    else:
        length = f"{schedule.length:,.0f} epochs of {schedule.steps_per_epoch} steps"
    return (
        f"{where}: {length} in all, {step_s:.2f} s a step in {precision} on {device}; "
        f"ends about {moment.end} ({duration(moment.left_s)} from now)"
    )


def slowdown(part: Configuration, step_s: float, planned_speed: float | None) -> float:
    """How many times as long as planning foresees a step takes, at least `LEAST_SLOWDOWN`.

    Planning counts the operations of convolutions; what a step does besides, and a machine that is busier than it was
    then, show in the steps of a network that was planned.

    Args:
        part: What is trained.
        step_s: Seconds of a step.
        planned_speed: Operations a second that planning reckons with; None: not known.
    """
    if planned_speed is None:
        return LEAST_SLOWDOWN
    flops = part.training.batch_size * count_training_flops(NetworkShape.of(part.network))
    return max(LEAST_SLOWDOWN, step_s * planned_speed / flops)


def mismatch(where: str, moment: Moment, slower: float) -> str:
    """What to do where a time budget holds too few steps of this network; "" where it holds enough.

    The step that is asked for leaves room for everything that takes time besides: looks at validation cases, the last
    weights, and what planning does not foresee.

    Args:
        where: Fold and configuration.
        moment: After the first steps.
        slower: See `slowdown`.
    """
    schedule, steps = moment.schedule, moment.expected_steps
    if schedule.total_steps is not None or steps >= LEAST_STEPS:
        return ""
    for_steps_s = (1 - TIME_FRACTION) * max(schedule.length - FINAL_WORK_S, schedule.length / 2)
    step_s = _rounded_down(for_steps_s / LEAST_STEPS / slower)
    longer_min = ceil((LEAST_STEPS * moment.counters.step_s / (1 - TIME_FRACTION) + FINAL_WORK_S) / 60)
    return (
        f"{where}: {duration(schedule.length)} hold about {steps} steps of {moment.counters.step_s:.2f} s, fewer than "
        f"the {LEAST_STEPS} that a training needs as a rule. Plan a network with shorter steps for this time\n"
        f"  autoseg plan DATASET --out NEW_RUN --preset cpu --step-time {step_s:g}s\n"
        f"or train this one for longer: --time-budget {longer_min}m"
    )


def _rounded_down(value: float) -> float:
    """To two digits."""
    scale = 10.0 ** (_DIGITS - 1 - floor(log10(value)))
    return floor(value * scale) / scale


def note(moment: Moment, batch_size: int, records: Sequence[EpochRecord]) -> str:
    """Where the training is, in one short line.

    Args:
        moment: After the newest step.
        batch_size: Samples a step.
        records: The learning curve so far.
    """
    counters = moment.counters
    parts = [f"epoch {counters.epoch}"]
    loss = counters.epoch_loss
    if loss is None:
        loss = _newest(record.train_loss for record in reversed(records))
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    # The running mean lags behind for dozens of looks.
    dice = _newest(record.mean_pseudo_dice for record in reversed(records))
    whole_dice = _newest(record.mean_whole_dice for record in reversed(records))
    if dice is not None:
        parts.append(f"Dice {dice:.3f}" + ("" if whole_dice is None else f" (whole {whole_dice:.3f})"))
    if counters.step_s > 0:
        parts.append(f"{batch_size / counters.step_s:.3g} samples/s")
    parts.append(f"ends {moment.end} (in {_clock(moment.left_s)})")
    return ", ".join(parts)


def _newest(values: Iterable[float | None]) -> float | None:
    """The first that there is."""
    return next((value for value in values if value is not None), None)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
