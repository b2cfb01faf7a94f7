"""The largest patch that fits the budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np

from autoseg.errors import PlanError
from autoseg.planning.activations import count_activations
from autoseg.planning.flops import NetworkShape, count_training_flops
from autoseg.planning.presets import PlannerRules
from autoseg.planning.topology import Topology, find_topology

Floats = tuple[float, ...]
Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """How long a training step may take.

    Attributes:
        step_seconds: The longest step.
        flops_per_second: Speed of the device.
        is_measured: Whether that speed was measured; else it is the preset's.
    """

    step_seconds: float
    flops_per_second: float
    is_measured: bool

    @property
    def operations(self) -> float:
        """What the device computes in the longest step."""
        return self.step_seconds * self.flops_per_second


@dataclass(frozen=True, slots=True)
class Limits:
    """What a network has to fit.

    Attributes:
        vram_gb: Memory for one training step.
        num_outputs: Channels of the head as nnU-Net counts them (the ignore label is one).
        in_channels: Channels of the input; they take time, but nnU-Net counts no memory for them.
        time: None where only memory limits the plan.
    """

    vram_gb: float
    num_outputs: int
    in_channels: int = 1
    time: TimeLimit | None = None


@dataclass(frozen=True, slots=True)
class ShrinkStep:
    """One step towards the budget.

    Attributes:
        axis: Which axis was shortened (network order).
        before: The patch that was too large.
        after: The patch afterwards.
        activations: One sample's count for `before`.
        flops: Operations of one sample's training step for `before`, with `timed_base_features`; 0 where time is not
            limited.
        fits_memory: Whether `before` was only too slow.
    """

    axis: int
    before: Ints
    after: Ints
    activations: int
    flops: int
    fits_memory: bool


@dataclass(frozen=True, slots=True)
class PatchSearch:
    """The patch, its network and the way there. Axes in network order.

    Attributes:
        spacing: Target spacing in millimetres.
        median_shape: Median image in voxels at that spacing.
        by_spacing: First guess from the voxel size alone.
        initial: That guess, no larger than the median image, padded for its strides.
        steps: Shrinking, in order.
        topology: The result.
        base_features: Channels of its finest stage.
        features: Channels of each stage.
        activations: One sample's count for the result.
        flops: Operations of one sample's training step; 0 where time is not limited.
        activation_limit: Count of one sample of which the reference batch just fits the memory.
        reference_batch: Samples of that batch.
        limits: What had to be fitted.
    """

    spacing: Floats
    median_shape: Floats
    by_spacing: Ints
    initial: Ints
    steps: tuple[ShrinkStep, ...]
    topology: Topology
    base_features: int
    features: Ints
    activations: int
    flops: int
    activation_limit: float
    reference_batch: int
    limits: Limits

    @property
    def capacity(self) -> float:
        """Activations that the memory holds, over all samples of a batch."""
        return self.activation_limit * self.reference_batch


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A patch with what it costs.

    Attributes:
        topology: The patch and its network.
        axis: Which axis was shortened to come to it.
        activations: One sample's count, as wide as the preset's networks are.
        flops: Operations of one sample's training step with `timed_base_features`; 0 where time is not limited.
        fits_memory: Whether a reference batch of it does.
    """

    topology: Topology
    axis: int | None
    activations: int
    flops: int
    fits_memory: bool

    @property
    def voxels(self) -> int:
        return prod(self.topology.patch_size)


def _flops_of(topology: Topology, limits: Limits, rules: PlannerRules, base_features: int | None = None) -> int:
    """Operations of one sample's training step."""
    stages = topology.num_stages
    shape = NetworkShape(
        in_channels=limits.in_channels,
        num_classes=limits.num_outputs,
        patch_size=topology.patch_size,
        features=rules.features(stages, len(topology.patch_size), base_features),
        strides=topology.strides,
        kernel_sizes=topology.kernel_sizes,
        encoder_block=rules.encoder_block,
        blocks_encoder=rules.encoder_blocks(stages),
        blocks_decoder=rules.decoder_blocks(stages),
    )
    return count_training_flops(shape)


