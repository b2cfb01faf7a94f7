"""From a fingerprint and a budget to a plan.

Reads from top to bottom: spacing and axes, then for each configuration patch, network and batch, then the reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite, prod

from autoseg.domain.dataset import Channel, LabelSchema
from autoseg.domain.fingerprint import Budget, Fingerprint
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.network_rules import MOST_STAGES
from autoseg.domain.plan import (
    CASCADE,
    FLAT,
    FULLRES,
    LOWRES,
    AugmentationPlan,
    Configuration,
    InferencePlan,
    Plan,
    PreprocessPlan,
    TrainingPlan,
)
from autoseg.domain.sides import Sides, swap_of
from autoseg.errors import ConfigError, PlanError
from autoseg.planning.batch import choose_batch
from autoseg.planning.choices import ConfigurationChoices, DatasetChoices
from autoseg.planning.explain import decisions
from autoseg.planning.lowres import search_lowres
from autoseg.planning.normalization import choose_normalization
from autoseg.planning.patch import Limits, PatchSearch, TimeLimit, search_patch
from autoseg.planning.presets import PlannerRules
from autoseg.planning.spacing import choose_spacing, order_axes, require_possible, resampled_median_shape

ELONGATED_2D_ASPECT = 1.5
"""A longer 2D patch is turned only a little, because turned further it would leave the image. Source: nnU-Net 2.8."""

FULL_TURN_DEGREES = 180.0
SMALL_TURN_DEGREES = 15.0
TURN_3D_DEGREES = 30.0
"""Rotation ranges (to either side). Source: nnU-Net (Isensee et al. 2021, supplement 4)."""

CHANNEL_DROPOUT = 0.2
"""How often a channel that may be missing is left out of a patch that has it.

