"""Whether the images are so large for the patch that a low-resolution stage is wanted, and at which spacing."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from autoseg.planning.patch import Limits, PatchSearch, search_patch
from autoseg.planning.presets import PlannerRules

Floats = tuple[float, ...]

COARSE_RATIO = 2.0
"""Axes finer than the coarsest by more than this are made coarser first. Source: nnU-Net 2.8."""


@dataclass(frozen=True, slots=True)
class LowresSearch:
    """The low-resolution stage.

    Attributes:
        seen_fraction: Part of a median image that the full-resolution patch sees.
        search: Its patch; None where full resolution is enough or a lower one would not be much smaller.
        gain: Voxels at full resolution / voxels at low resolution (1 when none was tried).
        voxels: Of a median image at low resolution; not rounded.
    """

    seen_fraction: float
    search: PatchSearch | None
    gain: float
    voxels: float

    @property
    def is_wanted(self) -> bool:
        """Whether there is a low-resolution stage."""
        return self.search is not None


def _coarser(spacing: Floats, step: float) -> Floats:
    """One step up, only the fine axes as long as they are much finer than the coarsest."""
    fine = [max(spacing) / value > COARSE_RATIO for value in spacing]
    return tuple(
        value * step if is_fine or not any(fine) else value for value, is_fine in zip(spacing, fine, strict=True)
    )


def search_lowres(fullres: PatchSearch, limits: Limits, rules: PlannerRules) -> LowresSearch:
    """Raise the spacing until a patch sees enough of a median image.

    Raises:
        PlanError: No patch fits at some spacing.

    Source: nnU-Net (Isensee et al. 2021, supplement 2.4).
    """
    whole = prod(fullres.median_shape)
    seen = prod(fullres.topology.patch_size) / whole
    spacing, voxels, patch_voxels = fullres.spacing, whole, float(prod(fullres.topology.patch_size))
    search: PatchSearch | None = None
    while patch_voxels / voxels < rules.lowres_below_fraction:
        spacing = _coarser(spacing, rules.lowres_spacing_step)
        exact = [
            old / new * edge for old, new, edge in zip(fullres.spacing, spacing, fullres.median_shape, strict=True)
        ]
        voxels = prod(exact)
        shape = tuple(float(max(1, round(edge))) for edge in exact)
        search = search_patch(spacing, shape, limits, rules)
        patch_voxels = float(prod(search.topology.patch_size))
    gain = whole / voxels
    return LowresSearch(seen, search if gain >= rules.lowres_smallest_gain else None, gain, voxels)
