"""Laws of resampling, and equality with scikit-image."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.transform import resize

from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.domain.preprocess_plan import NEVER_SEPARATE
from autoseg.preprocessing.resample import (
    GridChange,
    SlabResampler,
    coarse_axis,
    grid_change,
    output_shape,
    resample_channel,
    resample_image,
    resample_labels,
)
from autoseg.preprocessing.spline import axis_operator

ISOTROPIC = (1.0, 1.0, 1.0)
TOLERANCE = 1e-4

sizes = st.integers(1, 24)
shapes = st.tuples(sizes, sizes, sizes)
spacings = st.tuples(*[st.sampled_from((0.4, 0.8, 1.0, 2.5, 5.0))] * 3)
orders = st.sampled_from((0, 1, 3))


def noise(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return (100 * np.random.default_rng(seed).normal(size=shape) + 40).astype(np.float32)


def oracle(channel: NDArray[np.float32], shape: tuple[int, ...], order: int) -> NDArray[np.float64]:
    image = channel.astype(np.float64)
    return np.asarray(resize(image, shape, order=order, mode="edge", anti_aliasing=False, clip=True))


def oracle_apart(
    channel: NDArray[np.float32], shape: tuple[int, int, int], order: int, axis: int
) -> NDArray[np.float64]:
    """Plane by plane, then order 0 across."""
    plane = tuple(size for other, size in enumerate(shape) if other != axis)
    planes = np.stack([oracle(item, plane, order) for item in np.moveaxis(channel, axis, 0)])
    return np.moveaxis(oracle(planes, (shape[axis], *plane), 0), 0, axis)


@given(shape=shapes, new_shape=shapes, spacing=spacings, order=orders, seed=st.integers(0, 99))
@settings(max_examples=60)
def test_equals_scikit_image_on_any_grid(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    order: int,
    seed: int,
) -> None:
    image = noise((2, *shape), seed)
    change = grid_change(shape, new_shape, spacing, order=order)
    got = resample_image(image, new_shape, spacing, order=order)
    for channel, result in zip(image, got, strict=True):
        if change.coarse_axis is None:
            expected = oracle(channel, new_shape, order)
        else:
            expected = oracle_apart(channel, new_shape, order, change.coarse_axis)
        assert np.abs(result - expected).max() <= TOLERANCE * max(float(channel.std()), 1.0)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("new_shape", [(90, 130, 70), (40, 60, 110)])
def test_equals_scikit_image_over_several_blocks_and_slabs(
    order: int, new_shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoseg.preprocessing.resample._SLAB_BYTES", 1 << 18)
    image = noise((1, 70, 100, 90))
    expected = oracle(image[0], new_shape, order)
    got = resample_image(image, new_shape, ISOTROPIC, order=order)
    assert np.abs(got[0] - expected).max() <= TOLERANCE * image.std()


@given(shape=shapes, new_shape=shapes, spacing=spacings, order=orders, value=st.floats(-3e4, 3e4, width=32))
@settings(max_examples=40)
def test_a_constant_stays_that_very_constant(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    order: int,
    value: float,
) -> None:
    image = np.full((1, *shape), value, np.float32)
    assert (resample_image(image, new_shape, spacing, order=order) == np.float32(value)).all()


@given(shape=shapes, new_shape=shapes, spacing=spacings)
@settings(max_examples=40)
def test_the_result_stays_in_the_range_of_the_input(
    shape: tuple[int, int, int], new_shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    image = noise((1, *shape))
    got = resample_image(image, new_shape, spacing)
    assert got.min() >= image.min()
    assert got.max() <= image.max()


@pytest.mark.parametrize(("order", "margin"), [(1, 1), (3, 8)])
@pytest.mark.parametrize("new_shape", [(45, 30, 61), (20, 50, 33)])
def test_a_ramp_is_reproduced_away_from_the_edge(order: int, margin: int, new_shape: tuple[int, int, int]) -> None:
    shape = (30, 40, 50)
    slopes = (2.0, -3.0, 0.5)
    ramp = sum(slope * axis for slope, axis in zip(slopes, np.indices(shape), strict=True)).astype(np.float32)
    got = resample_image(ramp[None], new_shape, ISOTROPIC, order=order)[0]
    positions = [(np.arange(new) + 0.5) * old / new - 0.5 for old, new in zip(shape, new_shape, strict=True)]
    grid = np.meshgrid(*positions, indexing="ij")
    expected = sum(slope * axis for slope, axis in zip(slopes, grid, strict=True))
    is_inside = np.logical_and.reduce(
        [(axis >= margin) & (axis <= size - 1 - margin) for axis, size in zip(grid, shape, strict=True)]
    )
    assert is_inside.sum() > 1000
    np.testing.assert_allclose(got[is_inside], expected[is_inside], atol=2e-3)


def test_the_same_grid_gives_a_copy_bit_for_bit() -> None:
    image, labels = noise((2, 5, 6, 7)), np.arange(210, dtype=np.int16).reshape(5, 6, 7)
    same = resample_image(image, (5, 6, 7), ISOTROPIC)
    assert np.array_equal(same, image)
    assert not np.shares_memory(same, image)
    assert np.array_equal(resample_labels(labels, (5, 6, 7), ISOTROPIC), labels)


def test_an_axis_that_keeps_its_size_is_not_mixed() -> None:
    """In a 2D plan slices stay apart: changing one changes no other."""
    image = noise((1, 6, 20, 20))
    other = image.copy()
    other[:, 3] += 500
    args = ((6, 27, 31), (1.0, 0.9, 0.9))
    before, after = resample_image(image, *args), resample_image(other, *args)
    is_same = [bool(np.array_equal(before[0, row], after[0, row])) for row in range(6)]
    assert is_same[3] is False
    # The range that clips is that of the whole image here, so neighbours may only become less clipped.
    low, high = image.min(), image.max()
    np.testing.assert_array_equal(np.clip(after[0, :3], low, high), before[0, :3])


def test_shapes_round_half_to_even_and_never_vanish() -> None:
    assert output_shape((10, 5, 1), (1.0, 1.0, 1.0), (2.0, 2.0, 5.0)) == (5, 2, 1)


@pytest.mark.parametrize(
    ("spacing", "target", "expected"),
    [
        ((1, 1, 1), (1, 1, 1), None),
        ((3, 1, 1), (1, 1, 1), None),
        ((3.1, 1, 1), (1, 1, 1), 0),
        ((1, 5, 1), (1, 1, 1), 1),
        ((1, 1, 1), (1, 1, 4), 2),
        ((5, 1, 1), (1, 4, 1), 0),
        ((5, 5, 1), (1, 1, 1), None),
    ],
)
def test_the_coarse_axis(spacing: tuple[float, ...], target: tuple[float, ...], expected: int | None) -> None:
    assert coarse_axis(spacing, target) == expected


def test_other_spline_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="order"):
        axis_operator(4, 5, 2)


@given(num_in=st.integers(1, 60), num_out=st.integers(1, 60), order=orders)
def test_operator_rows_sum_to_one_and_the_band_never_turns_back(num_in: int, num_out: int, order: int) -> None:
    operator = axis_operator(num_in, num_out, order)
    np.testing.assert_allclose(operator.matrix.sum(axis=1, dtype=np.float64), 1, atol=1e-6)
    assert (np.diff(operator.first) >= 0).all()
    assert (np.diff(operator.stop) >= 0).all()
    rows, columns = np.nonzero(operator.matrix)
    assert (columns >= operator.first[rows]).all()
    assert (columns < operator.stop[rows]).all()


@given(
    shape=shapes,
    new_shape=shapes,
    order=st.sampled_from((1, 3)),
    coarse=st.sampled_from((None, 0, 1, 2)),
    axis=st.integers(0, 2),
    cuts=st.lists(st.integers(1, 23), max_size=4),
)
@settings(max_examples=60)
def test_slab_by_slab_equals_all_at_once(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    order: int,
    coarse: int | None,
    axis: int,
    cuts: list[int],
) -> None:
    change = GridChange(shape, new_shape, order, coarse)
    whole = torch.from_numpy(noise((3, *shape)))
    start, stop, expected = SlabResampler(change, 0).push(whole)
    assert (start, stop) == (0, new_shape[0])
    resampler = SlabResampler(change, axis)
    bounds = [0, *sorted({cut for cut in cuts if cut < shape[axis]}), shape[axis]]
    parts, done = [], 0
    for low, high in pairwise(bounds):
        start, stop, rows = resampler.push(whole.narrow(1 + axis, low, high - low))
        assert start == done
        assert rows.shape[1 + axis] == stop - start
        done = stop
        parts.append(rows)
    assert done == new_shape[axis]
    torch.testing.assert_close(
        torch.cat([part for part in parts if part.numel()], 1 + axis), expected, rtol=0, atol=1e-3
    )


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    factors=st.tuples(*[st.sampled_from((0.3, 1.0, 2.5))] * 3),
    order=st.sampled_from((0, 1, 3)),
    axis=st.integers(0, 2),
)
@settings(max_examples=40)
def test_a_slab_may_be_reused_once_its_rows_are_used(
    shape: tuple[int, int, int], factors: tuple[float, float, float], order: int, axis: int
) -> None:
    """Where nothing changed across the slab and no row was finished, the slab itself was kept."""
    new_shape = tuple(max(1, round(size * factor)) for size, factor in zip(shape, factors, strict=True))
    change = GridChange(shape, (new_shape[0], new_shape[1], new_shape[2]), order, None)
    whole = torch.from_numpy(noise(shape))
    kept, reused = SlabResampler(change, axis), SlabResampler(change, axis)
    buffer = torch.empty_like(whole.narrow(axis, 0, 1))
    for row in whole.split(1, dim=axis):
        expected = kept.push(row.clone())[2]
        buffer.copy_(row)
        assert torch.equal(reused.push(buffer)[2], expected)


def test_mixed_precision_around_it_changes_nothing() -> None:
    image = noise((1, 20, 20, 20))
    expected = resample_image(image, (25, 26, 27), ISOTROPIC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(resample_image(image, (25, 26, 27), ISOTROPIC), expected)


def blobs(shape: tuple[int, int, int], num_classes: int, seed: int) -> NDArray[np.int16]:
    """Class indices in boxes that overlap."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int16)
    for index in range(1, num_classes):
        low = [int(rng.integers(0, size)) for size in shape]
        box = tuple(slice(start, start + int(rng.integers(1, 10))) for start in low)
        labels[box] = index
    return labels


