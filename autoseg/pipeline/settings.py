"""Settings of a file with the command line's options on top."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from autoseg.config import Settings, load_settings, parse_additions, parse_assignments
from autoseg.domain.values import Value
from autoseg.errors import ConfigError

PATIENTS_KEY = "splits.patients"
"""With --set: whether names tell patients ("names") or only given ones count ("given")."""

V = TypeVar("V", bound=Value)


def _updated(value: V, changes: dict[str, Any], where: str) -> V:
    return type(value).from_json(json.dumps(value.model_dump(mode="json") | changes), where, ConfigError)


def resolve_settings(
    config_file: Path | None,
    *,
    preset: str | None = None,
    vram: str | None = None,
    step_time: str | None = None,
    additions: Sequence[str] = (),
    assignments: Sequence[str] = (),
    epochs: int | None = None,
    time_budget: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int | None = None,
    log: Sequence[str] = (),
    pretrained: Path | None = None,
) -> Settings:
    """Settings of the file with the command line's options on top.

    Raises:
        ConfigError: Unknown keys, wrong values, or both `epochs` and `time_budget`.
    """
    settings = load_settings(config_file)
    overrides = {**settings.plan.overrides, **dict(parse_assignments(assignments))}
    planning: dict[str, Any] = {"overrides": overrides}
    if PATIENTS_KEY in overrides:
        planning["patients"] = overrides.pop(PATIENTS_KEY)  # of the splits, which are no part of a plan
    training: dict[str, Any] = {}
    if preset is not None:
        planning["preset"] = preset
    if vram is not None:
        planning["vram_gb"] = vram
    if step_time is not None:
        planning["step_seconds"] = step_time
    if additions:
        planning["configurations"] = {**settings.plan.configurations, **parse_additions(additions)}
    if epochs is not None and time_budget is not None:
        raise ConfigError("--epochs and --time-budget exclude each other", hint="Give one of them.")
    if epochs is not None:
        training |= {"epochs": epochs, "time_budget_s": None}
    if time_budget is not None:
        training |= {"time_budget_s": time_budget, "epochs": None}
    if device != "auto":
        training["device"] = device
    if precision != "auto":
        training["precision"] = precision
    if seed is not None:
        training["seed"] = seed
    if log:
        training["log"] = list(dict.fromkeys(log))
    if pretrained is not None:
        training["pretrained"] = str(pretrained)
    return Settings(plan=_updated(settings.plan, planning, "plan"), train=_updated(settings.train, training, "train"))
