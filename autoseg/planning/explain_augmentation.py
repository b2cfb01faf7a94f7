"""The reasons of one configuration's augmentation: rotation, its growth, mirroring."""

from __future__ import annotations

from autoseg.domain.plan import Decision
from autoseg.planning.choices import ConfigurationChoices, DatasetChoices
from autoseg.planning.wording import number, several, shape

_LISTED_PAIRS = 2


def augmentation(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    """How far patches are turned."""
    plan, patch = choices.augmentation, choices.search.topology.patch_size
    degrees = f"±{plan.rotation_degrees[0]:g}°"
    if len(patch) == 2:
        rule = (
            "Patches are turned at random, 2D ones freely, or by up to ±15° where one side is more than 1.5 times as "
            "long as the other."
        )
        result, shortest = degrees, min(patch)
    else:
        rule = (
            "Patches are turned at random, 3D ones by up to ±30° about every axis; where the longest side is more "
            f"than {common.rules.anisotropy:g} times the first one, slices are turned freely in their plane "
            "instead, because turning thick slices out of it would blur them."
        )
        result, shortest = f"{degrees} {'in plane' if plan.dummy_2d else 'about every axis'}", patch[0]
    return Decision(
        configuration=choices.name,
        topic="rotation in training",
        rule=rule,
        inputs=f"patch {shape(patch)}; {max(patch)}/{shortest} = {max(patch) / shortest:.3g}",
        result=result,
        would_change="A patch of other proportions.",
    )


def warm_up(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    """Over how many steps the augmentation grows."""
    passes, steps = common.rules.augmentation_warm_up_passes, choices.augmentation.warm_up_steps
    return Decision(
        configuration=choices.name,
        topic="augmentation in the beginning",
        rule=(
            "Turning, scaling and changes of intensity begin with no patch and come to their planned number of patches "
            f"when the network has seen {passes:g} times as many voxels as the data set has, or after "
            f"{common.rules.augmentation_warm_up_most_steps} steps: until then most of what it sees is new to it."
            if passes
            else "Augmentation is the same from the first step to the last."
        ),
        inputs=f"in {number(choices.batch.steps_of_a_pass)} steps it sees as many voxels as the data set has",
        result=f"grows over {steps} steps" if steps else "whole from the first step",
        would_change=f"--set {choices.name}.training.augmentation.warm_up_steps=STEPS.",
    )


_MIRROR_RULES = {
    "leave_out": "Patches are mirrored at random along every axis, in training and, where asked for, in prediction; "
    "not from left to right where classes come in left/right pairs, which would be mixed up.",
    "swap": "Patches are mirrored at random along every axis, in training and, where asked for, in prediction; from "
    "left to right only together with the labels of left/right pairs, which change places.",
    "naive": "Patches are mirrored at random along every axis, in training and, where asked for, in prediction.",
}


def mirroring(common: DatasetChoices, choices: ConfigurationChoices) -> Decision:
    """Along which axes patches are mirrored."""
    names = common.axis_names[-len(choices.search.topology.patch_size) :]
    axes, sides, swap = choices.augmentation.mirror_axes, choices.sides, common.swap
    mirrored = [names[axis] for axis in (axes if sides is None else sides.mirrored(axes))]
    result = "along " + ", ".join(mirrored) if mirrored else "none"
    if sides is not None and sides.mirror_pairs == "swap":
        result += f"; along {names[sides.axis]} the labels of each pair change places"
    pairs = ", ".join(f"{left} / {right}" for left, right in common.sided_pairs[:_LISTED_PAIRS])
    inputs = f"{several(len(common.sided_pairs), 'left/right pair')} among the classes" + (
        f" ({pairs})" if pairs else ""
    )
    if pairs and sides is None:
        inputs += "; the slices of this network hold no axis from left to right"
    elif swap.problem:
        inputs += f"; {swap.problem}"
    elif pairs and swap.alone:
        inputs += f"; {', '.join(swap.alone[:_LISTED_PAIRS])} would keep the label: there is no partner"
    return Decision(
        configuration=choices.name,
        topic="mirroring",
        rule=_MIRROR_RULES[common.rules.mirror_pairs],
        inputs=inputs,
        result=result,
        would_change=_another_mirroring(common, choices),
    )


def _another_mirroring(common: DatasetChoices, choices: ConfigurationChoices) -> str:
    if not common.sided_pairs:
        return (
            "Nothing." if common.rules.mirror_pairs == "naive" else "Classes in pairs, such as left lung, right lung."
        )
    if choices.sides is None:
        return "Slices that hold the axis from left to right."
    if common.swap.problem:
        return 'Pairs that the description of the data set declares ("pairs": [] where there are none).'
    others = [way for way in _MIRROR_RULES if way != choices.sides.mirror_pairs]
    return f"--set {choices.name}.sides.mirror_pairs={others[0]} or {others[1]}."