def _candidate(topology: Topology, axis: int | None, limits: Limits, rules: PlannerRules) -> _Candidate:
    """A patch, and the axis that was shortened to come to it."""
    dims = len(topology.patch_size)
    activations = activations_of(topology, limits.num_outputs, rules)
    # In this order of operations, because plans must equal nnU-Net's to the last bit.
    needed = activations / (rules.reference_batch(dims) / rules.fitted_batch(dims))
    fits_memory = not needed > rules.activation_limit(dims, limits.vram_gb)
    flops = 0 if limits.time is None else _flops_of(topology, limits, rules, rules.timed_base_features)
    return _Candidate(topology, axis, activations, flops, fits_memory)


def activations_of(topology: Topology, num_outputs: int, rules: PlannerRules, base_features: int | None = None) -> int:
    """One sample's count for the U-Net of this topology."""
    stages = topology.num_stages
    return count_activations(
        topology.patch_size,
        topology.strides,
        rules.features(stages, len(topology.patch_size), base_features),
        rules.encoder_blocks(stages),
        rules.decoder_blocks(stages),
        num_outputs,
        rules.encoder_block,
    )


def _patch_by_spacing(spacing: Floats, rules: PlannerRules) -> Ints:
    """A patch of a fixed number of voxels that is a cube (square) in millimetres."""
    dims = len(spacing)
    edge = rules.initial_edge_2d if dims == 2 else rules.initial_edge_3d
    per_mm = 1 / np.asarray(spacing, np.float64)
    sizes = per_mm * (edge**dims / np.prod(per_mm)) ** (1 / dims)
    return tuple(max(1, round(float(size))) for size in sizes)


def _shrink_once(
    topology: Topology, spacing: Floats, median_shape: Floats, rules: PlannerRules
) -> tuple[int, Topology] | None:
    """Shorten the axis that covers most of the median image by its smallest possible step.

    An axis of which nothing would be left is passed over; nnU-Net's planner stops with an error there (decision 12).

    Returns:
        The axis and the new topology; None when there is nothing left to shorten.
    """
    patch = topology.patch_size
    ratios = [edge / whole for edge, whole in zip(patch, median_shape, strict=True)]
    for axis in sorted(range(len(ratios)), key=lambda item: (ratios[item], item), reverse=True):
        # The step is the divisor of the *shorter* patch, which may be smaller: so 224 is not skipped between 256 and
        # 192.
        trial = _shortened(patch, axis, topology.divisors[axis])
        step = find_topology(spacing, trial, rules).divisors[axis]
        if patch[axis] > step:
            return axis, find_topology(spacing, _shortened(patch, axis, step), rules)
    return None


def _shortened(patch: Ints, axis: int, by: int) -> Ints:
    return tuple(edge - by if number == axis else edge for number, edge in enumerate(patch))


def _shrinking(
    topology: Topology, spacing: Floats, median_shape: Floats, rules: PlannerRules
) -> Iterator[tuple[int, Topology]]:
    """Ever smaller patches, each with the axis that was shortened; ends where there is nothing left to shorten."""
    seen = set()
    while (state := (topology.patch_size, topology.divisors)) not in seen:
        seen.add(state)
        found = _shrink_once(topology, spacing, median_shape, rules)
        if found is None:
            return
        topology = found[1]
        yield found


def _largest(path: Sequence[_Candidate], numbers: Sequence[int]) -> int:
    return max(numbers, key=lambda number: (path[number].voxels, -number))


