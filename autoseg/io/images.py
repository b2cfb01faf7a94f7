"""Reading and writing images and label maps: every format becomes `(C, I, J, K)` with an RAS+ affine.

The voxel order is the file's own. NIfTI, MGH and MINC go through nibabel, NRRD and MetaImage through SimpleITK,
pictures and TIFF stacks through Pillow and tifffile, DICOM series (a folder, or a file of the series) through pydicom;
other libraries' conventions end here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import Case
from autoseg.domain.endings import (
    FREESURFER_ENDINGS,
    IMAGE_ENDINGS,
    ITK_ENDINGS,
    MINC_ENDING,
    NIFTI_ENDINGS,
    PAIR_ENDING,
    PICTURE_ENDINGS,
    WRITTEN_ENDINGS,
    split_ending,
    written_ending,
)
from autoseg.domain.geometry import Geometry, Volume, grid_mismatch
from autoseg.domain.label_table import Label
from autoseg.errors import DatasetError, GeometryError
from autoseg.io.content import require_supported
from autoseg.io.dicom import is_dicom, read_dicom, read_dicom_header
from autoseg.io.files import atomic_path
from autoseg.io.freesurfer import read_mgh, read_mgh_header, write_mgh
from autoseg.io.header import ImageHeader
from autoseg.io.itk import read_itk, read_itk_header, write_itk
from autoseg.io.minc import read_minc, read_minc_header
from autoseg.io.nifti import read_nifti, read_nifti_header, write_nifti
from autoseg.io.pictures import read_picture, read_picture_header, write_picture

__all__ = [
    "IMAGE_ENDINGS",
    "LABEL_ROUNDING_TOLERANCE",
    "ImageHeader",
    "read_case",
    "read_header",
    "read_image",
    "read_labels",
    "split_ending",
    "whole_numbers",
    "write_image",
    "write_labels",
]

LABEL_ROUNDING_TOLERANCE = 1e-3
"""Float labels this close to integers are integers in disguise.