Dropping whole inputs is what makes a network do without them (Neverova et al. 2016, "ModDrop"; Groevik et al. 2021, npj
Digital Medicine 4:33, for MR sequences). How often is a judgement, not a measurement: one patch in five, together with
the cases that lack the channel, and four in five of the others still show all there is. Decision 21.
"""


def plan_augmentation(
    patch_size: tuple[int, ...], rules: PlannerRules, channels: Sequence[Channel] = ()
) -> AugmentationPlan:
    """Rotation that suits the shape of the patch, and channel dropout where channels may be missing.

    Source: nnU-Net 2.8 for the rotation.
    """
    dropout = tuple(CHANNEL_DROPOUT if channel.may_be_missing else 0.0 for channel in channels)
    channel_dropout = dropout if any(dropout) else ()
    if len(patch_size) == 2:
        elongated = max(patch_size) / min(patch_size) > ELONGATED_2D_ASPECT
        degrees = SMALL_TURN_DEGREES if elongated else FULL_TURN_DEGREES
        return AugmentationPlan(rotation_degrees=(degrees,), mirror_axes=(0, 1), channel_dropout=channel_dropout)
    is_flat = max(patch_size) / patch_size[0] > rules.anisotropy
    return AugmentationPlan(
        rotation_degrees=(FULL_TURN_DEGREES, 0.0, 0.0) if is_flat else (TURN_3D_DEGREES,) * 3,
        dummy_2d=is_flat,
        channel_dropout=channel_dropout,
    )


def _limits(budget: Budget, rules: PlannerRules, num_outputs: int, in_channels: int) -> Limits:
    """The budget, with the preset's own numbers where nothing was given.

    Raises:
        ConfigError: A number is not above 0, or time is limited for a preset that plans for memory alone.
    """
    for what, given, unit in (
        ("memory budget", budget.vram_gb, " GB"),
        ("longest training step", budget.step_seconds, " s"),
        ("speed", budget.flops_per_second, " operations a second"),
    ):
        if given is not None and not (isfinite(given) and given > 0):
            raise ConfigError(f"the {what} must be above 0{unit}, got {given:g}")
    time = None
    if rules.default_step_seconds is not None and rules.default_flops_per_second is not None:
        time = TimeLimit(
            step_seconds=rules.default_step_seconds if budget.step_seconds is None else budget.step_seconds,
            flops_per_second=(
                rules.default_flops_per_second if budget.flops_per_second is None else budget.flops_per_second
            ),
            is_measured=budget.flops_per_second is not None,
        )
    elif budget.step_seconds is not None:
        raise ConfigError(
            f"the preset {rules.name} plans for memory alone: it cannot keep a step below {budget.step_seconds:g} s",
            hint="Use --preset cpu, or leave --step-time out.",
        )
    vram_gb = rules.default_vram_gb if budget.vram_gb is None else budget.vram_gb
    return Limits(vram_gb=vram_gb, num_outputs=num_outputs, in_channels=in_channels, time=time)


def _dataset_choices(
    fingerprint: Fingerprint,
    labels: LabelSchema,
    channels: tuple[Channel, ...],
    rules: PlannerRules,
    budget: Budget,
) -> DatasetChoices:
    # nnU-Net counts every label as an output when it estimates memory: background and ignore, for regions too.
    limits = _limits(budget, rules, labels.num_classes + (labels.ignore is not None), len(channels))
    require_possible(fingerprint)
    if len(channels) != len(fingerprint.channels) or labels.num_classes != fingerprint.num_classes:
        raise PlanError(
            f"the fingerprint has {len(fingerprint.channels)} channels and {fingerprint.num_classes} classes, "
            f"the data set {len(channels)} and {labels.num_classes}"
        )
    spacing = choose_spacing(fingerprint, rules)
    order = order_axes(fingerprint, spacing, rules)
    median_shape = resampled_median_shape(fingerprint, spacing.target)
    return DatasetChoices(
        fingerprint=fingerprint,
        rules=rules,
        limits=limits,
        channels=channels,
        num_values=labels.num_values,
        spacing=spacing,
        order=order,
        target=tuple(spacing.target[axis] for axis in order),
        median_shape=tuple(median_shape[axis] for axis in order),
        normalization=choose_normalization(fingerprint, channels, rules),
        sided_pairs=labels.sided_pairs,
        swap=swap_of(labels),
    )


def _search(common: DatasetChoices, dims: int) -> PatchSearch:
    """The patch over the last `dims` axes: all of them, or the plane of a slice."""
    return search_patch(common.target[-dims:], common.median_shape[-dims:], common.limits, common.rules)


def _search_cascade(common: DatasetChoices, fullres: PatchSearch) -> PatchSearch:
    """As at full resolution; where time is limited, the further input channels may cost some of the patch."""
    limits = replace(common.limits, in_channels=common.limits.in_channels + common.num_values - 1)
    return search_patch(fullres.spacing, fullres.median_shape, limits, common.rules)


def _choices_3d(common: DatasetChoices, fullres: PatchSearch) -> Iterator[ConfigurationChoices]:
    """Full resolution; where it sees too little also low resolution and the cascade of both.

    Source: nnU-Net (Isensee et al. 2021, supplement 2.4); its cascade inherits everything from full resolution.
    """
    cases = common.fingerprint.num_training_cases
    voxels = prod(common.median_shape) * cases
    lowres = common.lowres
    if lowres is None or lowres.search is None:
        yield _choices(common, FULLRES, fullres, voxels, batch_dice=False)
        return
    yield _choices(common, FULLRES, fullres, voxels, batch_dice=True)
    yield _choices(common, LOWRES, lowres.search, lowres.voxels * cases, batch_dice=False)
    cascade = _choices(common, CASCADE, _search_cascade(common, fullres), voxels, batch_dice=True)
    yield replace(cascade, previous_stage=LOWRES)


def _choices(
    common: DatasetChoices, name: str, search: PatchSearch, voxels: float, *, batch_dice: bool
) -> ConfigurationChoices:
    topology = search.topology
    if topology.num_stages > MOST_STAGES:
        raise PlanError(
            f"{name} would need {topology.num_stages} stages for a patch of {'x'.join(map(str, topology.patch_size))}, "
            f"and {MOST_STAGES} is the most",
            hint="Resample or cut the images to fewer voxels.",
        )
    batch = choose_batch(search, voxels, common.rules)
    augmentation = plan_augmentation(topology.patch_size, common.rules, common.channels)
    steps = round(common.rules.augmentation_warm_up_passes * batch.steps_of_a_pass)
    return ConfigurationChoices(
        name=name,
        search=search,
        batch=batch,
        batch_dice=batch_dice,
        augmentation=augmentation.model_copy(
            update={"warm_up_steps": min(steps, common.rules.augmentation_warm_up_most_steps)}
        ),
        sides=_sides(common, name),
    )


def _sides(common: DatasetChoices, name: str) -> Sides | None:
    """What mirroring from left to right does; None where there are no pairs, or no such axis in a slice."""
    axis = common.left_right_axis - (1 if name == FLAT else 0)
    if not common.sided_pairs or axis < 0:
        return None
    mirroring, swap = common.rules.mirror_pairs, common.swap
    if mirroring == "swap" and swap.problem:
        mirroring = "leave_out"
    return Sides(axis=axis, mirror_pairs=mirroring, labels=swap.labels, outputs=swap.outputs)


def _configuration(common: DatasetChoices, choices: ConfigurationChoices, labels: LabelSchema) -> Configuration:
    topology, rules = choices.search.topology, common.rules
    first, second, third = (2 - axis for axis in common.order)  # Z, Y, X are the canonical axes 2, 1, 0
    num_previous = 0 if choices.previous_stage is None else labels.num_values - 1
    return Configuration(
        preprocess=PreprocessPlan(
            axis_order=(first, second, third),
            target_spacing=choices.search.spacing,
            normalization=common.normalization,
        ),
        network=NetworkPlan(
            in_channels=len(common.channels) + num_previous,
            num_classes=labels.num_outputs,
            output="regions" if labels.has_regions else "classes",
            patch_size=topology.patch_size,
            features_per_stage=choices.search.features,
            strides=topology.strides,
            kernel_sizes=topology.kernel_sizes,
            encoder_block=rules.encoder_block,
            blocks_per_stage_encoder=rules.encoder_blocks(topology.num_stages),
            blocks_per_stage_decoder=rules.decoder_blocks(topology.num_stages),
        ),
        training=TrainingPlan(
            batch_size=choices.batch.batch_size,
            batch_dice=choices.batch_dice,
            augmentation=choices.augmentation,
            **rules.training.model_dump(),
        ),
        inference=InferencePlan(
            mirror_axes=choices.augmentation.mirror_axes, gaussian_sigma_fraction=rules.tile_sigma_fraction
        ),
        previous_stage=choices.previous_stage,
        sides=choices.sides,
    )


def make_plan(
    fingerprint: Fingerprint,
    dataset_name: str,
    labels: LabelSchema,
    channels: tuple[Channel, ...],
    rules: PlannerRules,
    budget: Budget = Budget(),  # noqa: B008  (frozen)
) -> Plan:
    """Plan every configuration that makes sense for a data set, with the reasons.

    Args:
        fingerprint: What was measured.
        dataset_name: For people.
        labels: The classes.
        channels: In order; their names choose the normalisation.
        rules: The preset.
        budget: Memory and time; without them the preset's own.

    Raises:
        ConfigError: A budget that is not above 0, or that the preset cannot keep.
        PlanError: Impossible measurements, or nothing fits the budget.
    """
    common = _dataset_choices(fingerprint, labels, channels, rules, budget)
    planned: list[ConfigurationChoices] = []
    if common.median_shape[0] != 1:  # else slices are all there is
        fullres = _search(common, 3)
        common = replace(common, lowres=search_lowres(fullres, common.limits, rules))
        planned.extend(_choices_3d(common, fullres))
    voxels = prod(common.median_shape) * fingerprint.num_training_cases
    planned.append(_choices(common, FLAT, _search(common, 2), voxels, batch_dice=True))
    return Plan(
        dataset=dataset_name,
        preset=rules.name,
        vram_gb=common.limits.vram_gb,
        fingerprint_digest=fingerprint.digest(),
        channels=channels,
        labels=labels,
        configurations={item.name: _configuration(common, item, labels) for item in planned},
        decisions=decisions(common, planned),
    )
