"""NRRD and MetaImage files, by SimpleITK. Its reversed arrays and its LPS world stay inside this module."""

# SimpleITK's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError, GeometryError
from autoseg.io.content import broken, require_room
from autoseg.io.files import atomic_path
from autoseg.io.header import ImageHeader

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])

_READERS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
_DETACHED = (".nhdr", ".mhd")
_HEADER_LIMIT_BYTES = 1 << 16
_UNCOMPRESSED = re.compile(rb"^(encoding:\s*raw|CompressedData\s*=\s*False)\s*$", re.IGNORECASE | re.MULTILINE)
_DATA_FILE = re.compile(rb"^(?:data ?file:\s*|ElementDataFile\s*=\s*)(.+?)\s*$", re.IGNORECASE | re.MULTILINE)

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # ITK would write them to stderr by itself; errors still come


def read_itk_header(path: Path) -> ImageHeader:
    """Shape, grid and components of a NRRD or MetaImage file, without its voxels.

    Raises:
        DatasetError: The header cannot be read, or promises more voxels than the file holds.
        GeometryError: The grid is degenerate.
    """
    return _header(path, _open(path))


def read_itk(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    """All voxels of a NRRD or MetaImage file as (C, I, J, K); float32 for floats, else the file's integer type.

    Raises:
        DatasetError: The file is broken or truncated.
        GeometryError: The grid is degenerate.
    """
    reader = _open(path)
    header = _header(path, reader)
    try:
        image = reader.Execute()
    except RuntimeError as problem:
        raise broken(path, f"the voxels cannot be read ({_reason(problem)})") from None
    array = sitk.GetArrayFromImage(image)
    # SimpleITK gives (time, K, J, I, components); the reverse of that order is ours but for the components.
    if image.GetNumberOfComponentsPerPixel() > 1:
        ours = array.transpose(*range(array.ndim - 2, -1, -1), array.ndim - 1)
        ours = np.moveaxis(ours, -1, 0)
    else:
        ours = array.transpose()
        ours = np.moveaxis(ours, 3, 0) if ours.ndim == 4 else ours[np.newaxis]
    ours = ours.reshape(header.components, *header.shape)
    return (ours if ours.dtype.kind in "iu" else ours.astype(np.float32, copy=False)), header


def _open(path: Path) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(_READERS[path.suffix.lower()])
    try:
        reader.ReadImageInformation()
    except RuntimeError as problem:
        raise broken(path, f"the header cannot be read ({_reason(problem)})") from None
    return reader


def _reason(problem: RuntimeError) -> str:
    """The last line of ITK's report, which says what happened; the ones before say where in its own code."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return re.sub(r"^.*?:\s", "", lines[-1]).rstrip(".") if lines else "no reason given"


def _header(path: Path, reader: Any) -> ImageHeader:
    size = tuple(int(item) for item in reader.GetSize())
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    components = int(reader.GetNumberOfComponents())
    bits = re.search(r"(\d+)-bit", kind)
    if bits is None or "complex" in kind:
        raise DatasetError(f"{path}: voxels of type {kind} cannot be used; they must be integers or real numbers")
    if len(size) > 4 or (len(size) == 4 and components > 1):
        raise DatasetError(f"{path}: images with {len(size)} axes of {components} components are not supported")
    _require_voxels(path, math.prod(size) * components * int(bits[1]) // 8)
    if len(size) == 4:
        components = size[3]
    shape = (*size, 1)[:3] if len(size) < 4 else size[:3]
    affine = _affine(reader, len(size))
    try:
        geometry = Geometry((shape[0], shape[1], shape[2]), affine, is_2d=len(size) == 2)
    except GeometryError as problem:
        raise GeometryError(f"{path}: {problem.message}", hint=problem.hint) from None
    return ImageHeader(geometry, components, kind)


def _affine(reader: Any, dimensions: int) -> NDArray[np.float64]:
    direction = np.array(reader.GetDirection(), np.float64).reshape(dimensions, dimensions)
    used = min(dimensions, 3)
    axes = np.eye(3)
    axes[:used, :used] = direction[:used, :used] * np.array(reader.GetSpacing(), np.float64)[:used]
    origin = np.zeros(3)
    origin[:used] = np.array(reader.GetOrigin(), np.float64)[:used]
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS @ axes
    affine[:3, 3] = LPS_TO_RAS @ origin
    return affine


def _require_voxels(path: Path, promised_bytes: int) -> None:
    """Hold the header's promise against the file with the voxels, which may lie beside the header."""
    with path.open("rb") as stream:
        head = stream.read(_HEADER_LIMIT_BYTES)
    named = _DATA_FILE.search(head)
    data = path
    if named is not None and named[1].upper() not in (b"LOCAL", b"LIST") and b"%" not in named[1]:
        data = path.parent / named[1].decode("utf-8", "replace")
        if not data.is_file():
            raise DatasetError(f"{path}: the file with its voxels, {data.name}, is missing")
    compressed = _UNCOMPRESSED.search(head) is None
    if data == path or data.is_file():
        require_room(data, promised_bytes, compressed=compressed)


def write_itk(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write (I, J, K) or (C, I, J, K) compressed, on the grid of `geometry`; atomic.

    A detached header (.nhdr, .mhd) is written with its voxels beside it, and is renamed last.

    Raises:
        DatasetError: SimpleITK refuses the array or the place.
    """
    image = _to_itk(array, geometry)
    if path.suffix.lower() not in _DETACHED:
        with atomic_path(path) as temporary:
            _write(image, temporary)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        _write(image, Path(folder) / path.name)
        for item in sorted(Path(folder).iterdir(), key=lambda item: item.name == path.name):
            item.replace(path.parent / item.name)


def _write(image: Any, path: Path) -> None:
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as problem:
        raise DatasetError(f"{path} cannot be written ({_reason(problem)})") from None


def _to_itk(array: NDArray[Any], geometry: Geometry) -> Any:
    many = array.ndim == 4 and array.shape[0] > 1
    spatial = array[0] if array.ndim == 4 and not many else array
    used = 2 if geometry.is_2d else 3
    if geometry.is_2d:
        spatial = spatial[..., 0]
    if many:
        spatial = np.moveaxis(spatial, 0, -1)
        reversed_axes = spatial.transpose(*range(used - 1, -1, -1), used)
    else:
        reversed_axes = spatial.transpose()
    image = sitk.GetImageFromArray(np.ascontiguousarray(reversed_axes), isVector=many)
    spacing = np.array(geometry.spacing_mm)
    directions = LPS_TO_RAS @ (geometry.affine[:3, :3] / spacing)
    image.SetSpacing(spacing[:used].tolist())
    image.SetDirection(directions[:used, :used].flatten().tolist())
    image.SetOrigin((LPS_TO_RAS @ geometry.affine[:3, 3])[:used].tolist())
    return image
