"""2D pictures (PNG, TIFF, JPEG, BMP): column, row and one slice become (I, J, K). Of TIFF also stacks; see `tiff.py`.

Pictures carry no place in the world: their spacing is 1 and their affine the identity. The dots-per-inch tags of PNG
and TIFF are not taken for a spacing: they describe paper (72, 96, 300), and sets that mix files with and without them
would be resampled for nothing.
"""

# SimpleITK's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from autoseg.domain.endings import LOSSY_ENDINGS, TIFF_ENDINGS
from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError
from autoseg.io.content import broken, require_room
from autoseg.io.files import atomic_path
from autoseg.io.header import ImageHeader
from autoseg.io.simpleitk import simpleitk
from autoseg.io.tiff import picture_geometry, read_tiff, read_tiff_header, write_tiff

_PNG_HEADER_BYTES = 26
_PNG_DEPTH_AT, _PNG_COLOUR_AT = 24, 25
"""Where PNG keeps bit depth and colour type. Source: PNG specification, sections 5.2 and 11.2.1 (IHDR)."""

_PNG_COLOUR_OR_ALPHA = (2, 4, 6)
_SPREAD_BY_DEPTH = {2: 85, 4: 17}
"""Pillow spreads grey levels of 2 and 4 bits over 0 ... 255; label values need the stored numbers."""

_NO_COLOURS_OF_OURS = ("CMYK", "YCbCr", "LAB", "HSV")
"""Their last plane could be taken for an alpha, and their first ones for red, green and blue."""

_PICTURE_PROBLEMS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    tifffile.TiffFileError,
    OSError,
    EOFError,
    SyntaxError,  # Pillow raises it for damaged PNG chunks
    ValueError,
    KeyError,
    IndexError,
    RuntimeError,
    # tifffile looks at tags when they are used, so damaged ones come as whatever Python makes of them.
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
    zlib.error,
)


def read_picture_header(path: Path) -> ImageHeader:
    """Size and components of a picture or TIFF stack, without its pixels.

    Raises:
        DatasetError: It cannot be read, or has several frames.
    """
    try:
        return read_tiff_header(path) if path.suffix.lower() in TIFF_ENDINGS else _pillow_header(path)
    except _PICTURE_PROBLEMS as problem:
        raise _unreadable(path, problem) from None


def read_picture(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    """All pixels as (C, I, J, K), colours and alpha as stored; palettes give their indices. K is 1 but for TIFF stacks.

    Raises:
        DatasetError: It is broken, truncated, or has several frames.
    """
    try:
        pixels, header = read_tiff(path) if path.suffix.lower() in TIFF_ENDINGS else _read_by_pillow(path)
    except _PICTURE_PROBLEMS as problem:
        raise _unreadable(path, problem) from None
    expected = (header.components, *header.shape)
    if pixels.shape != expected or pixels.dtype.kind not in "biuf":
        raise broken(path, f"the pixels are {pixels.dtype} of shape {pixels.shape}, the header says {expected}")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)
    elif pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float32, copy=False)
    if not pixels.dtype.isnative:
        pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    return pixels, header


def _unreadable(path: Path, problem: BaseException) -> DatasetError:
    if isinstance(problem, Image.DecompressionBombError):
        return DatasetError(
            f"{path}: the picture has more pixels than are read safely from this format",
            hint="Cut it into tiles, or store it as TIFF.",
        )
    return broken(path, f"the picture cannot be read ({(str(problem).splitlines() or [type(problem).__name__])[0]})")


def _read_by_pillow(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    header = _pillow_header(path)
    pixels = _pillow_pixels(path)
    planes = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
    return planes.transpose(2, 1, 0)[..., np.newaxis], header


def _pillow_header(path: Path) -> ImageHeader:
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise DatasetError(f"{path}: the picture has {image.n_frames} frames; only one is supported")  # type: ignore[attr-defined]
        columns, rows = image.size
        bands = image.getbands()
        if image.mode in _NO_COLOURS_OF_OURS:
            raise DatasetError(
                f"{path}: the picture has the colours {', '.join(bands)}; grey, RGB and palettes are supported",
                hint="Convert it to RGB.",
            )
    require_room(path, columns * rows // 8, compressed=True)
    return ImageHeader(picture_geometry(columns, rows), len(bands), _pillow_dtype(path), is_colour=True)


def _png_depth_and_colour(path: Path) -> tuple[int, int]:
    """Bit depth and colour type of a PNG file, (8, 0) for other formats."""
    with path.open("rb") as stream:
        head = stream.read(_PNG_HEADER_BYTES)
    return (head[_PNG_DEPTH_AT], head[_PNG_COLOUR_AT]) if head[1:4] == b"PNG" else (8, 0)


def _pillow_dtype(path: Path) -> str:
    return "uint16" if _png_depth_and_colour(path)[0] == 16 else "uint8"


def _pillow_pixels(path: Path) -> NDArray[Any]:
    depth, colour = _png_depth_and_colour(path)
    if depth == 16 and colour in _PNG_COLOUR_OR_ALPHA:  # Pillow would cut them to 8 bits
        reader = simpleitk().ImageFileReader()
        reader.SetFileName(str(path))
        reader.SetImageIO("PNGImageIO")
        return np.asarray(simpleitk().GetArrayFromImage(reader.Execute()))
    with Image.open(path) as image:
        pixels = np.array(image)
    if depth in _SPREAD_BY_DEPTH and colour == 0:
        pixels //= _SPREAD_BY_DEPTH[depth]
    return pixels


def write_picture(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write (I, J, 1) or (C, I, J, 1) losslessly, or a stack as TIFF; atomic.

    Args:
        path: .png or .bmp (integers of 8 bits; PNG grey of 16 bits too), or .tif (any type, any number of slices).
        array: One slice but for TIFF; one channel, or three for colour.
        geometry: The grid; TIFF stacks keep its spacing.

    Raises:
        DatasetError: The format cannot hold the array without loss.
    """
    ending = path.suffix.lower()
    channels_first = array if array.ndim == 4 else array[np.newaxis]
    if ending in TIFF_ENDINGS:
        write_tiff(path, channels_first, geometry)
        return
    if channels_first.shape[3] != 1:
        raise DatasetError(f"{path}: a picture has one slice, got shape {array.shape}")
    pixels = np.ascontiguousarray(channels_first[..., 0].transpose(2, 1, 0))
    if pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if ending in LOSSY_ENDINGS:
        raise DatasetError(f"{path}: JPEG changes values; write .png instead")
    if pixels.dtype != np.uint8 and not (ending == ".png" and pixels.dtype == np.uint16 and pixels.ndim == 2):
        raise DatasetError(f"{path}: {ending} cannot hold {pixels.dtype} of shape {pixels.shape}; write .tif instead")
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary)
