"""What an earlier start of a training left, and whether this one may go on with it."""

from __future__ import annotations

import logging
from pathlib import Path

from autoseg.domain.plan import Plan
from autoseg.errors import ConfigError
from autoseg.io.model import BEST, WEIGHTS
from autoseg.training import checkpoint
from autoseg.training.checkpoint import Counters
from autoseg.training.records import METRICS_FILE, RUN_FILE, RunRecord, TrainResult, TrainSettings, read_metrics

log = logging.getLogger("autoseg")


def forget(folder: Path) -> None:
    """Remove what earlier starts left, final weights included."""
    checkpoint.clear(folder)
    for name in (WEIGHTS, BEST):
        # The card goes first: weights without a card are no model.
        (folder / f"{name}.json").unlink(missing_ok=True)
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    for name in (METRICS_FILE, RUN_FILE):
        (folder / name).unlink(missing_ok=True)


def finished_result(folder: Path, before: RunRecord | None, settings: TrainSettings, plan: Plan) -> TrainResult | None:
    """The result of an earlier start that did all of what this one is asked to do; None when there is none.

    Args:
        folder: The fold folder.
        before: Its run.json, if there is one.
        settings: What is asked for now.
        plan: What is trained now.
    """
    asked = (settings.num_epochs, settings.time_budget_s)
    is_finished = (
        before is not None
        and before.status == "finished"
        and (before.num_epochs, before.time_budget_s) == asked
        and before.plan_digest == plan.digest()
        and (folder / f"{WEIGHTS}.json").is_file()
    )
    if before is None or not is_finished:
        return None
    records = read_metrics(folder)
    last = records[-1] if records else None
    return TrainResult(folder, before.epochs, before.steps, before.seconds, did_train=False, last=last)


def require_fit(stored: Counters, fresh: Counters, where: str) -> None:
    """Refuse a checkpoint of another network or seed; warn of other changes.

    Args:
        stored: Of the checkpoint.
        fresh: Of a training that would start now.
        where: Fold and configuration.

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
    if stored.configuration_digest != fresh.configuration_digest:
        log.warning("%s goes on with settings that differ from those of its first part", where)
