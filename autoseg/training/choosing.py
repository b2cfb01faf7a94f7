"""How a training computes: precision, layout, compiler. Settled by its first start, by rules and by timing; then kept.

Source: docs/decisions/0025.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import count
from math import prod
from typing import get_args

import torch

from autoseg import runtime
from autoseg.domain.network_plan import Ints, NetworkPlan
from autoseg.domain.plan import Configuration
from autoseg.training import orders
from autoseg.training.batches import Batch
from autoseg.training.learner import Learner
from autoseg.training.records import Choices, Compile, Layout, RunRecord, TrainSettings, known_choices
from autoseg.training.speed import made_up_batch, made_up_regions

log = logging.getLogger("autoseg")

PROBE_S = 3.0
"""Seconds that the timing of precisions may take, about; the first pass of each is not counted in."""

PROBE_FRACTION = 0.01
"""Part of a time budget that it may take."""

PROBE_VOXELS = 32**3
"""Voxels of the batch that precisions are timed with: enough for the kernels, little enough for a slow machine."""

HOPELESS_FACTOR = 4.0
"""A first pass so many times slower than another precision's needs no second one."""

TIMED_S = 2.0
TIMED_CALLS = 8
"""Each way of computing on a GPU is timed for about so long, after WARM_UP_CALLS; at most so many calls. The quickest
call counts, the one that others disturbed least."""

WARM_UP_CALLS = 2
"""The first calls choose and load kernels."""

MIN_COMPILED_S = 1200.0
"""Seconds of training ahead from which on compiling is tried: it takes about a minute (52 s for hippocampus's plan,
on one core with nothing cached), so even where it gains nothing the training is hardly longer. Source: decision 25."""

MIN_GAIN = 0.02
"""A way of computing is only left for one that is quicker by this part: less is noise."""


def precision_of(part: Configuration, settings: TrainSettings, before: RunRecord | None, device: torch.device) -> str:
    """As asked; "auto" stays what it was at the first start, because a change would change the result.

    At a first start "auto" is what the device does natively. On a CPU whose flags do not tell, steps of the plan's own
    network on a small patch are timed in bf16 and in fp32.

    Args:
        part: What is trained.
        settings: What is asked for now.
        before: The fold's run.json, if there is one.
        device: Where it trains now.

    Raises:
        ConfigError: The device does not have it.
    """
    if settings.precision != "auto":
        return runtime.pick_precision(settings.precision, device)
    if before is not None and before.device == device.type:
        return before.precision
    if device.type != "cpu" or runtime.is_bf16_quick() is not None:
        return runtime.pick_precision("auto", device)
    seconds = min(PROBE_S, PROBE_FRACTION * (settings.time_budget_s or PROBE_S / PROBE_FRACTION))
    return quicker_precision(part, seconds)


def quicker_precision(part: Configuration, seconds: float) -> str:
    """The quicker of fp32 and bf16 in training steps on this CPU.

    Args:
        part: Whose network.
        seconds: About so many are spent.
    """
    taken = {}
    first: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        step = _probe(part, precision)
        (first[precision],) = runtime.seconds_per_call(step, seconds=0.0, most=1, warm_up=0)
        if first[precision] > HOPELESS_FACTOR * first["fp32"]:
            taken[precision] = first[precision]
            continue
        taken[precision] = min(runtime.seconds_per_call(step, seconds=seconds / 2, most=TIMED_CALLS, warm_up=0))
    chosen = "bf16" if taken["bf16"] < (1 - MIN_GAIN) * taken["fp32"] else "fp32"
    words = ", ".join(f"{value * 1e3:.0f} ms in {name}" for name, value in taken.items())
    log.info("a small training step takes %s: training in %s", words, chosen)
    return chosen


