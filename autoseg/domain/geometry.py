"""Where voxels lie in the world: grids, orientations and volumes. Arrays only, no file formats."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import GeometryError

OBLIQUE_WARNING_DEGREES = 40.0
"""Beyond this angle off every axis "canonical" is close to a coin toss. Source: design, section 7."""

_DEGENERATE_FRACTION = 1e-6

_TOLD_DEGREES = 0.05
"""Smaller angles are not worth words: over 500 voxels they move the last one by less than half a voxel."""


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """The grid of a volume: voxel order as in the file, and where it lies in the world.

    Attributes:
        shape: Voxels along the file's own axes (I, J, K).
        affine: float64 (4, 4), voxel index (i, j, k, 1) to world millimetres, RAS+, at voxel centres.
        is_2d: True for pictures (PNG, TIFF, ...) that have no third axis; then K is 1.
        sform_code: NIfTI code of `affine`, kept so that outputs carry the same.
        qform_code: NIfTI code of `qform`.
        qform: float64 (4, 4) when the file carries a second affine, else None.
        stated: How much of the affine the file states. TIFF stacks state a "spacing" at most and no place in the world,
            often "nothing"; then the spacing is 1.
        is_stated_beside: Whether a file beside the image states the spacing (TIFF stacks).

    Raises:
        GeometryError: The affine is not finite or its axes are degenerate.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    is_2d: bool = False
    sform_code: int = 1
    qform_code: int = 1
    qform: NDArray[np.float64] | None = field(default=None)
    stated: Literal["place", "spacing", "nothing"] = "place"
    is_stated_beside: bool = False

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(f"the affine must be 4x4 and finite, got {affine.tolist()}")
        columns = affine[:3, :3]
        volume = abs(float(np.linalg.det(columns)))
        lengths = np.linalg.norm(columns, axis=0)
        if volume <= _DEGENERATE_FRACTION * float(np.prod(lengths)) or not (lengths > 0).all():
            raise GeometryError(
                f"the affine is degenerate: axes of length {lengths.tolist()} mm span a volume of {volume:g} mm3",
                hint="Repair the header (sform or qform) of this file; its voxels have no place in the world.",
            )
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the file's axes (I, J, K) in millimetres."""
        lengths = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return (float(lengths[0]), float(lengths[1]), float(lengths[2]))

    @property
    def spacing_beside_mm(self) -> tuple[float, float, float]:
        """Voxel size, without what TIFF stacks state inside themselves: 1 where no file beside them states it."""
        is_inside = self.stated == "spacing" and not self.is_stated_beside
        return (1.0, 1.0, 1.0) if is_inside else self.spacing_mm


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """An image with its place in the world.

    Attributes:
        array: (C, I, J, K) in the file's own voxel order; any real dtype.
        geometry: The grid; its shape equals ``array.shape[1:]``.
        missing: Numbers, among the channels of the data set, of those that the array does not hold.
    """

    array: NDArray[np.generic]
    geometry: Geometry
    missing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or tuple(self.array.shape[1:]) != tuple(self.geometry.shape):
            raise GeometryError(
                f"a volume needs (C, I, J, K) with the geometry's shape, got {self.array.shape} "
                f"against {self.geometry.shape}"
            )

    @property
    def num_channels(self) -> int:
        """Channels of the data set: those of the array and those that are missing."""
        return len(self.array) + len(self.missing)

    @property
    def channels(self) -> tuple[int, ...]:
        """Numbers of the channels that the array holds, in its order."""
        return tuple(number for number in range(self.num_channels) if number not in self.missing)


@dataclass(frozen=True, slots=True)
class Orientation:
    """How file axes become canonical RAS+ axes.

    Attributes:
        axes: `axes[a]` is the file axis that becomes canonical axis a (0 = right, 1 = anterior, 2 = superior).
        flips: `flips[a]` says whether canonical axis a runs against the file axis.
    """

    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]


IDENTITY_ORIENTATION = Orientation((0, 1, 2), (False, False, False))


