from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from autoseg.domain.plan import ChannelNormalization
from autoseg.errors import DatasetError
from autoseg.preprocessing.crop import any_nonzero, fill_holes, nonzero_box, nonzero_mask
from autoseg.preprocessing.normalise import normalise


@given(seed=st.integers(0, 200), density=st.sampled_from((0.02, 0.3, 0.6, 0.9)))
def test_filled_mask_equals_scipy_and_keeps_its_box(seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((7, 8, 9)) < density
    filled = fill_holes(mask)
    assert np.array_equal(filled, ndimage.binary_fill_holes(mask))
    assert nonzero_box(filled) == nonzero_box(mask)
    box = nonzero_box(mask)
    assert np.array_equal(fill_holes(mask[box]), filled[box]), "the crop alone gives the same"


def test_mask_joins_channels() -> None:
    image = np.zeros((2, 4, 5, 6), np.int16)
    image[0, 1, 1, 1], image[1, 2, 3, 4] = -5, 7
    assert nonzero_box(any_nonzero(image)) == (slice(1, 3), slice(1, 4), slice(1, 5))
    assert nonzero_mask(image).sum() == 2


def test_an_empty_image_is_not_cropped() -> None:
    assert nonzero_box(np.zeros((3, 4, 5), np.bool_)) == (slice(0, 3), slice(0, 4), slice(0, 5))


def image(seed: int = 0) -> np.ndarray:
    return (50 * np.random.default_rng(seed).normal(size=(6, 7, 8)) + 1000).astype(np.float32)


def test_zscore() -> None:
    values = image()
    normalise(values, ChannelNormalization(scheme="zscore"))
    assert values.mean(dtype=np.float64) == pytest.approx(0, abs=1e-5)
    assert values.std(dtype=np.float64) == pytest.approx(1, abs=1e-5)


def test_zscore_with_mask_leaves_the_outside_zero() -> None:
    values = image()
    mask = np.zeros(values.shape, np.bool_)
    mask[2:5, 1:4] = True
    values[~mask] = 0
    inside = values[mask].astype(np.float64)
    normalise(values, ChannelNormalization(scheme="zscore", use_mask=True), mask)
    np.testing.assert_allclose(values[mask], (inside - inside.mean()) / inside.std(), atol=1e-4)
    assert (values[~mask] == 0).all()


def test_zscore_ignores_a_mask_that_the_rule_does_not_ask_for() -> None:
    first, second = image(), image()
    normalise(first, ChannelNormalization(scheme="zscore"))
    normalise(second, ChannelNormalization(scheme="zscore"), np.zeros(second.shape, np.bool_))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("scheme", ["zscore", "rescale"])
def test_a_constant_channel_becomes_zero(scheme: str) -> None:
    values = np.full((3, 4, 5), 1234.5, np.float32)
    normalise(values, ChannelNormalization(scheme=scheme))  # type: ignore[arg-type]
    assert (values == 0).all()


def test_ct_clips_and_scales_by_the_numbers_of_the_plan() -> None:
    values = np.array([-2000, -100, 40, 300, 3000], np.float32).reshape(1, 1, 5)
    normalise(values, ChannelNormalization(scheme="ct", mean=100, std=50, lower=-100, upper=300))
    np.testing.assert_allclose(values.ravel(), [-4, -4, -1.2, 4, 4], rtol=1e-6)


def test_rescale_none_and_rgb() -> None:
    values = image()
    normalise(values, ChannelNormalization(scheme="rescale"))
    assert (values.min(), values.max()) == (0, 1)
    values = image()
    normalise(values, ChannelNormalization(scheme="none"))
    assert np.array_equal(values, image())
    values = np.array([0, 51, 255], np.float32).reshape(1, 1, 3)
    normalise(values, ChannelNormalization(scheme="rgb"))
    np.testing.assert_allclose(values.ravel(), [0, 0.2, 1], rtol=1e-6)


def test_rgb_refuses_what_is_no_8_bit_picture() -> None:
    with pytest.raises(DatasetError, match="0 and 255"):
        normalise(image(), ChannelNormalization(scheme="rgb"))
