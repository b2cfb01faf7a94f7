"""How fast this machine trains: operations a second in real steps of a small network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import count
from math import floor, log10
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg import machine, runtime
from autoseg.domain.network_plan import Ints, NetworkPlan
from autoseg.domain.plan import TrainingPlan
from autoseg.planning.flops import NetworkShape, count_training_flops
from autoseg.training.batches import Batch
from autoseg.training.learner import Learner

log = logging.getLogger("autoseg")

MEASURED_SECONDS = 1.5
"""The measurement takes about so long, once the kernels are compiled."""

SIGNIFICANT_DIGITS = 2
"""The speed varies by a few percent from one measurement to the next: more digits would be noise."""

MOST_STEPS = 1000
"""More steps say nothing new."""

NOTABLE_WORK_FRACTION = 0.1
"""Other programs that take more of the cores than this are mentioned."""

# A network like those that the planner makes, and patches small enough for a slow machine.
_EDGE, _BATCH, _FEATURES, _CLASSES = 40, 2, (32, 64, 128), 3
_CASE = "made up"


def reference_network() -> NetworkPlan:
    """The network whose steps are timed."""
    stages = len(_FEATURES)
    return NetworkPlan(
        in_channels=1,
        num_classes=_CLASSES,
        patch_size=(_EDGE,) * 3,
        features_per_stage=_FEATURES,
        strides=((1, 1, 1), *((2, 2, 2),) * (stages - 1)),
        kernel_sizes=((3, 3, 3),) * stages,
        blocks_per_stage_encoder=(2,) * stages,
        blocks_per_stage_decoder=(2,) * (stages - 1),
    )


def made_up_batch(network: NetworkPlan, size: int, patch: Ints, device: torch.device) -> Batch:
    """Noise with labels of every value: a batch that costs what a real one costs.

    Args:
        network: Which takes it.
        size: Samples.
        patch: Voxels of a sample.
        device: Where.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, network.in_channels, *patch, generator=generator).to(device)
    num_values = network.num_classes + (network.output == "regions")
    labels = torch.randint(0, num_values, (size, *patch), generator=generator).to(device, torch.int16)
    return Batch(images, labels, (_CASE,) * size)


def made_up_regions(network: NetworkPlan) -> NDArray[np.bool_] | None:
    """Of a network of regions: each has one label value, which costs as much as any other table; else None."""
    return np.eye(network.num_classes, network.num_classes + 1, 1, np.bool_) if network.output == "regions" else None


def measured_speed(device: torch.device, precision: str) -> float:
    """Operations of convolutions a second, as `planning.flops` counts them, in training steps.

    Everything else that a step does takes its time too, so this is the speed to plan with and not that of a convolution
    alone. What other programs take of the processor meanwhile is seen and counted as free: a plan is for the machine.
    Calls `runtime.configure_allocator`, as training does.

    Args:
        device: Where.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        Rounded to two digits.
    """
    runtime.configure_allocator()
    network, training = reference_network(), TrainingPlan(batch_size=_BATCH)
    learner = Learner(network, training, device=device, precision=precision, seed=0)
    batch, numbers = made_up_batch(network, _BATCH, network.patch_size, device), count()

    def step() -> None:
        learner.step(batch, training.learning_rate, next(numbers))

    with machine.OtherWork() as others:
        seconds = runtime.seconds_per_call(step, seconds=MEASURED_SECONDS, most=MOST_STEPS)
    taken = others.fraction if device.type == "cpu" else 0.0
    if taken > NOTABLE_WORK_FRACTION:
        log.warning(
            "other programs took %.0f%% of the processor while its speed was measured; the plan is for the machine "
            "without them (--step-time plans for shorter steps)",
            100 * taken,
        )
    flops = _BATCH * count_training_flops(NetworkShape.of(network))
    speed = flops / undisturbed_seconds(seconds, taken)
    return round(speed, SIGNIFICANT_DIGITS - 1 - floor(log10(speed)))


def undisturbed_seconds(seconds: Sequence[float], taken: float) -> float:
    """How long a step takes on a machine that does nothing else, by steps on one that may.

    Two ways to say so, and both say too much rather than too little: the quickest step was perhaps not disturbed; and
    on average steps had the part of the cores that others left.

    Args:
        seconds: Of each step.
        taken: The part of the cores that other programs took, less than 1.
    """
    return min(*seconds, (1 - taken) * mean(seconds))
