"""NIfTI files in memory, for the viewer on a page."""

from __future__ import annotations

import gzip
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

GZIP_LEVEL = 6

_SINGLE_FILE = b"n+1"
_DATA_OFFSET_BYTES = 352
"""Header and the four bytes that say that nothing stands between it and the voxels. Source: the NIfTI-1 standard."""

_RGB_CODE = 128


def nifti_gz(
    array: NDArray[np.uint8], affine: NDArray[np.float64], *, slope: float = 1.0, intercept: float = 0.0
) -> bytes:
    """A compressed NIfTI file of bytes; the same input gives the same file.

    Args:
        array: (I, J, K), or (I, J, K, 3) for colours.
        affine: Voxel centres to millimetres, RAS+.
        slope: A byte times it ...
        intercept: ... plus this is the value it stands for.
    """
    is_colour = array.ndim == 4
    header: Any = nib.Nifti1Header()  # type: ignore[no-untyped-call]
    header.set_data_shape(array.shape[:3])
    header.set_data_dtype(_RGB_CODE if is_colour else np.uint8)
    header.set_sform(affine, code="aligned")
    header.set_qform(affine, code="aligned", strip_shears=True)
    header.set_xyzt_units("mm")
    header.set_slope_inter(slope, intercept)
    header["magic"] = _SINGLE_FILE
    header["vox_offset"] = _DATA_OFFSET_BYTES
    voxels = np.moveaxis(array, -1, 0) if is_colour else array
    head: bytes = header.binaryblock
    return gzip.compress(head.ljust(_DATA_OFFSET_BYTES, b"\0") + voxels.tobytes("F"), GZIP_LEVEL, mtime=0)
