"""Laws of preprocessing: where voxels are in the world is never lost."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.plan import ChannelNormalization, PreprocessPlan
from autoseg.errors import DatasetError
from autoseg.preprocessing.crop import nonzero_mask
from autoseg.preprocessing.resample import SlabResampler
from autoseg.preprocessing.transform import apply, invert, to_file_axes, to_network_axes

AXIS_ORDERS = list(permutations(range(3)))
ORIENTATIONS = [(axes, signs) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]
SPACING = np.array([0.9, 1.1, 2.5])


def rotation(degrees: float) -> NDArray[np.float64]:
    """About all three axes."""
    angle = np.radians(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    around_z = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    around_x = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return np.asarray(around_z @ around_x)


def canonical_affine(degrees: float = 0.0) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) * SPACING
    affine[:3, 3] = (-31.0, 12.5, 7.0)
    return affine


def turned(volume: Volume, axes: tuple[int, ...], signs: tuple[int, ...]) -> Volume:
    """The same voxels in the world, stored in another order."""
    shape = np.array(volume.geometry.shape)
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    for new_axis, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        to_old[axis, new_axis] = sign
        to_old[axis, 3] = 0 if sign > 0 else shape[axis] - 1
    array = volume.array.transpose(0, *(1 + axis for axis in axes))
    array = array[(slice(None), *(slice(None, None, sign) for sign in signs))]
    return Volume(array, Geometry(tuple(array.shape[1:]), volume.geometry.affine @ to_old))


def plain(channels: int, **changes: object) -> PreprocessPlan:
    rule = ChannelNormalization(scheme="none")
    settings = {"target_spacing": (1.0, 1.0, 1.0), "normalization": (rule,) * channels, **changes}
    return PreprocessPlan(**settings)  # type: ignore[arg-type]


def world_of(affine: NDArray[np.float64], index: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3) indices to (..., 3) millimetres."""
    return np.asarray(index @ affine[:3, :3].T + affine[:3, 3])


