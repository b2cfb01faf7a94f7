"""What a plan will cost on this machine, said before anything is trained: memory, disk, time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Self

import torch

from autoseg import machine
from autoseg.domain.fingerprint import Fingerprint
from autoseg.domain.plan import Configuration, Plan
from autoseg.domain.values import Value
from autoseg.errors import ConfigError
from autoseg.inference.columns import make_columns
from autoseg.inference.fitting import default_tile_batch, sums_dtype
from autoseg.inference.sliding_window import make_grid
from autoseg.io.files import read_text
from autoseg.io.run_folder import RunFolder
from autoseg.network.summary import summarise
from autoseg.pipeline.disk import cached_bytes, prepared_shapes
from autoseg.pipeline.host import Target
from autoseg.planning.kept import FLOAT32_BYTES, HALF_BYTES, is_known, loss_bytes
from autoseg.planning.memory import (
    PredictionMemory,
    TrainingMemory,
    count_weights,
    prediction_memory,
    training_memory,
)
from autoseg.preprocessing.resample import GridChange
from autoseg.training.trial import TrialResult
from autoseg.training.validation import FORWARD_FRACTION

SCHEMA_VERSION = 1


class MeasuredStep(Value):
    """What a real training step took.

    Attributes:
        memory_bytes: At its peak; None where the system does not tell.
        step_seconds: Reading ahead, augmentation and learning.
        num_steps: Steps that the time is the median of.
        num_threads: On the CPU.
    """

    memory_bytes: int | None
    step_seconds: float
    num_steps: int
    num_threads: int

    @classmethod
    def of(cls, trial: TrialResult) -> Self | None:
        """Of a trial; None where it did not end well."""
        if trial.step_seconds is None:
            return None
        return cls(
            memory_bytes=trial.memory_bytes,
            step_seconds=trial.step_seconds,
            num_steps=trial.num_steps,
            num_threads=trial.num_threads,
        )


class ConfigurationForecast(Value):
    """What one configuration will cost.

    Attributes:
        training: Predicted memory of a training step.
        prediction: Predicted memory of segmenting a typical image (of median size).
        cache_bytes: Disk for the preprocessed cases; configurations that preprocess alike share them.
        measured: A real step; None where none was done.
        epoch_seconds: A nominal epoch with its validation patches; None where no step was timed.
        training_seconds: The default training of one fold: its time budget on a CPU, else its epochs where a step was
            timed, else None.
        training_steps: Of that training, where they are known.
    """

    training: TrainingMemory
    prediction: PredictionMemory
    cache_bytes: int
    measured: MeasuredStep | None = None
    epoch_seconds: float | None = None
    training_seconds: float | None = None
    training_steps: int | None = None


class Forecast(Value):
    """What a plan will cost on one machine.

    Attributes:
        plan_digest: Of the plan.
        device: "cpu", "cuda", "cuda:1", "mps".
        device_name: For a person.
        precision: Of training and prediction there.
        num_threads: That compute on the CPU.
        budget_gb: Memory that was asked for.
        planned_gb: Memory that it was planned for: less where a measured step took more than the budget.
        memory_free_bytes: Of the device, when this was written; None where the system does not tell.
        memory_total_bytes: Likewise.
        disk_free_bytes: Where the run folder is.
        cache_bytes: The most disk that the preprocessed cases of all configurations can take.
        flops_per_second: Measured speed, where the plan needed it.
        configurations: By name.
    """

    schema_version: int = SCHEMA_VERSION
    plan_digest: str
    device: str
    device_name: str
    precision: str
    num_threads: int
    budget_gb: float
    planned_gb: float
    memory_free_bytes: int | None
    memory_total_bytes: int | None
    disk_free_bytes: int
    cache_bytes: int
    flops_per_second: float | None
    configurations: dict[str, ConfigurationForecast]


@dataclass(frozen=True, slots=True)
class Measurements:
    """What was measured of a plan on this machine.

    Attributes:
        steps: Of configurations, by name.
        flops_per_second: Speed of the device; None where nothing needed it.
    """

    steps: Mapping[str, MeasuredStep] = field(default_factory=dict)
    flops_per_second: float | None = None


def read_forecast(run_folder: RunFolder) -> Forecast:
    """What planning wrote.

    Raises:
        ConfigError: Missing or not valid.
    """
    return Forecast.from_json(read_text(run_folder.forecast_file), run_folder.forecast_file)


def earlier_forecast(run_folder: RunFolder, target: Target) -> Forecast | None:
    """What an earlier planning wrote on this machine for the same device and precision; None where there is none.

    What was measured then holds still, and planning again with it gives the same plan again.
    """
    try:
        found = read_forecast(run_folder)
    except ConfigError:
        return None
    host = (str(target.device), target.name, target.precision, torch.get_num_threads())
    return found if (found.device, found.device_name, found.precision, found.num_threads) == host else None


def make_forecast(
    planned: Plan, fingerprint: Fingerprint, target: Target, measured: Measurements, *, budget_gb: float, folder: Path
) -> Forecast:
    """Everything that can be said before a training.

    Args:
        planned: The plan.
        fingerprint: What it was made from.
        target: Where it will run.
        measured: What was tried.
        budget_gb: What was asked for.
        folder: The run folder; must exist.
    """
    memory = machine.device_memory_bytes(target.device)
    parts = {
        name: _of_configuration(part, fingerprint, target, measured.steps.get(name))
        for name, part in planned.configurations.items()
    }
    caches = {part.preprocess.digest(): parts[name].cache_bytes for name, part in planned.configurations.items()}
    return Forecast(
        plan_digest=planned.digest(),
        device=str(target.device),
        device_name=target.name,
        precision=target.precision,
        num_threads=torch.get_num_threads(),
        budget_gb=budget_gb,
        planned_gb=planned.vram_gb,
        memory_free_bytes=memory[0] if memory else None,
        memory_total_bytes=memory[1] if memory else None,
        disk_free_bytes=shutil.disk_usage(folder).free,
        cache_bytes=sum(caches.values()),
        flops_per_second=measured.flops_per_second,
        configurations=parts,
    )


def predicted_training(part: Configuration, target: Target) -> TrainingMemory:
    """Memory of a training step of a configuration."""
    known = None if is_known(part.network) else _counted_by_running(part, target.precision)
    return training_memory(part.network, part.training, target.precision, target.device.type, known)


def _counted_by_running(part: Configuration, precision: str) -> tuple[int, int]:
    """Weights, and bytes kept for the backward pass, of a network whose layers the closed form does not know."""
    summary, batch_size = summarise(part.network), part.training.batch_size
    features, weights = summary.activation_bytes * batch_size, 0
    if precision != "fp32":
        features, weights = features * HALF_BYTES // FLOAT32_BYTES, summary.parameters * HALF_BYTES
    loss = loss_bytes(part.network, batch_size, batch_dice=part.training.batch_dice)
    return summary.parameters, features + weights + loss


def _of_configuration(
    part: Configuration, fingerprint: Fingerprint, target: Target, measured: MeasuredStep | None
) -> ConfigurationForecast:
    training, epoch_s = part.training, None
    if measured is not None:
        steps = training.steps_per_epoch + training.validation_steps_per_epoch * FORWARD_FRACTION
        epoch_s = steps * measured.step_seconds
    training_s = None if epoch_s is None else training.num_epochs * epoch_s
    num_steps: int | None = training.num_epochs * training.steps_per_epoch
    if target.device.type == "cpu":
        training_s = training.cpu_time_budget_s
        num_steps = None if epoch_s is None else round(training_s / epoch_s * training.steps_per_epoch)
    return ConfigurationForecast(
        training=predicted_training(part, target),
        prediction=_predicted_prediction(part, fingerprint, target),
        cache_bytes=cache_bytes(part, fingerprint),
        measured=measured,
        epoch_seconds=epoch_s,
        training_seconds=training_s,
        training_steps=num_steps,
    )


def _predicted_prediction(part: Configuration, fingerprint: Fingerprint, target: Target) -> PredictionMemory:
    """Of an image of median size."""
    shapes = sorted(prepared_shapes(part.preprocess, fingerprint), key=prod)
    network = part.network
    grid = make_grid(shapes[len(shapes) // 2], network.patch_size, part.inference.overlap)
    # As if nothing were resampled, which adds two rows of the image.
    unchanged = GridChange(grid.shape, grid.shape, part.preprocess.logits_order)
    columns = make_columns(grid, unchanged, network.num_classes, sums_dtype(target.precision).itemsize)
    return prediction_memory(
        network,
        count_weights(network) if is_known(network) else summarise(network).parameters,
        grid.padded_shape,
        max(column.summed_voxels(grid) for column in columns),
        tile_batch=default_tile_batch(network.patch_size, target.device),
        precision=target.precision,
        device_type=target.device.type,
    )


def cache_bytes(part: Configuration, fingerprint: Fingerprint) -> int:
    """The most disk that the preprocessed cases can take; compressed, they take less."""
    total = sum(cached_bytes(part.preprocess, fingerprint))
    # A fingerprint may state more cases than it holds measurements of.
    return round(total * max(1.0, fingerprint.num_training_cases / len(fingerprint.shapes)))
