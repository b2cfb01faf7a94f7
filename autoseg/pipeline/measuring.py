"""`plan --measure`: one real training step, and a smaller plan where that step does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from autoseg import machine
from autoseg.domain.plan import Configuration, Decision, Plan
from autoseg.errors import PlanError
from autoseg.pipeline.forecast import Forecast, MeasuredStep, Measurements, predicted_training
from autoseg.pipeline.host import GB, HOST_MEMORY_FRACTION, Target
from autoseg.planning.wording import gigabytes
from autoseg.training.trial import TIME_LIMIT_S, TrialRequest, TrialResult, run_trial

log = logging.getLogger("autoseg")

MOST_TRIALS = 4
"""A plan that still does not fit after so many measurements and corrections is given up."""

_SHRINK = 0.95
"""Factor of one step towards a smaller budget."""

_SMALLEST_FACTOR = 0.02
"""Below this part of the budget nothing is looked for."""

_DIGITS_GB = 3
"""Digits after the point of such a budget: MB."""

_MARGIN = 0.97
"""A corrected plan is to take this part of the budget, so that the next measurement does not miss it by a hair."""

_NOT_MEASURED_RATIO = 1.1
"""A step that ran out of memory is taken to need at least so many times what there was."""

_RULE = (
    "A real training step with the planned batch, on made-up images, shows what the plan takes on this machine. Where "
    "that is more than the budget, it is planned again for less: a smaller batch, and when that is as small as it may "
    "be a smaller patch."
)


def with_measured_step(
    planned: Plan,
    plan_for: Callable[[float], Plan],
    target: Target,
    measured: Measurements,
    earlier: Forecast | None = None,
) -> tuple[Plan, Measurements]:
    """Try a step of the default configuration, and plan again until it fits the budget.

    Args:
        planned: The plan.
        plan_for: Plans again for so many GB.
        target: Where.
        measured: What is known of this machine already.
        earlier: A forecast of this run, made here, that models were trained by since; where it holds a measured step
            for the same budget, that step counts and none is tried, so that the plan stays that of the models.

    Returns:
        The plan, with the reason why it stayed or became smaller, and everything measured.

    Raises:
        PlanError: No plan fits, or values set by hand keep it from becoming smaller.
    """
    name, budget_gb = planned.default_configuration, planned.vram_gb
    found, step = _measured_before(planned, plan_for, earlier), None
    told: tuple[str, ...] = ()
    if found is not None and earlier is not None:
        step = earlier.configurations[name].measured
        told = ("as measured when it was planned before",)
    else:
        found, trial, told = _fit_to_memory(planned, plan_for, target)
        step = MeasuredStep.of(trial)
    reason = Decision(
        configuration=name,
        topic="measured memory",
        rule=_RULE,
        inputs=f"budget {gigabytes(budget_gb)}; on {target.device.type} in {target.precision}: {'; then '.join(told)}",
        result=(
            "the plan stays as it is" if found.vram_gb == budget_gb else f"planned as for {gigabytes(found.vram_gb)}"
        ),
        would_change="Another --vram, device or precision; planning without --measure.",
    )
    found = found.model_copy(update={"decisions": (*found.decisions, reason)})
    return found, measured if step is None else replace(measured, steps={name: step})


def _measured_before(planned: Plan, plan_for: Callable[[float], Plan], earlier: Forecast | None) -> Plan | None:
    """The plan that a step was measured of before, for the same budget; None where there is none."""
    if earlier is None or earlier.budget_gb != planned.vram_gb:
        return None
    part = earlier.configurations.get(planned.default_configuration)
    if part is None or part.measured is None:
        return None
    again = planned if earlier.planned_gb == planned.vram_gb else plan_for(earlier.planned_gb)
    return again if again.digest() == earlier.plan_digest else None


def _fit_to_memory(
    planned: Plan, plan_for: Callable[[float], Plan], target: Target
) -> tuple[Plan, TrialResult, tuple[str, ...]]:
    """The first plan of which a step fits, that step, and what each trial showed."""
    name, budget_gb = planned.default_configuration, planned.vram_gb
    limit = _limit_bytes(target)
    allowed = budget_gb * GB if limit is None else min(budget_gb * GB, limit)
    told: list[str] = []
    current, factor = planned, 1.0
    for _ in range(MOST_TRIALS):
        part = current.configurations[name]
        trial = _try(part, target, limit)
        told.append(_told(part, trial))
        log.info("%s, one training step: %s", name, told[-1])
        if trial.outcome != "out_of_memory" and (trial.memory_bytes or 0) <= allowed:
            return current, trial, tuple(told)
        predicted = predicted_training(part, target).total
        needed = trial.memory_bytes or max(predicted, allowed) * _NOT_MEASURED_RATIO
        smaller = _smaller(name, plan_for, budget_gb, factor, allowed / needed * predicted, target)
        if smaller is None:
            break
        current, factor = smaller
    raise PlanError(
        f"no plan of {name} was found that takes at most {gigabytes(allowed / GB)} in a real training step",
        problems=told,
        hint="Give a larger --vram, stop what else uses the memory, or take back what was set by hand (--set) and "
        "keeps the plan from shrinking.",
    )


def _limit_bytes(target: Target) -> int | None:
    """What the trial may take; on a GPU the card itself is the limit."""
    found = machine.device_memory_bytes(target.device)
    if found is None:
        return None
    return found[0] if target.device.type == "cuda" else round(HOST_MEMORY_FRACTION * found[0])


def _try(part: Configuration, target: Target, limit: int | None) -> TrialResult:
    request = TrialRequest(
        network=part.network,
        training=part.training,
        device=str(target.device),
        precision=target.precision,
        memory_limit_bytes=limit,
    )
    return run_trial(request)


def _smaller(
    name: str, plan_for: Callable[[float], Plan], budget_gb: float, factor: float, wanted: float, target: Target
) -> tuple[Plan, float] | None:
    """The first smaller plan that is predicted to take at most `wanted` bytes, and its part of the budget."""
    while factor > _SMALLEST_FACTOR:
        factor *= _SHRINK
        try:
            smaller = plan_for(round(budget_gb * factor, _DIGITS_GB))
        except PlanError:  # the smallest patch is too large for so little
            return None
        part = smaller.configurations.get(name)
        if part is not None and predicted_training(part, target).total <= _MARGIN * wanted:
            return smaller, factor
    return None


def _told(part: Configuration, trial: TrialResult) -> str:
    """What one trial showed."""
    patch = "×".join(map(str, part.network.patch_size))
    what = f"{part.training.batch_size} patches of {patch}"
    if trial.outcome == "out_of_memory":
        return f"{what} do not fit"
    if trial.outcome == "too_slow":
        return f"{what}: two steps take longer than {TIME_LIMIT_S:.0f} s, not measured"
    if trial.memory_bytes is None:
        return f"{what}: this system does not tell the memory"
    return f"{what} take {gigabytes(trial.memory_bytes / GB)}"
