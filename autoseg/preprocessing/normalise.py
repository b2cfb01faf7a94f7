"""Scaling intensities, one channel at a time, by what the plan says."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.plan import ChannelNormalization
from autoseg.errors import DatasetError

STD_FLOOR = 1e-8
"""Smallest divisor, so that a constant image becomes 0 and not NaN. Source: nnU-Net v2."""

RGB_MAXIMUM = 255.0
"""Largest value of an 8-bit picture."""


def normalise(channel: NDArray[np.float32], rule: ChannelNormalization, mask: NDArray[np.bool_] | None = None) -> None:
    """Scale one channel in place.

    Args:
        channel: (D, H, W), finite, cropped to the nonzero box.
        rule: How.
        mask: (D, H, W), the filled nonzero mask; needed where `rule.use_mask`. Voxels outside it keep their 0.

    Raises:
        DatasetError: The rule is for 8-bit pictures and the values are not between 0 and 255.
    """
    if rule.scheme == "zscore":
        _standardise(channel, mask if rule.use_mask else None)
    elif rule.scheme == "ct":
        assert rule.lower is not None
        assert rule.upper is not None
        assert rule.mean is not None
        assert rule.std is not None
        np.clip(channel, rule.lower, rule.upper, out=channel)
        channel -= np.float32(rule.mean)
        channel /= np.float32(max(rule.std, STD_FLOOR))
    elif rule.scheme == "rescale":
        low, high = float(channel.min()), float(channel.max())
        channel -= np.float32(low)
        channel /= np.float32(max(high - low, STD_FLOOR))
    elif rule.scheme == "rgb":
        low, high = float(channel.min()), float(channel.max())
        if low < 0 or high > RGB_MAXIMUM:
            raise DatasetError(
                f"a picture's values must lie between 0 and 255, got {low:g} to {high:g}",
                hint="Convert the picture to 8 bits, or plan with another normalization for this channel.",
            )
        channel /= np.float32(RGB_MAXIMUM)


def _standardise(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> None:
    """Mean 0 and standard deviation 1, over the mask alone where there is one (and nothing else is touched)."""
    if mask is None:
        mean, std = _moments(channel)
        channel -= np.float32(mean)
        channel /= np.float32(max(std, STD_FLOOR))
        return
    if not mask.any():
        return
    inside = channel[mask]
    mean, std = _moments(inside)
    channel[mask] = (inside - np.float32(mean)) / np.float32(max(std, STD_FLOOR))


def _moments(values: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard deviation, summed in float64 row by row: no float64 copy of the image is made."""
    mean = float(values.mean(dtype=np.float64))
    squares = 0.0
    for row in values if values.ndim > 1 else np.array_split(values, max(1, values.size >> 16)):
        squares += float(np.square(row - mean, dtype=np.float64).sum())
    return mean, float(np.sqrt(squares / values.size))
