"""The reasons of one configuration: patch, depth, memory, batch, channels, loss, augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from autoseg.domain.plan import Decision
from autoseg.planning.choices import ConfigurationChoices, DatasetChoices
from autoseg.planning.patch import ShrinkStep
from autoseg.planning.wording import gigabytes, millions, number, part, per_axis, several, shape

_LISTED_PAIRS = 2


def _names(common: DatasetChoices, choices: ConfigurationChoices) -> tuple[str, ...]:
    return common.axis_names[-len(choices.search.spacing) :]


def _vram_for(common: DatasetChoices, choices: ConfigurationChoices, activations: float) -> float:
    """The budget in GB at which so many activations just fit."""
    return common.vram_gb * activations / choices.search.capacity


def _initial_patch(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    search, names = choices.search, _names(common, choices)
    edge = common.rules.initial_edge_2d if len(names) == 2 else common.rules.initial_edge_3d
    return Decision(
        configuration=choices.name,
        topic="initial patch",
        rule=(
            f"The search starts with a patch of {edge}{'²' if len(names) == 2 else '³'} voxels that is equally long in "
            "millimetres along every axis, cut to the typical image and rounded up to what the halvings below divide."
        ),
        inputs=(
            f"target spacing {per_axis(names, search.spacing, 'mm')}, which gives {shape(search.by_spacing)}; "
            f"typical image {shape(search.median_shape)}"
        ),
        result=shape(search.initial),
        would_change="Larger or smaller images, or another target spacing.",
    )


def _step_words(names: Sequence[str], steps: Sequence[ShrinkStep], num_samples: int) -> str:
    return "; ".join(
        f"{shape(step.before)} needs {millions(step.activations * num_samples)}, shorten {names[step.axis]}"
        for step in steps
    )


def _shrinking(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    search, rules = choices.search, common.rules
    smallest, names = rules.smallest_batch, _names(common, choices)
    needed = millions(search.activations * smallest)
    final = shape(search.topology.patch_size)
    capacity = f"{common.vram_gb:g} GB hold about {millions(search.capacity)} activations"
    if search.steps:
        last = search.steps[-1]
        enough = _vram_for(common, choices, last.activations * smallest)
        inputs = f"{capacity}; {_step_words(names, search.steps, smallest)}"
        result = f"{final} after {several(len(search.steps), 'step')}, needs {needed}"
        change = f"From {gigabytes(enough)} on the patch would be {shape(last.before)} at least."
    else:
        enough = _vram_for(common, choices, search.activations * smallest)
        inputs = f"{capacity}; the initial patch {final} needs {needed}"
        result = f"{final}, no shrinking needed"
        change = f"Below {gigabytes(enough)} the patch would shrink."
    return Decision(
        configuration=choices.name,
        topic="patch size",
        rule=(
            f"Until {smallest} patches fit the memory, the axis along which the patch covers most of the typical image "
            "is shortened by the smallest step that the halvings allow. Memory is counted in activations: the numbers "
            "that the network's convolutions write."
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
            f"From stage to stage every axis is halved that has at least {2 * rules.smallest_edge} voxels left and is "
            f"less than {rules.similar_spacing_ratio:g} times as coarse as the finest of those, so that voxels become "
            f"cubes on the way down; one axis alone needs {3 * rules.smallest_edge} voxels. Kernels are 1 wide along "
            "an axis until its spacing is that close to the finest, then 3; in the deepest stage 3 along all axes."
        ),
        inputs=f"patch {shape(topology.patch_size)} at {per_axis(names, choices.search.spacing, 'mm')}",
        result=(
            f"{several(topology.num_stages, 'stage')}; halvings {per_axis(names, topology.num_halvings)}; the deepest "
            f"feature map is {shape(bottom)}; strides {strides}; kernels {kernels}"
        ),
        would_change="A larger or smaller patch, or another target spacing.",
    )


def _features(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    rules, stages = common.rules, choices.search.topology.num_stages
    most = rules.max_features_2d if len(choices.search.spacing) == 2 else rules.max_features_3d
    return Decision(
        configuration=choices.name,
        topic="channels",
        rule=(
            f"{rules.base_features} channels in the first stage, twice as many in each further one, never more than "
            f"{most}; {rules.convs_per_stage} convolutions in each stage, down and up."
        ),
        inputs=several(stages, "stage"),
        result="-".join(map(str, choices.features)),
        would_change="More or fewer stages.",
    )


def _another_batch(common: DatasetChoices, choices: ConfigurationChoices) -> str:
    """What a batch with one more patch would take."""
    batch, wanted = choices.batch, choices.batch.batch_size + 1
    needs = []
    if batch.by_memory < wanted:
        needs.append(f"{gigabytes(_vram_for(common, choices, (wanted - 0.5) * choices.search.activations))} of memory")
    if round(batch.by_voxels) < wanted:
        # Rounding goes up from a half.
        cases = common.fingerprint.num_training_cases
        needs.append(f"about {ceil(cases * (wanted - 0.5) / batch.by_voxels)} training cases (now {cases})")
    return f"A batch of {wanted} would take {' and '.join(needs)}."


def _batch(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    batch, search, rules = choices.batch, choices.search, common.rules
    return Decision(
        configuration=choices.name,
        topic="batch size",
        rule=(
            "As many patches as fit the memory (rounded), but together no more than "
            f"{rules.batch_fraction_of_voxels:.0%} of the data set's voxels, so that steps differ from each other; "
            f"at least {rules.smallest_batch}."
        ),
        inputs=(
            f"{millions(search.capacity)} activations / {millions(search.activations)} a patch = {batch.by_memory}; "
            f"{rules.batch_fraction_of_voxels:.0%} of all voxels make {number(batch.by_voxels)} patches"
        ),
        result=str(batch.batch_size),
        would_change=_another_batch(common, choices),
    )


def _batch_dice(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    is_2d = choices.name == "2d"
    seen = 1.0 if common.lowres is None else common.lowres.seen_fraction
    return Decision(
        configuration=choices.name,
        topic="batch Dice",
        rule=(
            "The Dice loss pools all patches of a batch where one patch shows too little to judge it alone: always in "
            "2D, in 3D only where the images ask for a low-resolution network as well."
        ),
        inputs="2D slices" if is_2d else f"the patch sees {part(seen)} of a typical image",
        result="pooled over the batch" if choices.batch_dice else "each patch on its own",
        would_change="Nothing: 2D always pools." if is_2d else "Whether a low-resolution network is wanted (above).",
    )


def _augmentation(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    plan, patch = choices.augmentation, choices.search.topology.patch_size
    degrees = f"±{plan.rotation_degrees[0]:g}°"
    if len(patch) == 2:
        rule = "2D patches are turned freely, or by ±15° where one side is more than 1.5 times as long as the other."
        result, ratio = degrees, max(patch) / min(patch)
    else:
        rule = (
            "3D patches are turned by ±30° about every axis; where the patch is more than "
            f"{common.rules.anisotropy:g} times longer than its first axis, slices are turned freely in their plane "
            "instead, because turning thick slices out of it would blur them."
        )
        result, ratio = f"{degrees} {'in plane' if plan.dummy_2d else 'about every axis'}", max(patch) / patch[0]
    return Decision(
        configuration=choices.name,
        topic="rotation in training",
        rule=rule,
        inputs=f"patch {shape(patch)}, ratio {number(ratio)}",
        result=result,
        would_change="A patch of other proportions.",
    )


def _mirroring(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    names = common.axis_names[-len(choices.search.topology.patch_size) :]
    mirrored = [names[axis] for axis in choices.augmentation.mirror_axes]
    pairs = ", ".join(f"{left} / {right}" for left, right in common.sided_pairs[:_LISTED_PAIRS])
    return Decision(
        configuration=choices.name,
        topic="mirroring",
        rule=(
            "Patches are mirrored at random along every axis, in training and, where asked for, in prediction."
            if common.rules.mirrors_sided_classes
            else "Patches are mirrored at random along every axis, in training and, where asked for, prediction; not "
            "from left to right where class names come in left/right pairs, which would be mixed up."
        ),
        inputs=f"{len(common.sided_pairs)} left/right pairs among the class names" + (f" ({pairs})" if pairs else ""),
        result="along " + " and ".join(mirrored) if mirrored else "none",
        would_change=(
            "Nothing." if common.rules.mirrors_sided_classes else "Class names that name a side, or no longer do."
        ),
    )


def configuration_decisions(common: DatasetChoices, choices: ConfigurationChoices) -> tuple[Decision, ...]:
    """The reasons of one configuration, in the order in which the planner decides."""
    makers = (_initial_patch, _shrinking, _depth, _features, _batch, _batch_dice, _augmentation, _mirroring)
    return tuple(make(common, choices) for make in makers)