def label_oracle(labels: NDArray[np.int16], new_shape: tuple[int, int, int], axis: int | None) -> NDArray[np.int16]:
    """Every class resampled over the whole grid, in ascending order."""
    linear: Callable[[NDArray[np.float32]], NDArray[np.float64]]
    if axis is None:
        linear = lambda mask: oracle(mask, new_shape, 1)  # noqa: E731
    else:
        linear = lambda mask: oracle_apart(mask, new_shape, 1, axis)  # noqa: E731
    out = np.zeros(new_shape, np.int16)
    for index in np.unique(labels):
        out[linear((labels == index).astype(np.float32)) >= 0.5 - 1e-6] = index
    return out


@given(shape=shapes, new_shape=shapes, spacing=spacings, seed=st.integers(0, 99))
@settings(max_examples=60)
def test_labels_equal_each_class_on_its_own(
    shape: tuple[int, int, int], new_shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int
) -> None:
    labels = blobs(shape, 5, seed)
    labels[0, 0, 0] = 0
    change = grid_change(shape, new_shape, spacing, order=1)
    got = resample_labels(labels, new_shape, spacing)
    expected = labels if change.is_identity else label_oracle(labels, new_shape, change.coarse_axis)
    assert np.array_equal(got, expected)


@given(shape=shapes, new_shape=shapes, spacing=spacings, seed=st.integers(0, 99), order=st.sampled_from((0, 1)))
@settings(max_examples=40)
def test_labels_out_are_a_subset_of_labels_in(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    seed: int,
    order: int,
) -> None:
    # No background at all, and voxels that nobody annotated.
    labels = np.random.default_rng(seed).choice(np.array([IGNORE_INDEX, 2, 3, 7], np.int16), shape)
    got = resample_labels(labels, new_shape, spacing, order=order)
    assert got.dtype == np.int16
    assert set(np.unique(got)) <= set(np.unique(labels))


