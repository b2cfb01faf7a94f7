"""Which slices make a volume: series told apart, slices sorted by position, and everything refused that is no volume.

Positions are millimetres in DICOM's LPS world; the geometry that comes out is RAS+.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.geometry import GRID_TOLERANCE_FRACTION, Geometry
from autoseg.errors import DatasetError, GeometryError
from autoseg.io.dicom_frames import Frame
from autoseg.io.itk import LPS_TO_RAS

POSITION_ROUNDING_MM = 0.05
"""Scanners that write positions with one decimal are off by up to this much."""

POSITION_LIMIT_FRACTION = 0.2
"""Rounding or not, no slice may lie further than this fraction of a voxel from its place in the grid."""

SAME_POSITION_FRACTION = 0.01
"""Slices closer together than this fraction of a pixel lie at one position: copies agree to the last digit."""

TILT_TOLERANCE_DEGREES = 1.0
"""Slices may be stacked this far off their normal; the affine keeps it. Tilted gantries begin beyond it."""

_DIRECTION_TOLERANCE = 1e-3
"""Direction cosines of one stack agree to this; scanners write six decimals and more, some only three."""

_SPACING_TOLERANCE = 1e-3
_SHOWN = 6

_GAP_HINT = "Fetch or export the series again, whole; autoseg never guesses slices."
_SPLIT_HINT = (
    "Name a file of the volume to use instead of its folder, or copy the volume's files into their own folder."
)


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Slices of one size, direction, spacing and frame of reference under one SeriesInstanceUID.

    Attributes:
        frames: In no order.
        is_part: Whether the SeriesInstanceUID has others that do not fit these.
    """

    frames: tuple[Frame, ...]
    is_part: bool = False

    @property
    def first(self) -> Frame:
        """Some slice, always the same: the first by file and frame number."""
        return min(self.frames, key=lambda frame: (frame.path, frame.number))

    @property
    def name(self) -> str:
        """What people call it: its description, else its number or what is known."""
        first = self.first
        number = "" if first.series_number is None else f"series {first.series_number}"
        return first.description or number or first.series_uid or first.path.name

    @property
    def in_words(self) -> str:
        """Name, modality, number and size of its slices."""
        first, pixels = self.first, self.first.pixels
        size = f"{len(self.frames)} of {pixels.columns}×{pixels.rows}"
        return f"{self.name!r} ({first.modality or 'no modality'}, {size}, such as {first.path.name})"


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One of several volumes in a series.

    Attributes:
        name: Such as "b = 800".
        frames: In no order.
    """

    name: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Slices that make a volume.

    Attributes:
        frames: In order: number k is slice k of the third axis.
        geometry: Columns, rows, slices.
    """

    frames: tuple[Frame, ...]
    geometry: Geometry


def group_series(frames: Sequence[Frame]) -> tuple[Series, ...]:
    """Tell series apart, and within a series what cannot lie on one grid; by series number, then UID, then file.

    Slices whose UID was removed belong together by their folder. A slice with a problem goes with the series it
    belongs to, which then has it too. Images without a position (projections) stand alone.
    """
    by_uid: dict[str, list[Frame]] = {}
    for frame in sorted(frames, key=lambda item: (item.path, item.number)):
        by_uid.setdefault(frame.series_uid or str(frame.path.parent), []).append(frame)
    found: list[Series] = []
    for members in by_uid.values():
        clusters: list[list[Frame]] = []
        for frame in sorted(members, key=lambda item: bool(item.problem)):  # the sound ones first
            home = next((item for item in clusters if _belong_together(frame, item[0])), None)
            if home is None:
                clusters.append([frame])
            else:
                home.append(frame)
        found += [Series(tuple(cluster), is_part=len(clusters) > 1) for cluster in clusters]
    number = [2**31 if item.first.series_number is None else item.first.series_number for item in found]
    order = sorted(range(len(found)), key=lambda index: (number[index], found[index].first.series_uid, index))
    return tuple(found[index] for index in order)


