"""Configurations that people add to a plan: copies of planned ones, and those that stay when planning again.

A planned configuration is made anew each time; one of another name is somebody's own work and is never thrown away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from autoseg.domain.plan import PLANNED_NAMES, Configuration, Decision, Override, Plan
from autoseg.domain.values import validation_problems
from autoseg.errors import ConfigError, PlanError
from autoseg.planning.wording import shape

_RULE = (
    "A configuration with a name of its own was added by people. Planning again checks that it is possible and leaves "
    "it as it is; it plans no such configuration itself."
)


def keep_added(planned: Plan, earlier: Mapping[str, Any], where: str) -> Plan:
    """The new plan with the configurations that people added to the one before.

    Args:
        planned: The new plan.
        earlier: The content of the plan file before; may be of an older version, or hold what is not valid.
        where: That file, for messages.

    Raises:
        PlanError: Something that was added is not valid, or does not fit the new plan; every problem is listed.
    """
    found = earlier.get("configurations")
    names = [name for name in found if name not in PLANNED_NAMES] if isinstance(found, dict) else []
    if not isinstance(found, dict) or not names:
        return planned
    problems: list[str] = []
    kept: dict[str, Configuration] = {}
    for name in names:
        try:
            kept[name] = Configuration.model_validate_json(json.dumps(found[name]))
        except ValidationError as problem:
            problems.extend(f"{name}.{line}" for line in validation_problems(problem))
    if not problems:
        try:
            return _with_added(planned, kept, _overrides_of(earlier, names), f"kept from {where}")
        except ValidationError as problem:
            problems.extend(validation_problems(problem))
    raise PlanError(
        f"{where} holds configurations that were added by hand and do not fit any more: {', '.join(names)}",
        problems=problems,
        hint="Correct them there or take them out, or plan into another folder.",
    )


def add_copies(plan: Plan, copies: Mapping[str, str]) -> Plan:
    """A plan with copies of its configurations under new names, to be changed by overrides.

    Args:
        plan: As planned.
        copies: New names, each with the configuration that it begins as. A name that was added before is made anew.

    Raises:
        ConfigError: A name is one that planning uses itself, or the copied configuration does not exist.
    """
    for name, source in copies.items():
        if name in PLANNED_NAMES:
            raise ConfigError(
                f"{name} is planned by autoseg and cannot be added", hint="Choose a name of your own, such as 3d_small."
            )
        if source not in plan.configurations:
            raise ConfigError(
                f"{name} cannot be a copy of {source!r}: there is no such configuration",
                hint=f"The plan has {', '.join(plan.configurations)}.",
            )
        try:
            plan = _with_added(plan, {name: plan.configurations[source]}, (), f"a copy of {source}")
        except ValidationError as problem:
            raise ConfigError(f"{name} cannot be added", problems=validation_problems(problem)) from None
    return plan


def _overrides_of(earlier: Mapping[str, Any], names: list[str]) -> tuple[Override, ...]:
    """What was set by hand in these configurations; the record of it stays with them."""
    listed = earlier.get("overrides")
    found = []
    for item in listed if isinstance(listed, list) else []:
        try:
            record = Override.model_validate(item)
        except ValidationError:
            continue  # only a note; the value itself is in the configuration and was checked
        if record.key.partition(".")[0] in names:
            found.append(record)
    return tuple(found)


def _with_added(plan: Plan, added: Mapping[str, Configuration], overrides: tuple[Override, ...], origin: str) -> Plan:
    """The plan with further configurations, as a whole checked again; ValidationError where they do not fit."""
    data = plan.model_dump(mode="json")
    data["configurations"] |= {name: item.model_dump(mode="json") for name, item in added.items()}
    decisions = [item for item in plan.decisions if item.configuration not in added]
    decisions.extend(_decision(name, item, origin) for name, item in added.items())
    records = {item.key: item for item in plan.overrides if item.key.partition(".")[0] not in added}
    records |= {item.key: item for item in overrides}
    data |= {
        "decisions": [item.model_dump(mode="json") for item in decisions],
        "overrides": [item.model_dump(mode="json") for item in records.values()],
    }
    return Plan.model_validate_json(json.dumps(data))


def _decision(name: str, item: Configuration, origin: str) -> Decision:
    return Decision(
        configuration=name,
        topic="added by hand",
        rule=_RULE,
        inputs=origin,
        result=f"patch {shape(item.network.patch_size)}, batch size {item.training.batch_size}",
        would_change="Changing it in plan.json or with --set, or taking it out of plan.json.",
    )
