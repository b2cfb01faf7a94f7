"""Training one fold: from a cache of cases to weights, through any number of interruptions.

A training that was interrupted ends with the same bits as one that was not: tests show this on the CPU, on one machine
with one number of threads; on a GPU it has not been shown yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from autoseg import runtime
from autoseg.domain.plan import Plan
from autoseg.errors import ConfigError, TrainingInterrupted
from autoseg.io.files import Lock
from autoseg.io.model import BEST, WEIGHTS
from autoseg.runtime import NoProgress, Progress
from autoseg.training import checkpoint, telling, validation
from autoseg.training.batches import BatchReader, Prefetcher, assemble
from autoseg.training.cascade import PreviousStage
from autoseg.training.checkpoint import Checkpoint
from autoseg.training.diagnosis import diagnose
from autoseg.training.interrupt import Stopped, StopRequest
from autoseg.training.learner import Learner
from autoseg.training.outputs import FoldOutputs
from autoseg.training.records import (
    EpochRecord,
    Fold,
    FoldCases,
    Status,
    TrainResult,
    TrainSettings,
    read_metrics,
    read_run,
    write_metrics,
)
from autoseg.training.resume import begin, finished_result, forget, fresh_counters, require_fit, resolved_precision
from autoseg.training.sampling import PatchStore
from autoseg.training.schedule import FINAL_WORK_S, STEP_SMOOTHING, Clock, Schedule

log = logging.getLogger("autoseg")

LOCK_FILE = "lock"


def train_fold(
    folder: Path,
    plan: Plan,
    configuration: str,
    fold: Fold,
    store: PatchStore,
    train_ids: Sequence[str],
    validation_ids: Sequence[str],
    settings: TrainSettings,
    progress: Progress | None = None,
    previous: PreviousStage | None = None,
    annotated: Mapping[str, tuple[bool, ...]] | None = None,
) -> TrainResult:
    """Train one fold, going on where an earlier start stopped.

    Args:
        folder: The fold folder; made when missing. It ends with `weights.safetensors` and `weights.json`.
        plan: The whole plan; it travels with the weights.
        configuration: Which of its configurations.
        fold: Number of the fold, or "all".
        store: Preprocessed cases.
        train_ids: Cases to learn from.
        validation_ids: Cases to look at during training; may be empty, then no best weights are kept.
        settings: What this start is asked to do.
        progress: Told after every step.
        previous: Of a cascade: what the previous stage predicted.
        annotated: Of the cases in which not every class was annotated: for each class whether it was.

    Raises:
        ConfigError: The fold is in use, or what was trained before does not fit the plan or the settings.
        DatasetError: A cached case cannot be read.
        TrainingDiverged: The loss is no longer finite; the last good weights are kept.
        TrainingInterrupted: SIGINT or SIGTERM; everything is saved.
        DeviceMemoryError: The device has too little memory.
    """
    clock = Clock()
    runtime.configure_allocator()
    folder = Path(folder)
    where = f"fold {fold} of {configuration}"
    if not train_ids:
        raise ConfigError(f"{where} has no training cases")
    out_of_memory = runtime.device_memory_errors(
        f"the device ran out of memory while training {where}",
        hint="Plan for less memory (autoseg plan --vram), or stop what else uses the device.",
    )
    with Lock(folder / LOCK_FILE, what=where), out_of_memory:
        checkpoint.remove_leftovers(folder)
        if settings.restart:
            forget(folder)
        return _Training(
            folder,
            plan,
            configuration,
            fold,
            store,
            FoldCases(tuple(train_ids), tuple(validation_ids), previous.weights if previous else {}, annotated or {}),
            settings,
            clock,
            progress or NoProgress(),
            previous,
        ).run()


class _Training:
    """One start of a training: the state that the loop moves on."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        configuration: str,
        fold: Fold,
        store: PatchStore,
        cases: FoldCases,
        settings: TrainSettings,
        clock: Clock,
        progress: Progress,
        previous: PreviousStage | None,
    ) -> None:
        self.folder, self.plan, self.where = folder, plan, f"fold {fold} of {configuration}"
        self.clock, self.progress = clock, progress
        self.part = plan.configurations[configuration]
        self.device = runtime.pick_device(settings.device)
        self.settings = settings.with_length(self.part.training, self.device.type)
        self.before = read_run(folder)
        self.precision = resolved_precision(self.settings, self.before, self.device)
        training = self.part.training
        self.schedule = Schedule(
            training.learning_rate,
            training.decay_power,
            training.steps_per_epoch,
            self.settings.num_epochs,
            self.settings.time_budget_s,
            training.momentum,
            training.adapts_momentum,
            training.warm_up_steps,
        )
        regions, device = plan.labels.region_table() if plan.labels.has_regions else None, self.device
        self.learner = Learner(
            self.part.network, training, device=device, precision=self.precision, seed=settings.seed, regions=regions
        )
        self.cases = cases
        self.counters = fresh_counters(self.part, cases, settings.seed)
        environment = runtime.environment()
        self.outputs = FoldOutputs(
            folder, plan, configuration, fold, self.settings, self.device, self.precision, cases, environment
        )
        seed, stages = settings.seed, (runtime.STAGE_SAMPLE, runtime.STAGE_VALIDATE)
        known = cases.annotated
        self.train_reader = BatchReader.of(self.part, store, cases.train, seed, stages[0], previous, known)
        self.validation_reader = BatchReader.of(self.part, store, cases.validation, seed, stages[1], previous, known)
        self.validation_patches = self.before.validation_patches if self.before else None
        self.records: tuple[EpochRecord, ...] = ()
        self.saved_at_s = self.save_cost_s = 0.0
        self.stop = StopRequest()
        self.rate, self.momentum = training.learning_rate, training.momentum

    def run(self) -> TrainResult:
        """Train to the end of the schedule and write the final weights."""
        done = finished_result(self.folder, self.before, self.settings, self.plan, self.cases, self.where)
        if done is not None:
            return done
        self._go_on()
        total = self.schedule.total_steps
        self.progress.start(f"train {self.where}", total if total is not None else round(self.schedule.budget_s or 0.0))
        self.progress.advance(self._progress_made())
        self._write_run("running")
        with self.stop:
            self._train()
            self._write_model(WEIGHTS)
            self._write_run("finished")
        self.progress.finish(self._note())
        if self.stop.is_set:
            raise TrainingInterrupted(
                f"a stop was asked for while {self.where} ended: it is finished and saved",
                hint="The same command goes on with what is left.",
            )
        return self._result()

    def _train(self) -> None:
        """Step after step until the schedule is over."""
        with Prefetcher(self.train_reader.read, self.counters.step, self.settings.prefetch) as ahead:
            told_at = self.counters.step + telling.ANNOUNCED_AFTER_STEPS
            if self._epoch_is_over():
                self._end_epoch()  # the start before this one left while it looked
            while not self._is_over():
                self._train_step(ahead)
                if self.counters.step == told_at:
                    self._announce()
                if self._epoch_is_over():
                    self._end_epoch()
                elif self.stop.is_set or self._save_is_due(self.counters.step_s):
                    self._save()
                if self.stop.is_set:
                    self._interrupted()
            if self.counters.epoch_steps:
                self._end_epoch()

    # --- Steps -----------------------------------------------------------------------------------------------------

    def _train_step(self, ahead: Prefetcher) -> None:
        began = self.clock.used_s()
        made_before = self._progress_made()
        batch = assemble(ahead.take(), self.device)
        self.rate, self.momentum = self.schedule.pace(self.counters.step, began, self._reserve_s())
        outcome = self.learner.step(batch, self.rate, self.counters.step, self.momentum)
        if not outcome.is_finite:
            self._write_run("diverged")
            raise diagnose(
                self.learner.network,
                batch,
                loss=outcome.loss,
                gradient_norm=outcome.gradient_norm,
                step=self.counters.step,
                device=self.device,
                precision=self.precision,
            )
        now = self.clock.used_s()
        old = self.counters
        took = now - began
        self.counters = old.model_copy(
            update={
                "step": old.step + 1,
                "used_s": now,
                "epoch_steps": old.epoch_steps + 1,
                "epoch_loss_sum": old.epoch_loss_sum + outcome.loss,
                "epoch_s": old.epoch_s + took,
                "epoch_step_s": old.epoch_step_s + took,
                "step_s": took if old.step <= 1 else (1 - STEP_SMOOTHING) * old.step_s + STEP_SMOOTHING * took,
            }
        )
        self.progress.advance(self._progress_made() - made_before, self._note())

    def _is_over(self) -> bool:
        counters = self.counters
        return self.schedule.is_over(counters.step, self.clock.used_s(), self._reserve_s(), counters.step_s)

    def _reserve_s(self) -> float:
        """Seconds kept free at the end of a budget: last validation, last checkpoint, best and final weights."""
        return self.counters.validation_cost_s + max(FINAL_WORK_S, 3 * self.save_cost_s)

    # --- Ends of epochs --------------------------------------------------------------------------------------------

    def _epoch_is_over(self) -> bool:
        counters = self.counters
        return counters.epoch_steps > 0 and self.schedule.ends_epoch(counters.epoch_steps, counters.epoch_s)

    def _end_epoch(self) -> None:
        # What the first look takes is not known yet.
        if self._save_is_due(self.counters.validation_cost_s if self.counters.epoch else inf):
            self._save()
        try:
            look = self._look() if self._may_look() else None
        except Stopped:
            self._save()
            self._interrupted()
        old = self.counters
        mean = look.mean if look else None
        ema = validation.running_mean(old.ema_pseudo_dice, mean)
        is_best = mean is not None and ema is not None and ema > (old.best_ema_pseudo_dice or -1.0)
        record = EpochRecord(
            epoch=old.epoch,
            step=old.step,
            seconds=self.clock.used_s(),
            seconds_per_step=old.epoch_step_s / old.epoch_steps,
            learning_rate=self.rate,
            momentum=self.momentum,
            train_loss=old.epoch_loss_sum / old.epoch_steps,
            validation_loss=look.loss if look else None,
            pseudo_dice=look.pseudo_dice if look else (),
            mean_pseudo_dice=mean,
            ema_pseudo_dice=ema,
        )
        self.records = (*self.records, record)
        write_metrics(self.folder, self.records)
        update: dict[str, Any] = {"epoch": old.epoch + 1, "epoch_steps": 0, "epoch_loss_sum": 0.0}
        update |= {"epoch_s": 0.0, "epoch_step_s": 0.0, "ema_pseudo_dice": ema}
        if look:
            update |= {"validation_s": old.validation_s + look.seconds, "validation_cost_s": look.seconds}
        if is_best:
            update |= {"best_ema_pseudo_dice": ema, "best_epoch": old.epoch}
        self.counters = old.model_copy(update=update)
        if is_best:
            self._write_model(BEST)
        self._save()
        self._write_run("running")

    def _may_look(self) -> bool:
        """Under a time budget a look must fit into its part of the seconds used; the last one is kept free for."""
        if not self.validation_reader.sampler.case_ids or self.part.training.validation_steps_per_epoch == 0:
            return False
        counters = self.counters
        if self.schedule.num_epochs is not None or counters.validation_cost_s == 0 or self._is_over():
            return True
        allowed = validation.TIME_FRACTION * self.clock.used_s()
        return counters.validation_s + counters.validation_cost_s <= allowed

    def _look(self) -> validation.QuickLook:
        training = self.part.training
        if self.validation_patches is None:
            most = training.validation_steps_per_epoch * training.batch_size
            self.validation_patches = (
                most
                if self.schedule.num_epochs is not None
                else validation.affordable_patches(
                    self.schedule.epoch_s, self.counters.step_s, training.batch_size, most
                )
            )
        return validation.quick_look(
            self.learner.network,
            self.learner.weights,
            self.validation_reader,
            self.validation_patches,
            device=self.device,
            precision=self.precision,
            batch_dice=training.batch_dice,
            regions=self.learner.regions,
            check=self.stop.check,
        )

    # --- Going on --------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Load the newest checkpoint, if there is one."""
        found = checkpoint.newest(self.folder)
        if found is None:
            write_metrics(self.folder, ())
            self.counters = begin(self.learner, self.counters, self.outputs, self.before)
            return
        stored = found.counters
        asked = self.settings.pretrained
        self.counters = require_fit(stored, self.counters, self.before, self.cases, self.where, asked)
        self.learner.restore(found.tensors, (stored.loss_scale, stored.loss_scale_growth))
        self.clock.used_before_s = self.saved_at_s = stored.used_s
        # An epoch that is open in the checkpoint will be recorded again, even if the step is the same.
        self.records = tuple(record for record in read_metrics(self.folder) if record.epoch < stored.epoch)
        write_metrics(self.folder, self.records)
        log.info("%s goes on at step %d, after %.0f s of training", self.where, stored.step, stored.used_s)

    def _save(self) -> None:
        began = time.monotonic()
        scale, growth = self.learner.loss_scale
        self.counters = self.counters.model_copy(
            update={"used_s": self.clock.used_s(), "loss_scale": scale, "loss_scale_growth": growth}
        )
        checkpoint.save(self.folder, Checkpoint(self.counters, self.learner.state()))
        self.saved_at_s = self.counters.used_s
        self.save_cost_s = time.monotonic() - began

    def _save_is_due(self, next_s: float) -> bool:
        """Whether a kill at the end of what comes next, of so many seconds, would cost more than it may."""
        # The first checkpoint may take longer than is known; a second is little of a minute.
        at_risk_s = self.clock.used_s() - self.saved_at_s + next_s + max(FINAL_WORK_S, self.save_cost_s)
        return at_risk_s >= self.settings.checkpoint_interval_s

    def _interrupted(self) -> NoReturn:
        self._write_run("interrupted")
        self.progress.finish("interrupted")
        raise TrainingInterrupted(
            f"training of {self.where} was interrupted after step {self.counters.step}; everything is saved",
            hint="The same command goes on from here.",
        )

    # --- Results ---------------------------------------------------------------------------------------------------

    def _write_model(self, name: str) -> None:
        self.outputs.write_model(name, self.learner.weights, self.counters, self.clock.used_s())

    def _write_run(self, status: Status) -> None:
        self.outputs.write_run(status, self.counters, self.clock.used_s(), self.validation_patches)

    def _result(self) -> TrainResult:
        counters, last = self.counters, self.records[-1] if self.records else None
        return TrainResult(self.folder, counters.epoch, counters.step, self.clock.used_s(), did_train=True, last=last)

    def _progress_made(self) -> int:
        """Steps done, or whole seconds used under a time budget."""
        if self.schedule.total_steps is not None:
            return self.counters.step
        return min(round(self.counters.used_s), round(self.schedule.budget_s or 0.0))

    def _note(self) -> str:
        last_loss = self.records[-1].train_loss if self.records else None
        return telling.note(self.counters, last_loss, self.rate, self.schedule, self.clock.used_s())

    def _announce(self) -> None:
        state, where = (self.schedule, self.counters, self.clock.used_s()), str(self.device)
        now = datetime.now()
        log.info(telling.announcement(self.where, *state, device=where, precision=self.precision, now=now))
