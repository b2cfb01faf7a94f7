"""Steps whose loss or gradient is not finite: skipped, their batches kept for inspection, too many of them the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import nn

from autoseg.domain.values import Value
from autoseg.errors import TrainingDiverged
from autoseg.io.files import write_text
from autoseg.io.tensors import write_tensors
from autoseg.training.augment import Augmentation
from autoseg.training.batches import Batch, RawSample
from autoseg.training.checkpoint import Counters
from autoseg.training.diagnosis import diagnose
from autoseg.training.learner import StepOutcome
from autoseg.training.schedule import Pace

log = logging.getLogger("autoseg")

SCHEMA_VERSION = 1

BAD_STEPS_FOLDER = "diverged"

MOST_BAD_STEPS = 3
"""So many within `WINDOW_STEPS` end the training. Source: decision 27."""

WINDOW_STEPS = 25
"""A tenth of an epoch of nnU-Net's. Source: decision 27."""

KEPT_BATCHES = 6
"""The newest batches that are kept: those that ended a training, and as many before."""


class BadSample(Value):
    """One sample of the batch.

    Attributes:
        case: Its case.
        start: First voxel of the patch in the cached case; negative where it is padded.
        size: Voxels of the patch.
        forced_class: See `SampleSpec`.
        augmentation: What was drawn for it; what did not happen is left out.
    """

    case: str
    start: tuple[int, int, int]
    size: tuple[int, int, int]
    forced_class: int | None
    augmentation: dict[str, JsonValue]


class BadStep(Value):
    """step_N.json: what is known of a step that was skipped; step_N.safetensors holds its batch.

    Attributes:
        step: Steps done before.
        loss: As text, because JSON has no words for what is not finite.
        gradient_norm: Likewise.
        findings: Where it began, by `diagnosis`.
        samples: As in the batch.
    """

    schema_version: int = SCHEMA_VERSION
    step: int
    loss: str
    gradient_norm: str
    learning_rate: float
    momentum: float
    precision: str
    findings: tuple[str, ...]
    samples: tuple[BadSample, ...]


@dataclass(frozen=True, slots=True)
class BadSteps:
    """Deals with the bad steps of one training.

    Attributes:
        fold_folder: Batches are kept in its folder `BAD_STEPS_FOLDER`.
        where: Fold and configuration, for messages.
        network: With the weights that the step computed with, which it did not change.
        device: Where the network is.
        precision: Of the forward pass.
    """

    fold_folder: Path
    where: str
    network: nn.Module
    device: torch.device
    precision: str

    def note(
        self, counters: Counters, samples: Sequence[RawSample], batch: Batch, outcome: StepOutcome, pace: Pace
    ) -> Counters:
        """Keep what a bad step saw, and count it.

        Args:
            counters: Before the step.
            samples: What was read for it.
            batch: What it computed with.
            outcome: What it gave.
            pace: Its learning rate and momentum.

        Returns:
            The counters with this step among the bad ones, otherwise as they were.

        Raises:
            TrainingDiverged: It is one too many.
        """
        step = counters.step
        findings = diagnose(
            self.network,
            batch,
            loss=outcome.loss,
            gradient_norm=outcome.gradient_norm,
            device=self.device,
            precision=self.precision,
        )
        record = BadStep(
            step=step,
            loss=str(outcome.loss),
            gradient_norm=str(outcome.gradient_norm),
            learning_rate=pace.rate,
            momentum=pace.momentum,
            precision=self.precision,
            findings=findings,
            samples=tuple(_of_sample(sample) for sample in samples),
        )
        self._keep(record, batch)
        recent = (*counters.bad_steps, step)[-MOST_BAD_STEPS:]
        if len(recent) == MOST_BAD_STEPS and step - recent[0] < WINDOW_STEPS:
            raise self._diverged(recent, findings)
        log.warning(
            "%s: step %d is skipped, its loss or gradient is not finite (%s); its batch is kept in %s",
            self.where,
            step,
            "; ".join(findings),
            self._file(step),
        )
        update = {
            "bad_steps": recent,
            "num_bad_steps": counters.num_bad_steps + 1,
            "epoch_bad_steps": counters.epoch_bad_steps + 1,
        }
        return counters.model_copy(update=update)

    def _file(self, step: int) -> Path:
        return self.fold_folder / BAD_STEPS_FOLDER / f"step_{step}.safetensors"

    def _keep(self, record: BadStep, batch: Batch) -> None:
        """Write the batch and what is known of it, and remove the oldest; a full disk costs the file alone."""
        path = self._file(record.step)
        tensors = {"images": batch.images, "labels": batch.labels}
        if batch.annotated is not None:
            tensors["annotated"] = batch.annotated
        try:
            write_tensors(path, tensors)
            write_text(path.with_suffix(".json"), record.to_json())
        except OSError as problem:
            log.warning("the batch of step %d cannot be kept: %s", record.step, problem)
            return
        kept = sorted(path.parent.glob("step_*.json"), key=lambda item: int(item.stem.removeprefix("step_")))
        for old in kept[:-KEPT_BATCHES]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def _diverged(self, steps: Sequence[int], findings: Sequence[str]) -> TrainingDiverged:
        files = [self._file(step) for step in steps]
        names = ", ".join(path.name for path in files if path.is_file())
        return TrainingDiverged(
            f"training of {self.where} diverged at step {steps[-1]}: the loss or its gradient was not finite in "
            f"{len(steps)} of the last {steps[-1] - steps[0] + 1} steps",
            hint=(
                "The weights of the last checkpoint are good. Look at the cases named above with `autoseg check`, and "
                "at the JSON files beside the batches, which name patches and augmentation. If they are sound, go on "
                "with a lower learning rate (--set training.learning_rate=1e-3) or with --precision fp32."
            ),
            problems=[*findings, f"batches in {files[0].parent}: {names or 'none could be written'}"],
        )


def _of_sample(sample: RawSample) -> BadSample:
    spec = sample.spec
    return BadSample(
        case=spec.case_id,
        start=spec.start,
        size=spec.size,
        forced_class=spec.forced_class,
        augmentation=_drawn(sample.augmentation),
    )


def _drawn(augmentation: Augmentation) -> dict[str, JsonValue]:
    """What happens to a sample, as plain JSON."""
    values = {field.name: getattr(augmentation, field.name) for field in fields(augmentation)}
    return {name: _plain(value) for name, value in values.items() if not _is_nothing(value)}


def _is_nothing(value: Any) -> bool:
    return value is None or (not isinstance(value, np.ndarray) and not value)


def _plain(value: Any) -> JsonValue:
    if isinstance(value, np.ndarray):
        plain: JsonValue = value.tolist()
        return plain
    return list(value) if isinstance(value, tuple) else value
