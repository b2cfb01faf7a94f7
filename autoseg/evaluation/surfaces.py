"""The surface of a mask as elements with a place and an area, and how far two surfaces are from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree

HAUSDORFF_FRACTION = 0.95
"""Part of a surface that lies within the robust Hausdorff distance. Source: Nikolov et al. 2021, JMIR 23(7):e26151."""

_SLAB_VOXELS = 1 << 22
# MONAI needs about 30 bytes a voxel while it looks for surface elements; in slabs that stays near 130 MB.


@dataclass(frozen=True, slots=True, eq=False)
class Surface:
    """Surface elements between voxel centres.

    An element sits wherever a neighbourhood of 2x2x2 voxel centres (2x2 in a picture) is partly inside the mask.

    Attributes:
        points_mm: float64 (n, 2 or 3), places of the elements, relative to a corner common to both masks.
        areas: float64 (n,), in mm2 (mm in a picture).
    """

    points_mm: NDArray[np.float64]
    areas: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SurfaceDistances:
    """How far two surfaces are from each other.

    Attributes:
        hd95_mm: Robust Hausdorff distance.
        average_mm: Average symmetric surface distance.
        surface_dice: Fraction of both surfaces within the tolerance of the other (normalised surface Dice).
    """

    hd95_mm: float
    average_mm: float
    surface_dice: float


def surfaces(
    first: NDArray[np.bool_], second: NDArray[np.bool_], spacing_mm: Sequence[float]
) -> tuple[Surface, Surface]:
    """The surfaces of two masks on one grid.

    Args:
        first: bool, 2 or 3 axes. Outside the array counts as outside the mask, so surfaces are closed at the border.
        second: The same shape.
        spacing_mm: One entry an axis.
    """
    # It takes a second to import, which predictions, too, would wait for.
    from monai.metrics.utils import get_mask_edges

    padded = [torch.from_numpy(np.pad(mask, 1)) for mask in (first, second)]
    rows = padded[0].shape[0]
    step = max(1, _SLAB_VOXELS // max(1, padded[0][0].numel()))
    found: tuple[list[Surface], list[Surface]] = ([], [])
    for start in range(0, rows - 1, step):
        slabs = [mask[start : start + step + 1] for mask in padded]
        edges_and_areas = get_mask_edges(slabs[0], slabs[1], crop=False, spacing=list(spacing_mm))
        for index in range(2):
            edges, areas = (edges_and_areas[item].numpy() for item in (index, index + 2))
            points = np.argwhere(edges).astype(np.float64)
            points[:, 0] += start
            found[index].append(Surface(points * np.asarray(spacing_mm), areas[edges].astype(np.float64)))
    return _join(found[0]), _join(found[1])


def _join(parts: Sequence[Surface]) -> Surface:
    return Surface(np.concatenate([part.points_mm for part in parts]), np.concatenate([part.areas for part in parts]))


def compare(first: Surface, second: Surface, tolerance_mm: float) -> SurfaceDistances:
    """Compare two surfaces; symmetric in its first two arguments.

    Every element counts by its area. HD95 is the larger, over both directions, of the distance within which 95 % of
    a surface lies from the other; the average distance and the surface Dice pool the elements of both surfaces.

    Args:
        first: At least one element.
        second: At least one element.
        tolerance_mm: Distances up to it count as agreement.

    Source: Nikolov et al. 2021 (and the package `surface-distance`) for HD95 and surface Dice; Heimann et al. 2009,
        IEEE TMI 28(8), for the average distance.
    """
    distances = (
        np.asarray(KDTree(second.points_mm).query(first.points_mm)[0], np.float64),
        np.asarray(KDTree(first.points_mm).query(second.points_mm)[0], np.float64),
    )
    areas = (first.areas, second.areas)
    total = float(areas[0].sum() + areas[1].sum())
    within = sum(float(area[distance <= tolerance_mm].sum()) for distance, area in zip(distances, areas, strict=True))
    weighted = sum(float((distance * area).sum()) for distance, area in zip(distances, areas, strict=True))
    return SurfaceDistances(
        hd95_mm=max(_quantile(distance, area) for distance, area in zip(distances, areas, strict=True)),
        average_mm=weighted / total,
        surface_dice=min(1.0, within / total),
    )


def _quantile(distances: NDArray[np.float64], areas: NDArray[np.float64]) -> float:
    """The smallest distance within which the fraction HAUSDORFF_FRACTION of the area lies."""
    order = np.argsort(distances, kind="stable")
    covered = np.cumsum(areas[order])
    index = int(np.searchsorted(covered / covered[-1], HAUSDORFF_FRACTION))
    return float(distances[order[min(index, len(order) - 1)]])
