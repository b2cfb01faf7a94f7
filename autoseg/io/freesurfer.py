"""FreeSurfer's MGH and MGZ files, by nibabel for headers and by plain streams for voxels."""

# nibabel's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHError
from numpy.typing import NDArray

from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError
from autoseg.io.content import broken, require_room
from autoseg.io.header import ImageHeader, located
from autoseg.io.streams import STREAM_PROBLEMS, is_gzip_name, one_line, open_stream, read_voxels

_HEADER_BYTES = 90
_VOXELS_AT = 284
"""Source: FreeSurfer's wiki, "MghFormat": fields end at byte 90, the voxels begin at byte 284."""

_COMPRESSION = 6
"""gzip's own default; 9 takes several times as long for a few per cent."""

_HEADER_PROBLEMS = (*STREAM_PROBLEMS, MGHError, nib.spatialimages.HeaderDataError, ValueError, KeyError)


def read_mgh_header(path: Path) -> ImageHeader:
    """Shape, grid and components of an MGH or MGZ file, without its voxels.

    Raises:
        DatasetError: The header cannot be read, or promises more voxels than the file holds.
        GeometryError: The affine is not finite or degenerate.
    """
    return _read_header(path)[0]


def read_mgh(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    """All voxels as (C, I, J, K), frames as channels; float32, or the file's integer type in native byte order.

    Raises:
        DatasetError: The file is broken or truncated.
        GeometryError: The affine is not finite or degenerate.
    """
    header, dtype = _read_header(path)
    flat = read_voxels(path, _VOXELS_AT, header.num_voxels * header.components, dtype)
    return np.moveaxis(flat.reshape(*header.shape, header.components, order="F"), 3, 0), header


def _read_header(path: Path) -> tuple[ImageHeader, np.dtype[Any]]:
    try:
        with open_stream(path) as stream:
            block = stream.read(_HEADER_BYTES)
        if len(block) < _HEADER_BYTES:
            raise EOFError(f"it ends after {len(block)} bytes")
        header = nib.MGHImage.header_class(block)
        dtype = np.dtype(header.get_data_dtype())
    except _HEADER_PROBLEMS as problem:
        raise broken(path, f"the MGH header cannot be read ({one_line(problem)})") from None
    sizes = [int(size) for size in header["dims"]]
    if min(sizes) < 1:
        raise DatasetError(f"{path}: the header gives shape {tuple(sizes)}, which holds no voxels")
    require_room(path, math.prod(sizes) * dtype.itemsize, offset=_VOXELS_AT, compressed=is_gzip_name(path))
    with located(path), np.errstate(all="ignore"):  # what is not finite is told by the grid itself
        geometry = Geometry((sizes[0], sizes[1], sizes[2]), np.asarray(header.get_affine(), np.float64))
    return ImageHeader(geometry, sizes[3], str(dtype)), dtype


def write_mgh(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write (I, J, K) or (C, I, J, K) on a grid.

    Args:
        path: Where; ".mgz" compresses.
        array: Integers that fit into 32 bits, or float32.
        geometry: The grid.

    Raises:
        DatasetError: MGH has no type for the array's.
    """
    stored = np.moveaxis(array, 0, 3) if array.ndim == 4 else array
    if stored.dtype.kind in "iu" and stored.dtype not in (np.dtype(np.uint8), np.dtype(np.int16)):
        # Numbers of 16 bits without a sign have a code, but many of FreeSurfer's programs do not know it.
        if not np.can_cast(stored.dtype, np.int32):
            raise DatasetError(f"{path}: MGH files cannot hold {stored.dtype}; write .nii.gz instead")
        stored = stored.astype(np.int32)
    image = nib.MGHImage(stored, geometry.affine)
    with path.open("wb") as raw:
        if not is_gzip_name(path):
            image.to_stream(raw)
            return
        # Without name and time, so that the same labels give the same bytes.
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=_COMPRESSION, mtime=0) as packed:
            image.to_stream(packed)
