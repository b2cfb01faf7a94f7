"""Grids against each other: canonical voxel order, distances in voxels, overlap, labels carried from one to another."""

from __future__ import annotations

from itertools import product
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.geometry import IDENTITY_ORIENTATION, Geometry, Orientation, closest_orientation

Scalar = TypeVar("Scalar", bound=np.generic)

_LATTICE_POINTS = 32
"""Points along an axis at which overlap is looked at: shares are right to about 1 part in 32 a face."""


def canonical_orientation(geometry: Geometry) -> Orientation:
    """How the voxels of a grid would be reordered to RAS+; the identity for pictures, which have no place."""
    return IDENTITY_ORIENTATION if geometry.is_2d else closest_orientation(geometry.affine)


def reorder_grid(geometry: Geometry, orientation: Orientation) -> Geometry:
    """The grid whose voxels are those of `geometry`, each at its place in the world, in another order.

    Args:
        geometry: The grid; a second affine goes along.
        orientation: As `reorder_voxels` takes it.
    """
    if orientation == IDENTITY_ORIENTATION:
        return geometry
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for new, (old, flip) in enumerate(zip(orientation.axes, orientation.flips, strict=True)):
        to_old[old, new] = -1 if flip else 1
        to_old[old, 3] = geometry.shape[old] - 1 if flip else 0
    first, second, third = (geometry.shape[axis] for axis in orientation.axes)
    return Geometry(
        (first, second, third),
        geometry.affine @ to_old,
        geometry.is_2d,
        geometry.sform_code,
        geometry.qform_code,
        None if geometry.qform is None else geometry.qform @ to_old,
    )


def reorder_voxels(array: NDArray[Scalar], orientation: Orientation) -> NDArray[Scalar]:
    """A view of (..., I, J, K) with its last three axes reordered and turned round."""
    leading = array.ndim - 3
    turned = array.transpose(*range(leading), *(leading + axis for axis in orientation.axes))
    steps = (slice(None, None, -1) if flip else slice(None) for flip in orientation.flips)
    return turned[(..., *steps)]


def voxels_apart(geometry: Geometry, expected: Geometry) -> float:
    """How far the same voxel of two grids lies apart at most, along an axis of `expected` and in its voxels.

    Args:
        geometry: A grid of the same shape as the other.
        expected: The grid whose voxels are the unit.
    """
    corners = np.array([(*corner, 1.0) for corner in product(*((0, size - 1) for size in expected.shape))]).T
    there = np.linalg.solve(expected.affine, geometry.affine @ corners)
    # Both are affine, so nowhere between the corners is it further.
    return float(np.abs(there - corners)[:3].max())


def overlap_fraction(first: Geometry, second: Geometry) -> float:
    """The part of one grid's extent that lies in the other's, of that grid of which it is more; 0 ... 1."""
    return max(_share_inside(first, second), _share_inside(second, first))


def _share_inside(grid: Geometry, other: Geometry) -> float:
    axes = [(np.arange(count := min(size, _LATTICE_POINTS)) + 0.5) * size / count - 0.5 for size in grid.shape]
    points = np.stack([*np.meshgrid(*axes, indexing="ij"), np.ones([len(axis) for axis in axes])]).reshape(4, -1)
    there = np.linalg.solve(other.affine, grid.affine @ points)[:3]
    limits = np.array(other.shape)[:, np.newaxis] - 0.5
    return float(((there >= -0.5) & (there < limits)).all(axis=0).mean())


def carry_labels(labels: NDArray[Scalar], source: Geometry, target: Geometry) -> NDArray[Scalar]:
    """Label values on another grid: each of its voxels takes the value of the nearest one, 0 beyond the label map.

    Args:
        labels: (I, J, K) on `source`.
        source: Their grid.
        target: The grid to carry them to.
    """
    step = np.linalg.solve(source.affine, target.affine)
    out = np.zeros(target.shape, labels.dtype)
    rows, columns = np.meshgrid(np.arange(target.shape[0]), np.arange(target.shape[1]), indexing="ij")
    sizes = np.array(source.shape)[:, np.newaxis, np.newaxis]
    for index in range(target.shape[2]):  # slice by slice: the indices take 24 bytes a voxel
        where: NDArray[Any] = (
            step[:3, 0, np.newaxis, np.newaxis] * rows
            + step[:3, 1, np.newaxis, np.newaxis] * columns
            + (step[:3, 2] * index + step[:3, 3])[:, np.newaxis, np.newaxis]
        )
        nearest = np.floor(where + 0.5).astype(np.int64)
        inside = ((nearest >= 0) & (nearest < sizes)).all(axis=0)
        out[inside, index] = labels[tuple(nearest[:, inside])]
    return out