def _choose_by_time(
    path: Sequence[_Candidate], first: int, time: TimeLimit, limits: Limits, rules: PlannerRules
) -> tuple[int, int]:
    """The patch and the width of its network of which the smallest batch takes no longer than a step may.

    With the time there is less and less of it is chosen: a network of `base_features` on the largest patch; of
    `timed_base_features` on ever smaller ones, down to `narrow_patch_edge`; on that one ever narrower ones, down to
    `smallest_base_features`; these on still smaller patches. So more time gives neither a smaller patch nor a narrower
    network (decision 50). It is the patch with most voxels that is quick enough and not the first on the way down,
    because there a patch can gain voxels by padding.

    Args:
        path: Patches from large to small.
        first: The first that fits the memory.
        time: The limit.
        limits: All limits.
        rules: The preset.

    Returns:
        Which of the path, and the channels of its finest stage.

    Raises:
        PlanError: Even the narrowest network on the smallest patch takes too long.
    """
    most = time.operations / rules.smallest_batch
    fitting = [number for number in range(first, len(path)) if path[number].fits_memory]
    largest = _largest(path, fitting)
    edge = rules.narrow_patch_edge ** len(path[largest].topology.patch_size)
    ample = [number for number in fitting if path[number].voxels >= edge] or [largest]
    least = min(ample, key=lambda number: (path[number].voxels, number))
    stages = [([largest], rules.base_features), (ample, rules.timed_base_features)]
    width = rules.timed_base_features
    while (width := width // 2) >= rules.smallest_base_features:
        stages.append(([least], width))
    stages.append((fitting, stages[-1][1]))
    for numbers, width in stages:
        quick = [number for number in numbers if _flops_of(path[number].topology, limits, rules, width) <= most]
        if quick:
            return _largest(path, quick), width
    smallest = min(fitting, key=lambda number: (path[number].voxels, number))
    flops = _flops_of(path[smallest].topology, limits, rules, stages[-1][1])
    needed_s = rules.smallest_batch * flops / time.flops_per_second
    raise PlanError(
        f"no training step is as short as {time.step_seconds:g} s: {rules.smallest_batch} patches of "
        f"{'x'.join(map(str, path[smallest].topology.patch_size))} with {stages[-1][1]} channels in the first stage "
        f"take {needed_s:.2g} s at {time.flops_per_second:.3g} operations a second",
        hint=f"Give a longer step: --step-time {needed_s * 1.1:.2g}s.",
    )


def _shrink_to_fit(
    topology: Topology, spacing: Floats, median_shape: Floats, limits: Limits, rules: PlannerRules
) -> tuple[list[_Candidate], int, int]:
    """Shorten the patch until it fits.

    Returns:
        The way down, which of it was chosen, and the channels of its finest stage.

    Raises:
        PlanError: No patch fits.
    """
    further = _shrinking(topology, spacing, median_shape, rules)
    path = [_candidate(topology, None, limits, rules)]
    while not path[-1].fits_memory:
        following = next(further, None)
        if following is None:
            dims = len(spacing)
            raise PlanError(
                f"no {dims}D patch fits {limits.vram_gb:g} GB: {rules.fitted_batch(dims)} patches of "
                f"{'x'.join(map(str, path[-1].topology.patch_size))} with {limits.num_outputs} outputs are still too "
                "large",
                hint="Give a larger --vram, or plan fewer classes.",
            )
        path.append(_candidate(following[1], following[0], limits, rules))
    chosen = len(path) - 1
    if limits.time is None:
        return path, chosen, rules.base_features
    for axis, smaller in further:
        if prod(smaller.patch_size) < rules.smallest_patch_edge ** len(spacing):
            break
        path.append(_candidate(smaller, axis, limits, rules))
    return path, *_choose_by_time(path, chosen, limits.time, limits, rules)


def search_patch(spacing: Floats, median_shape: Floats, limits: Limits, rules: PlannerRules) -> PatchSearch:
    """The first patch, from large to small, of which a small batch fits the memory (and the time, if that is limited).

    Args:
        spacing: Target spacing in millimetres, two or three axes in network order.
        median_shape: Median image at that spacing in voxels.
        limits: The budget.
        rules: The preset.

    Raises:
        PlanError: No patch fits.

    Source: nnU-Net (Isensee et al. 2021, supplement 2.3); the time limit is ours.
    """
    dims = len(spacing)
    by_spacing = _patch_by_spacing(spacing, rules)
    clipped = tuple(min(guess, whole) for guess, whole in zip(by_spacing, median_shape, strict=True))
    first = find_topology(spacing, clipped, rules)
    path, chosen, width = _shrink_to_fit(first, spacing, median_shape, limits, rules)
    steps = tuple(
        ShrinkStep(
            after.axis,
            before.topology.patch_size,
            after.topology.patch_size,
            before.activations,
            before.flops,
            before.fits_memory,
        )
        for before, after in pairwise(path[: chosen + 1])
        if after.axis is not None
    )
    topology = path[chosen].topology
    return PatchSearch(
        spacing=spacing,
        median_shape=median_shape,
        by_spacing=by_spacing,
        initial=first.patch_size,
        steps=steps,
        topology=topology,
        base_features=width,
        features=rules.features(topology.num_stages, dims, width),
        activations=activations_of(topology, limits.num_outputs, rules, width),
        flops=0 if limits.time is None else _flops_of(topology, limits, rules, width),
        activation_limit=rules.activation_limit(dims, limits.vram_gb),
        reference_batch=rules.reference_batch(dims),
        limits=limits,
    )
