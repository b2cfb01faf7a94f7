"""The end of an epoch: look at validation cases, record what there is to say, tell whether it is the best so far."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoseg.domain.plan import TrainingPlan
from autoseg.training import plateau, validation
from autoseg.training.batches import BatchReader
from autoseg.training.checkpoint import Counters
from autoseg.training.learner import Learner
from autoseg.training.records import EpochRecord, read_metrics, write_metrics
from autoseg.training.schedule import Course, Pace, Schedule

log = logging.getLogger("autoseg")


@dataclass(slots=True)
class EpochEnds:
    """Ends the epochs of one start of a training; holds its learning curve.

    Attributes:
        folder: The fold folder.
        training: How the network learns.
        learner: What learns.
        reader: Draws validation patches.
        where: Fold and configuration, for messages.
        device: Where the network is.
        precision: Of its forward pass.
        validation_patches: Fixed patches that are looked at; None: not chosen yet.
        records: The learning curve so far.
    """

    folder: Path
    training: TrainingPlan
    learner: Learner
    reader: BatchReader
    where: str
    device: torch.device
    precision: str
    validation_patches: int | None
    records: tuple[EpochRecord, ...] = ()

    def forget_from(self, epoch: int) -> None:
        """Cut the learning curve back to the epochs before this one, in the file too."""
        # An epoch that is open in the checkpoint will be recorded again, even if the step is the same.
        found = read_metrics(self.folder) if epoch else ()
        self.records = tuple(record for record in found if record.epoch < epoch)
        write_metrics(self.folder, self.records)

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
        """
        look = None
        if self._may_look(counters, schedule, used_s, is_last=is_last):
            look = self._look(counters, schedule)
        mean = look.mean if look else None
        ema = validation.running_mean(counters.ema_pseudo_dice, mean)
        is_best = mean is not None and ema is not None and ema > (counters.best_ema_pseudo_dice or -1.0)
        record = EpochRecord(
            epoch=counters.epoch,
            step=counters.step,
            seconds=used_s + (look.seconds if look else 0.0),
            seconds_per_step=counters.epoch_step_s / counters.epoch_steps,
            learning_rate=pace.rate,
            momentum=pace.momentum,
            train_loss=counters.epoch_loss,
            num_bad_steps=counters.epoch_bad_steps,
            validation_loss=look.loss if look else None,
            pseudo_dice=look.pseudo_dice if look else (),
            mean_pseudo_dice=mean,
            ema_pseudo_dice=ema,
        )
        course = counters.course if is_last else self._course(counters, schedule, record)
        if course != counters.course:
            record = record.model_copy(update={"ends_at": course.end})
        self.records = (*self.records, record)
        write_metrics(self.folder, self.records)
        update: dict[str, Any] = {
            "epoch": counters.epoch + 1,
            "epoch_steps": 0,
            "epoch_loss_sum": 0.0,
            "epoch_bad_steps": 0,
            "epoch_s": 0.0,
            "epoch_step_s": 0.0,
            "ema_pseudo_dice": ema,
            "course": course,
        }
        if look:
            update |= {"validation_s": counters.validation_s + look.seconds, "validation_cost_s": look.seconds}
        if is_best:
            update |= {"best_ema_pseudo_dice": ema, "best_epoch": counters.epoch}
        return counters.model_copy(update=update), is_best

    def _course(self, counters: Counters, schedule: Schedule, newest: EpochRecord) -> Course:
        """As it was, or shortened where the measure has stopped rising."""
        measures = [
            record.mean_pseudo_dice
            for record in (*self.records, newest)
            if record.mean_pseudo_dice is not None and record.epoch >= counters.course.since
        ]
        found = plateau.shortened(
            schedule, self.training.early_end, measures, counters.step, newest.seconds, counters.fraction or 0.0
        )
        if found is None:
            return counters.course
        log.info(plateau.message(self.where, schedule, *found))
        return found[0]

    def _may_look(self, counters: Counters, schedule: Schedule, used_s: float, *, is_last: bool) -> bool:
        """Under a time budget a look must fit into its part of the seconds used; the last one is kept free for."""
        if not self.reader.sampler.case_ids or self.training.validation_steps_per_epoch == 0:
            return False
        if schedule.num_epochs is not None or counters.validation_cost_s == 0 or is_last:
            return True
        return counters.validation_s + counters.validation_cost_s <= validation.TIME_FRACTION * used_s

    def _look(self, counters: Counters, schedule: Schedule) -> validation.QuickLook:
        batch_size = self.training.batch_size
        if self.validation_patches is None:
            most = self.training.validation_steps_per_epoch * batch_size
            self.validation_patches = (
                most
                if schedule.num_epochs is not None
                else validation.affordable_patches(schedule.epoch_s, counters.step_s, batch_size, most)
            )
        return validation.quick_look(
            self.learner.network,
            self.learner.weights,
            self.reader,
            self.validation_patches,
            device=self.device,
            precision=self.precision,
            batch_dice=self.training.batch_dice,
            regions=self.learner.regions,
        )
