"""NRRD and MetaImage files, by SimpleITK. Its reversed arrays and its LPS world stay inside this module."""

# SimpleITK's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError
from autoseg.io.content import broken, require_room
from autoseg.io.files import atomic_path, temporary_folder
from autoseg.io.header import ImageHeader, located
from autoseg.io.meta_header import read_meta_header
from autoseg.io.simpleitk import simpleitk

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])

_READERS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
_NRRD_ENDINGS = (".nrrd", ".nhdr")
_DETACHED = (".nhdr", ".mhd")
_HEADER_LIMIT_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 18
_ANY_DEFLATE_HEADER = 47
"""zlib's window bits that take both zlib and gzip headers. Source: zlib's manual, inflateInit2."""


def _line(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(rb"^" + pattern + rb"[ \t\r]*$", re.IGNORECASE | re.MULTILINE)


# The keys of a NRRD header that say where and how the voxels are stored.
# Source: "Definition of the NRRD file format", sections 4 and 5.
_NRRD_HEADER_END = re.compile(rb"\r?\n\r?\n")
_NRRD_DATA_FILE = _line(rb"data ?file:[ \t]*(.+?)")
_NRRD_ENCODING = _line(rb"encoding:[ \t]*(\S+)")
_NRRD_SKIP = _line(rb"(?:byte|line) ?skip:[ \t]*-?[1-9]\d*")


@dataclass(frozen=True, slots=True)
class _StoredVoxels:
    """Where the voxels lie: a file, the bytes before them, and "raw", "deflate" or "other"."""

    path: Path
    offset: int
    encoding: str


def read_itk_header(path: Path) -> ImageHeader:
    """Shape, grid and components of a NRRD or MetaImage file, without its voxels.

    Raises:
        DatasetError: The header cannot be read, or promises more voxels than the file holds.
        GeometryError: The grid is degenerate.
    """
    return _header(path, _open(path))[0]


def read_itk(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    """All voxels of a NRRD or MetaImage file as (C, I, J, K); float32 for floats, else the file's integer type.

    Raises:
        DatasetError: The file is broken or truncated.
        GeometryError: The grid is degenerate.
    """
    reader = _open(path)
    header, stored_bytes = _header(path, reader)
    checksum = _unpacked_checksum(path, stored_bytes)
    try:
        image = reader.Execute()
    except RuntimeError as problem:
        raise broken(path, f"the voxels cannot be read ({_reason(problem)})") from None
    array = simpleitk().GetArrayFromImage(image)
    if checksum is not None and image.GetNumberOfComponentsPerPixel() == 1 and not _has_checksum(array, checksum):
        raise broken(path, "the voxels cannot be unpacked: the header does not say rightly where or how they lie")
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
    if path.suffix.lower() not in _NRRD_ENDINGS:
        read_meta_header(path)  # before MetaIO sees it
    reader = simpleitk().ImageFileReader()
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


def _header(path: Path, reader: Any) -> tuple[ImageHeader, int]:
    size = tuple(int(item) for item in reader.GetSize())
    kind = simpleitk().GetPixelIDValueAsString(reader.GetPixelID())
    components = int(reader.GetNumberOfComponents())
    bits = re.search(r"(\d+)-bit", kind)
    if bits is None or "complex" in kind:
        raise DatasetError(f"{path}: voxels of type {kind} cannot be used; they must be integers or real numbers")
    if len(size) > 4 or (len(size) == 4 and components > 1):
        raise DatasetError(f"{path}: images with {len(size)} axes of {components} components are not supported")
    stored_bytes = math.prod(size) * components * int(bits[1]) // 8
    _require_room(path, stored_bytes)
    if len(size) == 4:
        components = size[3]
    shape = (*size, 1)[:3] if len(size) < 4 else size[:3]
    affine = _affine(reader, len(size))
    with located(path):
        geometry = Geometry((shape[0], shape[1], shape[2]), affine, is_2d=len(size) == 2)
    return ImageHeader(geometry, components, kind), stored_bytes


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


def _stored_voxels(path: Path) -> _StoredVoxels:
    """Find where the voxels lie and how they are stored, by the text of the header."""
    return _nrrd_voxels(path) if path.suffix.lower() in _NRRD_ENDINGS else _meta_voxels(path)


def _nrrd_voxels(path: Path) -> _StoredVoxels:
    with path.open("rb") as stream:
        head = stream.read(_HEADER_LIMIT_BYTES)
    named = _NRRD_DATA_FILE.search(head)
    encoding = _nrrd_encoding(head)
    if named is None:
        end = _NRRD_HEADER_END.search(head)
        return _StoredVoxels(path, end.end() if end is not None else 0, encoding)
    return _detached(path, named[1].decode("utf-8", "replace"), encoding)


def _meta_voxels(path: Path) -> _StoredVoxels:
    header = read_meta_header(path)
    encoding = "deflate" if header.is_compressed else "raw"
    if header.skips or not header.is_binary:
        encoding = "other"
    is_local = header.data_file.upper() == "LOCAL"
    stored = _StoredVoxels(path, header.offset, encoding) if is_local else _detached(path, header.data_file, encoding)
    if encoding == "deflate":
        room = stored.path.stat().st_size - stored.offset
        if header.compressed_bytes is None and is_local:
            # MetaIO would unpack the file from its first byte and hand out what lies in memory.
            raise broken(path, "the header does not say how many bytes are compressed (CompressedDataSize)")
        if header.compressed_bytes is not None and header.compressed_bytes > room:
            raise broken(path, f"the header says {header.compressed_bytes:,} compressed bytes, the file holds {room:,}")
    return stored


def _detached(path: Path, name: str, encoding: str) -> _StoredVoxels:
    if name.upper().startswith("LIST") or "%" in name or " " in name:
        return _StoredVoxels(path, 0, "other")  # several files; SimpleITK finds them
    data = path.parent / name
    if not data.is_file():
        raise DatasetError(f"{path}: the file with its voxels, {data.name}, is missing")
    return _StoredVoxels(data, 0, encoding)


def detached_voxels(path: Path) -> list[Path]:
    """The file that the header of a detached NRRD or MetaImage names, if it exists; none of several files."""
    if path.suffix.lower() not in _DETACHED or not path.is_file():
        return []
    try:
        stored = _stored_voxels(path)
    except DatasetError:
        return []
    return [stored.path] if stored.path != path else []


def _nrrd_encoding(head: bytes) -> str:
    found = _NRRD_ENCODING.search(head)
    name = found[1].lower() if found is not None else b""
    if _NRRD_SKIP.search(head) is not None:
        return "other"
    return {b"raw": "raw", b"gzip": "deflate", b"gz": "deflate"}.get(name, "other")


def _require_room(path: Path, promised_bytes: int) -> None:
    stored = _stored_voxels(path)
    if stored.encoding == "other":
        require_room(stored.path, promised_bytes, compressed=True)
    else:
        require_room(stored.path, promised_bytes, offset=stored.offset, compressed=stored.encoding == "deflate")


def _unpacked_checksum(path: Path, promised_bytes: int) -> int | None:
    """Unpack deflated voxels once for their number and both checksums: ITK hands out damaged ones without a word.

    Returns:
        The checksum of the voxels as stored; None where they are not deflated.

    Raises:
        DatasetError: They are damaged, or too few.
    """
    stored = _stored_voxels(path)
    if stored.encoding != "deflate":
        return None
    unpacker = zlib.decompressobj(_ANY_DEFLATE_HEADER)
    count = checksum = 0
    try:
        with stored.path.open("rb") as stream:
            stream.seek(stored.offset)
            while not unpacker.eof and (chunk := stream.read(_CHUNK_BYTES)):
                voxels = unpacker.decompress(chunk)
                checksum = zlib.crc32(voxels[: max(0, promised_bytes - count)], checksum)
                count += len(voxels)
    except zlib.error as problem:
        raise broken(path, f"the voxels cannot be unpacked, the file is damaged ({problem})") from None
    if not unpacker.eof or count < promised_bytes:
        raise broken(
            path, f"the file is damaged or truncated: the packed voxels end at {count:,} of {promised_bytes:,} bytes"
        )
    return checksum


def _has_checksum(array: NDArray[Any], expected: int) -> bool:
    """Whether voxels are those of a checksum, in either byte order."""
    native = swapped = 0
    for part in array:  # slice by slice: without a second copy of the volume
        native = zlib.crc32(part.tobytes(), native)
        swapped = zlib.crc32(part.byteswap().tobytes(), swapped)
    return expected in (native, swapped)


def write_itk(path: Path, array: NDArray[Any], geometry: Geometry, fields: Mapping[str, str] | None = None) -> None:
    """Write (I, J, K) or (C, I, J, K) compressed, on the grid of `geometry`; atomic.

    A detached header (.nhdr, .mhd) is written with its voxels beside it, and is renamed last.

    Args:
        path: Its ending chooses the format.
        array: Of a type that the format stores.
        geometry: The grid.
        fields: Further key-value pairs of the header.

    Raises:
        DatasetError: SimpleITK refuses the array or the place.
    """
    image = _to_itk(array, geometry)
    for key, value in (fields or {}).items():
        image.SetMetaData(key, value)
    if path.suffix.lower() not in _DETACHED:
        with atomic_path(path) as temporary:
            _write(image, temporary)
        return
    with temporary_folder(path) as folder:
        _write(image, folder / path.name)
        for item in sorted(folder.iterdir(), key=lambda item: item.name == path.name):
            item.replace(path.parent / item.name)


def _write(image: Any, path: Path) -> None:
    try:
        simpleitk().WriteImage(image, str(path), useCompression=True)
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
    image = simpleitk().GetImageFromArray(np.ascontiguousarray(reversed_axes), isVector=many)
    spacing = np.array(geometry.spacing_mm)
    directions = LPS_TO_RAS @ (geometry.affine[:3, :3] / spacing)
    image.SetSpacing(spacing[:used].tolist())
    image.SetDirection(directions[:used, :used].flatten().tolist())
    image.SetOrigin((LPS_TO_RAS @ geometry.affine[:3, 3])[:used].tolist())
    return image
