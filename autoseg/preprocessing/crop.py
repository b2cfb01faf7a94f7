"""Which voxels of an image hold anything, and the box around them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Box = tuple[slice, slice, slice]


def any_nonzero(array: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Voxels at which any channel differs from 0.

    Args:
        array: (C, D, H, W) in any axis order.

    Returns:
        (D, H, W). Holes are not filled: the box around it is that of the filled mask all the same.
    """
    mask: NDArray[np.bool_] = array[0] != 0
    for channel in array[1:]:
        mask |= channel != 0
    return mask


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask with every background region filled that does not touch the edge of the array.

    Neighbours are face to face. The result inside the mask's bounding box is the same whether the whole image or only
    that box is given, because everything outside the box is connected to the edge.

    Args:
        mask: Any dimension.
    """
    if mask.all():
        return mask.copy()
    regions, count = ndimage.label(~mask)
    is_hole = np.ones(count + 1, np.bool_)
    is_hole[0] = False
    for axis in range(mask.ndim):
        for end in (0, -1):
            is_hole[np.unique(regions.take(end, axis=axis))] = False
    filled: NDArray[np.bool_] = mask | is_hole[regions]
    return filled


def nonzero_mask(array: NDArray[np.generic]) -> NDArray[np.bool_]:
    """The nonzero mask of a case: any channel differs from 0, holes filled.

    Args:
        array: (C, D, H, W) in any axis order.

    Returns:
        (D, H, W).

    Source: nnU-Net v2 (Isensee et al. 2021, online methods, cropping).
    """
    return fill_holes(any_nonzero(array))


def nonzero_box(mask: NDArray[np.bool_]) -> Box:
    """The smallest box around a mask; the whole array where the mask is empty.

    Args:
        mask: (D, H, W), filled or not.
    """
    if not mask.any():
        return (slice(0, mask.shape[0]), slice(0, mask.shape[1]), slice(0, mask.shape[2]))
    slices = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        positions = np.flatnonzero(mask.any(axis=others))
        slices.append(slice(int(positions[0]), int(positions[-1]) + 1))
    return (slices[0], slices[1], slices[2])
