"""Values of a plan that people set by hand: checked like planned ones, and visible in the plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError

from autoseg.domain.plan import Configuration, Override, Plan
from autoseg.domain.values import EVERY_FIELD, validation_problems
from autoseg.errors import ConfigError, PlanError

_NUM_SUGGESTIONS = 3


class _Target(NamedTuple):
    """A place in a plan: configuration and the keys below it."""

    configuration: str
    path: tuple[str, ...]

    @property
    def key(self) -> str:
        return ".".join((self.configuration, *self.path))


def _keys(data: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key below nested dictionaries."""
    for name, value in data.items():
        key = f"{prefix}{name}"
        yield key
        if isinstance(value, dict):
            yield from _keys(value, f"{key}.")


def _child(data: Any, name: str) -> Any:
    """The entry of a dictionary or of a list; KeyError when there is none."""
    if isinstance(data, list):
        if not name.isdecimal() or int(name) >= len(data):
            raise KeyError(name)
        return data[int(name)]
    if not isinstance(data, dict):
        raise KeyError(name)
    return data[name]


def _lookup(data: Any, path: Sequence[str]) -> Any:
    for name in path:
        data = _child(data, name)
    return data


def _assign(data: Any, path: Sequence[str], value: Any) -> None:
    parent = _lookup(data, path[:-1])
    parent[int(path[-1]) if isinstance(parent, list) else path[-1]] = value


def _unknown(key: str, configurations: dict[str, Any]) -> ConfigError:
    known = list(_keys(configurations))
    everywhere = sorted({name.partition(".")[2] for name in known if "." in name})
    near = get_close_matches(key, [*known, *everywhere], n=_NUM_SUGGESTIONS)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(
        f"unknown plan key {key!r}",
        hint=f"{meant}Keys look like 3d_fullres.network.patch_size, or training.learning_rate for every configuration.",
    )


def _targets(key: str, configurations: dict[str, Any]) -> tuple[_Target, ...]:
    """The places a key means: one, or one in each configuration that has it.

    Raises:
        ConfigError: The key is unknown somewhere it should be.
    """
    first, *rest = key.split(".")
    found: tuple[_Target, ...]
    if first in configurations and rest:
        found = (_Target(first, tuple(rest)),)
    elif first in Configuration.model_fields and rest:
        # Only `sides` is not in every configuration: not in one whose slices hold no axis from left to right.
        found = tuple(
            _Target(name, (first, *rest)) for name, values in configurations.items() if values[first] is not None
        )
        if not found:
            raise ConfigError(
                f"no configuration has {first!r}: the labels come in no left/right pairs",
                hint='Pairs that the names do not show are declared with "pairs" in the description of the data set.',
            )
    else:
        raise _unknown(key, configurations)
    for target in found:
        try:
            value = _lookup(configurations[target.configuration], target.path)
        except KeyError:
            raise _unknown(key, configurations) from None
        if isinstance(value, dict):
            raise ConfigError(
                f"plan key {key!r} is a group, not a value",
                hint=f"It holds {', '.join(f'{key}.{name}' for name in value)}.",
            )
    return found


def apply_overrides(plan: Plan, settings: Sequence[tuple[str, Any]]) -> Plan:
    """A plan with values set by hand, checked as a whole and recorded in `overrides`.

    Args:
        plan: As planned, or with earlier overrides.
        settings: Keys and values. ``3d_fullres.network.patch_size`` names one place; a key without a configuration,
            such as ``training.learning_rate``, means every configuration. A number picks an entry of a list:
            ``2d.preprocess.normalization.0.scheme``. A later setting wins.

    Raises:
        ConfigError: A key is unknown (near ones are named) or is not a single value.
        PlanError: The plan would be impossible; every problem is listed.
    """
    if not settings:
        return plan
    data = plan.model_dump(mode="json", context=EVERY_FIELD)
    configurations = data["configurations"]
    before = json.loads(json.dumps(configurations))
    changed: dict[_Target, None] = {}
    for key, value in settings:
        for target in _targets(key, configurations):
            _assign(configurations[target.configuration], target.path, value)
            changed[target] = None
    try:
        checked = Plan.model_validate(data)
    except ValidationError as problem:
        keys = ", ".join(key for key, _ in settings)
        raise PlanError(f"the plan is impossible with {keys}", problems=validation_problems(problem)) from None
    after = checked.model_dump(mode="json", context=EVERY_FIELD)["configurations"]
    records = {item.key: item for item in plan.overrides}
    for target in changed:
        planned = json.dumps(_lookup(before[target.configuration], target.path))
        if target.key in records:
            planned = records[target.key].planned
        value = json.dumps(_lookup(after[target.configuration], target.path))
        records[target.key] = Override(key=target.key, planned=planned, value=value)
    return checked.model_copy(update={"overrides": tuple(records.values())})
