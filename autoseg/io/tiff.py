"""TIFF files by tifffile, and by Pillow where their compression needs it: pictures, and stacks whose pages are slices.

A TIFF file has no place in the world: (I, J, K) are column, row and page, at the origin.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError
from autoseg.io.content import broken, require_room
from autoseg.io.files import atomic_path
from autoseg.io.header import ImageHeader
from autoseg.io.tiff_spacing import refuse_entities, stated_spacing, stating_sidecars

_STACK_AXES = "ZIQ"
"""tifffile's letters for depth, and for pages that nothing is said about."""

_CHANNEL_AXES = "CS"
"""Channels in pages, and samples of a pixel."""

_PILLOW_DECODES = (
    tifffile.COMPRESSION.CCITTRLE,
    tifffile.COMPRESSION.CCITT_T4,
    tifffile.COMPRESSION.CCITT_T6,
    tifffile.COMPRESSION.LZW,
    tifffile.COMPRESSION.JPEG,
)
"""What tifffile reads only with the package imagecodecs, and Pillow by libtiff."""

_IMAGEJ_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
_IMAGEJ_LIMIT_BYTES = 2**32 - 2**25
"""ImageJ's files are plain TIFF, whose offsets have 32 bits. Source: tifffile's documentation of `imagej`."""

_MICROSCOPIC_MM = 0.1
"""Below this voxel edge sizes are written in micrometres: six decimals of a millimetre would be too few."""


def picture_geometry(columns: int, rows: int) -> Geometry:
    """The grid of a picture: (I, J, K) = (columns, rows, 1), spacing 1, at the origin."""
    return Geometry((columns, rows, 1), np.eye(4), is_2d=True)


def read_tiff_header(path: Path) -> ImageHeader:
    """Shape, grid and components of a TIFF file, without its pixels.

    Raises:
        DatasetError: It holds a time series, several pictures, or promises more than it can hold. Damaged files raise
            whatever tifffile makes of them.
    """
    with tifffile.TiffFile(path, _multifile=False) as file:
        return _header(path, file, _series(path, file))


