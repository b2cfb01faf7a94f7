"""The data set, the costs and the provenance of a run as titles and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.report.collect import ConfigurationResult, RunResults
from autoseg.report.wording import gigabytes, minutes, number, times
from autoseg.training.records import RunRecord

SHOWN_PACKAGES = ("python", "torch", "monai", "numpy", "scipy", "nibabel", "SimpleITK", "safetensors")

_MILLION = 1e6


@dataclass(frozen=True, slots=True)
class PlannedCost:
    """What the plan foresaw for one configuration, before anything was trained.

    Attributes:
        device: In words.
        training_bytes: Of a training step at its peak.
        prediction_bytes: Of predicting an image of median size.
        cache_bytes: Disk for preprocessed cases.
        step_seconds: Of a training step; None where none was timed.
        training_seconds: Of the default training of one fold; None where it is not known.
    """

    device: str
    training_bytes: int
    prediction_bytes: int
    cache_bytes: int
    step_seconds: float | None = None
    training_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class CostRow:
    """One row of the table of costs: what it is, foreseen, measured; "–" where there is nothing."""

    configuration: str
    title: str
    foreseen: str
    measured: str


def is_flat(results: RunResults) -> bool:
    """Whether all images are pictures of one slice."""
    return all(shape[0] == 1 for shape in results.fingerprint.shapes)


def data_facts(results: RunResults) -> Iterator[tuple[str, str]]:
    """The data set at a glance."""
    fingerprint, dataset = results.fingerprint, results.dataset
    spacings, shapes = np.array(fingerprint.spacings_mm), np.array(fingerprint.shapes)
    patients = {case.patient for case in dataset.cases if case.patient is not None}
    yield "Labelled cases", f"{len(dataset.cases)}" + (f" of {len(patients)} patients" if patients else "")
    yield "Channels", ", ".join(channel.name for channel in dataset.channels)
    yield "Median size (voxels, Z × Y × X)", times(np.median(shapes, axis=0).round().astype(int))
    yield "Range of sizes", f"{times(shapes.min(axis=0))} to {times(shapes.max(axis=0))}"
    yield "Median spacing (mm, Z × Y × X)", times(np.median(spacings, axis=0))
    yield "Range of spacings", f"{times(spacings.min(axis=0))} to {times(spacings.max(axis=0))}"
    yield "Size after cropping to non-zero", f"{fingerprint.median_relative_size_fraction:.0%} of the image (median)"
    for name, stats in zip(fingerprint.channels, fingerprint.intensities, strict=True):
        if stats is None:
            yield f"Intensity in the foreground, {name}", "not measured"
            continue
        yield (
            f"Intensity in the foreground, {name}",
            f"{stats.mean:.4g} ± {stats.std:.4g} (0.5 to 99.5 %: {stats.percentile_00_5:.4g} to "
            f"{stats.percentile_99_5:.4g})",
        )


def class_presence(results: RunResults) -> tuple[tuple[str, str, str, str], ...]:
    """Per class: its name, its label values, in how many of the measured cases it occurs, its median voxels there."""
    cases = results.fingerprint.cases
    rows = []
    for index, item in enumerate(results.plan.labels.classes):
        counts = [case.class_voxels[index] for case in cases if index < len(case.class_voxels)]
        present = [count for count in counts if count]
        values = ", ".join(str(value) for value in item.values)
        where = f"{len(present)} of {len(cases)}" if cases else "not measured"
        rows.append((item.name, values, where, f"{np.median(present):,.0f}" if present else "–"))
    return tuple(rows)


def cost_rows(results: RunResults, planned: Mapping[str, PlannedCost]) -> tuple[CostRow, ...]:
    """Memory and time of every trained configuration, foreseen against measured."""
    rows: list[CostRow] = []
    for item in results.summary.configurations:
        if item.folds:
            rows += _costs(item, planned.get(item.name))
    return tuple(rows)


def _costs(item: ConfigurationResult, cost: PlannedCost | None) -> Iterator[CostRow]:
    records = [fold.training for fold in item.folds if fold.training is not None]
    peak = max((record.peak_memory_bytes for record in records), default=0)
    steps = [record.seconds_per_step for record in records if record.seconds_per_step is not None]
    seconds = [record.seconds for record in records]
    predicted = [(fold.predict_s, fold.num_cases) for fold in item.folds if fold.predict_s and fold.num_cases]
    a_case = sum(one for one, _ in predicted) / sum(count for _, count in predicted) if predicted else None
    yield CostRow(
        item.name,
        "Memory of training (GB)",
        gigabytes(cost.training_bytes if cost else None),
        gigabytes(peak) + (" (whole process)" if records and records[0].device == "cpu" else ""),
    )
    yield CostRow(
        item.name,
        "Seconds a training step",
        number(cost.step_seconds if cost else None, 2),
        number(float(np.mean(steps)) if steps else None, 2),
    )
    yield CostRow(
        item.name,
        "Minutes of training a fold",
        minutes(cost.training_seconds if cost else None),
        minutes(float(np.mean(seconds)) if seconds else None),
    )
    yield CostRow(item.name, "Memory of prediction (GB)", gigabytes(cost.prediction_bytes if cost else None), "–")
    yield CostRow(item.name, "Seconds to predict a case", "–", number(a_case, 2))
    yield CostRow(item.name, "Preprocessed cases on disk (GB)", gigabytes(cost.cache_bytes if cost else None), "–")


def records_of(results: RunResults) -> tuple[RunRecord, ...]:
    """Of every training that has one."""
    folds = [fold for item in results.summary.configurations for fold in item.folds]
    return tuple(fold.training for fold in folds if fold.training is not None)


def provenance(results: RunResults) -> Iterator[tuple[str, str]]:
    """What made these numbers: versions, seeds, machines, digests."""
    records = records_of(results)
    yield "autoseg", results.summary.autoseg_version
    yield "Plan digest", results.summary.plan_digest
    yield "Fingerprint digest", results.summary.fingerprint_digest
    yield "Preset", f"{results.plan.preset}, {results.plan.vram_gb:g} GB"
    if not records:
        return
    environments = [record.environment for record in records]
    yield "Seeds", _different(str(record.seed) for record in records)
    yield "Devices", _different(f"{record.device}, {record.precision}" for record in records)
    gpus = _different(", ".join(map(str, one.get("cuda_devices") or ())) for one in environments)
    if gpus:
        yield "GPUs", gpus
    for key, title in (("cpu", "Processor"), ("num_threads", "Threads"), ("system", "System")):
        found = _different(str(one[key]) for one in environments if one.get(key))
        if found:
            yield title, found
    for name in SHOWN_PACKAGES:
        found = _different(str(one["versions"][name]) for one in environments if name in one.get("versions", {}))
        if found:
            yield name, found
    plans = {record.plan_digest for record in records} - {results.summary.plan_digest}
    if plans:
        yield "Trained by other plans", ", ".join(sorted(plans))


def _different(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))


def total_training(results: RunResults) -> tuple[float, int]:
    """Seconds of all trainings together, and the highest peak memory of any."""
    records: Sequence[RunRecord] = records_of(results)
    return sum(record.seconds for record in records), max((record.peak_memory_bytes for record in records), default=0)
