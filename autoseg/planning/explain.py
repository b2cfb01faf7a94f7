"""The reasons of a plan in words: rule, numbers that went in, result, and what would change it.

Written for somebody who has never seen the code. Reasons that all configurations share are here, those of a single
configuration in `explain_configuration.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from autoseg.domain.dataset import Channel
from autoseg.domain.fingerprint import ChannelIntensity
from autoseg.domain.plan import FULLRES, LOWRES, ChannelNormalization, Decision, Plan
from autoseg.planning.choices import AXIS_NAMES, ConfigurationChoices, DatasetChoices
from autoseg.planning.explain_configuration import configuration_decisions
from autoseg.planning.normalization import SCHEMES_BY_NAME, uses_mask
from autoseg.planning.wording import millions, number, part, per_axis, several, shape, span

ALL = ""
"""The configuration of a decision that all of them share."""


def _target_spacing(common: DatasetChoices) -> Decision:
    choice, rules = common.spacing, common.rules
    columns = list(zip(*common.fingerprint.spacings_mm, strict=True))
    spacings = ", ".join(
        f"{name} {number(middle)} ({span(min(column), max(column))})"
        for name, middle, column in zip(AXIS_NAMES, choice.median, columns, strict=True)
    )
    coarse = AXIS_NAMES[choice.coarsest]
    others = [axis for axis in range(3) if axis != choice.coarsest]
    limit_mm = rules.anisotropy * max(choice.median[axis] for axis in others)
    limit_vox = min(choice.median_size[axis] for axis in others) / rules.anisotropy
    if choice.is_coarse_and_short:
        change = (
            f"{coarse} would keep its median if that were {number(limit_mm)} mm or less, "
            f"or if the images had {number(limit_vox)} voxels or more along it."
        )
    else:
        missing = []
        if choice.median[choice.coarsest] <= limit_mm:
            missing.append(f"its median were above {number(limit_mm)} mm")
        if choice.median_size[choice.coarsest] >= limit_vox:
            missing.append(f"the images had fewer than {number(limit_vox)} voxels along it")
        same = ", the same here" if number(choice.percentile) == number(choice.median[choice.coarsest]) else ""
        change = (
            f"Other images. {coarse}, the coarsest axis, would get its {rules.coarse_axis_percentile:g}th percentile "
            f"({number(choice.percentile)} mm{same}) if {' and '.join(missing)}."
        )
    return Decision(
        configuration=ALL,
        topic="target spacing",
        rule=(
            "Every image is resampled to one voxel size (its spacing), along each axis the median over the cases. An "
            f"axis more than {rules.anisotropy:g} times as coarse as both others and with less than a third of their "
            f"voxels gets its {rules.coarse_axis_percentile:g}th percentile instead, so that few images lose slices."
        ),
        inputs=(
            f"{several(len(columns[0]), 'case')}; median spacing in mm, with its range in brackets: {spacings}; "
            f"median size {per_axis(AXIS_NAMES, choice.median_size, 'voxels')}"
        ),
        result=per_axis(common.axis_names, common.target, "mm"),
        would_change=change,
    )


def _axis_order(common: DatasetChoices) -> Decision:
    first, *others = common.axis_names
    tie = common.rules.axis_tie_fraction
    rule = (
        "The axis with the coarsest target spacing goes first, the others keep their order: the 2D network works on "
        "the slices across the first axis."
    )
    if tie:
        rule += f" Spacings within {tie:.2%} count as equal; then the earlier axis goes first."
    if common.rules.single_slice_first:
        rule += " An axis along which every image is a single slice goes first whatever its spacing."
    return Decision(
        configuration=ALL,
        topic="axis order",
        rule=rule,
        inputs=f"target spacing {per_axis(AXIS_NAMES, common.spacing.target, 'mm')}",
        result=", ".join(common.axis_names) + "; all numbers below are in this order",
        would_change=f"{' or '.join(others)} becoming coarser than {first}.",
    )


def _median_shape(common: DatasetChoices) -> Decision:
    total = prod(common.median_shape) * common.fingerprint.num_training_cases
    return Decision(
        configuration=ALL,
        topic="median shape",
        rule=(
            "The size of a typical image after cropping to the box around its non-zero voxels and resampling: the "
            "median along each axis. A patch, the piece of an image that the network sees at once, is planned no "
            "larger, apart from rounding up."
        ),
        inputs=(
            f"sizes and spacings of {several(len(common.fingerprint.shapes), 'case')}, "
            f"target spacing {per_axis(common.axis_names, common.target, 'mm')}"
        ),
        result=(
            f"{shape(common.median_shape)} voxels; about {millions(total)} voxels in "
            f"{several(common.fingerprint.num_training_cases, 'training case')}"
        ),
        would_change="Larger or smaller images, or another target spacing.",
    )


_NAME_RULE = (
    f"The channel's name chooses: {', '.join(SCHEMES_BY_NAME)} have a meaning (case is ignored), any other is z-score."
)
_SCHEME_REASONS = {
    "zscore": "With it each image is scaled by its own mean and deviation, whatever its units.",
    "ct": "CT numbers mean the same in every image, so all are scaled alike, by the labelled voxels of the data set; "
    "clipping to their 0.5 and 99.5 percentiles cuts extreme values such as metal and air.",
    "none": "This name says that the values are ready to use.",
    "rescale": "This name asks for the range of each image to become 0–1.",
    "rgb": "This name says that the values are colours from 0 to 255.",
}
_SCHEME_WORDS = {
    "zscore": "z-score: in each image subtract the mean and divide by the standard deviation",
    "ct": "as CT, the same numbers for every image",
    "none": "left as it is",
    "rescale": "each image scaled to 0–1 by its minimum and maximum",
    "rgb": "divided by 255",
}


def _normalization(channel: Channel, chosen: ChannelNormalization, stats: ChannelIntensity | None) -> Decision:
    result = _SCHEME_WORDS[chosen.scheme]
    use = "" if chosen.scheme == "ct" else " (not used by this rule)"
    inputs = f"channel name '{channel.name}'; voxels of any class but background{use}: "
    if stats is None:
        inputs += "not measured"
    else:
        inputs += (
            f"mean {number(stats.mean)}, standard deviation {number(stats.std)}, 0.5 to 99.5 percentile "
            f"{number(stats.percentile_00_5)} to {number(stats.percentile_99_5)}"
        )
    if chosen.scheme == "ct" and stats is not None:
        result += (
            f": clip to {number(stats.percentile_00_5)} to {number(stats.percentile_99_5)}, subtract "
            f"{number(stats.mean)} and divide by {number(stats.std)}"
        )
    elif chosen.use_mask:
        result += ", inside the non-zero mask only"
    return Decision(
        configuration=ALL,
        topic=f"normalisation of {channel.name}",
        rule=f"{_NAME_RULE} {_SCHEME_REASONS[chosen.scheme]}",
        inputs=inputs,
        result=result,
        would_change="Another channel name in the data set's description.",
    )


def _mask(common: DatasetChoices) -> Decision:
    fraction, limit = common.fingerprint.median_relative_size_fraction, common.rules.mask_below_fraction
    is_used = uses_mask(common.fingerprint, common.rules)
    return Decision(
        configuration=ALL,
        topic="normalisation mask",
        rule=(
            f"Where cropping to the box around the non-zero voxels leaves less than {limit:.0%} of a typical image, "
            "the zeros are blank background; z-scores then use only voxels inside the non-zero mask (holes filled), "
            "and the rest stays 0."
        ),
        inputs=f"the box holds {100 * fraction:.4g}% of the voxels (median over cases)",
        result="only voxels inside the mask" if is_used else "all voxels of the cropped image",
        would_change=f"A median {'of' if is_used else 'below'} {limit:.0%}{' or more' if is_used else ''}.",
    )


def _fullres_presence(common: DatasetChoices) -> Decision:
    slices = number(common.median_shape[0])
    is_3d = common.lowres is not None
    return Decision(
        configuration=FULLRES,
        topic="whether there is a 3D network",
        rule="A 3D network is planned unless a typical image has a single slice along the first axis.",
        inputs=f"a typical image has {slices} slices along {common.axis_names[0]}",
        result="planned, beside the 2D network" if is_3d else "not planned: there is only the 2D network",
        would_change="A typical image with one slice along the first axis."
        if is_3d
        else "Images with more than one slice.",
    )


def _lowres(common: DatasetChoices) -> tuple[Decision, ...]:
    """Nothing where there is no 3D network at all."""
    found, rules = common.lowres, common.rules
    if found is None:
        return ()
    if found.search is not None:
        result = f"planned, with {found.gain:.2g} times fewer voxels, and the cascade of both beside it"
        change = "More memory (a larger patch), or smaller images."
    elif found.seen_fraction >= rules.lowres_below_fraction:
        result = "not planned: the patch sees enough"
        change = "Less memory (a smaller patch), or larger images."
    else:
        result = f"not planned: its images would have only {found.gain:.2g} times fewer voxels"
        change = "Less memory (a smaller patch), or larger images."
    return (
        Decision(
            configuration=LOWRES,
            topic="whether there is a low-resolution network",
            rule=(
                f"Where a patch sees less than {rules.lowres_below_fraction:.0%} of a typical image, a network at a "
                "coarser spacing gives the overview, and a cascade refines what it predicts at full resolution. Both "
                f"are left out unless the coarser images have at most 1/{rules.lowres_smallest_gain:g} of the voxels."
            ),
            inputs=f"the 3d_fullres patch sees {part(found.seen_fraction)} of a typical image",
            result=result,
            would_change=change,
        ),
    )


def _missing_channels(common: DatasetChoices, planned: Sequence[ConfigurationChoices]) -> tuple[Decision, ...]:
    """Nothing where every case has every channel."""
    optional = [number for number, channel in enumerate(common.channels) if channel.may_be_missing]
    if not optional:
        return ()
    probability = max(planned[0].augmentation.channel_dropout)
    return (
        Decision(
            configuration=ALL,
            topic="missing channels",
            rule=(
                "A channel that a case lacks is filled with zeros after normalisation, which is the mean of a channel "
                "scaled by z-score. So that the network learns to do without, channels that may be missing are also "
                "left out at random of patches that have them."
            ),
            inputs="channels that cases may lack: " + ", ".join(common.channels[number].name for number in optional),
            result=f"each is left out of {probability:.0%} of the patches, one channel always stays",
            would_change="Declaring no channel as missing; training.augmentation.channel_dropout sets how often.",
        ),
    )


def decisions(common: DatasetChoices, planned: Sequence[ConfigurationChoices]) -> tuple[Decision, ...]:
    """Every reason, in the order in which the planner decides."""
    normalization = tuple(
        _normalization(channel, chosen, stats)
        for channel, chosen, stats in zip(
            common.channels, common.normalization, common.fingerprint.intensities, strict=True
        )
    )
    return (
        _target_spacing(common),
        _axis_order(common),
        _median_shape(common),
        *normalization,
        _mask(common),
        *_missing_channels(common, planned),
        _fullres_presence(common),
        *_lowres(common),
        *(item for choices in planned for item in configuration_decisions(common, choices, planned)),
    )


def explain(plan: Plan) -> tuple[Decision, ...]:
    """The reasons of a plan, with what was set by hand at the end."""
    by_hand = tuple(
        Decision(
            configuration=item.key.partition(".")[0],
            topic=item.key.partition(".")[2],
            rule="Set by hand; the reasons above are those of the planned value.",
            inputs=f"planned {item.planned}",
            result=item.value,
            would_change="Planning again without this setting.",
        )
        for item in plan.overrides
    )
    return (*plan.decisions, *by_hand)
