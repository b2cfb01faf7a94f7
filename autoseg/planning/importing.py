"""Measurements that were taken elsewhere: autoseg's own fingerprint file, or nnU-Net's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from autoseg.domain.dataset import Channel
from autoseg.domain.fingerprint import SCHEMA_VERSION, ChannelIntensity, Fingerprint, Shape, Triple
from autoseg.domain.values import Value, validation_problems
from autoseg.errors import ConfigError, DatasetError


class _ForeignIntensity(Value):
    """nnU-Net's entry for a channel; other keys are its own business."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    mean: float
    median: float
    std: float
    minimum: float = Field(alias="min")
    maximum: float = Field(alias="max")
    percentile_00_5: float
    percentile_99_5: float


class _ForeignFingerprint(Value):
    """nnU-Net's `dataset_fingerprint.json`. Axes are in the order z, y, x, as ours."""

    model_config = ConfigDict(extra="ignore")

    spacings: tuple[Triple, ...]
    shapes_after_crop: tuple[Shape, ...]
    median_relative_size_after_cropping: float
    foreground_intensity_properties_per_channel: dict[str, _ForeignIntensity]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"the fingerprint {path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise DatasetError(f"the fingerprint {path} cannot be read as JSON: {problem}") from None
    if not isinstance(data, dict):
        raise DatasetError(f"the fingerprint {path} must hold keys and values, got {type(data).__name__}")
    return data


def _own(
    data: dict[str, Any], path: Path, channels: tuple[str, ...], num_classes: int, num_training: int
) -> Fingerprint:
    if data["schema_version"] != SCHEMA_VERSION:
        raise DatasetError(
            f"the fingerprint {path} has schema version {data['schema_version']}, this autoseg reads {SCHEMA_VERSION}",
            hint="Measure the data set again: run `autoseg plan` without --fingerprint.",
        )
    found = Fingerprint.from_json(json.dumps(data), path, DatasetError)
    problems = [
        f"{what}: got {got}, the data set has {expected}"
        for what, got, expected in (
            ("channels", found.channels, channels),
            ("classes with background", found.num_classes, num_classes),
            ("training cases", found.num_training_cases, num_training or found.num_training_cases),
        )
        if got != expected
    ]
    if problems:
        raise DatasetError(f"the fingerprint {path} was measured on another data set", problems=problems)
    return found


def _intensities(
    foreign: dict[str, _ForeignIntensity], path: Path, channels: tuple[str, ...]
) -> tuple[ChannelIntensity | None, ...]:
    """One entry a channel, in order; nnU-Net numbers them from 0. None where there are no numbers."""
    expected = [str(number) for number in range(len(channels))]
    if not set(foreign) <= set(expected):
        raise DatasetError(
            f"the fingerprint {path} has intensities of channels {', '.join(foreign)}; "
            f"expected {', '.join(expected)} for {', '.join(channels)}"
        )
    entries = [foreign.get(number) for number in expected]
    return tuple(
        ChannelIntensity(**entry.model_dump())
        if entry is not None and all(map(isfinite, entry.model_dump().values()))
        else None
        for entry in entries
    )


def import_fingerprint(
    path: Path, channels: Sequence[Channel | str], num_classes: int, num_training: int
) -> Fingerprint:
    """Read a fingerprint file; whose it is, is told by its keys.

    Args:
        path: autoseg's `fingerprint.json` or nnU-Net's `dataset_fingerprint.json`.
        channels: Of the data set it is for, in order (or their names).
        num_classes: Background and foreground classes.
        num_training: Training cases; 0 where the data set does not say, then as many as were measured.

    Raises:
        ConfigError: There is no such file.
        DatasetError: It is not a fingerprint, or not one of this data set.
    """
    path = Path(path)
    data = _read(path)
    names = tuple(item.name if isinstance(item, Channel) else item for item in channels)
    if "schema_version" in data:
        return _own(data, path, names, num_classes, num_training)
    try:
        foreign = _ForeignFingerprint.model_validate(data)
    except ValidationError as problem:
        raise DatasetError(
            f"{path} is neither autoseg's nor nnU-Net's fingerprint", problems=validation_problems(problem)
        ) from None
    if not foreign.spacings or len(foreign.spacings) != len(foreign.shapes_after_crop):
        raise DatasetError(
            f"the fingerprint {path} has {len(foreign.spacings)} spacings and {len(foreign.shapes_after_crop)} shapes; "
            "one of each is needed for every case"
        )
    return Fingerprint(
        channels=names,
        num_classes=num_classes,
        num_training_cases=num_training or len(foreign.spacings),
        spacings_mm=foreign.spacings,
        shapes=foreign.shapes_after_crop,
        median_relative_size_fraction=foreign.median_relative_size_after_cropping,
        intensities=_intensities(foreign.foreground_intensity_properties_per_channel, path, names),
    )
