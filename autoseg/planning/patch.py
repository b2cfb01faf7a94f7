"""The largest patch that fits the budget, and how many of them make a batch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from autoseg.errors import PlanError
from autoseg.planning.memory import count_activations
from autoseg.planning.presets import PlannerRules
from autoseg.planning.topology import Topology, find_topology

Floats = tuple[float, ...]
Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShrinkStep:
    """One step towards the budget.

    Attributes:
        axis: Which axis was shortened (network order).
        before: The patch that was too large.
        after: The patch afterwards.
        activations: One sample's count for `before`.
    """

    axis: int
    before: Ints
    after: Ints
    activations: int


@dataclass(frozen=True, slots=True)
class PatchSearch:
    """The patch, its network and the way there. Axes in network order.

    Attributes:
        spacing: Target spacing in millimetres.
        median_shape: Median image in voxels at that spacing.
        by_spacing: First guess from the voxel size alone.
        initial: That guess, no larger than the median image, padded for its strides.
        steps: Shrinking for memory, in order.
        topology: The result.
        activations: One sample's count for the result.
        capacity: Activations that the budget holds, over all samples of a batch.
    """

    spacing: Floats
    median_shape: Floats
    by_spacing: Ints
    initial: Ints
    steps: tuple[ShrinkStep, ...]
    topology: Topology
    activations: int
    capacity: float


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """The batch size and the two limits it comes from.

    Attributes:
        by_memory: Patches that the budget holds, rounded.
        by_voxels: Patches that make up the largest part of the data set a batch may cover; not rounded.
        batch_size: The result.
    """

    by_memory: int
    by_voxels: float
    batch_size: int


def activations_of(topology: Topology, num_outputs: int, rules: PlannerRules) -> int:
    """One sample's count for the plain U-Net of this topology."""
    stages = topology.num_stages
    return count_activations(
        topology.patch_size,
        topology.strides,
        rules.features(stages, len(topology.patch_size)),
        (rules.convs_per_stage,) * stages,
        (rules.convs_per_stage,) * (stages - 1),
        num_outputs,
    )


def _patch_by_spacing(spacing: Floats, rules: PlannerRules) -> Ints:
    """A patch of a fixed number of voxels that is a cube (square) in millimetres."""
    dims = len(spacing)
    edge = rules.initial_edge_2d if dims == 2 else rules.initial_edge_3d
    per_mm = 1 / np.asarray(spacing, np.float64)
    sizes = per_mm * (edge**dims / np.prod(per_mm)) ** (1 / dims)
    return tuple(round(float(size)) for size in sizes)


def _shrink_once(
    topology: Topology, spacing: Floats, median_shape: Floats, rules: PlannerRules
) -> tuple[int, Topology]:
    """Shorten the axis that covers most of the median image by its smallest possible step.

    Returns:
        The axis and the new topology; its patch has no voxels when there is nothing left to shorten.
    """
    ratios = [edge / whole for edge, whole in zip(topology.patch_size, median_shape, strict=True)]
    axis = max(range(len(ratios)), key=lambda item: (ratios[item], item))

    def shortened(by: int) -> Ints:
        return tuple(edge - by if item == axis else edge for item, edge in enumerate(topology.patch_size))

    # The step is the divisor of the *shorter* patch, which may be smaller: so 224 is not skipped between 256 and 192.
    trial = shortened(topology.divisors[axis])
    step = find_topology(spacing, trial, rules).divisors[axis]
    return axis, find_topology(spacing, shortened(step), rules)


def search_patch(
    spacing: Floats, median_shape: Floats, num_outputs: int, vram_gb: float, rules: PlannerRules
) -> PatchSearch:
    """The first patch, from large to small, of which the smallest batch fits the budget.

    Args:
        spacing: Target spacing in millimetres, two or three axes in network order.
        median_shape: Median image at that spacing in voxels.
        num_outputs: Channels of the head.
        vram_gb: The budget.
        rules: The preset.

    Raises:
        PlanError: No patch fits.

    Source: nnU-Net (Isensee et al. 2021, supplement 2.3).
    """
    dims = len(spacing)
    by_spacing = _patch_by_spacing(spacing, rules)
    clipped = tuple(min(guess, whole) for guess, whole in zip(by_spacing, median_shape, strict=True))
    topology = find_topology(spacing, clipped, rules)
    initial = topology.patch_size
    activations = activations_of(topology, num_outputs, rules)
    limit = rules.activation_limit(dims, vram_gb)
    steps: list[ShrinkStep] = []
    seen = {initial}
    while activations / rules.reference_batch(dims) * rules.smallest_batch > limit:
        axis, smaller = _shrink_once(topology, spacing, median_shape, rules)
        if min(smaller.patch_size) < 1 or smaller.patch_size in seen:
            raise PlanError(
                f"no {dims}D patch fits {vram_gb:g} GB: {rules.smallest_batch} patches of "
                f"{'x'.join(map(str, topology.patch_size))} with {num_outputs} outputs are still too large",
                hint="Give a larger --vram, or plan fewer classes.",
            )
        seen.add(smaller.patch_size)
        steps.append(ShrinkStep(axis, topology.patch_size, smaller.patch_size, activations))
        topology = smaller
        activations = activations_of(topology, num_outputs, rules)
    capacity = limit * rules.reference_batch(dims)
    return PatchSearch(spacing, median_shape, by_spacing, initial, tuple(steps), topology, activations, capacity)


def choose_batch(search: PatchSearch, voxels_of_dataset: float, rules: PlannerRules) -> BatchChoice:
    """As many patches as the memory holds, but no more than a small part of the data set, and at least two.

    Args:
        search: The patch.
        voxels_of_dataset: Voxels of all training images after resampling.
        rules: The preset.

    Source: nnU-Net (Isensee et al. 2021, supplement 2.3).
    """
    by_memory = round(search.capacity / search.activations)
    by_voxels = voxels_of_dataset * rules.batch_fraction_of_voxels / prod(search.topology.patch_size)
    return BatchChoice(by_memory, by_voxels, max(min(by_memory, round(by_voxels)), rules.smallest_batch))