def _belong_together(frame: Frame, other: Frame) -> bool:
    if frame.problem:
        return True
    if frame.position is None or other.position is None or other.problem:
        return False
    if frame.frame_of_reference != other.frame_of_reference:
        return False
    if (frame.pixels.rows, frame.pixels.columns) != (other.pixels.rows, other.pixels.columns):
        return False
    return bool(
        np.allclose(_axes(frame), _axes(other), rtol=0, atol=_DIRECTION_TOLERANCE)
        and np.allclose(frame.spacing_mm or (), other.spacing_mm or (), rtol=_SPACING_TOLERANCE)
    )


def _axes(frame: Frame) -> NDArray[np.float64]:
    """The directions of a sound slice: row, column."""
    assert frame.row is not None
    assert frame.column is not None
    return np.array([frame.row, frame.column], np.float64)


def make_stack(frames: Sequence[Frame], where: Path) -> Stack:
    """Sort slices along their normal and find the grid they lie on.

    Args:
        frames: Of one series, at least one.
        where: For messages.

    Raises:
        DatasetError: A slice cannot be used, slices are missing, or several lie at one position.
        GeometryError: Directions are no directions, the spacing is uneven, or slices are not stacked along their
            normal.
    """
    _require_sound(frames, where)
    if frames[0].position is None:
        return _picture(frames[0], where)
    axes = _unit_axes(frames[0], where)
    normal = np.cross(axes[0], axes[1])
    places = np.array([frame.position for frame in frames], np.float64)
    heights = places @ normal
    order = np.argsort(heights, kind="stable")
    ordered = tuple(frames[index] for index in order)
    places, heights = places[order], heights[order]
    pixel = min(ordered[0].spacing_mm or (1.0, 1.0))
    _require_one_each(ordered, heights, pixel, where)
    _require_even(ordered, heights, where)
    if len(ordered) > 1:
        step = (places[-1] - places[0]) / (len(ordered) - 1)
        _require_upright(ordered, places, step, normal, pixel, where)
    else:
        step = normal * (ordered[0].step_mm or 1.0)
    spacing = ordered[0].spacing_mm or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ np.column_stack([axes[0] * spacing[0], axes[1] * spacing[1], step])
    affine[:3, 3] = LPS_TO_RAS @ places[0]
    pixels = ordered[0].pixels
    try:
        return Stack(ordered, Geometry((pixels.columns, pixels.rows, len(ordered)), affine))
    except GeometryError as problem:
        raise GeometryError(f"{where}: {problem.message}", hint=problem.hint) from None


def _picture(frame: Frame, where: Path) -> Stack:
    """A projection: columns and rows as in a picture, with the spacing of the detector where that is known."""
    affine = np.diag([*(frame.spacing_mm or (1.0, 1.0)), 1.0, 1.0])
    try:
        geometry = Geometry((frame.pixels.columns, frame.pixels.rows, 1), affine, is_2d=True)
    except GeometryError as problem:
        raise GeometryError(f"{where}: {problem.message}", hint=problem.hint) from None
    return Stack((frame,), geometry)


def _require_sound(frames: Sequence[Frame], where: Path) -> None:
    broken = [frame for frame in frames if frame.problem]
    if not broken:
        return
    lines = [f"{frame.path.name}: {frame.problem}" for frame in broken[:_SHOWN]]
    more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    raise DatasetError(
        f"{where}: {len(broken)} of {len(frames)} slices cannot be used: {'; '.join(lines)}{more}",
        hint="Export the series again with its geometry and grey values, as CT or MR images.",
    )


def _unit_axes(frame: Frame, where: Path) -> NDArray[np.float64]:
    axes = _axes(frame)
    lengths = np.linalg.norm(axes, axis=1)
    if np.abs(lengths - 1).max() > _DIRECTION_TOLERANCE or abs(axes[0] @ axes[1]) > _DIRECTION_TOLERANCE:
        raise GeometryError(
            f"{where}: ImageOrientationPatient of {frame.path.name} holds no two directions at a right angle: "
            f"{axes.flatten().tolist()}",
            hint="Export the series again; without directions its slices have no place in the world.",
        )
    unit: NDArray[np.float64] = axes / lengths[:, None]
    return unit


