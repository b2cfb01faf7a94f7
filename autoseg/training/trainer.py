"""Training one fold: from a cache of cases to weights, through any number of interruptions.

A training that was interrupted ends with the same bits as one that was not: tests show this on the CPU, on one machine
with one number of threads; on a GPU it has not been shown yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from math import inf
from pathlib import Path
from typing import NoReturn

from autoseg import runtime
from autoseg.compute import ALONE, Processes
from autoseg.domain.plan import Plan
from autoseg.errors import ConfigError, TrainingDiverged, TrainingInterrupted
from autoseg.io.files import Lock
from autoseg.io.model import BEST, WEIGHTS
from autoseg.runtime import NoProgress, Progress
from autoseg.training import checkpoint, choosing, orders, telling
from autoseg.training.bad_steps import BadSteps
from autoseg.training.batches import Batch, BatchReader, Prefetcher, RawSample, assemble
from autoseg.training.cascade import PreviousStage
from autoseg.training.checkpoint import Checkpoint
from autoseg.training.epochs import EpochEnds
from autoseg.training.interrupt import Stopped, StopRequest
from autoseg.training.learner import Learner, StepOutcome
from autoseg.training.outputs import FoldOutputs
from autoseg.training.records import (
    Fold,
    FoldCases,
    RunRecord,
    Status,
    TrainResult,
    TrainSettings,
    read_run,
)
from autoseg.training.resume import begin, finished_result, forget, fresh_counters, require_fit, with_length
from autoseg.training.sampling import PatchStore
from autoseg.training.schedule import FINAL_WORK_S, STEP_SMOOTHING, Clock, Pace, Schedule
from autoseg.training.trackers import trackers

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
    processes: Processes = ALONE,
) -> TrainResult:
    """Train one fold, going on where an earlier start stopped.

    With several processes this is what the main one does, inside `orders.leading`; the others do `following.follow`.

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
        processes: Those that share every batch.

    Raises:
        ConfigError: The fold is in use, or what was trained before does not fit the plan or the settings.
        DatasetError: A cached case cannot be read.
        TrainingDiverged: Too many steps gave no finite loss or gradient; the last good weights are kept.
        TrainingInterrupted: SIGINT or SIGTERM; everything is saved.
        DeviceMemoryError: The device has too little memory for one sample.
        ProcessLost: Another process has ended or failed.
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
            processes,
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
        processes: Processes,
    ) -> None:
        self.folder, self.plan, self.where = folder, plan, f"fold {fold} of {configuration}"
        self.clock, self.progress = clock, progress
        self.part = plan.configurations[configuration]
        self.device = runtime.pick_device(settings.device)
        self.settings = settings.with_length(self.part.training, self.device.type)
        self.before = read_run(folder)
        self.precision = choosing.precision_of(self.part, self.settings, self.before, self.device)
        self.processes = processes
        training = self.part.training
        self.straight = Schedule(
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
            self.part.network,
            training,
            device=device,
            precision=self.precision,
            seed=settings.seed,
            regions=regions,
            processes=processes,
        )
        self.cases = cases
        self.counters = fresh_counters(self.part, cases, self.settings)
        self.outputs = FoldOutputs(
            folder,
            plan,
            configuration,
            fold,
            self.settings,
            self.device,
            self.precision,
            cases,
            runtime.environment(),
            processes.world_size,
        )
        seed, stages = settings.seed, (runtime.STAGE_SAMPLE, runtime.STAGE_VALIDATE)
        known = cases.annotated
        reader = BatchReader.of(self.part, store, cases.train, seed, stages[0], previous, known)
        self.train_reader = reader.shared(processes)
        reader = BatchReader.of(self.part, store, cases.validation, seed, stages[1], previous, known)
        self.stop = StopRequest()
        self.ends = EpochEnds(
            folder, self.where, self.part, self.learner, reader, self.device, self.precision, self.before, self.stop
        )
        self.loggers = trackers(settings.log)
        self.bad_steps = BadSteps(folder, self.where, self.learner.network, self.device, self.precision)
        self.starts = self.before.starts if self.before else ()
        self.saved_at_s = self.save_cost_s = 0.0
        self.pace = Pace(training.learning_rate, training.momentum)

    def run(self) -> TrainResult:
        """Train to the end of the schedule and write the final weights."""
        done = finished_result(self.folder, self.before, self.settings, self.plan, self.cases, self.where)
        if done is not None:
            return done
        self._go_on()
        self._choose()
        self.starts = (*self.starts, self.outputs.start(self.counters, self.clock.used_s()))
        self._show_progress()
        self.loggers.start(self.outputs.facts(self._write_run("running"), self.ends.records))
        with self.stop, self.loggers:
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
                self._heed()
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
        samples = ahead.take()
        batch = assemble(samples, self.device)
        self.pace = self.schedule.pace(self.counters.step, began, self._reserve_s())
        outcome = self.learner.step(batch, self.pace.rate, self.counters.step, self.pace.momentum)
        if not outcome.is_finite:
            self._note_bad_step(samples, batch, outcome)
        now = self.clock.used_s()
        old = self.counters
        took = now - began
        self.counters = old.model_copy(
            update={
                "step": old.step + 1,
                "used_s": now,
                "fraction": self.pace.fraction,
                "epoch_steps": old.epoch_steps + 1,
                "epoch_loss_sum": old.epoch_loss_sum + (outcome.loss if outcome.is_finite else 0.0),
                "epoch_s": old.epoch_s + took,
                "epoch_step_s": old.epoch_step_s + took,
                "step_s": took if old.step <= 1 else (1 - STEP_SMOOTHING) * old.step_s + STEP_SMOOTHING * took,
            }
        )
        self.progress.advance(self._progress_made() - made_before, self._note())

    def _note_bad_step(self, samples: Sequence[RawSample], batch: Batch, outcome: StepOutcome) -> None:
        try:
            self.counters = self.bad_steps.note(self.counters, samples, batch, outcome, self.pace)
        except TrainingDiverged:
            self._write_run("diverged")
            raise

    @property
    def schedule(self) -> Schedule:
        """The training's length, and the way it takes there."""
        return replace(self.straight, course=self.counters.course)

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
        # What the first looks take is not known yet.
        looks_s = self.counters.validation_cost_s + self.counters.whole_cost_s
        if self._save_is_due(looks_s if self.counters.epoch else inf):
            self._save()
        before = self.schedule
        used_s, is_last = self.clock.used_s(), self._is_over()
        try:
            self.counters, is_best = self.ends.end(self.counters, before, self.pace, used_s, is_last=is_last)
        except Stopped:
            self._save()
            self._interrupted()
        if self.schedule.length != before.length:
            self._show_progress()
        self.loggers.log(self.ends.records[-1])
        if is_best:
            self._write_model(BEST)
        self._save()
        self._write_run("running")

    def _choose(self) -> None:
        """Settle how to compute, and have the other processes do the same."""
        used_s, counters = self.clock.used_s(), self.counters

        def left_s(step_s: float) -> float:
            return self.schedule.left_s(counters.step, used_s, step_s)

        self.learner.gradients.lowers_micro_batch = True
        num_samples = -(-self.part.training.batch_size // self.processes.world_size)
        self.choices = choosing.choices_of(self.part, self.settings, self.before, self.learner, num_samples, left_s)
        orders.begin(self.processes, self.precision, self.choices)

    def _heed(self) -> None:
        """What came of a step beside learning: a smaller micro-batch, another process that was asked to stop."""
        if self.learner.gradients.is_stop_asked:
            self.stop.ask()
        if self.learner.choices != self.choices:
            self.choices = self.learner.choices
            self._write_run("running")

    # --- Going on --------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Load the newest checkpoint, if there is one."""
        found = checkpoint.newest(self.folder)
        if found is None:
            self.ends.forget_from(0)
            self.counters = begin(self.learner, self.counters, self.outputs, self.before)
            return
        asked = self.settings.pretrained
        stored = require_fit(found.counters, self.counters, self.before, self.cases, self.where, asked)
        early_end, reserve_s = self.part.training.early_end, FINAL_WORK_S + stored.validation_cost_s
        if stored.step:
            # That of the last step, for the record of an epoch that is still open.
            last, done = stored.step - 1, stored.fraction
            done = self.straight.fraction(last, stored.used_s, reserve_s) if done is None else done
            self.pace = self.straight.pace_at(done, last)
        self.counters = with_length(stored, self.straight, early_end, reserve_s, self.where)
        self.learner.restore(found.tensors, (stored.loss_scale, stored.loss_scale_growth))
        self.clock.used_before_s = self.saved_at_s = stored.used_s
        self.ends.forget_from(stored.epoch)
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

    def _write_run(self, status: Status) -> RunRecord:
        self.loggers.status = status
        return self.outputs.write_run(
            status,
            self.counters,
            self.clock.used_s(),
            validation_patches=self.ends.validation_patches,
            whole_cases=self.ends.whole.case_ids,
            starts=self.starts,
            choices=self.learner.choices,
        )

    def _result(self) -> TrainResult:
        counters, last = self.counters, self.ends.records[-1] if self.ends.records else None
        return TrainResult(self.folder, counters.epoch, counters.step, self.clock.used_s(), did_train=True, last=last)

    def _progress_made(self) -> int:
        """Steps done, or whole seconds used under a time budget."""
        if self.schedule.total_steps is not None:
            return self.counters.step
        return min(round(self.counters.used_s), round(self.schedule.length))

    def _show_progress(self) -> None:
        total = self.schedule.total_steps
        self.progress.start(f"train {self.where}", round(self.schedule.length) if total is None else total)
        self.progress.advance(self._progress_made())

    def _moment(self) -> telling.Moment:
        look_s = self.ends.look_s(self.counters)
        return telling.Moment(self.schedule, self.counters, self.clock.used_s(), look_s, datetime.now())

    def _note(self) -> str:
        return telling.note(self._moment(), self.part.training.batch_size, self.ends.records)

    def _announce(self) -> None:
        moment = self._moment()
        log.info(telling.announcement(self.where, moment, device=str(self.device), precision=self.precision))
        slower = telling.slowdown(self.part, self.counters.step_s, self.settings.planned_speed)
        problem = telling.mismatch(self.where, moment, slower)
        if problem:
            log.warning(problem)
