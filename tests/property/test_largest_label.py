"""The largest part of a voxel decides its label: equality with scikit-image in float64, and laws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.transform import resize

from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.preprocessing import largest_label
from autoseg.preprocessing.resample import grid_change, resample_labels

ISOTROPIC = (1.0, 1.0, 1.0)

sizes = st.integers(1, 14)
shapes = st.tuples(sizes, sizes, sizes)
spacings = st.tuples(*[st.sampled_from((0.4, 1.0, 2.5))] * 3)
even = st.sampled_from((2, 4, 6, 8))


def resized(values: NDArray[np.generic], shape: tuple[int, ...], order: int) -> NDArray[np.float64]:
    return np.asarray(resize(values.astype(np.float64), shape, order=order, mode="edge", anti_aliasing=False))


def oracle(labels: NDArray[np.int16], shape: tuple[int, ...]) -> NDArray[np.int16]:
    """All masks at once; of the labels with the largest part the nearest, else the first."""
    classes = np.unique(labels)
    parts = np.stack([resized(labels == index, shape, 1) for index in classes])
    nearest = np.rint(resized(labels, shape, 0)).astype(np.int16)
    part_of_nearest = np.take_along_axis(parts, np.searchsorted(classes, nearest)[None], axis=0)[0]
    return np.where(part_of_nearest == parts.max(axis=0), nearest, classes[parts.argmax(axis=0)])


def oracle_apart(labels: NDArray[np.int16], shape: tuple[int, int, int], axis: int) -> NDArray[np.int16]:
    """Plane by plane, then the nearest plane."""
    plane = tuple(size for other, size in enumerate(shape) if other != axis)
    planes = np.stack([oracle(item, plane) for item in np.moveaxis(labels, axis, 0)])
    return np.rint(np.moveaxis(resized(planes, (shape[axis], *plane), 0), 0, axis)).astype(np.int16)


def expected_of(
    labels: NDArray[np.int16], shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> NDArray[np.int16]:
    change = grid_change(labels.shape, shape, spacing, order=1)
    if change.is_identity:
        return labels
    return oracle(labels, shape) if change.coarse_axis is None else oracle_apart(labels, shape, change.coarse_axis)


def patches(shape: tuple[int, int, int], num_classes: int, seed: int) -> NDArray[np.int16]:
    """Noise of which some regions are uniform."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, shape).astype(np.int16)
    labels[: shape[0] // 2, : shape[1] // 2] = num_classes - 1
    return labels


@given(shape=shapes, new_shape=shapes, spacing=spacings, num_classes=st.integers(2, 30), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_equals_scikit_image_on_any_grid(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    num_classes: int,
    seed: int,
) -> None:
    labels = patches(shape, num_classes, seed)
    got = resample_labels(labels, new_shape, spacing, decision="largest")
    np.testing.assert_array_equal(got, expected_of(labels, new_shape, spacing))


@pytest.mark.parametrize("spacing", [ISOTROPIC, (4.0, 1.0, 1.0), (1.0, 4.0, 1.0), (1.0, 1.0, 4.0)])
@pytest.mark.parametrize("factor", [2, 0.5, 1.5, 1 / 4, 3])
@given(shape=st.tuples(even, even, even).map(lambda shape: (2 * shape[0], 2 * shape[1], 2 * shape[2])), seed=sizes)
@example(shape=(4, 8, 12), seed=0)
@settings(max_examples=6, deadline=None)
def test_ties_fall_as_in_scikit_image(
    factor: float, spacing: tuple[float, float, float], shape: tuple[int, int, int], seed: int
) -> None:
    """At these factors voxels lie in the middle between others: two to eight labels have the same part."""
    new_shape = (int(shape[0] * factor), int(shape[1] * factor), int(shape[2] * factor))
    labels = patches(shape, 5, seed)
    got = resample_labels(labels, new_shape, spacing, decision="largest")
    np.testing.assert_array_equal(got, expected_of(labels, new_shape, spacing))


def test_slabs_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = patches((9, 8, 7), 6, 0)
    whole = resample_labels(labels, (20, 9, 13), ISOTROPIC, decision="largest")
    monkeypatch.setattr(largest_label, "_SLAB_VOXELS", 3 * 9 * 13)
    np.testing.assert_array_equal(resample_labels(labels, (20, 9, 13), ISOTROPIC, decision="largest"), whole)


def test_no_voxel_is_without_an_owner() -> None:
    """Where four labels meet none fills half of the voxel; halves leave it to the background, which is not near."""
    labels = np.zeros((2, 2, 8), np.int16)
    labels[:, :, :2] = np.array([[3, 4], [5, 6]])[:, :, None]
    assert resample_labels(labels, (1, 1, 4), ISOTROPIC)[0, 0, 0] == 0
    assert resample_labels(labels, (1, 1, 4), ISOTROPIC, decision="largest")[0, 0, 0] == 6  # nearest: the later


def test_a_tie_without_the_nearest_goes_to_the_smallest() -> None:
    # The nearest of the eight is the last, 3, which fills a quarter; 1 and 2 fill three eighths each.
    labels = np.array([3, 1, 1, 1, 2, 2, 2, 3], np.int16).reshape(2, 2, 2)
    assert resample_labels(labels, (1, 1, 1), ISOTROPIC, decision="largest").item() == 1
    ignored = np.where(labels == 1, IGNORE_INDEX, labels).astype(np.int16)
    assert resample_labels(ignored, (1, 1, 1), ISOTROPIC, decision="largest").item() == 2


def test_the_ignore_index_wins_where_it_fills_most() -> None:
    labels = np.zeros((4, 4, 4), np.int16)
    labels[:2] = IGNORE_INDEX
    got = resample_labels(labels, (8, 8, 8), ISOTROPIC, decision="largest")
    assert (got[:4] == IGNORE_INDEX).all()
    assert (got[4:] == 0).all()


def test_order_zero_is_the_nearest_label_and_cubic_is_refused() -> None:
    labels = patches((5, 6, 7), 4, 0)
    got = resample_labels(labels, (8, 4, 7), ISOTROPIC, order=0, decision="largest")
    np.testing.assert_array_equal(got, resample_labels(labels, (8, 4, 7), ISOTROPIC, order=0))
    with pytest.raises(ValueError, match="0 or 1, got 3"):
        resample_labels(labels, (8, 4, 7), ISOTROPIC, order=3, decision="largest")