# --- Several slices at one position ---------------------------------------------------------------------------------


def _position_numbers(heights: NDArray[np.float64], pixel_mm: float) -> NDArray[np.int64]:
    """Number the positions: sorted heights (mm) that hardly differ have one number."""
    steps = np.diff(heights, prepend=heights[:1]) > SAME_POSITION_FRACTION * pixel_mm
    numbers: NDArray[np.int64] = np.cumsum(steps)
    return numbers


def parts_of(frames: Sequence[Frame]) -> tuple[Part, ...]:
    """The volumes of a series that has several slices at a position, told apart by what their headers say.

    Returns:
        None when no position is taken twice, or when headers do not explain it.
    """
    if not frames or frames[0].position is None or any(frame.problem for frame in frames):
        return ()
    normal = np.cross(*_axes(frames[0]))
    heights = np.array([frame.position for frame in frames], np.float64) @ normal
    order = np.argsort(heights, kind="stable")
    ordered = [frames[index] for index in order]
    numbers = _position_numbers(heights[order], min(frames[0].spacing_mm or (1.0, 1.0)))
    return _explained(ordered, numbers)


def _explained(ordered: Sequence[Frame], numbers: NDArray[np.int64]) -> tuple[Part, ...]:
    """Split by the first trait, or pair of traits, that leaves every position once and no more parts than needed."""
    most = int(np.bincount(numbers).max())
    if most < 2:
        return ()
    traits = [dict(frame.traits) for frame in ordered]
    names = [name for name in dict.fromkeys(key for item in traits for key in item) if _varies(name, traits)]
    for chosen in (*((name,) for name in names), *combinations(names, 2)):
        members: dict[tuple[str, ...], list[int]] = {}
        for index, item in enumerate(traits):
            members.setdefault(tuple(item.get(name, "none") for name in chosen), []).append(index)
        if len(members) != most or any(len(set(numbers[group])) < len(group) for group in members.values()):
            continue
        return tuple(
            Part(
                ", ".join(f"{name} = {value}" for name, value in zip(chosen, values, strict=True)),
                tuple(ordered[index] for index in members[values]),
            )
            for values in sorted(members, key=_natural)
        )
    return ()


def _varies(name: str, traits: Sequence[dict[str, str]]) -> bool:
    return len({item.get(name) for item in traits}) > 1


def _natural(values: tuple[str, ...]) -> list[tuple[float, str]]:
    """Sorts "50" before "400", and what is no number after the numbers."""
    keys = []
    for value in values:
        try:
            keys.append((float(value.split()[0]), value))
        except (ValueError, IndexError):
            keys.append((float("inf"), value))
    return keys


def _require_one_each(ordered: Sequence[Frame], heights: NDArray[np.float64], pixel_mm: float, where: Path) -> None:
    numbers = _position_numbers(heights, pixel_mm)
    num_positions = int(numbers[-1]) + 1
    if num_positions == len(ordered):
        return
    what = f"{where}: {len(ordered)} slices lie at {num_positions} position{'s' if num_positions > 1 else ''}"
    parts = _explained(ordered, numbers)
    if parts:
        raise DatasetError(f"{what}: it holds {len(parts)} volumes: {parts_in_words(parts)}", hint=_SPLIT_HINT)
    counts = np.bincount(numbers)
    at = int(np.argmax(counts > 1))
    first, second = (ordered[index] for index in np.flatnonzero(numbers == at)[:2])
    same = first.instance_uid and first.instance_uid == second.instance_uid and first.path != second.path
    how = "are copies of one image" if same else "differ in nothing that their headers name as a volume's mark"
    doubled = int((counts > 1).sum())
    raise DatasetError(
        f"{what}, {doubled} of them taken more than once; such as {_named(first)} and {_named(second)}, which {how} "
        f"and lie at {_point(first)} mm",
        hint="Take away the copies, or copy the slices of one volume into a folder of their own.",
    )


