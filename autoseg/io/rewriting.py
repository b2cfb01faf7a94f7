"""Writing a file anew with its voxels reordered, one of its channels alone, or another grid: numbers stay as stored."""

# nibabel's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from autoseg.domain.endings import NIFTI_ENDINGS, split_ending
from autoseg.domain.geometry import Geometry, Orientation
from autoseg.domain.grids import reorder_voxels
from autoseg.io.files import atomic_path
from autoseg.io.images import read_header, read_image, write_image
from autoseg.io.nifti import set_grid


def rewrite_image(
    source: Path,
    target: Path,
    geometry: Geometry,
    orientation: Orientation,
    *,
    component: int | None = None,
    fill: float | None = None,
) -> None:
    """Write the voxels of one file to another, on another grid or in another order; atomic.

    Between NIfTI files the stored numbers, their type, their scaling and the header's other fields are kept. Otherwise
    the numbers are those that autoseg reads: floats become float32.

    Args:
        source: A file that can be read.
        target: Its ending chooses the format.
        geometry: The grid that is written, in the new order.
        orientation: The new order of the voxels.
        component: The channel to take of a file that holds several; None takes all.
        fill: Written in place of NaN and infinities; None leaves them.

    Raises:
        DatasetError: The format cannot hold the voxels.
        OSError: The folder cannot be written, or the disk is full.
    """
    both = all(split_ending(path)[1].lower() in NIFTI_ENDINGS for path in (source, target))
    if both and fill is None:
        image: Any = nib.load(source)
        if not image.header.get_data_dtype().fields:  # colours are read as channels
            _rewrite_nifti(image, target, geometry, orientation, component)
            return
    array = read_image(source, read_header(source).components).array
    array = array if component is None else array[component : component + 1]
    array = reorder_voxels(array, orientation)
    if fill is not None:
        array = np.where(np.isfinite(array), array, np.asarray(fill, array.dtype))
    write_image(target, array if array.shape[0] > 1 else array[0], geometry)


def _rewrite_nifti(
    image: Any, target: Path, geometry: Geometry, orientation: Orientation, component: int | None
) -> None:
    stored = np.asanyarray(image.dataobj.get_unscaled())
    grid = (*stored.shape[:3], 1, 1)[:3]
    stored = stored.reshape(*grid, -1)
    stored = np.moveaxis(stored, 3, 0)
    if component is not None:
        stored = stored[component : component + 1]
    stored = reorder_voxels(stored, orientation)
    array = stored[0] if stored.shape[0] == 1 else np.moveaxis(stored, 0, 3)
    if geometry.is_2d and array.ndim == 3:
        array = array[:, :, 0]
    out = type(image)(array, None, image.header, dtype=image.header.get_data_dtype())
    set_grid(out.header, geometry, array.ndim)
    encoded = [orientation.axes.index(axis) if axis is not None else None for axis in image.header.get_dim_info()]
    out.header.set_dim_info(*encoded)
    out.update_header()
    # The stored numbers are written as they are when the scaling is set by hand.
    out.header.set_slope_inter(float(image.dataobj.slope), float(image.dataobj.inter))
    with atomic_path(target) as temporary:
        nib.save(out, temporary)
