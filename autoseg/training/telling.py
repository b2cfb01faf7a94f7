"""How a training goes, in words: once what it will do and when it ends, then a short note after every step."""

from __future__ import annotations

from datetime import datetime, timedelta

from autoseg.training.checkpoint import Counters
from autoseg.training.schedule import Schedule

ANNOUNCED_AFTER_STEPS = 5
"""Steps of a start after which its speed is told: the first ones are slower."""


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


def announcement(
    where: str, schedule: Schedule, counters: Counters, used_s: float, *, device: str, precision: str, now: datetime
) -> str:
    """What the training will do and when it will end, judged by its first steps.

    Args:
        where: Fold and configuration.
        schedule: Its length.
        counters: Where it is, with the seconds of its steps.
        used_s: Seconds used so far.
        device: Where it runs.
        precision: Of the network.
        now: The time.
    """
    left_s = schedule.left_s(counters.step, used_s, counters.step_s)
    if schedule.total_steps is None:
        about = counters.step + round(left_s / max(counters.step_s, 1e-9))
        length = f"{duration(schedule.budget_s or 0.0)}, about {about:,} steps"
    else:
        length = f"{schedule.num_epochs:,} epochs of {schedule.steps_per_epoch} steps"
    end = now + timedelta(seconds=left_s)
    # Without a date only where it is today.
    when = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"
    return (
        f"{where}: {length} in all, {counters.step_s:.2f} s a step in {precision} on {device}; "
        f"ends about {when} ({duration(left_s)} from now)"
    )


def note(counters: Counters, last_loss: float | None, rate: float, schedule: Schedule, used_s: float) -> str:
    """Where the training is, in one short line.

    Args:
        counters: Steps, losses and pseudo-Dice so far.
        last_loss: Of the last whole epoch, if there is one.
        rate: The learning rate.
        schedule: Its length.
        used_s: Seconds used so far.
    """
    parts = [f"epoch {counters.epoch}"]
    loss = last_loss if counters.epoch_loss is None else counters.epoch_loss
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    parts.append(f"lr {rate:.2g}")
    if counters.ema_pseudo_dice is not None:
        parts.append(f"pseudo-Dice {counters.ema_pseudo_dice:.3f}")
    left = round(schedule.left_s(counters.step, used_s, counters.step_s))
    parts += [f"{counters.step_s:.2f} s/step", f"{left // 60}:{left % 60:02d} left"]
    return ", ".join(parts)
