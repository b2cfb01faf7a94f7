"""Whether the validation measure has stopped rising, and how a training then comes to its end sooner.

What a network learns at a high learning rate levels off, and the rest comes with the decay. Waiting longer for the
decay brings nothing then.

Source of every number: decision 26, which shows for which of nnU-Net's published curves the rule fires.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from statistics import mean, variance
from typing import NamedTuple

from autoseg.domain.plan import EarlyEnd
from autoseg.training.schedule import Course, Schedule

LEAST_EPOCHS = 100
"""Looks before which nothing is decided, where epochs are counted."""

LEAST_LOOKS = 30
"""The same under a time budget, which has fewer looks."""

PART = 3
"""The newest third of the looks is compared with the third before it."""

BLOCKS = 5
"""Means of so many stretches of each third tell the noise, also of measures that swing slowly."""

NUM_ERRORS = 2.0
"""Standard errors that are added to what the measure has risen by."""

SMALLEST_RISE = 0.003
"""A rise of pseudo-Dice below which, with its error, it is not waited for."""

FALL_FRACTION = 0.5
"""The learning rate falls to 0 within this part of what was done so far."""

LARGEST_END = 0.9
"""A training is only shortened to at most this part of its length: less is not worth a change."""


class Rise(NamedTuple):
    """By how much the newest looks are above those before them.

    Attributes:
        gain: Difference of the means.
        error: Its standard error.
        looks: In each of the two groups.
    """

    gain: float
    error: float
    looks: int

    @property
    def is_plateau(self) -> bool:
        """Whether it is small even if the error hides a rise; a measure too noisy to tell is none."""
        return max(self.gain, 0.0) + NUM_ERRORS * self.error < SMALLEST_RISE


def rise(measures: Sequence[float]) -> Rise:
    """Compare the newest third of a measure with the third before it.

    Args:
        measures: One a look, at least `PART` x `BLOCKS` of them; the oldest third is left out.
    """
    length = len(measures) // PART // BLOCKS
    looks = length * BLOCKS
    recent = measures[-2 * looks :]
    blocks = [mean(recent[first : first + length]) for first in range(0, 2 * looks, length)]
    before, newest = blocks[:BLOCKS], blocks[BLOCKS:]
    error = ((variance(before) + variance(newest)) / BLOCKS) ** 0.5
    return Rise(mean(newest) - mean(before), error, looks)


def shortened(
    schedule: Schedule, mode: EarlyEnd, measures: Sequence[float], step: int, used_s: float, fraction: float
) -> tuple[Course, Rise] | None:
    """The course of a training whose measure has stopped rising, and by how much it rose last; None where it goes on.

    Args:
        schedule: Its length.
        mode: Of the plan.
        measures: Mean pseudo-Dice of every look so far.
        step: Steps done.
        used_s: Seconds used.
        fraction: Of the last step.
    """
    counts_epochs = schedule.num_epochs is not None
    if mode == "never" or (mode == "epochs" and not counts_epochs) or schedule.course.end is not None:
        return None
    if len(measures) < (LEAST_EPOCHS if counts_epochs else LEAST_LOOKS):
        return None
    done = schedule.position(step, used_s)
    within = FALL_FRACTION * done
    if counts_epochs:
        within = ceil(within)
    if done + within > LARGEST_END * schedule.length:
        return None
    found = rise(measures)
    return (Course.falling(done, fraction, within), found) if found.is_plateau else None


def message(where: str, schedule: Schedule, course: Course, found: Rise) -> str:
    """What happens, for a person.

    Args:
        where: Fold and configuration.
        schedule: As it was before.
        course: As it is now.
        found: Why.
    """
    if schedule.num_epochs is None:
        end = f"ends after {(course.end or 0.0) / 60:.1f} instead of {schedule.length / 60:.1f} minutes"
    else:
        end = f"ends after {course.end:,.0f} instead of {schedule.length:,.0f} epochs"
    return (
        f"{where}: the pseudo-Dice has stopped rising ({found.gain:+.4f} with an error of {found.error:.4f} from one "
        f"group of {found.looks} looks to the next): the learning rate falls to 0 from here on, and the training {end} "
        "(training.early_end=never switches this off)"
    )
