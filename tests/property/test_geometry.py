"""Laws of grids and orientations, over all 48 orientations and oblique affines."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import aff2axcodes, io_orientation

from autoseg.domain.geometry import (
    GRID_TOLERANCE_FRACTION,
    Geometry,
    Volume,
    closest_orientation,
    degrees_off_axis,
    grid_mismatch,
    grid_shift_mm,
    orientation_code,
)
from autoseg.errors import GeometryError

ALL_48 = [(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def turn(axis: int, degrees: float) -> np.ndarray:
    radians = np.radians(degrees)
    matrix = np.eye(3)
    first, second = [other for other in range(3) if other != axis]
    matrix[[first, first, second, second], [first, second, first, second]] = [
        np.cos(radians),
        -np.sin(radians),
        np.sin(radians),
        np.cos(radians),
    ]
    return matrix


def affine_of(order: tuple[int, ...], signs: tuple[int, ...], rotation: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """World axis a runs along file axis order[a], with that sign; then the whole is turned."""
    axes = np.zeros((3, 3))
    for world in range(3):
        axes[world, order[world]] = signs[world]
    affine = np.eye(4)
    affine[:3, :3] = rotation @ axes * spacing
    affine[:3, 3] = (11, -7, 3)
    return affine


@pytest.mark.parametrize(("order", "signs"), ALL_48)
def test_every_orientation_is_found_also_when_oblique(order: tuple[int, ...], signs: tuple[int, ...]) -> None:
    for degrees in (0, 12, -30):
        affine = affine_of(order, signs, turn(1, degrees) @ turn(2, degrees / 2), np.array([0.5, 1.0, 4.0]))
        orientation = closest_orientation(affine)
        assert orientation.axes == order
        assert orientation.flips == tuple(sign < 0 for sign in signs)
        assert orientation_code(affine) == "".join(aff2axcodes(affine))
        ours = io_orientation(affine)
        assert [int(axis) for axis in ours[list(orientation.axes), 0]] == [0, 1, 2]


@given(st.sampled_from(ALL_48), st.floats(0, 40), st.integers(0, 2), st.tuples(*[st.floats(0.1, 9)] * 3))
def test_the_angle_off_the_axes_is_the_angle_turned(kind, degrees, axis, spacing) -> None:  # type: ignore[no-untyped-def]
    affine = affine_of(*kind, turn(axis, degrees), np.array(spacing))
    assert degrees_off_axis(affine) == pytest.approx(degrees, abs=1e-4)
    assert Geometry((2, 3, 4), affine).spacing_mm == pytest.approx(spacing)


@given(
    st.sampled_from(ALL_48),
    st.tuples(*[st.integers(1, 30)] * 3),
    st.tuples(*[st.floats(0.2, 6)] * 3),
    st.floats(-0.2, 0.2),
)
def test_a_shift_is_measured_and_tolerated_up_to_its_fraction(kind, shape, spacing, fraction) -> None:  # type: ignore[no-untyped-def]
    first = Geometry(shape, affine_of(*kind, turn(0, 10), np.array(spacing)))
    moved = first.affine.copy()
    moved[1, 3] += fraction * min(spacing)
    second = Geometry(shape, moved)
    assert grid_shift_mm(first, second) == pytest.approx(abs(fraction) * min(spacing), abs=1e-9)
    if abs(abs(fraction) - GRID_TOLERANCE_FRACTION) > 1e-6:
        assert bool(grid_mismatch(second, first)) == (abs(fraction) > GRID_TOLERANCE_FRACTION)
    assert grid_mismatch(first, first) == ""


def test_a_flipped_grid_of_the_same_place_is_another_grid() -> None:
    first = Geometry((4, 4, 4), np.eye(4))
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = 3
    message = grid_mismatch(Geometry((4, 4, 4), flipped), first)
    assert "3 mm apart" in message
    assert "LAS against RAS" in message


def test_pictures_are_compared_by_shape_only() -> None:
    picture = Geometry((4, 5, 1), np.eye(4), is_2d=True)
    assert grid_mismatch(picture, Geometry((4, 5, 1), np.diag([3.0, 3, 3, 1]))) == ""
    assert "5×4×1 against 4×5×1" in grid_mismatch(Geometry((5, 4, 1), np.eye(4), is_2d=True), picture)


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1.0, 0, 1, 1]),
        np.full((4, 4), np.nan),
        np.eye(3),
        np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    ],
)
def test_affines_without_a_volume_are_refused(affine: np.ndarray) -> None:
    with pytest.raises(GeometryError):
        Geometry((2, 2, 2), affine)


def test_tiny_voxels_are_no_degenerate_ones() -> None:
    assert Geometry((2, 2, 2), np.diag([1e-5, 1e-5, 1e-5, 1])).spacing_mm == (1e-5, 1e-5, 1e-5)


def test_affines_are_copied_and_cannot_be_changed() -> None:
    affine = np.eye(4)
    geometry = Geometry((2, 2, 2), affine)
    affine[0, 0] = 5
    assert geometry.spacing_mm == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="read-only"):
        geometry.affine[0, 0] = 5


def test_a_volume_has_the_shape_of_its_grid() -> None:
    with pytest.raises(GeometryError, match="shape"):
        Volume(np.zeros((1, 2, 2, 3)), Geometry((2, 2, 2), np.eye(4)))
