"""What a training leaves in its fold folder: weights with their card, and run.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from autoseg import runtime
from autoseg.domain.plan import Plan
from autoseg.io.model import PREVIOUS_WEIGHTS, WEIGHTS, ModelCard, save_model
from autoseg.training.checkpoint import Counters
from autoseg.training.records import (
    VALIDATION_FOLDER,
    VALIDATION_SUMMARY_FILE,
    Fold,
    FoldCases,
    RunRecord,
    Status,
    TrainSettings,
    write_run,
)


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
        )
        save_model(self.folder, weights, card, name=name)

    def _previous_stage(self) -> dict[str, JsonValue]:
        """Which weights predicted the maps that a cascade learned from."""
        weights: dict[str, JsonValue] = dict(self.cases.previous_weights.items())
        return {PREVIOUS_WEIGHTS: weights} if weights else {}

    def write_run(self, status: Status, counters: Counters, used_s: float, validation_patches: int | None) -> None:
        """Write run.json.

        Args:
            status: How the training is.
            counters: Where it is.
            used_s: Seconds of training.
            validation_patches: Chosen number of fixed patches.
        """
        on_gpu = self.device.type == "cuda"
        record = RunRecord(
            configuration=self.configuration,
            fold=self.fold,
            plan_digest=self.plan.digest(self.configuration),
            seed=self.settings.seed,
            num_epochs=self.settings.num_epochs,
            time_budget_s=self.settings.time_budget_s,
            device=self.device.type,
            precision=self.precision,
            status=status,
            num_training_cases=len(self.cases.train),
            num_validation_cases=len(self.cases.validation),
            cases_digest=self.cases.digest,
            previous_weights=dict(self.cases.previous_weights),
            pretrained=counters.pretrained,
            validation_patches=validation_patches,
            epochs=counters.epoch,
            steps=counters.step,
            seconds=round(used_s, 3),
            seconds_per_step=counters.step_s or None,
            best_epoch=counters.best_epoch,
            best_ema_pseudo_dice=counters.best_ema_pseudo_dice,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else runtime.peak_memory_bytes(),
            environment=self.environment,
        )
        write_run(self.folder, record)


def _pretrained(counters: Counters) -> dict[str, JsonValue]:
    """What the training began with, tensor by tensor."""
    return {} if counters.pretrained is None else {"pretrained": counters.pretrained.model_dump(mode="json")}
