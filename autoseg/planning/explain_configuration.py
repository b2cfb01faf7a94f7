"""The reasons of one configuration: patch, depth, budget, batch, channels, loss."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from autoseg.domain.plan import CASCADE, FLAT, LOWRES, Decision
from autoseg.planning.choices import ConfigurationChoices, DatasetChoices
from autoseg.planning.explain_augmentation import augmentation, mirroring, warm_up
from autoseg.planning.patch import ShrinkStep
from autoseg.planning.wording import (
    gigabytes,
    millions,
    number,
    operations,
    part,
    per_axis,
    seconds,
    several,
    shape,
)

_LISTED_STEPS = (3, 2)
"""Of a long way down, so many steps are told at its beginning and at its end."""


def _names(common: DatasetChoices, choices: ConfigurationChoices) -> tuple[str, ...]:
    return common.axis_names[-len(choices.search.spacing) :]


def _vram_for(choices: ConfigurationChoices, activations: float) -> float:
    """The budget in GB at which so many activations just fit."""
    return choices.search.limits.vram_gb * activations / choices.search.capacity


def _initial_patch(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    search, names = choices.search, _names(common, choices)
    is_2d = len(names) == 2
    edge = common.rules.initial_edge_2d if is_2d else common.rules.initial_edge_3d
    return Decision(
        configuration=choices.name,
        topic="first guess of the patch",
        rule=(
            f"The search for a patch starts large: a {'square' if is_2d else 'cube'} in millimetres of "
            f"{edge}{'²' if is_2d else '³'} voxels, cut to the typical image, and rounded up so that it can be halved "
            "as often as the network does (see depth)."
        ),
        inputs=(
            f"voxels of {per_axis(names, search.spacing, 'mm')}, which give {shape(search.by_spacing)}; "
            f"a typical image has {shape(search.median_shape)}"
        ),
        result=shape(search.initial),
        would_change="Larger or smaller images, or another target spacing.",
    )


def _step_words(names: Sequence[str], step: ShrinkStep, choices: ConfigurationChoices, num_samples: int) -> str:
    time = choices.search.limits.time
    needs = millions(step.activations * num_samples)
    if time is not None:
        needs += f" and {seconds(step.flops * num_samples / time.flops_per_second)}"
    return f"{shape(step.before)} needs {needs}: shorten {names[step.axis]}"


def _all_steps(names: Sequence[str], choices: ConfigurationChoices, num_samples: int) -> str:
    """The way down in words; of a long one only its ends."""
    first, last = _LISTED_STEPS
    words = [_step_words(names, step, choices, num_samples) for step in choices.search.steps]
    if len(words) > first + last + 1:
        left_out = len(words) - first - last
        words = [*words[:first], f"... {left_out} more steps ...", *words[-last:]]
    return "; ".join(words)


def _next_larger(choices: ConfigurationChoices, num_samples: int) -> str:
    """What the last patch that was given up would take."""
    search, last, time = choices.search, choices.search.steps[-1], choices.search.limits.time
    if last.fits_memory and time is not None:
        needed_s = last.flops * num_samples / time.flops_per_second
        return f"With steps of {seconds(needed_s)} the patch would be {shape(last.before)} at least."
    enough = gigabytes(search.limits.vram_gb * last.activations * num_samples / search.capacity)
    return f"From --vram {enough} on the patch would be {shape(last.before)} at least."


def _patch(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    search, rules, names = choices.search, common.rules, _names(common, choices)
    samples, time = rules.fitted_batch(len(names)), search.limits.time
    final, needed = shape(search.topology.patch_size), millions(search.activations * samples)
    inputs = f"{search.limits.vram_gb:g} GB hold about {millions(search.capacity)} activations"
    if time is not None:
        needed += f" and {seconds(search.flops * samples / time.flops_per_second)}"
        speed = "measured" if time.is_measured else "not measured: the preset's own number"
        inputs += f"; at most {seconds(time.step_seconds)} a step at {operations(time.flops_per_second)} ({speed})"
    if search.steps:
        inputs += f"; {_all_steps(names, choices, samples)}"
        result = f"{final} after {several(len(search.steps), 'step')}; {samples} of them need {needed}"
        change = _next_larger(choices, samples)
    else:
        inputs += f"; {samples} patches of {final} need {needed}"
        result = f"{final}, nothing had to be shortened"
        below = gigabytes(_vram_for(choices, search.activations * samples))
        change = f"With --vram below {below} the patch would be smaller."
    limited = "memory" if time is None else "memory, and a training step takes no longer than it may"
    return Decision(
        configuration=choices.name,
        topic="patch size",
        rule=(
            f"The patch is shortened until {samples} of them fit the {limited}: each time along the axis on which it "
            "covers most of the typical image, by the smallest piece that still lets it be halved as often as the "
            "network does. Memory is counted in activations, the numbers that the network's convolutions give and "
            "training keeps; how many a GB holds was fitted for 2D and 3D apart. This count is for choosing only, "
            "not the bytes to expect."
        ),
        inputs=inputs,
        result=result,
        would_change=change,
    )


def _depth(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    topology, rules, names = choices.search.topology, common.rules, _names(common, choices)
    bottom = [size // divisor for size, divisor in zip(topology.patch_size, topology.divisors, strict=True)]
    strides = ", ".join(shape(stride) for stride in topology.strides)
    kernels = ", ".join(shape(kernel) for kernel in topology.kernel_sizes)
    return Decision(
        configuration=choices.name,
        topic="depth, strides and kernels",
        rule=(
            "The network works in stages of ever coarser resolution. From stage to stage it halves every axis that has "
            f"at least {2 * rules.smallest_edge} voxels left and a spacing under {rules.similar_spacing_ratio:g} "
            "times the finest of those, so that voxels become cubes on the way down; an axis that would be halved "
            f"alone needs {3 * rules.smallest_edge} voxels. It stops where no axis can be halved. Kernels are 1 wide "
            f"along an axis until its spacing is under {rules.similar_spacing_ratio:g} times the finest, then 3; in "
            "the deepest stage 3 along all axes."
        ),
        inputs=f"patch {shape(topology.patch_size)}, voxels of {per_axis(names, choices.search.spacing, 'mm')}",
        result=(
            f"{several(topology.num_stages, 'stage')}; halvings {per_axis(names, topology.num_halvings)}; the deepest "
            f"stage has {shape(bottom)} left; strides {strides}; kernels {kernels}"
        ),
        would_change="A larger or smaller patch, or another target spacing.",
    )


def _blocks(choices: ConfigurationChoices, common: DatasetChoices) -> str:
    rules, stages = common.rules, choices.search.topology.num_stages
    down, up = rules.encoder_blocks(stages), rules.decoder_blocks(stages)
    if rules.encoder_block == "residual":
        listed = "-".join(map(str, down))
        return f"{listed} residual blocks (two convolutions with a shortcut around them) on the way down, " + (
            f"{'-'.join(map(str, up))} convolutions on the way up" if up else "no way up"
        )
    return f"{'-'.join(map(str, down))} convolutions on the way down, {'-'.join(map(str, up)) or 'none'} on the way up"


def _features(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    search, rules, stages = choices.search, common.rules, choices.search.topology.num_stages
    has_time = search.limits.time is None or search.base_features == rules.base_features
    is_3d = len(search.spacing) == 3
    rule = (
        f"{rules.base_features} channels in the first stage, twice as many in each further one, in "
        f"{len(search.spacing)}D never more than {rules.max_features(len(search.spacing))}; the preset says "
        "how many convolutions a stage has."
    )
    if search.limits.time is not None:
        rule += (
            f" That is where a step has time for the largest patch; else {rules.timed_base_features} in the first "
            f"stage, and fewer before a patch gets fewer voxels than {rules.narrow_patch_edge}{'³' if is_3d else '²'}."
        )
    return Decision(
        configuration=choices.name,
        topic="channels and convolutions",
        rule=rule,
        inputs=several(stages, "stage"),
        result=f"channels {'-'.join(map(str, search.features))}; {_blocks(choices, common)}",
        would_change="More or fewer stages, or another preset." if has_time else "Longer steps.",
    )


def _another_batch(common: DatasetChoices, choices: ConfigurationChoices) -> str:
    """What a batch with one more patch would take."""
    batch, search, wanted = choices.batch, choices.search, choices.batch.batch_size + 1
    needs = []
    if batch.by_memory < wanted:
        needs.append(f"{gigabytes(_vram_for(choices, (wanted - 0.5) * search.activations))} of memory")
    if search.limits.time is not None and batch.by_time is not None and batch.by_time < wanted:
        needs.append(f"steps of {seconds(wanted * search.flops / search.limits.time.flops_per_second)}")
    if round(batch.by_voxels) < wanted:
        # Rounding goes up from a half.
        cases = common.fingerprint.num_training_cases
        needs.append(f"about {ceil(cases * (wanted - 0.5) / batch.by_voxels)} training cases (now {cases})")
    return f"A batch of {wanted} would take {' and '.join(needs)}."


def _batch(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    batch, search, rules = choices.batch, choices.search, common.rules
    fraction = rules.batch_fraction_of_voxels
    share = f"{fraction:.0%} of" if fraction < 1 else "all"
    inputs = [
        f"memory: {millions(search.capacity)} activations / {millions(search.activations)} a patch = "
        f"{number(search.capacity / search.activations)} patches"
    ]
    if batch.by_time is not None:
        inputs.append(f"time: {batch.by_time}")
    inputs.append(f"data: {fraction:.0%} of all voxels are {number(batch.by_voxels)} patches")
    return Decision(
        configuration=choices.name,
        topic="batch size",
        rule=(
            "A batch is the patches that the network sees in one training step: the smaller of what the memory "
            f"{'' if batch.by_time is None else 'and the time '}holds and what makes up about {share} the data set's "
            f"voxels, so that steps differ from each other; both rounded, at least {rules.smallest_batch}."
        ),
        inputs="by " + "; by ".join(inputs),
        result=str(batch.batch_size),
        would_change=_another_batch(common, choices),
    )


def _batch_dice(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    seen = 1.0 if common.lowres is None else common.lowres.seen_fraction
    has_lowres = common.lowres is not None and common.lowres.search is not None
    sees = f"the patch sees {part(seen)} of a typical image, so {'a' if has_lowres else 'no'} low-resolution network"
    inputs = {FLAT: "a 2D patch is one slice", LOWRES: "the low-resolution network, made to see enough"}
    change = {FLAT: "Nothing: 2D always pools.", LOWRES: "Nothing: low resolution never pools."}
    return Decision(
        configuration=choices.name,
        topic="batch Dice",
        rule=(
            "The Dice loss compares the patches of a batch together, not one by one, where a single patch shows too "
            "little to judge it alone: in 2D always, in 3D at full resolution only where the images also get a "
            "low-resolution network."
        ),
        inputs=inputs.get(choices.name, f"{sees} is planned (see 3d_lowres)"),
        result="pooled over the batch" if choices.batch_dice else "each patch on its own",
        would_change=change.get(choices.name, "Whether a low-resolution network is planned."),
    )


def _lowres_spacing(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    rules, names, search = common.rules, common.axis_names, choices.search
    return Decision(
        configuration=choices.name,
        topic="target spacing",
        rule=(
            f"The spacing of 3d_fullres is made {rules.lowres_spacing_step - 1:.0%} coarser again and again (first "
            "only along axes more than twice as fine as the coarsest) until a patch sees at least "
            f"{rules.lowres_below_fraction:.0%} of a typical image."
        ),
        inputs=f"3d_fullres: {per_axis(names, common.target, 'mm')}, typical image {shape(common.median_shape)}",
        result=f"{per_axis(names, search.spacing, 'mm')}, typical image {shape(search.median_shape)}",
        would_change="More memory (a larger patch), or images of another size.",
    )


def _cascade_input(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    channels, classes = len(common.channels), common.num_values - 1
    return Decision(
        configuration=choices.name,
        topic="input",
        rule=(
            "The cascade is the full-resolution network with a second look: beside the image it is given what the "
            "low-resolution network predicted, one channel a class. It learns from predictions for images which the "
            "low-resolution network was not trained on, so train every fold of 3d_lowres first."
        ),
        inputs=f"{several(channels, 'image channel')}, {several(classes, 'class')}",
        result=f"{channels + classes} input channels",
        would_change="Other channels or classes.",
    )


def _as_fullres(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    search = choices.search
    return Decision(
        configuration=choices.name,
        topic="patch, network and training",
        rule="Everything but the input is as in 3d_fullres.",
        inputs="the decisions on 3d_fullres above",
        result=(
            f"patch {shape(search.topology.patch_size)}, batch size {choices.batch.batch_size}, "
            f"{several(search.topology.num_stages, 'stage')}"
        ),
        would_change="Whatever changes 3d_fullres.",
    )


def configuration_decisions(
    common: DatasetChoices, choices: ConfigurationChoices, planned: Sequence[ConfigurationChoices]
) -> tuple[Decision, ...]:
    """The reasons of one configuration, in the order in which the planner decides.

    Args:
        common: What all configurations share.
        choices: Of this one.
        planned: All of them.
    """
    makers = (_initial_patch, _patch, _depth, _features, _batch, _batch_dice, augmentation, warm_up, mirroring)
    if choices.name == LOWRES:
        return tuple(make(common, choices) for make in (_lowres_spacing, *makers))
    if choices.name == CASCADE:
        is_as_fullres = any(
            (item.search.topology, item.search.features, item.batch.batch_size)
            == (choices.search.topology, choices.search.features, choices.batch.batch_size)
            for item in planned
            if item.name not in (CASCADE, LOWRES)
        )
        others = (_as_fullres,) if is_as_fullres else makers
        return tuple(make(common, choices) for make in (_cascade_input, *others))
    return tuple(make(common, choices) for make in makers)
