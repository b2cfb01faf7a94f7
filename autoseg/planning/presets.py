"""The planner's rules: one frozen set of constants for each preset, read from `configs/presets`.

Source of the shipped ones: nnU-Net (Isensee et al. 2021, Nature Methods 18, supplement 2) and its residual presets
(Isensee et al. 2024, "nnU-Net Revisited"), with the constants of version 2.8.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from autoseg.config import YAML_ENDINGS, preset_file, preset_names, read_yaml
from autoseg.domain.plan import EarlyEnd, Optimiser
from autoseg.domain.sides import MirrorPairs
from autoseg.domain.values import Value
from autoseg.errors import ConfigError

Ints = tuple[int, ...]


class TrainingRules(Value):
    """How networks of a preset learn; every field is that of `TrainingPlan`, and none has a default here."""

    optimiser: Optimiser
    learning_rate: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    adapts_momentum: bool
    betas: tuple[float, float]
    weight_decay: float = Field(ge=0)
    warm_up_steps: int = Field(ge=0)
    decay_power: float = Field(gt=0)
    gradient_clip: float = Field(gt=0)
    ema_decay: float = Field(ge=0, lt=1)
    foreground_fraction: float = Field(ge=0, le=1)
    hard_voxel_fraction: float = Field(gt=0, le=1)
    early_end: EarlyEnd


class PlannerRules(Value):
    """Every constant the planner uses. Counts of activations are those of `activations.count_activations`.

    No constant has a default: a preset file says all of them, and what a preset does is read in one place.

    Attributes:
        name: The preset.
        default_vram_gb: Budget when none is given.
        reference_vram_gb: Budget for which `activations_*` were fitted.
        activations_3d: Count of one 3D sample of which the reference batch just fits the reference budget.
        activations_2d: The same in 2D.
        reference_batch_3d: Samples of that reference batch.
        reference_batch_2d: The same in 2D.
        fitted_batch_3d: The 3D patch is shrunk until this many samples fit.
        fitted_batch_2d: The same in 2D.
        smallest_batch: No batch is smaller.
        batch_fraction_of_voxels: A batch covers at most this part of the data set's voxels (against overfitting).
        default_step_seconds: Longest training step when none is given; None where only memory limits the plan.
        default_flops_per_second: Speed of the device when none was measured, in operations a second.
        timed_base_features: Channels of the finest stage where time limits the plan, if a network of `base_features`
            has no time for the largest patch that the memory holds.
        narrow_patch_edge: Rather than fewer voxels than this cubed (squared), a patch gets a narrower network to save
            time.
        smallest_base_features: As narrow as this.
        smallest_patch_edge: With the narrowest network, no 3D (2D) patch has fewer voxels than this cubed (squared) to
            save time, unless the image has fewer.
        encoder_block: See `NetworkPlan`.
        blocks_per_stage_encoder: Blocks of each encoder stage, finest first; the last entry holds for all deeper ones.
        blocks_per_stage_decoder: The same for the decoder.
        base_features: Channels of the finest stage; each deeper stage has twice as many.
        max_features_3d: Most channels of a stage in 3D.
        max_features_2d: The same in 2D.
        smallest_edge: No axis of a feature map is made shorter than this by halving.
        initial_edge_3d: The first guess of a patch has this cubed as its volume.
        initial_edge_2d: The first guess of a patch has this squared as its area.
        anisotropy: Spacing (and size) ratio from which one axis counts as coarse.
        coarse_axis_percentile: Percentile of the spacings that replaces the median on such an axis.
        similar_spacing_ratio: Axes whose spacing is below this multiple of the finest are treated alike.
        mask_below_fraction: Images cropped to less than this part of their voxels are normalised inside the mask.
        lowres_below_fraction: A patch that sees less than this part of a median image asks for a low-resolution stage.
        lowres_spacing_step: Factor by which its spacing is raised until the patch sees enough.
        lowres_smallest_gain: It is dropped when it has not at least this many times fewer voxels.
        axis_tie_fraction: Spacings this close (relative) count as equal when axes are ordered; the earlier goes first.
        single_slice_first: Whether an axis with one slice in every case goes first even when it is not the coarsest.
        mirror_pairs: What mirroring from left to right does where classes come in left/right pairs, see `Sides`; "swap"
            becomes "leave_out" where it is not known which labels change places.
        tile_sigma_fraction: Sigma of the Gaussian that weights the voxels of a tile in prediction, as a fraction of the
            patch.
        augmentation_warm_up_passes: The augmentation is as strong as planned once patches of so many times the data
            set's voxels have been seen, and grows until then, see `AugmentationPlan.warm_up_steps`; 0: at once.
        augmentation_warm_up_most_steps: It never grows over more steps than these.
        training: How the networks learn.
    """

    name: str = Field(min_length=1)
    default_vram_gb: float = Field(gt=0)
    reference_vram_gb: float = Field(gt=0)
    activations_3d: int = Field(gt=0)
    activations_2d: int = Field(gt=0)
    reference_batch_3d: int = Field(ge=1)
    reference_batch_2d: int = Field(ge=1)
    fitted_batch_3d: int = Field(ge=1)
    fitted_batch_2d: int = Field(ge=1)
    smallest_batch: int = Field(ge=1)
    batch_fraction_of_voxels: float = Field(gt=0)
    default_step_seconds: float | None
    default_flops_per_second: float | None
    timed_base_features: int = Field(ge=1)
    narrow_patch_edge: int = Field(ge=1)
    smallest_base_features: int = Field(ge=1)
    smallest_patch_edge: int = Field(ge=1)
    encoder_block: Literal["conv", "residual"]
    blocks_per_stage_encoder: Ints = Field(min_length=1)
    blocks_per_stage_decoder: Ints = Field(min_length=1)
    base_features: int = Field(ge=1)
    max_features_3d: int = Field(ge=1)
    max_features_2d: int = Field(ge=1)
    smallest_edge: int = Field(ge=1)
    initial_edge_3d: int = Field(ge=1)
    initial_edge_2d: int = Field(ge=1)
    anisotropy: float = Field(ge=1)
    coarse_axis_percentile: float = Field(ge=0, le=100)
    similar_spacing_ratio: float = Field(gt=1)
    mask_below_fraction: float
    lowres_below_fraction: float = Field(ge=0, le=1)
    lowres_spacing_step: float = Field(gt=1)
    lowres_smallest_gain: float = Field(ge=1)
    axis_tie_fraction: float = Field(ge=0, lt=1)
    single_slice_first: bool
    mirror_pairs: MirrorPairs
    tile_sigma_fraction: float = Field(gt=0)
    augmentation_warm_up_passes: float = Field(ge=0)
    augmentation_warm_up_most_steps: int = Field(ge=0)
    training: TrainingRules

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if (self.default_step_seconds is None) != (self.default_flops_per_second is None):
            raise ValueError("default_step_seconds and default_flops_per_second need each other")
        for limit in (self.default_step_seconds, self.default_flops_per_second):
            if limit is not None and not (isfinite(limit) and limit > 0):
                raise ValueError(f"default_step_seconds and default_flops_per_second must be above 0, got {limit}")
        if not self.smallest_base_features <= self.timed_base_features <= self.base_features:
            raise ValueError(
                "smallest_base_features, timed_base_features and base_features must not fall, got "
                f"{self.smallest_base_features}, {self.timed_base_features}, {self.base_features}"
            )
        if min(*self.blocks_per_stage_encoder, *self.blocks_per_stage_decoder) < 1:
            raise ValueError("every stage needs at least one block")
        return self

    @property
    def plans_for_time(self) -> bool:
        """Whether a step may only take so long; else memory alone limits the plan."""
        return self.default_step_seconds is not None

    def activation_limit(self, dims: int, vram_gb: float) -> float:
        """Count of one sample of which the reference batch just fits this budget."""
        return (self.activations_2d if dims == 2 else self.activations_3d) * (vram_gb / self.reference_vram_gb)

    def reference_batch(self, dims: int) -> int:
        """Samples of the reference batch."""
        return self.reference_batch_2d if dims == 2 else self.reference_batch_3d

    def fitted_batch(self, dims: int) -> int:
        """Samples that the patch is shrunk for."""
        return self.fitted_batch_2d if dims == 2 else self.fitted_batch_3d

    def max_features(self, dims: int) -> int:
        """Most channels of a stage."""
        return self.max_features_2d if dims == 2 else self.max_features_3d

    def features(self, num_stages: int, dims: int, base_features: int | None = None) -> Ints:
        """Channels of each stage, finest first; `base_features` where the network is narrower than planned."""
        base = self.base_features if base_features is None else base_features
        return tuple(min(self.max_features(dims), base * 2**stage) for stage in range(num_stages))

    def encoder_blocks(self, num_stages: int) -> Ints:
        """Blocks of each encoder stage, finest first."""
        return _repeat_last(self.blocks_per_stage_encoder, num_stages)

    def decoder_blocks(self, num_stages: int) -> Ints:
        """Convolutions of each decoder stage, finest first; one stage fewer than the network has."""
        return _repeat_last(self.blocks_per_stage_decoder, num_stages - 1)


def _repeat_last(blocks: Sequence[int], count: int) -> Ints:
    return tuple(blocks[min(stage, len(blocks) - 1)] for stage in range(count))


def _read(path: Path) -> PlannerRules:
    return PlannerRules.from_json(json.dumps(read_yaml(path)), path)


@cache
def _shipped(name: str) -> PlannerRules:
    return _read(preset_file(name))


def preset_rules(name: str) -> PlannerRules:
    """The rules of a shipped preset, or of a file of one's own.

    Args:
        name: A name of `config.preset_names`, or the path of a YAML file with the same keys.

    Raises:
        ConfigError: There is no such preset (the known ones are listed), or the file is not a preset.
    """
    known = preset_names()
    if name in known:
        return _shipped(name)
    if name.endswith(YAML_ENDINGS):
        rules = _read(Path(name))
        if rules.name in known:
            raise ConfigError(
                f"the preset file {name} calls itself {rules.name!r}, which is a preset of autoseg's own",
                hint="Give it another name, so that plans made by it can be told apart.",
            )
        return rules
    near = get_close_matches(name, known, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"unknown preset {name!r}", hint=f"Known presets: {', '.join(known)}; or give a YAML file of your own.{meant}"
    )