Scaled storage and float32 arithmetic leave errors of 1e-7 times the value; a probability map has values far beyond.
"""

_READERS = {
    **dict.fromkeys((*NIFTI_ENDINGS, PAIR_ENDING), (read_nifti_header, read_nifti)),
    **dict.fromkeys(ITK_ENDINGS, (read_itk_header, read_itk)),
    **dict.fromkeys(FREESURFER_ENDINGS, (read_mgh_header, read_mgh)),
    **dict.fromkeys(PICTURE_ENDINGS, (read_picture_header, read_picture)),
    MINC_ENDING: (read_minc_header, read_minc),
}
"""How the header alone and how all of a file is read, by its ending."""

_COLOUR_CHANNELS = 3
_GRID_HINT = "Export image and labels from one grid, or resample one onto the other, then check again."


def read_header(path: str | Path) -> ImageHeader:
    """Shape, grid and components of an image, without its voxels.

    Raises:
        DatasetError: The file is missing, broken, or of a format that is not supported.
        GeometryError: Its affine is not finite or degenerate.
    """
    path = Path(path)
    if is_dicom(path):
        return read_dicom_header(path)
    return _READERS[require_supported(path)][0](path)


def read_image(path: str | Path, channels: int | None = None) -> Volume:
    """Read one image file, or a DICOM series.

    Args:
        path: The file; of a DICOM series its folder, or any file of it.
        channels: How many channels the data set says this file holds; None is 1. A 4D file, a file of several
            components or a colour picture is read as channels only when their number is this one.

    Returns:
        The volume (C, I, J, K) in the file's voxel order, the header's scaling applied: float32 where it is scaled or
        stored as floats, else the file's integer type in native byte order. NaN and infinities are kept.

    Raises:
        DatasetError: The file is missing, broken, not supported, or has another number of channels.
        GeometryError: Its affine is not finite or degenerate.
    """
    path = Path(path)
    array, header = _read(path)
    array = _select_channels(path, array, header, channels or 1)
    return Volume(array, header.geometry)


def read_case(case: Case, num_channels: int) -> Volume:
    """Read the image of a case: its channel files stacked, or its one file that holds every channel.

    Args:
        case: The case.
        num_channels: Channels of the data set.

    Returns:
        The volume (C, I, J, K) on the grid of the first file, without the channels that the case lacks. Channels of
        different types become float32.

    Raises:
        DatasetError: A file cannot be read, or the number of channels is another one.
        GeometryError: Channels lie on different grids (further apart than `GRID_TOLERANCE_FRACTION` of a voxel).
    """
    first = read_image(case.images[0], case.channels_in_a_file(num_channels))
    if len(first.array) + len(case.missing) == num_channels and len(case.images) == 1:
        return Volume(first.array, first.geometry, case.missing)
    if len(case.images) + len(case.missing) != num_channels:
        lacking = f" and {len(case.missing)} missing channels" if case.missing else ""
        raise DatasetError(f"case {case.id}: got {len(case.images)} image files{lacking}, expected {num_channels}")
    volumes = [first]
    for file in case.images[1:]:
        volume = read_image(file)
        mismatch = grid_mismatch(volume.geometry, first.geometry)
        if mismatch:
            raise GeometryError(
                f"case {case.id}: channel {Path(file).name} does not match {Path(case.images[0]).name}: {mismatch}",
                hint="All channels of a case must lie on one grid; resample them onto it first.",
            )
        volumes.append(volume)
    types = {volume.array.dtype for volume in volumes}
    dtype = types.pop() if len(types) == 1 else np.dtype(np.float32)
    stacked = np.empty((len(volumes), *first.geometry.shape[::-1]), dtype).transpose(0, 3, 2, 1)
    for index, volume in enumerate(volumes):
        stacked[index] = volume.array[0]
    return Volume(stacked, first.geometry, case.missing)


def read_labels(path: str | Path, reference: Geometry | None = None) -> tuple[NDArray[np.integer[Any]], Geometry]:
    """Read a label map.

    Args:
        path: The file.
        reference: Grid of the image; the label map must lie on it.

    Returns:
        Label values as stored, (I, J, K) integer (floats that are integers in disguise become int32), and the file's
        own geometry.

    Raises:
        DatasetError: The file cannot be read, has several channels, or holds values that are not integers.
        GeometryError: It does not lie on the grid of the image.
    """
    path = Path(path)
    array, header = _read(path)
    if reference is not None:
        mismatch = grid_mismatch(header.geometry, reference)
        if mismatch:
            raise GeometryError(f"{path}: the label map does not lie on its image's grid: {mismatch}", hint=_GRID_HINT)
    labels = _select_channels(path, array, header, 1)[0]
    return whole_numbers(path, labels), header.geometry


def write_labels(
    path: str | Path, labels: NDArray[np.integer[Any]], geometry: Geometry, names: Sequence[Label] = ()
) -> None:
    """Write a label map on a grid, so that it lies exactly on the image the grid was read from; atomic.

    Args:
        path: Its ending chooses the format; pictures need a `geometry` of one slice.
        labels: (I, J, K), uint8 or uint16.
        geometry: The image's grid; NIfTI keeps both affines and their codes.
        names: What the values are called, for the header of NIfTI files; see `read_label_names`.

    Raises:
        DatasetError: The type or shape does not fit, or the format is not written.
    """
    if labels.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise DatasetError(f"{path}: label maps are written as uint8 or uint16, got {labels.dtype}")
    _write(Path(path), labels, geometry, is_label=True, names=names)


def write_image(path: str | Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Write an image on a grid; atomic. Floats become float32, integers keep their type.

    Args:
        path: Its ending chooses the format.
        array: (I, J, K) or (C, I, J, K).
        geometry: The grid.

    Raises:
        DatasetError: The shape does not fit, or the format cannot hold the type.
    """
    stored = array if array.dtype.kind in "iu" else array.astype(np.float32, copy=False)
    _write(Path(path), stored, geometry, is_label=False)