def _rotation_part(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation nearest to the affine's axes (polar decomposition), shear and scale removed."""
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(columns)
    return np.asarray(left @ right)


def closest_orientation(affine: NDArray[np.float64]) -> Orientation:
    """The assignment of file axes to world axes that agrees best with the affine.

    Args:
        affine: (4, 4), not degenerate.
    """
    rotation = _rotation_part(affine)
    best = max(permutations(range(3)), key=lambda axes: sum(abs(rotation[world, axes[world]]) for world in range(3)))
    flips = tuple(bool(rotation[world, best[world]] < 0) for world in range(3))
    return Orientation((best[0], best[1], best[2]), (flips[0], flips[1], flips[2]))


def degrees_off_axis(affine: NDArray[np.float64]) -> float:
    """The largest angle, over the three file axes, between an axis and its canonical world axis, in degrees."""
    rotation = _rotation_part(affine)
    orientation = closest_orientation(affine)
    cosines = [abs(float(rotation[world, orientation.axes[world]])) for world in range(3)]
    return float(np.degrees(np.arccos(np.clip(min(cosines), -1.0, 1.0))))


def orientation_code(affine: NDArray[np.float64]) -> str:
    """Three letters that name where the file axes point, such as "RAS" or "PSR"."""
    orientation = closest_orientation(affine)
    letters = ["", "", ""]
    for world, (axis, flip) in enumerate(zip(orientation.axes, orientation.flips, strict=True)):
        letters[axis] = ("RL", "AP", "SI")[world][int(flip)]
    return "".join(letters)


GRID_TOLERANCE_FRACTION = 0.05
"""Two grids are one when no corner voxel lies further apart than this fraction of the smallest spacing.

Headers written by different programs differ by float32 rounding, up to 1e-3 of a voxel over a whole volume; half a
voxel would blur a label's border. Source: the spread of the real sets (below 1e-4 of a voxel) with ample room.
"""


def grid_shift_mm(first: Geometry, second: Geometry) -> float:
    """How far apart the same voxel of two grids lies at most, in millimetres; shapes must be equal."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in first.shape], [1], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((first.affine - second.affine) @ corners)[:3], axis=0).max())


def degrees_between(first: Geometry, second: Geometry) -> float:
    """By how many degrees one grid's axes are turned against the other's, orders and directions of axes aside."""
    frames = []
    for geometry in (first, second):
        orientation = closest_orientation(geometry.affine)
        signs = [-1.0 if flip else 1.0 for flip in orientation.flips]
        frames.append(_rotation_part(geometry.affine)[:, orientation.axes] * signs)
    cosine = (float(np.trace(frames[0].T @ frames[1])) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def grid_mismatch(geometry: Geometry, expected: Geometry) -> str:
    """Say in words how a grid differs from the expected one; "" when they are one grid.

    Pictures have no place in the world, so only their shape is compared; of TIFF stacks the spacing too, where both
    files state it.
    """
    grids = as_far_as_stated(geometry, expected)
    if geometry.shape != expected.shape:
        shapes = f"shape {_by(geometry.shape)} against {_by(expected.shape)}"
        return "; ".join([shapes, *([] if grids is None else _other_differences(*grids))])
    if grids is None:
        return ""
    geometry, expected = grids
    shift = grid_shift_mm(geometry, expected)
    smallest = min(*geometry.spacing_mm, *expected.spacing_mm)
    if shift <= GRID_TOLERANCE_FRACTION * smallest:
        return ""
    parts = [f"the grids lie up to {shift:.4g} mm apart ({shift / smallest:.2g} of the smallest voxel edge)"]
    return "; ".join([*parts, *_other_differences(geometry, expected)])


def _other_differences(geometry: Geometry, expected: Geometry) -> list[str]:
    """Differences in spacing, order and angle of the axes, in words."""
    parts = []
    if not np.allclose(geometry.spacing_mm, expected.spacing_mm, rtol=1e-3):
        parts.append(f"spacing {_by(geometry.spacing_mm)} mm against {_by(expected.spacing_mm)} mm")
    if orientation_code(geometry.affine) != orientation_code(expected.affine):
        parts.append(f"axes {orientation_code(geometry.affine)} against {orientation_code(expected.affine)}")
    degrees = degrees_between(geometry, expected)
    if degrees > _TOLD_DEGREES:
        parts.append(f"turned by {degrees:.2g} degrees")
    return parts


def as_far_as_stated(first: Geometry, second: Geometry) -> tuple[Geometry, Geometry] | None:
    """Two grids without what only one of their files states: place and direction, or all but the shape (then None)."""
    stated = (first.stated, second.stated)
    if first.is_2d or second.is_2d or "nothing" in stated:
        return None
    return (_without_place(first), _without_place(second)) if "spacing" in stated else (first, second)


def _without_place(geometry: Geometry) -> Geometry:
    return Geometry(geometry.shape, np.diag([*geometry.spacing_mm, 1.0]))


def _by(numbers: tuple[float, ...]) -> str:
    return "×".join(f"{number:.4g}" if isinstance(number, float) else str(number) for number in numbers)
