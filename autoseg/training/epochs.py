"""The end of an epoch: look at validation cases, record what there is to say, tell whether it is the best so far."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoseg import runtime
from autoseg.domain.plan import Configuration
from autoseg.training import plateau, validation
from autoseg.training.batches import BatchReader
from autoseg.training.checkpoint import Counters
from autoseg.training.interrupt import StopRequest
from autoseg.training.learner import Learner
from autoseg.training.records import EpochRecord, RunRecord, read_metrics, write_metrics
from autoseg.training.schedule import Course, Pace, Schedule
from autoseg.training.validation import QuickLook
from autoseg.training.whole import WholeLook, WholeLooks

log = logging.getLogger("autoseg")


_NEXT = {"epoch_steps": 0, "epoch_loss_sum": 0.0, "epoch_bad_steps": 0, "epoch_s": 0.0, "epoch_step_s": 0.0}
"""What an epoch begins with."""


@dataclass(frozen=True, slots=True)
class Looks:
    """What was looked at when an epoch ended.

    Attributes:
        quick: At patches; None when not.
        whole: At whole cases; None when not.
        ema: Running mean of the pseudo-Dice, this epoch's included.
    """

    quick: QuickLook | None
    whole: WholeLook | None
    ema: float | None

    @property
    def mean(self) -> float | None:
        """Mean pseudo-Dice of this epoch."""
        return self.quick.mean if self.quick else None

    @property
    def seconds(self) -> float:
        """What the looks took."""
        return sum(look.seconds for look in (self.quick, self.whole) if look is not None)

    def is_above(self, best: float | None) -> bool:
        """Whether the weights are better than the best so far."""
        return self.mean is not None and self.ema is not None and self.ema > (best or -1.0)


def _record(counters: Counters, pace: Pace, used_s: float, looks: Looks, memory_bytes: int) -> EpochRecord:
    quick, whole = looks.quick, looks.whole
    return EpochRecord(
        epoch=counters.epoch,
        step=counters.step,
        seconds=used_s + looks.seconds,
        seconds_per_step=counters.epoch_step_s / counters.epoch_steps,
        learning_rate=pace.rate,
        momentum=pace.momentum,
        train_loss=counters.epoch_loss,
        num_bad_steps=counters.epoch_bad_steps,
        validation_loss=quick.loss if quick else None,
        pseudo_dice=quick.pseudo_dice if quick else (),
        mean_pseudo_dice=looks.mean,
        ema_pseudo_dice=looks.ema,
        whole_dice=whole.dice if whole else (),
        mean_whole_dice=whole.mean if whole else None,
        num_whole_cases=whole.num_cases if whole else 0,
        memory_bytes=memory_bytes or None,
    )


def _looked(counters: Counters, looks: Looks, *, is_best: bool) -> dict[str, Any]:
    """What the looks change in the counters."""
    update: dict[str, Any] = {"ema_pseudo_dice": looks.ema}
    if looks.quick:
        seconds = looks.quick.seconds
        update |= {"validation_s": counters.validation_s + seconds, "validation_cost_s": seconds}
    if looks.whole:
        seconds = looks.whole.seconds
        update |= {"whole_s": counters.whole_s + seconds, "whole_cost_s": seconds}
    if is_best:
        update |= {"best_ema_pseudo_dice": looks.ema, "best_epoch": counters.epoch}
    return update


class EpochEnds:
    """Ends the epochs of one start of a training; holds its learning curve.

    Args:
        folder: The fold folder.
        where: Fold and configuration, for messages.
        part: What is trained.
        learner: What learns.
        reader: Draws validation patches.
        device: Where the network is.
        precision: Of its forward pass.
        before: What an earlier start chose to look at.
        stop: Looks are left where a stop is asked for.

    Attributes:
        records: The learning curve so far.
        validation_patches: Fixed patches that are looked at; None: not chosen yet.
        whole: Looks at whole cases.
    """

    def __init__(
        self,
        folder: Path,
        where: str,
        part: Configuration,
        learner: Learner,
        reader: BatchReader,
        device: torch.device,
        precision: str,
        before: RunRecord | None,
        stop: StopRequest,
    ) -> None:
        self._folder, self._where = folder, where
        self._training = part.training
        self._learner, self._reader = learner, reader
        self._device, self._precision = device, precision
        self._stop = stop
        self.records: tuple[EpochRecord, ...] = ()
        self.validation_patches = before.validation_patches if before else None
        cases = before.whole_cases if before else None
        self.whole = WholeLooks(part, learner, reader, device, precision, cases, stop.check)

    def forget_from(self, epoch: int) -> None:
        """Cut the learning curve back to the epochs before this one, in the file too."""
        # An epoch that is open in the checkpoint will be recorded again, even if the step is the same.
        found = read_metrics(self._folder) if epoch else ()
        self.records = tuple(record for record in found if record.epoch < epoch)
        write_metrics(self._folder, self.records)

    def end(
        self, counters: Counters, schedule: Schedule, pace: Pace, used_s: float, *, is_last: bool
    ) -> tuple[Counters, bool]:
        """End the epoch that is open.

        Args:
            counters: After its last step.
            schedule: The training's length.
            pace: Of that step.
            used_s: Seconds of training used.
            is_last: Whether the training is over.

        Returns:
            The counters with the next epoch open, and whether the weights are the best by validation so far.

        Raises:
            Stopped: A stop was asked for during a look; the epoch is still open.
        """
        quick = self._look(counters, schedule) if self._may_look(counters, schedule, used_s, is_last=is_last) else None
        ema = validation.running_mean(counters.ema_pseudo_dice, quick.mean if quick else None)
        # The last weights are validated on every case when the training is over.
        newest = quick.mean if quick else ema
        whole = None if is_last else self.whole.look(counters, schedule, newest, used_s)
        looks = Looks(quick, whole, ema)
        record = _record(counters, pace, used_s, looks, runtime.peak_memory_on(self._device.type))
        course = counters.course if is_last else self._course(counters, schedule, record)
        if course != counters.course:
            record = record.model_copy(update={"ends_at": course.end})
        self.records = (*self.records, record)
        write_metrics(self._folder, self.records)
        is_best = looks.is_above(counters.best_ema_pseudo_dice)
        update = _looked(counters, looks, is_best=is_best) | {"course": course}
        return counters.model_copy(update=_NEXT | {"epoch": counters.epoch + 1} | update), is_best

    def look_s(self, counters: Counters) -> float:
        """Seconds of the looks at the end of an epoch: of the last one, or by the time of a step."""
        if counters.validation_cost_s or not self._reader.sampler.case_ids:
            return counters.validation_cost_s
        return self._training.validation_steps_per_epoch * validation.FORWARD_FRACTION * counters.step_s

    def _course(self, counters: Counters, schedule: Schedule, newest: EpochRecord) -> Course:
        """As it was, or shortened where the measure has stopped rising."""
        measures = [
            record.mean_pseudo_dice
            for record in (*self.records, newest)
            if record.mean_pseudo_dice is not None and record.epoch >= counters.course.since
        ]
        found = plateau.shortened(
            schedule, self._training.early_end, measures, counters.step, newest.seconds, counters.fraction or 0.0
        )
        if found is None:
            return counters.course
        log.info(plateau.message(self._where, schedule, *found))
        return found[0]

    def _may_look(self, counters: Counters, schedule: Schedule, used_s: float, *, is_last: bool) -> bool:
        """Under a time budget a look must fit into its part of the seconds used; the last one is kept free for."""
        if not self._reader.sampler.case_ids or self._training.validation_steps_per_epoch == 0:
            return False
        if schedule.num_epochs is not None or counters.validation_cost_s == 0 or is_last:
            return True
        return counters.validation_s + counters.validation_cost_s <= validation.QUICK_FRACTION * used_s

    def _look(self, counters: Counters, schedule: Schedule) -> validation.QuickLook:
        batch_size = self._training.batch_size
        if self.validation_patches is None:
            most = self._training.validation_steps_per_epoch * batch_size
            self.validation_patches = (
                most
                if schedule.num_epochs is not None
                else validation.affordable_patches(schedule.epoch_s, counters.step_s, batch_size, most)
            )
        return validation.quick_look(
            self._learner.network,
            self._learner.weights,
            self._reader,
            self.validation_patches,
            device=self._device,
            precision=self._precision,
            batch_dice=self._training.batch_dice,
            regions=self._learner.regions,
            check=self._stop.check,
        )
