"""NIfTI-1 and NIfTI-2 files and pairs, by nibabel for headers and by plain streams for voxels."""

# nibabel's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from autoseg.domain.endings import PAIR_ENDING
from autoseg.domain.geometry import Geometry
from autoseg.domain.label_table import Label
from autoseg.errors import DatasetError, GeometryError
from autoseg.io.content import broken, pair_voxels, require_room
from autoseg.io.header import ImageHeader, located
from autoseg.io.label_names import label_extensions
from autoseg.io.streams import STREAM_PROBLEMS, gzip_damage, is_gzip_name, one_line, open_stream, read_voxels

_NIFTI2_BYTES = 540
"""The longer of the two headers; of a NIfTI-1 file the first 348 bytes are used."""

_HEADER_PROBLEMS = (
    *STREAM_PROBLEMS,
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
    loaded = _load(path)
    header = _header(path, loaded)
    dtype = loaded.header.get_data_dtype()
    fields = len(dtype.fields) if dtype.fields else 1
    count = header.num_voxels * header.components // fields
    flat = read_voxels(loaded.voxel_file, loaded.offset, count, dtype)
    if dtype.fields:
        stored = flat.view(np.uint8).reshape(fields, *header.geometry.shape, order="F")
    else:
        stored = np.moveaxis(flat.reshape(*header.geometry.shape, header.components, order="F"), 3, 0)
    return _scaled(stored, loaded.slope, loaded.inter), header


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A header, and what it says of the voxels.

    Attributes:
        header: nibabel's.
        shape: As stored, any number of axes.
        voxel_file: The second file of a pair, else the file itself.
        offset: Bytes before the voxels.
        slope: Of the scaling; 1 where there is none.
        inter: Of the scaling; 0 where there is none.
    """

    header: Any
    shape: tuple[int, ...]
    voxel_file: Path
    offset: int
    slope: float
    inter: float


def _load(path: Path) -> _Loaded:
    """The header without its extensions: nothing of them is needed, and their lengths may say anything."""
    is_pair = path.suffix.lower() == PAIR_ENDING
    try:
        with open_stream(path) as stream:
            block = stream.read(_NIFTI2_BYTES)
        kind = _header_class(path, block, is_pair=is_pair)
        header = kind(block[: kind.template_dtype.itemsize])
        header.get_data_dtype()
        shape = tuple(int(size) for size in header.get_data_shape())
        offset = int(header.get_data_offset())
        slope, inter = header.get_slope_inter()
    except _HEADER_PROBLEMS as problem:
        reason = gzip_damage(path) or one_line(problem)
        raise broken(path, f"the NIfTI header cannot be read ({reason})") from None
    if offset < (0 if is_pair else int(header["sizeof_hdr"])):
        raise broken(path, f"the header says that the voxels begin at byte {offset}, inside itself")
    voxel_file = pair_voxels(path) if is_pair else path
    scale = (1.0, 0.0) if slope is None else (float(slope), float(inter))
    return _Loaded(header, shape, voxel_file, offset, *scale)


def _header_class(path: Path, block: bytes, *, is_pair: bool) -> Any:
    """The class of a header, told by its mark.

    Raises:
        DatasetError: It has none.
    """
    if nib.Nifti1Header.may_contain_header(block):
        return nib.nifti1.Nifti1PairHeader if is_pair else nib.Nifti1Header
    if nib.Nifti2Header.may_contain_header(block):
        return nib.nifti2.Nifti2PairHeader if is_pair else nib.Nifti2Header
    if nib.AnalyzeHeader.may_contain_header(block):
        raise broken(path, "it is not a NIfTI file but an Analyze file, which does not say where left and right are")
    reason = gzip_damage(path)
    raise broken(path, f"it is not a NIfTI file{reason and f' ({reason})'}")


def _header(path: Path, loaded: _Loaded) -> ImageHeader:
    dtype = loaded.header.get_data_dtype()
    shape = loaded.shape
    grid, components = _grid_and_components(path, shape)
    if dtype.fields:
        if components != 1:
            raise DatasetError(f"{path}: a series of colour volumes is not supported, got shape {shape}")
        components = len(dtype.fields)
    elif dtype.kind not in "iuf":
        raise DatasetError(f"{path}: voxels of type {dtype} cannot be used; they must be integers or real numbers")
    promised = math.prod(shape) * dtype.itemsize
    require_room(loaded.voxel_file, promised, offset=loaded.offset, compressed=is_gzip_name(loaded.voxel_file))
    return ImageHeader(_geometry(path, loaded.header, grid, is_2d=len(shape) == 2), components, str(dtype))


def _grid_and_components(path: Path, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], int]:
    if not shape or any(size < 1 for size in shape):
        raise DatasetError(f"{path}: the header gives shape {shape}, which holds no voxels")
    rest = [size for size in shape[3:] if size > 1]
    if len(rest) > 1:
        raise DatasetError(f"{path}: images with {len(shape)} axes are not supported, got shape {shape}")
    padded = (*shape, 1, 1)
    return (padded[0], padded[1], padded[2]), rest[0] if rest else 1


def _geometry(path: Path, header: Any, shape: tuple[int, int, int], *, is_2d: bool) -> Geometry:
    qform_code = int(header["qform_code"])
    qform = None
    if qform_code > 0:
        try:
            qform = np.asarray(header.get_qform(), np.float64)
        except (ValueError, nib.spatialimages.HeaderDataError):
            qform_code = 0  # a quaternion that is none says nothing
    affine = _best_affine(path, header)
    if shape[2] == 1:
        affine = _with_third_axis(affine)
    with located(path):
        return Geometry(shape, affine, is_2d, int(header["sform_code"]), qform_code, qform)


def _best_affine(path: Path, header: Any) -> NDArray[np.float64]:
    try:
        return np.array(header.get_best_affine(), np.float64)
    except (ValueError, nib.spatialimages.HeaderDataError) as problem:
        raise GeometryError(f"{path}: the header gives no affine ({one_line(problem)})") from None


def _with_third_axis(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give a single slice whose header has no third axis (length 0) one of 1 mm, at a right angle to the others."""
    if affine[:3, 2].any():
        return affine
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    length = float(np.linalg.norm(normal))
    if length > 0:
        affine[:3, 2] = normal / length
    return affine


def _scaled(stored: NDArray[Any], slope: float, inter: float) -> NDArray[Any]:
    if slope == 1 and inter == 0:
        return stored if stored.dtype.kind in "iu" else stored.astype(np.float32, copy=False)
    out = np.empty_like(stored, dtype=np.float32)
    for last in range(stored.shape[-1]):  # slice by slice: float64 inside, without a float64 copy of the volume
        out[..., last] = stored[..., last].astype(np.float64) * slope + inter
    return out


def write_nifti(
    path: Path, array: NDArray[Any], geometry: Geometry, *, is_label: bool, labels: Sequence[Label] = ()
) -> None:
    """Write (I, J, K) or (C, I, J, K) without scaling, on the grid of `geometry`, its codes and second affine included.

    Args:
        path: Where; ".nii.gz" compresses.
        array: Of a type NIfTI stores.
        geometry: The grid; written as NIfTI-1, or NIfTI-2 where an axis is too long for NIfTI-1.
        is_label: Marks the file as a label map (NIfTI intent).
        labels: Names and colours for header extensions, see `label_extensions`.
    """
    stored = np.moveaxis(array, 0, 3) if array.ndim == 4 else array
    if geometry.is_2d and stored.ndim == 3:
        stored = stored[:, :, 0]
    too_long = max(stored.shape) > np.iinfo(np.int16).max
    image = (nib.Nifti2Image if too_long else nib.Nifti1Image)(stored, None, dtype=stored.dtype)
    set_grid(image.header, geometry, stored.ndim)
    if is_label:
        image.header.set_intent("label")
    image.header.extensions.extend(label_extensions(labels))
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
