"""What a training leaves in its fold folder: weights with their card, and run.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from autoseg import runtime
from autoseg.domain.plan import Plan
from autoseg.io.model import PREVIOUS_WEIGHTS, WEIGHTS, ModelCard, save_model
from autoseg.training.checkpoint import Counters
from autoseg.training.loggers import LOGS_FOLDER, RunFacts
from autoseg.training.records import (
    VALIDATION_FOLDER,
    VALIDATION_SUMMARY_FILE,
    Choices,
    EpochRecord,
    Fold,
    FoldCases,
    RunRecord,
    Start,
    Status,
    TrainSettings,
    write_run,
)

_FACTS = {
    "configuration",
    "fold",
    "plan_digest",
    "seed",
    "num_epochs",
    "time_budget_s",
    "device",
    "precision",
    "num_training_cases",
    "num_validation_cases",
}
"""Of run.json, for loggers."""


@dataclass(frozen=True, slots=True)
class FoldOutputs:
    """Writes the results of one fold; holds what stays the same during a training.

    Attributes:
        folder: The fold folder.
        plan: Travels with the weights.
        configuration: Which part of the plan was trained.
        fold: Which fold.
        settings: As resolved.
        device: Where it trains.
        precision: As resolved.
        cases: Learned from and looked at.
        environment: Of this machine.
        num_processes: That share the training.
    """

    folder: Path
    plan: Plan
    configuration: str
    fold: Fold
    settings: TrainSettings
    device: torch.device
    precision: str
    cases: FoldCases
    environment: dict[str, Any]
    num_processes: int = 1

    def write_model(self, name: str, weights: Mapping[str, Tensor], counters: Counters, used_s: float) -> None:
        """Write NAME.safetensors and NAME.json; new final weights make the validation of earlier ones void.

        Args:
            name: "weights" or "best".
            weights: To predict with.
            counters: How they came about.
            used_s: Seconds of training.
        """
        if name == WEIGHTS:
            (self.folder / VALIDATION_FOLDER / VALIDATION_SUMMARY_FILE).unlink(missing_ok=True)
        has_mean = self.plan.configurations[self.configuration].training.ema_decay > 0
        card = ModelCard(
            plan=self.plan,
            configuration=self.configuration,
            fold=self.fold,
            digest=self.plan.digest(self.configuration),
            versions=self.environment["versions"],
            provenance={
                "trained_by": "autoseg",
                "weights": "running mean" if has_mean else "last step",
                "epochs": counters.epoch,
                "steps": counters.step,
                "seconds": round(used_s, 1),
                "seed": self.settings.seed,
                "precision": self.precision,
                "num_training_cases": len(self.cases.train),
                **self._previous_stage(),
                **_pretrained(counters),
            },
            trained_on=self.settings.trained_on,
        )
        save_model(self.folder, weights, card, name=name)

    def _previous_stage(self) -> dict[str, JsonValue]:
        """Which weights predicted the maps that a cascade learned from."""
        weights: dict[str, JsonValue] = dict(self.cases.previous_weights.items())
        return {PREVIOUS_WEIGHTS: weights} if weights else {}

    def start(self, counters: Counters, used_s: float) -> Start:
        """The start of a training that is here.

        Args:
            counters: Where it goes on.
            used_s: Seconds of training before.
        """
        return Start(
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            num_epochs=self.settings.num_epochs,
            time_budget_s=self.settings.time_budget_s,
            step=counters.step,
            seconds=round(used_s, 3),
            device=self.device.type,
            precision=self.precision,
        )

    def facts(self, record: RunRecord, done: Sequence[EpochRecord]) -> RunFacts:
        """What loggers are told of the training.

        Args:
            record: What run.json holds at the start.
            done: The learning curve so far.
        """
        part = self.plan.configurations[self.configuration]
        facts = record.model_dump(mode="json", include=_FACTS) | {
            "data_set": self.plan.dataset,
            "preset": self.plan.preset,
            "patch_size": list(part.network.patch_size),
            "features_per_stage": list(part.network.features_per_stage),
            **part.training.model_dump(mode="json", exclude={"augmentation", "num_epochs"}),
            **{f"version_{name}": version for name, version in self.environment["versions"].items()},
        }
        name = f"{self.plan.dataset} {self.configuration} fold {self.fold}"
        return RunFacts(name, self.folder / LOGS_FOLDER, self.plan.labels.names, facts, done)

    def write_run(
        self,
        status: Status,
        counters: Counters,
        used_s: float,
        *,
        validation_patches: int | None,
        whole_cases: tuple[str, ...] | None,
        starts: tuple[Start, ...],
        choices: Choices,
    ) -> RunRecord:
        """Write run.json; returns what it holds.

        Args:
            status: How the training is.
            counters: Where it is.
            used_s: Seconds of training.
            validation_patches: Chosen number of fixed patches.
            whole_cases: Chosen cases to look at as wholes.
            starts: Of this training so far, this one included.
            choices: How it computes.
        """
        record = RunRecord(
            configuration=self.configuration,
            fold=self.fold,
            plan_digest=self.plan.digest(self.configuration),
            seed=self.settings.seed,
            num_epochs=self.settings.num_epochs,
            time_budget_s=self.settings.time_budget_s,
            device=self.device.type,
            precision=self.precision,
            choices=choices,
            num_processes=self.num_processes,
            status=status,
            num_training_cases=len(self.cases.train),
            num_validation_cases=len(self.cases.validation),
            cases_digest=self.cases.digest,
            previous_weights=dict(self.cases.previous_weights),
            pretrained=counters.pretrained,
            validation_patches=validation_patches,
            whole_cases=whole_cases,
            epochs=counters.epoch,
            steps=counters.step,
            seconds=round(used_s, 3),
            seconds_per_step=counters.step_s or None,
            best_epoch=counters.best_epoch,
            best_ema_pseudo_dice=counters.best_ema_pseudo_dice,
            num_bad_steps=counters.num_bad_steps,
            course=counters.course,
            starts=starts,
            peak_memory_bytes=runtime.peak_memory_on(self.device.type),
            environment=self.environment,
        )
        write_run(self.folder, record)
        return record


def _pretrained(counters: Counters) -> dict[str, JsonValue]:
    """What the training began with, tensor by tensor."""
    return {} if counters.pretrained is None else {"pretrained": counters.pretrained.model_dump(mode="json")}
