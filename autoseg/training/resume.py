"""What an earlier start of a training left, and whether this one may go on with it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from autoseg.domain.plan import Configuration, EarlyEnd, Plan
from autoseg.domain.values import digest_of
from autoseg.errors import ConfigError
from autoseg.io.model import BEST, WEIGHTS, Model, is_whole
from autoseg.training import checkpoint, transfer
from autoseg.training.bad_steps import BAD_STEPS_FOLDER
from autoseg.training.checkpoint import Counters
from autoseg.training.learner import Learner
from autoseg.training.loggers import LOGS_FOLDER
from autoseg.training.outputs import FoldOutputs
from autoseg.training.pretrained import Pretrained
from autoseg.training.records import (
    METRICS_FILE,
    RUN_FILE,
    VALIDATION_FOLDER,
    FoldCases,
    RunRecord,
    TrainResult,
    TrainSettings,
    read_metrics,
)
from autoseg.training.schedule import Schedule
from autoseg.training.telling import duration

log = logging.getLogger("autoseg")


def forget(folder: Path) -> None:
    """Remove what earlier starts left, final weights and their validation included."""
    checkpoint.clear(folder)
    for name in (WEIGHTS, BEST):
        # The card goes first: weights without a card are no model.
        (folder / f"{name}.json").unlink(missing_ok=True)
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    for name in (VALIDATION_FOLDER, BAD_STEPS_FOLDER, LOGS_FOLDER):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for name in (METRICS_FILE, RUN_FILE):
        (folder / name).unlink(missing_ok=True)


def fresh_counters(part: Configuration, cases: FoldCases, settings: TrainSettings) -> Counters:
    """Where a training begins.

    Args:
        part: What is trained.
        cases: With which cases.
        settings: For how long, and with which seed.
    """
    return Counters(
        configuration_digest=digest_of(part.model_dump(mode="json")),
        network_digest=digest_of(part.network.model_dump(mode="json")),
        cases_digest=cases.digest,
        previous_weights=dict(cases.previous_weights),
        seed=settings.seed,
        num_epochs=settings.num_epochs,
        time_budget_s=settings.time_budget_s,
    )


def begin(learner: Learner, counters: Counters, outputs: FoldOutputs, before: RunRecord | None) -> Counters:
    """Let a training that has no checkpoint begin with the weights of a pretrained model, where one is asked for.

    Args:
        learner: With fresh weights.
        counters: Of a training that starts now.
        outputs: What is trained, and the settings.
        before: The fold's run.json, if there is one.

    Returns:
        The counters to go on with.

    Raises:
        ConfigError: Nothing of the model fits, or an earlier start, of which nothing was saved, began otherwise.
    """
    model, where = outputs.settings.pretrained, f"fold {outputs.fold} of {outputs.configuration}"
    if before is not None and before.pretrained is not None:
        if model is None:
            raise ConfigError(
                f"{where} began with the weights of {before.pretrained.name} and was stopped before any checkpoint",
                hint="Give --pretrained as at the first start, or --restart to begin with fresh weights.",
            )
        _require_same_start(before.pretrained, model, where)
    if model is None:
        return counters
    plan, fresh = outputs.plan, learner.weights
    shapes = {name: tuple(weight.shape) for name, weight in fresh.items()}
    fit = transfer.fit(shapes, plan, outputs.configuration, model)
    learner.start_from(fit.start(fresh, model))
    log.info("%s begins with the weights of %s: %s", where, fit.record.name, "\n".join(fit.record.lines()))
    if model.card.plan.dataset == plan.dataset and model.card.fold != outputs.fold and outputs.cases.validation:
        log.warning(
            "the pretrained model is of the data set %s too, fold %s: it may have learned from validation cases of %s, "
            "whose scores are then too good",
            plan.dataset,
            model.card.fold,
            where,
        )
    return counters.model_copy(update={"pretrained": fit.record})


def finished_result(
    folder: Path, before: RunRecord | None, settings: TrainSettings, plan: Plan, cases: FoldCases, where: str
) -> TrainResult | None:
    """The result of an earlier start that did all of what this one is asked to do; None when there is none.

    Final weights that are lost or corrupt are no result: going on from the checkpoint writes them anew.

    Args:
        folder: The fold folder.
        before: Its run.json, if there is one.
        settings: What is asked for now.
        plan: What is trained now.
        cases: Of the fold as it is now.
        where: Fold and configuration.

    Raises:
        ConfigError: It was trained with other cases, with maps of other weights of the previous stage, or from another
            pretrained model.
    """
    is_finished = (
        before is not None
        and before.status == "finished"
        and before.configuration in plan.configurations
        and before.plan_digest == plan.digest(before.configuration)
        and _is_enough(before, settings, plan.configurations[before.configuration].training.steps_per_epoch)
        and (folder / f"{WEIGHTS}.json").is_file()
    )
    if before is None or not is_finished:
        return None
    _require_same_cases(before.cases_digest, before, cases, where)
    _require_same_previous(before.previous_weights, cases, where)
    _require_same_start(before.pretrained, settings.pretrained, where)
    if not is_whole(folder, WEIGHTS):
        log.warning("the final weights of %s are lost or corrupt: they are made anew from its checkpoint", where)
        return None
    if (before.num_epochs, before.time_budget_s) != (settings.num_epochs, settings.time_budget_s):
        log.info(
            "%s is finished: it has done %d steps in %s (asked for %s), so nothing is left of %s",
            where,
            before.steps,
            duration(before.seconds),
            _length(before.num_epochs, before.time_budget_s),
            _length(settings.num_epochs, settings.time_budget_s),
        )
    records = read_metrics(folder)
    last = records[-1] if records else None
    return TrainResult(folder, before.epochs, before.steps, before.seconds, did_train=False, last=last)


def _is_enough(before: RunRecord, settings: TrainSettings, steps_per_epoch: int) -> bool:
    """Whether a finished training did all that is asked for now."""
    if settings.num_epochs is not None:
        steps = settings.num_epochs * steps_per_epoch
        return before.steps >= steps or (before.num_epochs or 0) >= settings.num_epochs
    budget_s = settings.time_budget_s or 0.0
    return before.seconds >= budget_s or (before.time_budget_s or 0.0) >= budget_s


def _length(num_epochs: int | None, time_budget_s: float | None) -> str:
    return f"{num_epochs:,} epochs" if num_epochs is not None else duration(time_budget_s or 0.0)


def with_length(stored: Counters, schedule: Schedule, early_end: EarlyEnd, reserve_s: float, where: str) -> Counters:
    """The counters of a checkpoint, brought to the length that is asked for now.

    Args:
        stored: Of the checkpoint.
        schedule: The straight way to the length of now.
        early_end: Of the plan; "never" lifts an end that a plateau brought.
        reserve_s: See `Schedule.fraction`.
        where: Fold and configuration.
    """
    now = {"num_epochs": schedule.num_epochs, "time_budget_s": schedule.budget_s}
    is_lifted = stored.course.end is not None and early_end == "never"
    is_same = (stored.num_epochs, stored.time_budget_s) == (schedule.num_epochs, schedule.budget_s)
    if stored.fraction is None or (is_same and not is_lifted):
        return stored.model_copy(update=now)
    rate = schedule.rate(stored.fraction)
    then, wanted = _length(stored.num_epochs, stored.time_budget_s), _length(schedule.num_epochs, schedule.budget_s)
    if schedule.is_over(stored.step, stored.used_s, reserve_s, stored.step_s):
        log.warning(
            "%s was asked for %s and now for %s, which is done already: it ends at step %d, where the learning rate "
            "had fallen from %.2g to %.2g only; a training whose whole decay lies in its length is as a rule better",
            where,
            then,
            wanted,
            stored.step,
            schedule.learning_rate,
            rate,
        )
    else:
        log.info(
            "%s was asked for %s and now for %s: from a learning rate of %.2g the decay is fitted into what is left",
            where,
            then,
            wanted,
            rate,
        )
    course = schedule.rejoined(stored.fraction, stored.step, stored.used_s, reserve_s)
    return stored.model_copy(update={**now, "course": course.model_copy(update={"since": stored.epoch})})


def require_fit(
    stored: Counters,
    fresh: Counters,
    before: RunRecord | None,
    cases: FoldCases,
    where: str,
    pretrained: Model | None = None,
) -> Counters:
    """Refuse a checkpoint of another network, seed, set of cases, previous stage or start; warn of other changes.

    Args:
        stored: Of the checkpoint.
        fresh: Of a training that would start now.
        before: The fold's run.json, if there is one.
        cases: Of the fold as it is now.
        where: Fold and configuration.
        pretrained: The model that is asked to begin with; None asks for nothing, whatever it began with.

    Returns:
        The counters to go on with.

    Raises:
        ConfigError: The training cannot go on with it.
    """
    if stored.network_digest != fresh.network_digest:
        raise ConfigError(
            f"{where} was trained with another network than the plan has now",
            hint="Use --restart to train it anew, or plan as before.",
        )
    if stored.seed != fresh.seed:
        raise ConfigError(
            f"{where} was trained with seed {stored.seed}, not {fresh.seed}",
            hint="Use --restart to train it anew, or the same seed.",
        )
    _require_same_cases(stored.cases_digest, before, cases, where)
    _require_same_previous(stored.previous_weights, cases, where)
    _require_same_start(stored.pretrained, pretrained, where)
    if stored.configuration_digest != fresh.configuration_digest:
        log.warning("%s goes on with settings that differ from those of its first part", where)
    now = {"configuration_digest": fresh.configuration_digest, "cases_digest": fresh.cases_digest}
    return stored.model_copy(update=now)


def _require_same_cases(digest: str, before: RunRecord | None, cases: FoldCases, where: str) -> None:
    """Refuse to go on with other cases than those of `digest`; an empty one, of an earlier version, fits any."""
    if digest in ("", cases.digest):
        return
    now = f"now {len(cases.train)} for training and {len(cases.validation)} for validation"
    then = ""
    if before is not None and before.cases_digest == digest:
        then = f"then {before.num_training_cases} and {before.num_validation_cases}, "
    raise ConfigError(
        f"the cases of {where} have changed since it was trained ({then}{now})",
        hint="Use --restart to train it anew, or put the cases and splits back as they were.",
    )


def _require_same_previous(weights: Mapping[str, str], cases: FoldCases, where: str) -> None:
    """Refuse to go on with label maps that other weights of the previous stage predicted."""
    now = cases.previous_weights
    changed = sorted(fold for fold in weights.keys() | now.keys() if weights.get(fold) != now.get(fold))
    if not changed:
        return
    raise ConfigError(
        f"the previous stage of {where} has changed since it was trained: other weights of {', '.join(changed)}",
        hint="Use --restart to train it anew on what the previous stage predicts now.",
    )


def _require_same_start(began: Pretrained | None, model: Model | None, where: str) -> None:
    """Refuse to go on from another pretrained model than the training began with; where none is given, any will do."""
    if model is None or (began is not None and began.weights_sha256 == model.card.weights_sha256):
        return
    with_what = f"the weights of {began.name}" if began else "fresh weights"
    card = model.card
    raise ConfigError(
        f"{where} began with {with_what}, not with those of {card.plan.dataset}, {card.configuration} fold "
        f"{card.fold} ({card.weights_sha256[:12]})",
        hint="Use --restart to train it anew from this model, or leave out --pretrained to go on.",
    )
