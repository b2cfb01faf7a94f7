"""From a fingerprint and a budget to a plan.

Reads from top to bottom: spacing and axes, then for each configuration patch, network and batch, then the reasons.
"""

from __future__ import annotations

from dataclasses import replace
from math import isfinite, prod
from typing import Literal

from autoseg.domain.dataset import Channel, LabelSchema
from autoseg.domain.fingerprint import Budget, Fingerprint
from autoseg.domain.laterality import left_right_pairs
from autoseg.domain.plan import (
    AugmentationPlan,
    Configuration,
    InferencePlan,
    NetworkPlan,
    Plan,
    PreprocessPlan,
    TrainingPlan,
)
from autoseg.errors import ConfigError, PlanError
from autoseg.planning.choices import ConfigurationChoices, DatasetChoices
from autoseg.planning.explain import decisions
from autoseg.planning.lowres import search_lowres
from autoseg.planning.normalization import choose_normalization
from autoseg.planning.patch import PatchSearch, choose_batch, search_patch
from autoseg.planning.presets import PlannerRules, preset_rules
from autoseg.planning.spacing import choose_spacing, order_axes, require_possible, resampled_median_shape

ELONGATED_2D_ASPECT = 1.5
"""A longer 2D patch is turned only a little, because turned further it would leave the image. Source: nnU-Net 2.8."""

FULL_TURN_DEGREES = 180.0
SMALL_TURN_DEGREES = 15.0
TURN_3D_DEGREES = 30.0
"""Rotation ranges (to either side). Source: nnU-Net (Isensee et al. 2021, supplement 4)."""


def plan_augmentation(
    patch_size: tuple[int, ...], rules: PlannerRules, kept_axis: int | None = None
) -> AugmentationPlan:
    """Rotation and mirroring that suit the shape of the patch; `kept_axis` is not mirrored.

    Source: nnU-Net 2.8.
    """
    mirror_axes = tuple(axis for axis in range(len(patch_size)) if axis != kept_axis)
    if len(patch_size) == 2:
        elongated = max(patch_size) / min(patch_size) > ELONGATED_2D_ASPECT
        degrees = SMALL_TURN_DEGREES if elongated else FULL_TURN_DEGREES
        return AugmentationPlan(rotation_degrees=(degrees,), mirror_axes=mirror_axes)
    if max(patch_size) / patch_size[0] > rules.anisotropy:
        return AugmentationPlan(rotation_degrees=(FULL_TURN_DEGREES, 0.0, 0.0), mirror_axes=mirror_axes, dummy_2d=True)
    return AugmentationPlan(rotation_degrees=(TURN_3D_DEGREES,) * 3, mirror_axes=mirror_axes)


def _dataset_choices(
    fingerprint: Fingerprint,
    labels: LabelSchema,
    channels: tuple[Channel, ...],
    rules: PlannerRules,
    vram_gb: float,
) -> DatasetChoices:
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
        vram_gb=vram_gb,
        channels=channels,
        # nnU-Net counts the ignore label as an output when it estimates memory.
        num_outputs=labels.num_classes + (labels.ignore is not None),
        spacing=spacing,
        order=order,
        target=tuple(spacing.target[axis] for axis in order),
        median_shape=tuple(median_shape[axis] for axis in order),
        normalization=choose_normalization(fingerprint, channels, rules),
        sided_pairs=left_right_pairs(labels.names),
    )


def _search(common: DatasetChoices, dims: int) -> PatchSearch:
    """The patch over the last `dims` axes: all of them, or the plane of a slice."""
    target, shape = common.target[-dims:], common.median_shape[-dims:]
    return search_patch(target, shape, common.num_outputs, common.vram_gb, common.rules)


def _configuration_choices(
    common: DatasetChoices, name: Literal["2d", "3d_fullres"], search: PatchSearch
) -> ConfigurationChoices:
    rules = common.rules
    voxels = prod(common.median_shape) * common.fingerprint.num_training_cases
    has_lowres = common.lowres is not None and common.lowres.is_wanted
    return ConfigurationChoices(
        name=name,
        search=search,
        batch=choose_batch(search, voxels, rules),
        features=rules.features(search.topology.num_stages, len(search.spacing)),
        batch_dice=name == "2d" or has_lowres,
        augmentation=plan_augmentation(search.topology.patch_size, rules, _kept_axis(common, name)),
    )


def _kept_axis(common: DatasetChoices, name: str) -> int | None:
    """The axis of the patch that mirroring leaves alone, so that left stays left."""
    if common.rules.mirrors_sided_classes or not common.sided_pairs:
        return None
    return common.left_right_axis - (1 if name == "2d" else 0)


def _configuration(common: DatasetChoices, choices: ConfigurationChoices, labels: LabelSchema) -> Configuration:
    topology = choices.search.topology
    first, second, third = (2 - axis for axis in common.order)  # Z, Y, X are the canonical axes 2, 1, 0
    return Configuration(
        preprocess=PreprocessPlan(
            axis_order=(first, second, third),
            target_spacing=choices.search.spacing,
            normalization=common.normalization,
        ),
        network=NetworkPlan(
            in_channels=len(common.channels),
            num_classes=labels.num_classes,
            patch_size=topology.patch_size,
            features_per_stage=choices.features,
            strides=topology.strides,
            kernel_sizes=topology.kernel_sizes,
            convs_per_stage_encoder=(common.rules.convs_per_stage,) * topology.num_stages,
            convs_per_stage_decoder=(common.rules.convs_per_stage,) * (topology.num_stages - 1),
        ),
        training=TrainingPlan(
            batch_size=choices.batch.batch_size,
            batch_dice=choices.batch_dice,
            adapts_momentum=common.rules.adapts_momentum,
            augmentation=choices.augmentation,
        ),
        inference=InferencePlan(mirror_axes=choices.augmentation.mirror_axes),
    )


def make_plan(
    fingerprint: Fingerprint,
    dataset_name: str,
    labels: LabelSchema,
    channels: tuple[Channel, ...],
    preset: str = "default",
    budget: Budget = Budget(),  # noqa: B008  (frozen)
) -> Plan:
    """Plan every configuration that makes sense for a data set, with the reasons.

    Args:
        fingerprint: What was measured.
        dataset_name: For people.
        labels: The classes.
        channels: In order; their names choose the normalisation.
        preset: A key of `presets.PRESETS`.
        budget: Memory; without it the preset's own.

    Raises:
        ConfigError: Unknown preset, or a budget that is not above 0.
        PlanError: Impossible measurements, or nothing fits the budget.
    """
    rules = preset_rules(preset)
    vram_gb = rules.default_vram_gb if budget.vram_gb is None else budget.vram_gb
    if not (isfinite(vram_gb) and vram_gb > 0):
        raise ConfigError(f"the memory budget must be above 0 GB, got {vram_gb:g}")
    common = _dataset_choices(fingerprint, labels, channels, rules, vram_gb)
    planned = []
    if common.median_shape[0] != 1:  # else slices are all there is
        fullres = _search(common, 3)
        common = replace(common, lowres=search_lowres(fullres, common.num_outputs, vram_gb, rules))
        planned.append(_configuration_choices(common, "3d_fullres", fullres))
    planned.append(_configuration_choices(common, "2d", _search(common, 2)))
    return Plan(
        dataset=dataset_name,
        preset=rules.name,
        vram_gb=vram_gb,
        fingerprint_digest=fingerprint.digest(),
        channels=channels,
        labels=labels,
        configurations={item.name: _configuration(common, item, labels) for item in planned},
        decisions=decisions(common, planned),
    )
