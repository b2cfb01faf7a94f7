"""NIfTI-1 and NIfTI-2 files, by nibabel for headers and by plain streams for voxels."""

# nibabel's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError, GeometryError
from autoseg.io.content import broken, require_room
from autoseg.io.header import ImageHeader

CHUNK_BYTES = 1 << 20
_STREAM_PROBLEMS = (OSError, EOFError, zlib.error)
_HEADER_PROBLEMS = (
    *_STREAM_PROBLEMS,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.spatialimages.HeaderTypeError,
    ValueError,
    OverflowError,
    KeyError,
)


def read_nifti_header(path: Path) -> ImageHeader:
    """Shape, grid and components of a NIfTI file, without its voxels.

    Raises:
        DatasetError: The header cannot be read, or promises more voxels than the file holds.
        GeometryError: The affine is not finite or degenerate.
    """
    return _header(path, _load(path))


def read_nifti(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    """All voxels of a NIfTI file as (C, I, J, K) with the scaling of its header applied.

    Returns:
        The voxels (float32 where they are scaled or stored as floats, else the file's integer type in native byte
        order) and the header.

    Raises:
        DatasetError: The file is broken, truncated, or of a type without an order (complex numbers).
        GeometryError: The affine is not finite or degenerate.
    """
    image = _load(path)
    header = _header(path, image)
    dtype = image.header.get_data_dtype()
    fields = len(dtype.fields) if dtype.fields else 1
    flat = _voxels(path, int(image.dataobj.offset), header.num_voxels * header.components // fields, dtype)
    if dtype.fields:
        stored = flat.view(np.uint8).reshape(fields, *header.geometry.shape, order="F")
    else:
        stored = np.moveaxis(flat.reshape(*header.geometry.shape, header.components, order="F"), 3, 0)
    return _scaled(stored, float(image.dataobj.slope), float(image.dataobj.inter)), header


def _load(path: Path) -> Any:
    try:
        image: Any = nib.load(path)
        image.header.get_data_dtype()
        image.header.get_data_shape()
    except _HEADER_PROBLEMS as problem:
        reason = _gzip_damage(path) or _one_line(problem)
        raise broken(path, f"the NIfTI header cannot be read ({reason})") from None
    if not isinstance(image, nib.nifti1.Nifti1Pair):
        raise broken(path, "it is not a NIfTI file")
    return image


def _gzip_damage(path: Path) -> str:
    """What is wrong with a .gz file as such, which nibabel reports as an unknown file type; "" when nothing is."""
    if not _is_gzip_name(path):
        return ""
    try:
        with gzip.open(path) as stream:
            stream.read(CHUNK_BYTES)
    except _STREAM_PROBLEMS as problem:
        return f"it is damaged or truncated: {_one_line(problem)}"
    return ""


def _is_gzip_name(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _one_line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(".")


def _header(path: Path, image: Any) -> ImageHeader:
    dtype = image.header.get_data_dtype()
    shape = tuple(int(size) for size in image.shape)
    grid, components = _grid_and_components(path, shape)
    if dtype.fields:
        if components != 1:
            raise DatasetError(f"{path}: a series of colour volumes is not supported, got shape {shape}")
        components = len(dtype.fields)
    elif dtype.kind not in "iuf":
        raise DatasetError(f"{path}: voxels of type {dtype} cannot be used; they must be integers or real numbers")
    promised = math.prod(shape) * dtype.itemsize
    compressed = _is_gzip_name(path)
    require_room(path, promised, offset=int(image.dataobj.offset), compressed=compressed)
    return ImageHeader(_geometry(path, image, grid, is_2d=len(shape) == 2), components, str(dtype))


def _grid_and_components(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    if not shape or any(size < 1 for size in shape):
        raise DatasetError(f"{path}: the header gives shape {shape}, which holds no voxels")
    rest = [size for size in shape[3:] if size > 1]
    if len(rest) > 1:
        raise DatasetError(f"{path}: images with {len(shape)} axes are not supported, got shape {shape}")
    padded = (*shape, 1, 1)
    return (padded[0], padded[1], padded[2]), rest[0] if rest else 1


def _geometry(path: Path, image: Any, shape: tuple[int, int, int], *, is_2d: bool) -> Geometry:
    header = image.header
    qform_code = int(header["qform_code"])
    qform = None
    if qform_code > 0:
        try:
            qform = np.asarray(header.get_qform(), np.float64)
        except (ValueError, nib.spatialimages.HeaderDataError):
            qform_code = 0  # a quaternion that is none says nothing
    affine = np.array(image.affine, np.float64)
    if shape[2] == 1:
        affine = _with_third_axis(affine)
    try:
        return Geometry(shape, affine, is_2d, int(header["sform_code"]), qform_code, qform)
    except GeometryError as problem:
        raise GeometryError(f"{path}: {problem.message}", hint=problem.hint) from None


def _with_third_axis(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give a single slice whose header has no third axis (length 0) one of 1 mm, at a right angle to the others."""
    if affine[:3, 2].any():
        return affine
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    length = float(np.linalg.norm(normal))
    if length > 0:
        affine[:3, 2] = normal / length
    return affine


def _voxels(path: Path, offset: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The stored numbers, flat, in native byte order; gzip is read to its end so that its checksum is tested."""
    size = count * dtype.itemsize
    opener = gzip.open if _is_gzip_name(path) else open
    try:
        with cast(IO[bytes], opener(path, "rb")) as stream:
            stream.seek(offset)
            data = _at_most(stream, size)
            while stream.read(CHUNK_BYTES):
                pass
    except _STREAM_PROBLEMS as problem:
        raise broken(
            path, f"the voxels cannot be read, the file is damaged or truncated ({_one_line(problem)})"
        ) from None
    if len(data) < size:
        raise broken(path, f"the file is truncated: it holds {len(data):,} of {size:,} bytes of voxels")
    flat: NDArray[Any] = np.frombuffer(data, dtype)
    return flat if dtype.isnative else flat.astype(dtype.newbyteorder("="))


def _at_most(stream: IO[bytes], size: int) -> bytearray:
    """Up to `size` bytes; memory grows with what the file really holds, not with what its header promises."""
    data = bytearray()
    while len(data) < size:
        chunk = stream.read(min(CHUNK_BYTES, size - len(data)))
        if not chunk:
            break
        data += chunk
    return data


def _scaled(stored: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    if slope == 1 and inter == 0:
        return stored if stored.dtype.kind in "iu" else stored.astype(np.float32, copy=False)
    out = np.empty_like(stored, dtype=np.float32)
    for last in range(stored.shape[-1]):  # slice by slice: float64 inside, without a float64 copy of the volume
        out[..., last] = stored[..., last].astype(np.float64) * slope + inter
    return out


def write_nifti(path: Path, array: NDArray[Any], geometry: Geometry, *, is_label: bool) -> None:
    """Write (I, J, K) or (C, I, J, K) without scaling, on the grid of `geometry`, its codes and second affine included.

    Args:
        path: Where; ".nii.gz" compresses.
        array: Of a type NIfTI stores.
        geometry: The grid; written as NIfTI-1, or NIfTI-2 where an axis is too long for NIfTI-1.
        is_label: Marks the file as a label map (NIfTI intent).
    """
    stored = np.moveaxis(array, 0, 3) if array.ndim == 4 else array
    if geometry.is_2d and stored.ndim == 3:
        stored = stored[:, :, 0]
    too_long = max(stored.shape) > np.iinfo(np.int16).max
    image = (nib.Nifti2Image if too_long else nib.Nifti1Image)(stored, None, dtype=stored.dtype)
    set_grid(image.header, geometry, stored.ndim)
    if is_label:
        image.header.set_intent("label")
    image.update_header()
    nib.save(image, path)


def set_grid(header: Any, geometry: Geometry, num_axes: int) -> None:
    """Put a grid into a NIfTI header, its codes and second affine included.

    Args:
        header: nibabel's; its shape must be set.
        geometry: The grid.
        num_axes: Axes of the stored array.
    """
    header.set_zooms((*geometry.spacing_mm, 1.0)[:num_axes])
    header.set_xyzt_units("mm")
    second = geometry.affine if geometry.qform is None else geometry.qform
    header.set_qform(second if geometry.qform_code > 0 else None, geometry.qform_code)
    header.set_sform(geometry.affine if geometry.sform_code > 0 else None, geometry.sform_code)
    if not np.allclose(header.get_best_affine(), geometry.affine, rtol=1e-5, atol=1e-4):
        header.set_sform(geometry.affine, 1)
