"""From a configuration of nnU-Net's plans to ours: reading order, transposition, normalisation, network, prediction."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from pydantic import ValidationError

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.plan import (
    ChannelNormalization,
    Configuration,
    InferencePlan,
    NormalizationScheme,
    PreprocessPlan,
    TrainingPlan,
)
from autoseg.domain.values import validation_problems
from autoseg.interop.nnunet_network import NormFound, network_plan
from autoseg.interop.nnunet_plans import ForeignConfiguration, ForeignPlans
from autoseg.interop.nnunet_resampling import resampling_fields
from autoseg.planning.planner import plan_augmentation
from autoseg.planning.presets import preset_rules

_READERS: dict[str, Literal["RAS", "native"]] = {
    "SimpleITKIO": "native",
    "NibabelIO": "native",
    "NaturalImage2DIO": "native",
    "Tiff3DIO": "native",
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
}
"""nnU-Net's readers, and the orientation that images have when they have read them. Source: nnU-Net 2.8.1."""

_BLIND_TO_TIFF_SPACING = "Tiff3DIO"
"""Takes the voxel size of a TIFF stack from a file beside it, never from the stack."""

_SCHEMES: dict[str, NormalizationScheme] = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "rescale",
    "RGBTo01Normalization": "rgb",
}
"""nnU-Net's classes. Source: nnU-Net 2.8.1."""

_CT_NUMBERS = {"mean": "mean", "std": "std", "percentile_00_5": "lower", "percentile_99_5": "upper"}

_PRESET_OF_TRAINING = "nnunet"
"""Its rules choose the augmentation, should somebody train such a configuration further."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What only the weights and their checkpoint say.

    Attributes:
        mirror_axes: That predictions may be mirrored along.
        norm: Normalisation that the weights are of.
    """

    mirror_axes: tuple[int, ...]
    norm: NormFound


def convert_configuration(
    plans: ForeignPlans,
    foreign: ForeignConfiguration,
    trained: Trained,
    labels: LabelSchema,
    num_channels: int,
    previous_stage: str | None,
    problems: list[str],
) -> Configuration | None:
    """A configuration as autoseg plans it.

    Args:
        plans: Of the data set.
        foreign: Of these plans.
        trained: What the checkpoint says.
        labels: Of the data set.
        num_channels: Of its images.
        previous_stage: Of a cascade, by our name.
        problems: Gets what cannot be represented, each in words.

    Returns:
        None where there were problems.
    """
    before = len(problems)
    if foreign.preprocessor != "DefaultPreprocessor":
        problems.append(f"the preprocessor {foreign.preprocessor!r} is not known; DefaultPreprocessor is")
    preprocess = _preprocess(plans, foreign, num_channels, problems)
    num_previous = labels.num_values - 1 if previous_stage else 0
    network = network_plan(
        foreign.architecture,
        foreign.patch_size,
        num_channels + num_previous,
        labels.num_outputs,
        output="regions" if labels.has_regions else "classes",
        norm=trained.norm,
        problems=problems,
    )
    if len(problems) > before or preprocess is None or network is None:
        return None
    augmentation = plan_augmentation(foreign.patch_size, preset_rules(_PRESET_OF_TRAINING))
    try:
        return Configuration(
            preprocess=preprocess,
            network=network,
            training=TrainingPlan(
                batch_size=foreign.batch_size,
                batch_dice=foreign.batch_dice,
                augmentation=augmentation.model_copy(update={"mirror_axes": trained.mirror_axes}),
            ),
            inference=InferencePlan(mirror_axes=trained.mirror_axes, precision="fp32"),
            previous_stage=previous_stage,
        )
    except ValidationError as problem:
        problems += validation_problems(problem)
        return None


def _preprocess(
    plans: ForeignPlans, foreign: ForeignConfiguration, num_channels: int, problems: list[str]
) -> PreprocessPlan | None:
    before = len(problems)
    forward, backward = plans.transpose_forward, plans.transpose_backward
    if sorted(forward) != [0, 1, 2] or any(backward[axis] != place for place, axis in enumerate(forward)):
        problems.append(f"transpose_forward {forward} and transpose_backward {backward} do not undo each other")
    if plans.reader not in _READERS:
        problems.append(f"the image_reader_writer {plans.reader!r} is not known; {', '.join(_READERS)} are")
    if len(foreign.spacing) != len(foreign.patch_size):
        problems.append(f"spacing {foreign.spacing} and patch_size {foreign.patch_size} differ in their axes")
    fields = resampling_fields(foreign, problems)
    normalization = _normalization(plans, foreign, num_channels, problems)
    if len(problems) > before:
        return None
    first, second, third = (2 - axis for axis in forward)  # as read, axes are the file's in reverse order
    try:
        return PreprocessPlan(
            orientation=_READERS[plans.reader],
            axis_order=(first, second, third),
            target_spacing=foreign.spacing,
            normalization=normalization,
            trusts_tiff_spacing=plans.reader != _BLIND_TO_TIFF_SPACING,
            **fields,
        )
    except ValidationError as problem:
        problems += validation_problems(problem)
        return None


def _normalization(
    plans: ForeignPlans, foreign: ForeignConfiguration, num_channels: int, problems: list[str]
) -> tuple[ChannelNormalization, ...]:
    names, masks = foreign.normalization, foreign.use_mask
    if len(names) != num_channels or len(masks) != num_channels:
        problems.append(
            f"{len(names)} normalization_schemes and {len(masks)} entries of use_mask_for_norm for {num_channels} "
            "channels"
        )
        return ()
    rules = []
    for number, (name, mask) in enumerate(zip(names, masks, strict=True)):
        scheme = _SCHEMES.get(name)
        if scheme is None:
            problems.append(f"channel {number}: the normalisation {name!r} is not known; {', '.join(_SCHEMES)} are")
            continue
        numbers = _ct_numbers(plans, number, problems) if scheme == "ct" else {}
        rules.append(ChannelNormalization(scheme=scheme, use_mask=bool(mask) and scheme == "zscore", **numbers))
    return tuple(rules)


def _ct_numbers(plans: ForeignPlans, number: int, problems: list[str]) -> dict[str, Any]:
    """Mean, deviation and clipping range of a channel; zeros where the plans lack them, which is a problem."""
    found = plans.intensities.get(str(number), {})
    out = {}
    for theirs, ours in _CT_NUMBERS.items():
        value = found.get(theirs)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            problems.append(f"channel {number}: CTNormalization needs {theirs} of its foreground, got {value!r}")
            value = 0.0
        out[ours] = float(value)
    return out
