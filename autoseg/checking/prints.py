"""Fingerprints of images: equal ones for equal images, like ones for copies that were resampled, scaled or smoothed."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.domain.geometry import Geometry
from autoseg.io.drawing import to_canonical

BLOCKS_3D, BLOCKS_2D = 24, 64
"""Blocks along each axis over which a print averages.

Small enough that the anatomy which all cases share is not all that is left, large enough that a copy on another grid
keeps them. How far prints of real images and of copies agree is measured in docs/reference/findings.md.
"""

_HIGH_PASS_BLOCKS = 3
"""The mean over so many blocks is taken away: it holds the anatomy that all cases share."""

_DIGEST_BYTES = 16
_LEVELS = 127
_CLIP_DEVIATIONS = 4.0
"""A print holds its values in 8 bits, up to so many standard deviations."""


def content_digest(array: NDArray[Any]) -> bytes:
    """A hash of shape and values; the type that they are stored in does not matter.

    Args:
        array: (I, J, K), any real dtype.
    """
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=_DIGEST_BYTES)
    for index in range(array.shape[-1]):  # slice by slice: a float copy of the whole would double the memory
        digest.update(np.ascontiguousarray(array[..., index].T, np.float32).data)
    return digest.digest()


def detail_print(array: NDArray[Any], geometry: Geometry, limits: tuple[float, float]) -> NDArray[np.int8]:
    """The fine pattern of an image, independent of its grid, its intensity scale and the order of its axes.

    Means over blocks in canonical axes, less their surroundings, at unit variance.

    Args:
        array: (I, J, K).
        geometry: Its grid.
        limits: Intensities beyond are cut off; they must differ.

    Returns:
        Flat; `BLOCKS_2D` ** 2 entries for pictures, else `BLOCKS_3D` ** 3.
    """
    turned = to_canonical(array, geometry)
    blocks = turned[..., 0] if geometry.is_2d else turned
    count = BLOCKS_2D if geometry.is_2d else BLOCKS_3D
    blocks = np.clip(np.nan_to_num(blocks.astype(np.float32)), *limits)
    for axis in range(blocks.ndim):
        blocks = _averaged(blocks, axis, count)
    fine = blocks - ndimage.uniform_filter(blocks, _HIGH_PASS_BLOCKS, mode="nearest")
    fine -= fine.mean()
    deviation = float(fine.std())
    if deviation == 0:
        return np.zeros(fine.size, np.int8)
    levels = np.clip(fine.ravel() / (deviation * _CLIP_DEVIATIONS), -1, 1) * _LEVELS
    out: NDArray[np.int8] = np.rint(levels).astype(np.int8)
    return out


def _averaged(array: NDArray[np.float32], axis: int, count: int) -> NDArray[np.float32]:
    """Means over `count` pieces of an axis; a shorter axis is stretched to that by repeating."""
    size = array.shape[axis]
    if size < count:
        stretched: NDArray[np.float32] = array.take(np.arange(count) * size // count, axis=axis)
        return stretched
    starts = np.arange(count) * size // count
    lengths = np.diff(starts, append=size).astype(np.float32)
    means: NDArray[np.float32] = np.add.reduceat(array, starts, axis=axis)
    means /= lengths.reshape([-1 if other == axis else 1 for other in range(array.ndim)])
    return means


def correlations(rows: NDArray[np.int8], others: NDArray[np.int8]) -> NDArray[np.float32]:
    """How far prints agree: 1 for one pattern, about 0 for unrelated ones; 0 for images without any pattern.

    Args:
        rows: (n, entries).
        others: (m, entries).

    Returns:
        (n, m).
    """
    agreement: NDArray[np.float32] = _unit(rows) @ _unit(others).T
    return agreement


def _unit(prints: NDArray[np.int8]) -> NDArray[np.float32]:
    values = prints.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)
    return unit