def world_volume(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> Volume:
    """An image whose three channels are the world coordinates of each voxel."""
    grid = np.stack(np.indices(shape), axis=-1).astype(np.float64)
    return Volume(np.moveaxis(world_of(affine, grid), -1, 0).astype(np.float32), Geometry(shape, affine))


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_all_48_orientations_of_a_file_give_the_same_input(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    """Oblique, cropped, normalised and resampled: bit for bit, and the way back ends on the file's own grid."""
    rng = np.random.default_rng(1)
    array = np.zeros((1, 11, 13, 7), np.float32)
    array[:, 2:9, 1:12, 1:7] = rng.normal(size=(1, 7, 11, 6)) + 5
    labels = np.zeros((1, 11, 13, 7), np.int16)
    labels[:, 3:6, 2:9, 2:5] = 1
    geometry = Geometry((11, 13, 7), canonical_affine(10))
    volume, label_volume = Volume(array, geometry), Volume(labels, geometry)
    plan = plain(1, target_spacing=(2.0, 1.3, 0.8), normalization=(ChannelNormalization(scheme="zscore"),))
    expected = apply(volume, plan, labels[0])

    file, file_labels = turned(volume, axes, signs), turned(label_volume, axes, signs).array[0].astype(np.int16)
    got = apply(file, plan, file_labels)
    assert np.array_equal(got.image, expected.image)
    assert got.labels is not None
    assert expected.labels is not None
    assert np.array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.trail.affine, expected.trail.affine, atol=1e-9)

    crop = to_network_axes(file_labels, got.trail)[got.trail.crop_box]
    assert np.array_equal(invert(crop, got.trail), file_labels)
    assert np.array_equal(to_file_axes(to_network_axes(file.array, got.trail), got.trail), file.array)


@pytest.mark.parametrize("orientation", ["RAS", "native"])
@pytest.mark.parametrize("axis_order", AXIS_ORDERS)
@pytest.mark.parametrize("order", [1, 3])
def test_a_world_ramp_is_reproduced(orientation: str, axis_order: tuple[int, int, int], order: int) -> None:
    """Each prepared voxel holds the world coordinates that the trail says it has."""
    volume = turned(world_volume((30, 28, 26), canonical_affine(12)), (1, 2, 0), (-1, 1, -1))
    plan = plain(3, orientation=orientation, axis_order=axis_order, image_order=order, target_spacing=(1.3, 1.2, 1.4))
    prepared = apply(volume, plan)
    grid = np.stack(np.indices(prepared.trail.resampled_shape), axis=-1).astype(np.float64)
    expected = np.moveaxis(world_of(prepared.trail.affine, grid), -1, 0)
    inner = (slice(None), *(slice(size // 3, -(size // 3)) for size in prepared.trail.resampled_shape))
    np.testing.assert_allclose(prepared.image[inner], expected[inner], atol=2e-3)


@given(
    shape=st.tuples(*[st.integers(6, 16)] * 3),
    case=st.integers(0, 47),
    axis_order=st.sampled_from(AXIS_ORDERS),
    # Not anisotropic: nearest sampling of a coarse axis may step over a single voxel.
    target=st.tuples(*[st.sampled_from((0.7, 1.0, 1.6))] * 3),
    seed=st.integers(0, 999),
)
@settings(max_examples=60)
def test_a_marked_voxel_keeps_its_world_position(
    shape: tuple[int, int, int],
    case: int,
    axis_order: tuple[int, int, int],
    target: tuple[float, float, float],
    seed: int,
) -> None:
    """Through flip, permutation, crop and resampling, to within half a voxel of the coarser grid along each axis."""
    rng = np.random.default_rng(seed)
    array = np.zeros((1, *shape), np.float32)
    box = tuple(slice(int(rng.integers(0, size // 3)), int(rng.integers(2 * size // 3, size)) + 1) for size in shape)
    array[(slice(None), *box)] = 1
    marked = tuple(int(rng.integers(part.start, part.stop)) for part in box)
    array[(0, *marked)] = 1000
    affine = canonical_affine(5)
    volume = turned(Volume(array, Geometry(shape, affine)), *ORIENTATIONS[case])
    prepared = apply(volume, plain(1, axis_order=axis_order, target_spacing=target, image_order=1))
    peak = np.unravel_index(int(prepared.image[0].argmax()), prepared.image[0].shape)
    found = world_of(prepared.trail.affine, np.array(peak, np.float64))
    expected = world_of(affine, np.array(marked, np.float64))
    # Back to voxels of the source, whose axes the rotation has turned.
    off = np.abs(np.linalg.inv(affine[:3, :3]) @ (found - expected))
    canonical_target = np.empty(3)
    canonical_target[list(axis_order)] = prepared.trail.target_spacing
    assert (off <= 0.5 * np.maximum(1, canonical_target / SPACING) + 1e-6).all()


def test_without_resampling_voxels_are_only_moved() -> None:
    volume = turned(world_volume((6, 7, 8), canonical_affine()), (2, 0, 1), (1, -1, 1))
    prepared = apply(volume, plain(3, target_spacing=(2.5, 1.1, 0.9)))
    assert prepared.trail.resampled_shape == (8, 7, 6)
    grid = np.stack(np.indices((8, 7, 6)), axis=-1).astype(np.float64)
    world = np.moveaxis(world_of(prepared.trail.affine, grid), -1, 0)
    np.testing.assert_allclose(prepared.image, world, atol=1e-5)
    assert prepared.trail.target_spacing == pytest.approx((2.5, 1.1, 0.9))


def test_2d_plans_leave_the_first_axis_alone() -> None:
    volume = world_volume((20, 22, 9), canonical_affine())
    prepared = apply(volume, plain(3, target_spacing=(0.55, 1.8)))
    assert prepared.trail.resampled_shape == (9, 44, 10)
    np.testing.assert_allclose(prepared.image[2].mean(axis=(1, 2)), 7.0 + 2.5 * np.arange(9), atol=1e-3)


def test_extent_is_kept_and_the_effective_spacing_recorded() -> None:
    trail = apply(world_volume((10, 11, 12), canonical_affine()), plain(3, target_spacing=(1.7, 1.7, 1.7))).trail
    for axis in range(3):
        extent = trail.crop_shape[axis] * trail.source_spacing_mm[axis]
        assert trail.resampled_shape[axis] * trail.target_spacing[axis] == pytest.approx(extent)


def test_constants_stay_constant_through_everything() -> None:
    array = np.full((1, 9, 10, 11), 77.25, np.float32)
    prepared = apply(
        Volume(array, Geometry((9, 10, 11), canonical_affine(7))), plain(1, target_spacing=(1.9, 0.8, 0.6))
    )
    assert (prepared.image == 77.25).all()


def test_crop_and_masked_zscore_see_the_same_zeros() -> None:
    """As nnU-Net does: hole voxels count, voxels outside the mask stay 0."""
    array = np.zeros((2, 12, 12, 12), np.int16)
    array[0, 3:9, 3:10, 2:9] = 100
    array[1, 3:6, 3:10, 2:9] = 40
    array[:, 5, 5, 5] = 0
    array[:, 3, 3, 2] = 0
    rule = ChannelNormalization(scheme="zscore", use_mask=True)
    plan = plain(2, normalization=(rule, rule))
    prepared = apply(Volume(array, Geometry((12, 12, 12), np.eye(4))), plan)
    assert prepared.trail.crop_start == (2, 3, 3)
    assert prepared.trail.crop_shape == (7, 7, 6)
    mask = nonzero_mask(array)[3:9, 3:10, 2:9].transpose(2, 1, 0)
    assert mask.sum() == 6 * 7 * 7 - 1
    for channel, source in zip(prepared.image, array, strict=True):
        values = source[3:9, 3:10, 2:9].transpose(2, 1, 0)[mask].astype(np.float64)
        np.testing.assert_allclose(channel[mask], (values - values.mean()) / values.std(), atol=1e-5)
        assert (channel[~mask] == 0).all()


def test_without_crop_the_whole_image_is_used() -> None:
    array = np.zeros((1, 5, 6, 7), np.float32)
    array[0, 2, 2, 2] = 1
    trail = apply(Volume(array, Geometry((5, 6, 7), np.eye(4))), plain(1, crop_to_nonzero=False)).trail
    assert (trail.crop_start, trail.crop_shape) == ((0, 0, 0), (7, 6, 5))


def test_an_image_of_zeros_goes_through() -> None:
    volume = Volume(np.zeros((1, 5, 6, 7), np.uint8), Geometry((5, 6, 7), np.eye(4)))
    plan = plain(1, target_spacing=(2.0, 1.0, 1.0), normalization=(ChannelNormalization(scheme="zscore"),))
    assert (apply(volume, plan).image == 0).all()


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<f8", ">f4"])
def test_the_dtype_of_the_file_does_not_matter(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, (1, 9, 8, 7))
    geometry = Geometry((9, 8, 7), np.eye(4))
    plan = plain(1, target_spacing=(0.8, 1.2, 1.0), normalization=(ChannelNormalization(scheme="zscore"),))
    expected = apply(Volume(values.astype(np.float32), geometry), plan).image
    assert np.array_equal(apply(Volume(values.astype(dtype), geometry), plan).image, expected)


def test_the_input_is_never_written() -> None:
    array = np.random.default_rng(0).normal(size=(1, 6, 6, 6)).astype(np.float32)
    before = array.copy()
    array.flags.writeable = False
    rule = ChannelNormalization(scheme="zscore")
    for target in ((1.0, 1.0, 1.0), (1.5, 1.0, 0.7)):
        apply(Volume(array, Geometry((6, 6, 6), np.eye(4))), plain(1, target_spacing=target, normalization=(rule,)))
    assert np.array_equal(array, before)


def test_the_way_back_for_logits_ends_on_the_crop() -> None:
    volume = world_volume((14, 15, 16), canonical_affine())
    plan = plain(3, target_spacing=(1.0, 1.5, 1.2))
    trail = apply(volume, plan).trail
    change = trail.change_back(plan)
    import torch

    start, stop, back = SlabResampler(change).push(torch.from_numpy(apply(volume, plan).image))
    assert (start, stop) == (0, trail.crop_shape[0])
    world = to_network_axes(volume.array, trail)[(slice(None), *trail.crop_box)]
    inner = (slice(None), *[slice(4, -4)] * 3)
    np.testing.assert_allclose(back.numpy()[inner], world[inner], atol=0.05)


def test_a_map_of_another_shape_is_refused() -> None:
    trail = apply(world_volume((6, 7, 8), canonical_affine()), plain(3)).trail
    with pytest.raises(ValueError, match="crop's shape"):
        invert(np.zeros((1, 2, 3), np.uint8), trail)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    array = np.ones((2, 4, 4, 4), np.float32)
    array[1, 1, 2, 3] = value
    with pytest.raises(DatasetError, match="channel 1 holds 1 values"):
        apply(Volume(array, Geometry((4, 4, 4), np.eye(4))), plain(2))


def test_channels_and_labels_must_fit() -> None:
    volume = world_volume((4, 5, 6), canonical_affine())
    with pytest.raises(DatasetError, match="3 channels, the plan is for 1"):
        apply(volume, plain(1))
    with pytest.raises(DatasetError, match="labels have shape"):
        apply(volume, plain(3), np.zeros((4, 5, 5), np.int16))
    with pytest.raises(DatasetError, match="class indices"):
        apply(volume, plain(3), np.full((4, 5, 6), 3, np.int16), 3)
