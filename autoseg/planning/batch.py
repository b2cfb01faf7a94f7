"""How many patches make a batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, prod

from autoseg.planning.patch import PatchSearch
from autoseg.planning.presets import PlannerRules


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """The batch size and the limits it comes from.

    Attributes:
        by_memory: Patches that the memory holds, rounded.
        by_voxels: Patches that make up the largest part of the data set a batch may cover; not rounded.
        by_time: Patches that a step has time for; None where time is not limited.
        batch_size: The result.
        steps_of_a_pass: Steps whose patches have as many voxels as the data set.
    """

    by_memory: int
    by_voxels: float
    by_time: int | None
    batch_size: int
    steps_of_a_pass: float


def choose_batch(search: PatchSearch, voxels_of_dataset: float, rules: PlannerRules) -> BatchChoice:
    """As many patches as memory and time allow, but no more than a part of the data set, and at least the smallest.

    Args:
        search: The patch.
        voxels_of_dataset: Voxels of all training images after resampling.
        rules: The preset.

    Source: nnU-Net (Isensee et al. 2021, supplement 2.3); the time limit is ours.
    """
    # In this order of operations, because plans must equal nnU-Net's to the last bit.
    by_memory = round(search.activation_limit / search.activations * search.reference_batch)
    by_voxels = voxels_of_dataset * rules.batch_fraction_of_voxels / prod(search.topology.patch_size)
    time = search.limits.time
    by_time = None if time is None else floor(time.operations / search.flops)
    most = min(by_memory, round(by_voxels)) if by_time is None else min(by_memory, round(by_voxels), by_time)
    batch_size = max(most, rules.smallest_batch)
    steps_of_a_pass = voxels_of_dataset / prod(search.topology.patch_size) / batch_size
    return BatchChoice(by_memory, by_voxels, by_time, batch_size, steps_of_a_pass)