def _write(path: Path, array: NDArray[Any], geometry: Geometry, *, is_label: bool, names: Sequence[Label] = ()) -> None:
    if array.ndim not in (3, 4) or tuple(array.shape[-3:]) != geometry.shape:
        raise DatasetError(f"{path}: an array of shape {array.shape} does not fit a grid of {geometry.shape}")
    ending = split_ending(path)[1].lower()
    if ending in NIFTI_ENDINGS:
        with atomic_path(path) as temporary:
            write_nifti(temporary, array, geometry, is_label=is_label, labels=names)
    elif ending in ITK_ENDINGS:
        write_itk(path, array, geometry)
    elif ending in FREESURFER_ENDINGS:
        with atomic_path(path) as temporary:
            write_mgh(temporary, array, geometry)
    elif ending in PICTURE_ENDINGS:
        write_picture(path, array, geometry)
    else:
        instead = f"write {written_ending(ending)} instead; " if ending in IMAGE_ENDINGS else ""
        raise DatasetError(
            f"{path}: cannot write this format",
            hint=f"{instead}endings that can be written: {', '.join(WRITTEN_ENDINGS)}.".capitalize(),
        )


def _read(path: Path) -> tuple[NDArray[Any], ImageHeader]:
    if is_dicom(path):
        return read_dicom(path)
    return _READERS[require_supported(path)][1](path)


def _select_channels(path: Path, array: NDArray[Any], header: ImageHeader, expected: int) -> NDArray[Any]:
    """The expected channels of (C, I, J, K): an alpha that says nothing is dropped, grey-in-RGB is grey."""
    if array.shape[0] == expected:
        return array
    if header.is_colour:
        opaque = _without_alpha(array)
        if opaque.shape[0] == expected:
            return opaque
        if expected == 1 and _is_grey(opaque):
            return opaque[:1]
    what = _components_in_words(array, header)
    raise DatasetError(
        f"{path}: expected {expected} channel{'s' if expected > 1 else ''} in this file, got {what}",
        hint="Give one file a channel, or name as many channels in the data set's description as the file holds.",
    )


def _without_alpha(array: NDArray[Any]) -> NDArray[Any]:
    """Grey + alpha or RGB + alpha without the alpha, if that is constant; otherwise unchanged."""
    has_alpha = array.shape[0] in (2, _COLOUR_CHANNELS + 1)
    return array[:-1] if has_alpha and bool((array[-1] == array[-1].flat[0]).all()) else array


def _is_grey(array: NDArray[Any]) -> bool:
    return array.shape[0] == _COLOUR_CHANNELS and all(
        np.array_equal(array[0], array[other]) for other in range(1, _COLOUR_CHANNELS)
    )


def _components_in_words(array: NDArray[Any], header: ImageHeader) -> str:
    count = array.shape[0]
    if header.is_colour:
        names = {
            1: "grey",
            2: "grey and a varying alpha",
            3: "colour (red, green, blue)",
            4: "colour and a varying alpha",
        }
        return names.get(count, f"{count} components")
    return f"{count} (a 4D file, or {count} numbers a voxel; shape {'×'.join(map(str, array.shape[1:]))} and {count})"


def whole_numbers(path: str | Path, labels: NDArray[Any]) -> NDArray[np.integer[Any]]:
    """Label values as integers: as they are, or floats that are integers in disguise as int32.

    Args:
        path: For messages.
        labels: Any shape, integer or float.

    Raises:
        DatasetError: Values are not finite, not whole (further than `LABEL_ROUNDING_TOLERANCE`), or too large.
    """
    if labels.dtype.kind in "iu":
        return labels
    limit = np.iinfo(np.int32).max
    if not np.isfinite(labels).all():
        raise DatasetError(
            f"{path}: the label map holds NaN or infinite values in {int((~np.isfinite(labels)).sum()):,} voxels"
        )
    rounded = np.rint(labels)
    off = np.abs(labels - rounded) > LABEL_ROUNDING_TOLERANCE
    if off.any():
        raise DatasetError(
            f"{path}: the label map holds values that are not integers, in {int(off.sum()):,} of {labels.size:,} "
            f"voxels, such as {float(labels[off].flat[0]):.6g} "
            f"(range {float(labels.min()):.4g} to {float(labels.max()):.4g})",
            hint="Cut a probability map at a threshold and save integers; if this is an image, name the label file.",
        )
    if float(np.abs(rounded).max(initial=0)) > limit:
        raise DatasetError(f"{path}: label values beyond {limit:,} are not supported")
    whole: NDArray[np.int32] = rounded.astype(np.int32)
    return whole