def parts_in_words(parts: Sequence[Part]) -> str:
    """Each volume with its slices and a file by which it can be named."""
    return "; ".join(f"{part.name} ({len(part.frames)} slices, such as {_named(part.frames[0])})" for part in parts)


def _named(frame: Frame) -> str:
    return frame.path.name if frame.pixels.num_frames == 1 else f"frame {frame.number + 1} of {frame.path.name}"


def _point(frame: Frame) -> str:
    return "(" + ", ".join(f"{value:g}" for value in frame.position or ()) + ")"


# --- Gaps and tilt --------------------------------------------------------------------------------------------------


def _tolerance_mm(edge_mm: float) -> float:
    """How far a slice may lie from its place in the grid, along an edge of that length."""
    return min(max(GRID_TOLERANCE_FRACTION * edge_mm, POSITION_ROUNDING_MM), POSITION_LIMIT_FRACTION * edge_mm)


def _require_even(ordered: Sequence[Frame], heights: NDArray[np.float64], where: Path) -> None:
    if len(ordered) < 3:
        return
    even = np.linspace(heights[0], heights[-1], len(heights))
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if np.abs(heights - even).max() <= _tolerance_mm(float(gaps.mean())):
        return
    multiples = np.rint(gaps / usual)
    if multiples.min() >= 1 and np.abs(gaps - multiples * usual).max() <= 2 * _tolerance_mm(usual):
        lost = int(multiples.sum()) - len(gaps)
        holes = [_hole(ordered, gaps, index, usual) for index in np.flatnonzero(multiples > 1).tolist()]
        more = f" and at {len(holes) - _SHOWN} more places" if len(holes) > _SHOWN else ""
        raise DatasetError(
            f"{where}: {lost} slice{'s are' if lost > 1 else ' is'} missing: {'; '.join(holes[:_SHOWN])}{more}",
            hint=_GAP_HINT,
        )
    worst = int(np.argmax(np.abs(gaps - usual)))
    raise GeometryError(
        f"{where}: its {len(ordered)} slices are not evenly spaced: gaps from {gaps.min():.4g} to {gaps.max():.4g} mm, "
        f"usually {usual:.4g} mm; the oddest between {_named(ordered[worst])} and {_named(ordered[worst + 1])}",
        hint=f"A grid allows {_tolerance_mm(usual):.2g} mm here. {_GAP_HINT}",
    )


def _hole(ordered: Sequence[Frame], gaps: NDArray[np.float64], index: int, usual: float) -> str:
    before, after = ordered[index], ordered[index + 1]
    return f"{gaps[index]:.4g} mm between {_named(before)} and {_named(after)}, where others are {usual:.4g} mm apart"


def _require_upright(
    ordered: Sequence[Frame],
    places: NDArray[np.float64],
    step: NDArray[np.float64],
    normal: NDArray[np.float64],
    pixel_mm: float,
    where: Path,
) -> None:
    degrees = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if degrees > TILT_TOLERANCE_DEGREES:
        raise GeometryError(
            f"{where}: the slices are stacked {degrees:.1f} degrees off their normal, as with a tilted gantry: a "
            "sheared volume",
            hint="Correct the tilt first, for example with dcm2niix, which resamples it, and use what it writes.",
        )
    off = places - (places[0] + np.outer(np.arange(len(places)), step))
    aside = np.linalg.norm(off - np.outer(off @ normal, normal), axis=1)
    worst = int(np.argmax(aside))
    if aside[worst] > _tolerance_mm(pixel_mm):
        raise GeometryError(
            f"{where}: {_named(ordered[worst])} lies {aside[worst]:.3g} mm beside the line of the others",
            hint=f"A grid allows {_tolerance_mm(pixel_mm):.2g} mm here. {_GAP_HINT}",
        )


def series_in_words(found: Sequence[Series]) -> str:
    """The series of a folder in one line, the most common kinds of trouble of naming them avoided."""
    doubled = Counter(item.name for item in found)
    shown = [
        item.in_words if doubled[item.name] == 1 else f"{item.in_words} in {item.first.path.parent.name}"
        for item in found
    ]
    return "; ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
