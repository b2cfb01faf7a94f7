"""How much memory the work on a case takes, before any voxel is read: by its fingerprint, file size or header."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from autoseg.domain.dataset import Case
from autoseg.domain.fingerprint import Fingerprint
from autoseg.domain.geometry import Geometry, closest_orientation
from autoseg.domain.plan import PreprocessPlan
from autoseg.errors import DatasetError
from autoseg.io.images import read_header
from autoseg.pipeline.disk import prepared_shapes

SMALL_BYTES = 50_000_000
"""Nobody wants to know better of cases that surely take less: their headers are not read."""

_MOST_COMPRESSED = 100
"""Images are hardly smaller on disk than the hundredth part of what their voxels take in memory."""

_NUMBER_BYTES = 4
"""Of a stored value in memory: float32, unless it is an integer of two bytes or one."""

_MEASURED_VOXEL_BYTES = 28
"""Of measuring, a stored voxel beyond its values: labels, masks, and labelled voxels in float64."""

_STORED_VOXEL_BYTES, _PREPARED_VOXEL_BYTES, _PREPARED_VALUE_BYTES = 18, 22, 8
"""Of preparing with resampling: a stored voxel beyond its values; a prepared one beyond its values; a prepared value,
as it is and compressed. Source: peaks between 68 and 471 MB, docs/benchmarks/cache.md."""

_KEPT_VOXEL_BYTES = 12
"""Of preparing without resampling: a voxel beyond its values."""


def measuring_bytes(cases: Iterable[Case], num_channels: int) -> dict[str, int]:
    """Memory that it takes to measure each case, by its id; 0 where its files cannot be read, which others say."""
    a_voxel = _NUMBER_BYTES * num_channels + _MEASURED_VOXEL_BYTES
    found = {}
    for case in cases:
        bound = _file_bytes(case) * _MOST_COMPRESSED
        if bound > SMALL_BYTES:
            grid = _grid(case)
            bound = 0 if grid is None else prod(grid.shape) * a_voxel
        found[case.id] = bound
    return found


def preparing_bytes(
    cases: Iterable[Case], plan: PreprocessPlan, fingerprint: Fingerprint | None = None
) -> dict[str, int]:
    """Memory that it takes to prepare each case, by its id; 0 where its files cannot be read, which others say.

    Args:
        cases: The cases.
        plan: What is done to them.
        fingerprint: Its measurements save reading the headers of the cases that are in it.
    """
    known = {} if fingerprint is None else _measured_voxels(plan, fingerprint)
    found = {}
    for case in cases:
        stored, prepared = known.get(case.id) or _header_voxels(case, plan)
        values = len(plan.normalization) * (stored * _NUMBER_BYTES + prepared * _PREPARED_VALUE_BYTES)
        beyond = stored * _STORED_VOXEL_BYTES + prepared * _PREPARED_VOXEL_BYTES
        found[case.id] = values + (stored * _KEPT_VOXEL_BYTES if stored == prepared else beyond)
    return found


def _measured_voxels(plan: PreprocessPlan, fingerprint: Fingerprint) -> Mapping[str, tuple[int, int]]:
    if not fingerprint.cases:
        return {}
    shapes = prepared_shapes(plan, fingerprint)
    return {
        case.case: (prod(case.shape_original), prod(shape))
        for case, shape in zip(fingerprint.cases, shapes, strict=True)
    }


def _header_voxels(case: Case, plan: PreprocessPlan) -> tuple[int, int]:
    """Stored and, without any crop, prepared voxels."""
    grid = _grid(case)
    if grid is None:
        return 0, 0
    axes = closest_orientation(grid.affine).axes
    order = [axes[canonical] for canonical in plan.axis_order]
    resampled = order[3 - len(plan.target_spacing) :]
    growth = prod(grid.spacing_mm[axis] / target for axis, target in zip(resampled, plan.target_spacing, strict=True))
    return prod(grid.shape), round(prod(grid.shape) * growth)


def _grid(case: Case) -> Geometry | None:
    try:
        return read_header(case.images[0]).geometry
    except (DatasetError, OSError):
        return None


def _file_bytes(case: Case) -> int:
    """Of the largest image file, times their number; a folder (a DICOM series) counts as large."""
    sizes = []
    for file in map(Path, case.images):
        if file.is_dir():
            return SMALL_BYTES
        sizes.append(file.stat().st_size if file.is_file() else 0)
    return max(sizes) * len(sizes)
