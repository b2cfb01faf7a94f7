"""Images that somebody has opened with nibabel, and label maps for them."""

# nibabel's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from autoseg.domain.geometry import Geometry, Volume
from autoseg.errors import DatasetError
from autoseg.io.nifti import set_grid

_SPATIAL_AXES = 3


def is_nibabel(image: object) -> bool:
    """Whether it is an image of nibabel's with a grid."""
    return isinstance(image, nib.spatialimages.SpatialImage)


def from_nibabel(image: Any) -> Volume:
    """An image of nibabel's as a volume.

    Args:
        image: (I, J, K), or with channels last (I, J, K, C); axes of one entry between them are left out.

    Returns:
        (C, I, J, K), scaling applied.

    Raises:
        DatasetError: It has fewer than three axes, or several beyond the third.
        GeometryError: Its affine is degenerate.
    """
    array = np.asanyarray(image.dataobj)
    further = [size for size in array.shape[_SPATIAL_AXES:] if size > 1]
    if array.ndim < _SPATIAL_AXES or len(further) > 1:
        raise DatasetError(f"an image needs axes (I, J, K) or (I, J, K, C), got the shape {array.shape}")
    shape = array.shape[:_SPATIAL_AXES]
    channels = np.moveaxis(array.reshape(*shape, *(further or [1]), order="A"), -1, 0)
    header = image.header
    if not isinstance(header, nib.nifti1.Nifti1Header):
        return Volume(channels, Geometry(shape, image.affine))
    qform, qform_code = header.get_qform(coded=True)
    geometry = Geometry(shape, image.affine, False, int(header["sform_code"]), int(qform_code), qform)
    return Volume(channels, geometry)


def to_nibabel(labels: NDArray[np.integer[Any]], geometry: Geometry) -> Any:
    """A label map as a NIfTI image of nibabel's, on the grid of its image.

    Args:
        labels: (I, J, K), uint8 or uint16.
        geometry: The grid.
    """
    image = nib.Nifti1Image(labels, None, dtype=labels.dtype)
    set_grid(image.header, geometry, labels.ndim)
    image.header.set_intent("label")
    # The image keeps an affine of its own beside the header's.
    return nib.Nifti1Image(labels, geometry.affine, image.header, dtype=labels.dtype)
