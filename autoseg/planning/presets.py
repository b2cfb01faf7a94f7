"""The planner's constants, one frozen set for each preset.

Source: nnU-Net (Isensee et al. 2021, Nature Methods 18, supplement 2) with the constants of version 2.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from autoseg.domain.values import Value
from autoseg.errors import ConfigError


class PlannerRules(Value):
    """Every constant the planner uses. Counts of activations are those of `memory.count_activations`.

    Attributes:
        name: The preset.
        default_vram_gb: Budget when none is given.
        reference_vram_gb: Budget for which `activations_*` were fitted.
        activations_3d: Count of one 3D sample of which the reference batch just fits the reference budget.
        activations_2d: The same in 2D.
        reference_batch_3d: Samples of that reference batch.
        reference_batch_2d: The same in 2D.
        smallest_batch: The patch is shrunk until this many samples fit; no batch is smaller.
        batch_fraction_of_voxels: A batch covers at most this part of the data set's voxels (against overfitting).
        base_features: Channels of the finest stage; each deeper stage has twice as many.
        max_features_3d: Most channels of a stage in 3D.
        max_features_2d: The same in 2D.
        convs_per_stage: Convolutions in each encoder and each decoder stage.
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
        adapts_momentum: See `TrainingPlan`.
        mirrors_sided_classes: Whether patches are mirrored from left to right although classes come in left/right
            pairs, which such a patch cannot tell apart.
        single_slice_first: Whether an axis with one slice in every case goes first even when it is not the coarsest.
    """

    name: str
    default_vram_gb: float = 8.0
    reference_vram_gb: float = 8.0
    activations_3d: int = 560_000_000
    activations_2d: int = 85_000_000
    reference_batch_3d: int = 2
    reference_batch_2d: int = 12
    smallest_batch: int = 2
    batch_fraction_of_voxels: float = 0.05
    base_features: int = 32
    max_features_3d: int = 320
    max_features_2d: int = 512
    convs_per_stage: int = 2
    smallest_edge: int = 4
    initial_edge_3d: int = 256
    initial_edge_2d: int = 2048
    anisotropy: float = 3.0
    coarse_axis_percentile: float = 10.0
    similar_spacing_ratio: float = 2.0
    mask_below_fraction: float = 0.75
    lowres_below_fraction: float = 0.25
    lowres_spacing_step: float = 1.03
    lowres_smallest_gain: float = 2.0
    axis_tie_fraction: float = 0.0
    single_slice_first: bool = False
    mirrors_sided_classes: bool = True
    adapts_momentum: bool = False

    def activation_limit(self, dims: int, vram_gb: float) -> float:
        """Count of one sample of which the reference batch just fits this budget."""
        return (self.activations_2d if dims == 2 else self.activations_3d) * (vram_gb / self.reference_vram_gb)

    def reference_batch(self, dims: int) -> int:
        """Samples of the reference batch."""
        return self.reference_batch_2d if dims == 2 else self.reference_batch_3d

    def features(self, num_stages: int, dims: int) -> tuple[int, ...]:
        """Channels of each stage, finest first."""
        most = self.max_features_2d if dims == 2 else self.max_features_3d
        return tuple(min(most, self.base_features * 2**stage) for stage in range(num_stages))


PRESETS: Mapping[str, PlannerRules] = MappingProxyType(
    {
        "nnunet": PlannerRules(name="nnunet"),
        # Source of the departures: decisions 4 (axis order), 8 (mirroring) and 9 (momentum).
        "default": PlannerRules(
            name="default",
            axis_tie_fraction=1e-4,
            single_slice_first=True,
            mirrors_sided_classes=False,
            adapts_momentum=True,
        ),
    }
)
"""The presets by name. "nnunet" equals nnU-Net's default planner without exception."""


def preset_rules(name: str) -> PlannerRules:
    """The rules of a preset.

    Raises:
        ConfigError: There is no such preset; the known ones are listed.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = get_close_matches(name, PRESETS, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown preset {name!r}", hint=f"Known presets: {', '.join(sorted(PRESETS))}.{meant}")