def test_the_ignore_index_is_resampled_like_a_class() -> None:
    labels = np.zeros((4, 4, 4), np.int16)
    labels[:2] = IGNORE_INDEX
    got = resample_labels(labels, (8, 8, 8), ISOTROPIC)
    assert (got[:4] == IGNORE_INDEX).all()
    assert (got[4:] == 0).all()


def test_the_new_size_rounds_halves_as_nnunet_does() -> None:
    """35 voxels of 0.7 mm at 1.4 mm are 17.5: nnU-Net divides the spacings first, which is exact here."""
    assert output_shape((35, 35, 35), (0.7, 0.7, 0.7), (1.4, 1.4, 1.4)) == (18, 18, 18)


def test_two_axes_that_an_oblique_affine_makes_unequal_by_rounding_are_equally_coarse() -> None:
    assert coarse_axis((0.24, 1.25, 1.25 * (1 + 2e-7)), (1.0, 1.0, 1.0)) is None
    assert coarse_axis((0.24, 1.25, 1.26), (1.0, 1.0, 1.0)) == 2


def test_a_coarse_axis_of_the_same_order_is_resampled_like_the_others() -> None:
    array = np.random.default_rng(3).normal(size=(5, 12, 9)).astype(np.float32)
    spacing, target = (5.0, 1.0, 1.0), (3.0, 0.8, 1.3)
    new_shape = output_shape(array.shape, spacing, target)
    results = []
    for ratio, coarse_order in ((3.0, 1), (NEVER_SEPARATE, 0)):
        change = grid_change(
            array.shape, new_shape, spacing, target, order=1, separate_axis_ratio=ratio, coarse_order=coarse_order
        )
        out = np.empty(new_shape, np.float32)
        resample_channel(array, out, change)
        results.append(out)
        assert change.coarse_axis == (0 if coarse_order else None)
    np.testing.assert_allclose(results[0], results[1], atol=1e-6)


def test_ratio_zero_takes_the_coarsest_axis_of_any_image_apart() -> None:
    assert coarse_axis((1.0, 1.1, 1.0), (9.0, 1.0, 1.0), 0.0) == 1
    assert coarse_axis((1.0, 1.0, 1.0), (9.0, 1.0, 1.0), 0.0) is None