def read_tiff(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    """All pixels as (C, I, J, K) as stored; see `read_tiff_header`."""
    with tifffile.TiffFile(path, _multifile=False) as file:
        series = _series(path, file)
        header = _header(path, file, series)
        pixels = _by_pillow(path, series) if series.keyframe.compression in _PILLOW_DECODES else series.asarray()
    axes = series.axes
    pixels = np.asarray(pixels).reshape(series.shape)
    order = [
        *(axis for axis in axes if axis in _CHANNEL_AXES),
        "X",
        "Y",
        *(axis for axis in axes if axis in _STACK_AXES),
    ]
    pixels = pixels.transpose([axes.index(axis) for axis in order])
    return pixels.reshape(header.components, *header.shape), header


def _series(path: Path, file: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    if file.is_ome:
        refuse_entities(path, str(file.ome_metadata))
    all_series = list(file.series)
    if len(all_series) != 1:
        listed = ", ".join("×".join(map(str, item.shape)) for item in all_series[:4])
        raise DatasetError(
            f"{path}: the TIFF file holds {len(all_series)} pictures of different kinds ({listed}); one picture or one "
            "stack is supported",
            hint="Save the stack alone, without previews and labels.",
        )
    series: tifffile.TiffPageSeries = all_series[0]
    if any(page is None for page in series.pages):
        raise DatasetError(f"{path}: some pages lie in other files, which are not read", hint="Save it as one file.")
    _check_axes(path, dict(zip(series.axes, series.shape, strict=True)))
    return series


def _check_axes(path: Path, sizes: dict[str, int]) -> None:
    what = f"axes {', '.join(f'{axis} of {size}' for axis, size in sizes.items())}"
    if sizes.get("T", 1) > 1:
        raise DatasetError(
            f"{path}: the TIFF file is a time series ({what}); stacks of slices are supported",
            hint="If its frames are slices, say so in ImageJ (Image > Properties: slices) and save it again.",
        )
    known = {axis for axis in sizes if axis in "XY" + _STACK_AXES + _CHANNEL_AXES}
    twice = any(len([axis for axis in axes if axis in sizes]) > 1 for axes in (_STACK_AXES, _CHANNEL_AXES))
    if known != set(sizes) or twice or not {"X", "Y"} <= known:
        raise DatasetError(
            f"{path}: a TIFF file with {what} is not supported; pages may be slices (Z), channels (C), or both",
            hint="Store the stack as .nii.gz or .nrrd.",
        )


def _header(path: Path, file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> ImageHeader:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    stack = next((sizes[axis] for axis in _STACK_AXES if axis in sizes), 1)
    components = math.prod(sizes.get(axis, 1) for axis in _CHANNEL_AXES)
    columns, rows = sizes["X"], sizes["Y"]
    if min(columns, rows, stack, components) < 1:
        raise broken(path, f"the header says {columns} columns, {rows} rows, {stack} slices, {components} components")
    _require_room(path, file, series)
    is_colour = "C" not in sizes
    if stack == 1:
        return ImageHeader(picture_geometry(columns, rows), components, str(series.dtype), is_colour)
    spacing = stated_spacing(path, file)
    affine = np.diag([*(spacing or (1.0, 1.0, 1.0)), 1.0])
    geometry = Geometry(
        (columns, rows, stack),
        affine,
        stated="nothing" if spacing is None else "spacing",
        is_stated_beside=bool(stating_sidecars(path)),
    )
    return ImageHeader(geometry, components, str(series.dtype), is_colour)


def _require_room(path: Path, file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    page = series.keyframe
    is_packed = page.compression != tifffile.COMPRESSION.NONE
    bits = math.prod(series.shape) * int(page.bitspersample)
    stored = sum(sum(item.databytecounts) for item in file.pages)
    require_room(path, stored, compressed=False)
    require_room(path, bits // 8, compressed=is_packed)


def _by_pillow(path: Path, series: tifffile.TiffPageSeries) -> NDArray[Any]:
    page = series.keyframe
    name = tifffile.COMPRESSION(page.compression).name
    is_inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    if page.is_tiled and page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        raise DatasetError(f"{path}: planes of {name} tiles are not read", hint="Save it without compression.")
    slices = []
    with Image.open(path) as image:
        for item in series.pages:
            image.seek(0 if item is None else int(item.index))  # `_series` lets no missing page pass
            pixels = np.array(image)
            if pixels.shape != page.shape or pixels.dtype != page.dtype:
                raise DatasetError(
                    f"{path}: {name} compression is not read for pixels of {page.dtype} and shape {page.shape}",
                    hint="Save it without compression, or compressed by deflate (zip).",
                )
            slices.append(_as_stored(pixels) if is_inverted else pixels)
    return np.stack(slices)


def _as_stored(pixels: NDArray[Any]) -> NDArray[Any]:
    """Pillow turns pictures whose zero is white; label values need the stored numbers."""
    if pixels.dtype == np.bool_:
        return ~pixels
    return np.iinfo(np.uint8).max - pixels if pixels.dtype == np.uint8 else pixels


def write_tiff(path: Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write a picture, or a stack with its spacing: as ImageJ does, or as OME-TIFF where ImageJ lacks the type; atomic.

    Args:
        path: Where.
        array: (C, I, J, K).
        geometry: The grid; of a stack only the spacing is kept.
    """
    pages = np.ascontiguousarray(array.transpose(3, 0, 2, 1))  # Z, C, Y, X
    with atomic_path(path) as temporary:
        if len(pages) == 1:
            _write_picture(temporary, pages[0])
        elif array.dtype in _IMAGEJ_TYPES and array.nbytes < _IMAGEJ_LIMIT_BYTES:
            _write_imagej(temporary, pages, geometry)
        else:
            _write_ome(temporary, pages, geometry)


def _write_picture(path: Path, planes: NDArray[Any]) -> None:
    if len(planes) == 1:
        tifffile.imwrite(path, planes[0], compression="zlib", photometric="minisblack")
    else:
        pixels = np.ascontiguousarray(np.moveaxis(planes, 0, -1))
        tifffile.imwrite(path, pixels, compression="zlib", photometric="rgb")


def _write_imagej(path: Path, pages: NDArray[Any], geometry: Geometry) -> None:
    columns, rows, depth = geometry.spacing_mm
    if geometry.stated == "nothing":
        tifffile.imwrite(path, pages, imagej=True, compression="zlib", metadata={"axes": "ZCYX"})
        return
    unit, factor = ("micron", 1e3) if min(geometry.spacing_mm) < _MICROSCOPIC_MM else ("mm", 1.0)
    tifffile.imwrite(
        path,
        pages,
        imagej=True,
        compression="zlib",
        resolution=(1 / (columns * factor), 1 / (rows * factor)),
        metadata={"axes": "ZCYX", "spacing": depth * factor, "unit": unit},
    )


def _write_ome(path: Path, pages: NDArray[Any], geometry: Geometry) -> None:
    metadata: dict[str, Any] = {"axes": "ZCYX"}
    if geometry.stated != "nothing":
        for axis, size in zip("XYZ", geometry.spacing_mm, strict=True):
            metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": "mm"}
    tifffile.imwrite(path, pages, ome=True, compression="zlib", metadata=metadata)
