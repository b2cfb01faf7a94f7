"""MINC files, by nibabel: MINC 1 through SciPy's NetCDF, MINC 2 through h5py where that is installed. Read only."""

# nibabel's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import importlib.util
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.minc1 import Minc1File, MincError
from nibabel.minc2 import Minc2File
from numpy.typing import NDArray
from scipy.io import netcdf_file

from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError
from autoseg.io.content import broken, require_room
from autoseg.io.header import ImageHeader, located
from autoseg.io.streams import one_line

_HDF5_MARK = b"\x89HDF"
_PROBLEMS = (
    OSError,
    MincError,
    # Neither library looks at a header before it uses it, so damage comes as whatever Python makes of it.
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    RuntimeError,
    ArithmeticError,
    struct.error,
)


def read_minc_header(path: Path) -> ImageHeader:
    """Shape, grid and components of a MINC file.

    Raises:
        DatasetError: The header cannot be read, promises more voxels than the file holds, or is MINC 2 without h5py.
        GeometryError: The affine is not finite or degenerate.
    """
    with _opened(path) as file:
        return _header(path, file)


def read_minc(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    """All voxels as (C, I, J, K), float32, scaled slice by slice as the file says; axes in the file's order.

    Raises:
        DatasetError: The file is broken or truncated, or MINC 2 without h5py.
        GeometryError: The affine is not finite or degenerate.
    """
    with _opened(path) as file:
        header = _header(path, file)
        with np.errstate(all="ignore"):
            array = np.asarray(file.get_scaled_data()).astype(np.float32)
        if array.size != header.num_voxels * header.components:
            raise broken(path, f"it holds {array.size:,} voxels, its header says shape {header.shape}")
        return array.reshape(header.components, *header.shape), header


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with path.open("rb") as stream:
        is_hdf5 = stream.read(len(_HDF5_MARK)) == _HDF5_MARK
    if is_hdf5 and importlib.util.find_spec("h5py") is None:
        raise DatasetError(
            f"{path}: MINC 2 files are read through the Python package h5py, which is not installed",
            hint="Install h5py (pip install 'autoseg-unet[minc]'), or convert the file, for example with mnc2nii.",
        )
    try:
        with _open_hdf5(path) if is_hdf5 else _open_netcdf(path) as file:
            yield file
    except _PROBLEMS as problem:
        raise broken(path, f"the MINC file cannot be read ({one_line(problem)})") from None


class _Content(BytesIO):
    """A file in memory that refuses negative lengths, which `BytesIO` takes for "all"."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes."""
        if size is not None and size < -1:
            raise ValueError(f"a length of {size} in the header")
        return super().read(size)


@contextmanager
def _open_netcdf(path: Path) -> Iterator[Any]:
    # From memory: of a file, Python would set aside as many bytes as a damaged header asks for.
    with netcdf_file(_Content(path.read_bytes()), mmap=False) as file:
        yield Minc1File(file)


@contextmanager
def _open_hdf5(path: Path) -> Iterator[Any]:
    import h5py  # type: ignore[import-not-found, unused-ignore]

    with h5py.File(path, "r") as file:
        yield Minc2File(file)


def _header(path: Path, file: Any) -> ImageHeader:
    names = [str(name) for name in file._dim_names]
    sizes = tuple(int(size) for size in file.get_data_shape())
    dtype = np.dtype(file.get_data_dtype())
    if len(names) != len(sizes) or not sizes or min(sizes) < 1:
        raise broken(path, f"the header gives shape {sizes} for the axes {', '.join(names) or 'none'}")
    spatial = [name for name in names if name.endswith("space")]
    if sorted(spatial) != ["xspace", "yspace", "zspace"] or names[-3:] != spatial or len(names) > 4:
        raise DatasetError(f"{path}: MINC files with the axes {', '.join(names)} are not supported")
    if dtype.kind not in "iuf":
        raise DatasetError(f"{path}: voxels of type {dtype} cannot be used; they must be integers or real numbers")
    require_room(path, math.prod(sizes) * dtype.itemsize, compressed=True)
    with located(path), np.errstate(all="ignore"):
        geometry = Geometry((sizes[-3], sizes[-2], sizes[-1]), np.asarray(file.get_affine(), np.float64))
    return ImageHeader(geometry, math.prod(sizes[:-3]), str(dtype))
