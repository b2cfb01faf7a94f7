"""How fast this machine trains: operations a second in real steps of a small network."""

from __future__ import annotations

from itertools import count
from math import floor, log10

import torch

from autoseg import runtime
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import TrainingPlan
from autoseg.planning.flops import NetworkShape, count_training_flops
from autoseg.training.batches import Batch
from autoseg.training.learner import Learner

MEASURED_SECONDS = 1.5
"""The measurement takes about so long, once the kernels are compiled."""

SIGNIFICANT_DIGITS = 2
"""The speed varies by a few percent from one measurement to the next: more digits would be noise."""

# A network like those that the planner makes, and patches small enough for a slow machine.
_EDGE, _BATCH, _FEATURES, _CLASSES = 40, 2, (32, 64, 128), 3


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


def measured_speed(device: torch.device, precision: str) -> float:
    """Operations of convolutions a second, as `planning.flops` counts them, in training steps.

    Everything else that a step does takes its time too, so this is the speed to plan with and not that of a convolution
    alone. Calls `runtime.configure_allocator`, as training does.

    Args:
        device: Where.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        Rounded to two digits.
    """
    runtime.configure_allocator()
    network, training = reference_network(), TrainingPlan(batch_size=_BATCH)
    learner = Learner(network, training, device=device, precision=precision, seed=0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_BATCH, 1, *network.patch_size, generator=generator).to(device)
    labels = torch.randint(0, _CLASSES, (_BATCH, *network.patch_size), generator=generator).to(device, torch.int16)
    batch, numbers = Batch(images, labels, ()), count()
    flops = _BATCH * count_training_flops(NetworkShape.of(network))
    speed = runtime.flops_per_second(
        lambda: learner.step(batch, training.learning_rate, next(numbers)), flops, seconds=MEASURED_SECONDS
    )
    return round(speed, SIGNIFICANT_DIGITS - 1 - floor(log10(speed)))