def _probe(part: Configuration, precision: str) -> Callable[[], object]:
    network = part.network
    learner = Learner(
        network,
        part.training,
        device=torch.device("cpu"),
        precision=precision,
        seed=0,
        regions=made_up_regions(network),
    )
    patch = small_patch(network)
    size = min(part.training.batch_size, max(1, PROBE_VOXELS // prod(patch)))
    batch = made_up_batch(network, size, patch, torch.device("cpu"))
    numbers = count()
    return lambda: learner.step(batch, part.training.learning_rate, next(numbers))


def settle(
    part: Configuration,
    settings: TrainSettings,
    before: RunRecord | None,
    learner: Learner,
    left_s: Callable[[float], float],
) -> Choices:
    """Settle how a training computes, in the main process, and have the others do the same.

    Args:
        part: What is trained.
        settings: What is asked for now.
        before: The fold's run.json, if there is one.
        learner: Of the training; from now on it takes fewer samples at a time when memory runs out.
        left_s: Seconds of training ahead, by those of a step.
    """
    compute = learner.compute
    learner.gradients.lowers_micro_batch = True
    num_samples = -(-part.training.batch_size // compute.processes.world_size)
    chosen = choices_of(part, settings, before, learner, num_samples, left_s)
    orders.begin(compute.processes, compute.precision, chosen)
    return chosen


def choices_of(
    part: Configuration,
    settings: TrainSettings,
    before: RunRecord | None,
    learner: Learner,
    num_samples: int,
    left_s: Callable[[float], float],
) -> Choices:
    """How to compute beside the precision: as before, or found out now. The learner is made to compute like that.

    Args:
        part: What is trained.
        settings: What is asked for now.
        before: The fold's run.json, if there is one.
        learner: Of the training; what it knows does not change.
        num_samples: Of a batch, as many as this process has.
        left_s: Seconds of training ahead, by those of a step.
    """
    compute = learner.compute
    here = (compute.device.type, compute.precision)
    if before is not None and before.choices is not None and here == (before.device, before.precision):
        chosen = before.choices
        if settings.compile != "auto":
            chosen = chosen.model_copy(update={"is_compiled": settings.compile == "always"})
    elif compute.device.type == "cuda":
        batch = made_up_batch(part.network, num_samples, part.network.patch_size, compute.device)
        chosen = quickest(learner.choices, settings.compile, partial(_seconds, learner, batch), left_s)
        # A rehearsal that did not fit has found the micro-batch.
        chosen = chosen.model_copy(update={"micro_batch": learner.choices.micro_batch})
    else:
        chosen = known_choices(*here).model_copy(update={"is_compiled": settings.compile == "always"})
    learner.use(chosen)
    return chosen


def _seconds(learner: Learner, batch: Batch, choices: Choices) -> float:
    """Seconds of the long part of a step; infinite where it cannot be computed like that."""
    learner.use(choices.model_copy(update={"micro_batch": learner.choices.micro_batch}))
    taken = runtime.seconds_per_call(
        lambda: learner.rehearse(batch), seconds=TIMED_S, most=TIMED_CALLS, warm_up=WARM_UP_CALLS
    )
    return min(taken) if learner.choices.is_compiled == choices.is_compiled else float("inf")


def quickest(
    start: Choices, compile_: Compile, seconds: Callable[[Choices], float], left_s: Callable[[float], float]
) -> Choices:
    """The quickest way of computing: each layout, and the better one compiled where a long training is ahead.

    Args:
        start: What others must be clearly quicker than; not compiled.
        compile_: Whether to compile.
        seconds: Times a step; infinite where it cannot be computed like that.
        left_s: Seconds of training ahead, by those of a step.
    """
    timings: dict[str, float] = {}

    def timed(choices: Choices) -> float:
        name = f"{choices.layout}, compiled" if choices.is_compiled else choices.layout
        timings[name] = seconds(choices)
        return timings[name]

    best, best_s = start, timed(start)
    for layout in get_args(Layout):
        other = start.model_copy(update={"layout": layout})
        if layout != start.layout and (other_s := timed(other)) < (1 - MIN_GAIN) * best_s:
            best, best_s = other, other_s
    if compile_ == "always" or (compile_ == "auto" and left_s(best_s) >= MIN_COMPILED_S):
        compiled = best.model_copy(update={"is_compiled": True})
        # Who wants it always gets it where it is possible at all.
        most_s = float("inf") if compile_ == "always" else (1 - MIN_GAIN) * best_s
        best = compiled if timed(compiled) < most_s else best
    known = {name: round(value, 6) for name, value in timings.items() if value < float("inf")}
    log.info("timed: %s", ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in known.items()))
    return best.model_copy(update={"timings_s": known})


def small_patch(network: NetworkPlan) -> Ints:
    """A patch of the same shape with about `PROBE_VOXELS`, divisible by the strides."""
    factor = min(1.0, (PROBE_VOXELS / prod(network.patch_size)) ** (1 / network.dims))
    return tuple(
        max(1, round(length * factor / step)) * step
        for length, step in zip(network.patch_size, network.divisors, strict=True)
    )
