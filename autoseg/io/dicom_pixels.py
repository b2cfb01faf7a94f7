"""The numbers of DICOM slices: unpacked, scaled, and stacked to a volume, one slice in memory besides it."""

# SimpleITK's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from autoseg.errors import DatasetError
from autoseg.io.content import DEFLATE_MAX_RATIO, broken, require_room
from autoseg.io.dicom_files import quiet
from autoseg.io.dicom_frames import DICOM_PROBLEMS, Frame, syntax_name
from autoseg.io.simpleitk import simpleitk

_PIXEL_DATA = 0x7FE00010
_PIXEL_KEYWORDS = (
    "PixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "NumberOfFrames",
)
_PIXEL_TAGS = [Tag(keyword) for keyword in _PIXEL_KEYWORDS]

_DEFER_BYTES = 1 << 10
"""Values longer than this stay in the file, so that a false length costs no memory."""

_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)

_PACKED_LIMIT_BYTES = 1 << 26
"""A packed slice below this size is believed (a constant one packs to next to nothing); above, deflate's limit holds.

8192 x 8192 pixels of 8 bits, more than any scanner's slice.
"""

_INTEGERS = (np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.int64))


def value_type(frames: Sequence[Frame]) -> np.dtype[Any]:
    """The type that holds every value of the slices: float32 where one is scaled by more than whole numbers.

    Otherwise the stored integer type, or where the intercept does not fit into it the smallest signed one that does.
    """
    if any(frame.slope != 1 or frame.intercept != int(frame.intercept) for frame in frames):
        return np.dtype(np.float32)
    stored = {_stored_type(frame) for frame in frames}
    ranges = [
        (low + frame.intercept, high + frame.intercept) for frame in frames for low, high in [_stored_range(frame)]
    ]
    low, high = min(item[0] for item in ranges), max(item[1] for item in ranges)
    candidates = (stored.pop(), *_INTEGERS) if len(stored) == 1 else _INTEGERS
    return next(item for item in candidates if np.iinfo(item).min <= low and high <= np.iinfo(item).max)


def _stored_type(frame: Frame) -> np.dtype[Any]:
    return np.dtype(f"{'i' if frame.pixels.is_signed else 'u'}{frame.pixels.bits_allocated // 8}")


def _stored_range(frame: Frame) -> tuple[int, int]:
    bits = frame.pixels.bits_stored
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if frame.pixels.is_signed else (0, 2**bits - 1)


def require_pixels(frames: Sequence[Frame]) -> None:
    """Refuse headers that promise more pixels than their files can hold, before anything is allocated.

    Raises:
        DatasetError: A file is too small.
    """
    for frame in {frame.path: frame for frame in frames}.values():
        promised = frame.pixels.frame_bytes * frame.pixels.num_frames
        if frame.pixels.syntax in _NATIVE[:3]:
            require_room(frame.path, promised, compressed=False)
        elif promised > max(_PACKED_LIMIT_BYTES, frame.path.stat().st_size * DEFLATE_MAX_RATIO):
            require_room(frame.path, promised, compressed=True)


def read_values(frames: Sequence[Frame]) -> NDArray[Any]:
    """The values of slices of one size.

    Returns:
        (I, J, K): columns, rows, slices in the order given, of `value_type`. Projections that are stored with white
        as their lowest number (MONOCHROME1) are turned round, so that bright means the same in all of them; of stacks
        the numbers mean something, and stay.

    Raises:
        DatasetError: A file is broken or truncated, or nothing here unpacks it.
    """
    require_pixels(frames)
    dtype = value_type(frames)
    pixels = frames[0].pixels
    volume: NDArray[Any] | None = None
    last: tuple[Path, Dataset] | None = None
    for index, frame in enumerate(frames):
        if last is None or last[0] != frame.path:
            last = (frame.path, _open(frame))
        values = _values(frame, last[1])
        _require_range(values, dtype, frame)
        if volume is None:  # only now is it known that the first file holds what it promises
            volume = np.empty((len(frames), pixels.rows, pixels.columns), dtype)
        volume[index] = values
    assert volume is not None
    return volume.transpose()


def _values(frame: Frame, dataset: Dataset) -> NDArray[Any]:
    """(rows, columns) values of a slice, float64 or integers."""
    stored = _unpacked(frame, dataset)
    if frame.slope == 1 and frame.intercept == 0:
        values = stored
    elif frame.slope == 1 and frame.intercept == int(frame.intercept):
        values = stored.astype(np.int64) + int(frame.intercept)
    else:
        values = stored * np.float64(frame.slope) + frame.intercept
    if values.shape != (frame.pixels.rows, frame.pixels.columns):
        expected = (frame.pixels.rows, frame.pixels.columns)
        raise broken(frame.path, f"its pixels are {values.shape}, its header says {expected}")
    if frame.position is None and frame.pixels.photometric == "MONOCHROME1":
        ends = sum(_stored_range(frame)) * frame.slope + 2 * frame.intercept
        turned = ends - values.astype(np.float64)
        return turned if values.dtype.kind == "f" else turned.astype(np.int64)
    return values


def _require_range(values: NDArray[Any], dtype: np.dtype[Any], frame: Frame) -> None:
    """Packed numbers know their own size, which may be another than the header's."""
    if dtype.kind == "f" or np.can_cast(values.dtype, dtype):
        return
    low, high = int(values.min()), int(values.max())
    if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
        raise broken(frame.path, f"its values, {low} to {high}, do not fit into the bits that its header names")


def _open(frame: Frame) -> Dataset:
    is_in_memory = frame.pixels.syntax == DeflatedExplicitVRLittleEndian  # it is inflated as a whole
    try:
        with quiet():
            return pydicom.dcmread(
                frame.path, defer_size=None if is_in_memory else _DEFER_BYTES, specific_tags=_PIXEL_TAGS
            )
    except DICOM_PROBLEMS as problem:
        raise broken(frame.path, f"the file cannot be read ({_one_line(problem)})") from None


def _unpacked(frame: Frame, dataset: Dataset) -> NDArray[Any]:
    """Stored numbers of a frame (rows, columns)."""
    if frame.pixels.syntax in _NATIVE:
        return _native(frame, dataset)
    try:
        with quiet():
            decoder = get_decoder(UID(frame.pixels.syntax))
            array: NDArray[Any] = decoder.as_array(dataset, index=frame.number, raw=True)[0]
            return array
    except DICOM_PROBLEMS as problem:
        if not _is_known_to_pydicom(frame):
            return _by_gdcm(frame, dataset)
        raise broken(
            frame.path,
            f"the pixels of frame {frame.number + 1} ({syntax_name(frame.pixels.syntax)}) cannot be unpacked "
            f"({_one_line(problem)})",
        ) from None


def _is_known_to_pydicom(frame: Frame) -> bool:
    """Whether pydicom has a decoder for such pixels, so that its failure means damage; Pillow unpacks 8 bits only."""
    if frame.pixels.syntax == JPEGExtended12Bit and frame.pixels.bits_stored > 8:
        return False
    try:
        with quiet():
            return get_decoder(UID(frame.pixels.syntax)).is_available
    except NotImplementedError:
        return False


def _native(frame: Frame, dataset: Dataset) -> NDArray[Any]:
    pixels, size = frame.pixels, frame.pixels.frame_bytes
    element: Any = dataset.get_item(_PIXEL_DATA, keep_deferred=True) if _PIXEL_DATA in dataset else None
    if element is None:
        raise broken(frame.path, "the file holds no pixels, it is truncated")
    if pixels.syntax == DeflatedExplicitVRLittleEndian:
        data = bytes(element.value)[frame.number * size : (frame.number + 1) * size]
    else:
        with frame.path.open("rb") as stream:
            stream.seek(element.value_tell + frame.number * size)
            data = stream.read(min(size, max(0, element.length - frame.number * size)))
    if len(data) < size:
        of = "" if pixels.num_frames == 1 else f" of frame {frame.number + 1}"
        raise broken(frame.path, f"the file is truncated: it holds {len(data):,} of {size:,} bytes of pixels{of}")
    order = ">" if pixels.syntax == ExplicitVRBigEndian else "<"
    unsigned = np.frombuffer(data, np.dtype(f"{order}u{pixels.bits_allocated // 8}"))
    unsigned = unsigned.astype(unsigned.dtype.newbyteorder("="), copy=False)
    stored: NDArray[Any] = _without_unused_bits(unsigned, frame).reshape(pixels.rows, pixels.columns)
    return stored


def _without_unused_bits(unsigned: NDArray[Any], frame: Frame) -> NDArray[Any]:
    """The stored numbers: old files keep drawings in the bits beside them."""
    pixels, dtype = frame.pixels, _stored_type(frame)
    if pixels.bits_stored == pixels.bits_allocated:
        whole: NDArray[Any] = unsigned.view(dtype)
        return whole
    shift = min(max(pixels.high_bit + 1 - pixels.bits_stored, 0), pixels.bits_allocated - pixels.bits_stored)
    kept: NDArray[Any] = (unsigned >> unsigned.dtype.type(shift)) & unsigned.dtype.type(2**pixels.bits_stored - 1)
    if not pixels.is_signed:
        return kept
    sign = dtype.type(2 ** (pixels.bits_stored - 1))
    signed: NDArray[Any] = (kept.view(dtype) ^ sign) - sign
    return signed


def _by_gdcm(frame: Frame, dataset: Dataset) -> NDArray[Any]:
    """Stored numbers of a frame by the decoders inside SimpleITK.

    They get a file of their own with this frame and how it is packed, nothing else: a false length elsewhere would cost
    them any memory, and they would scale every frame of a file alike.
    """
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            packed = get_frame(dataset.PixelData, frame.number, number_of_frames=frame.pixels.num_frames)
            _lone_file(frame, packed).save_as(Path(folder) / "frame.dcm", enforce_file_format=True)
            reader = simpleitk().ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(str(Path(folder) / "frame.dcm"))
            values: NDArray[Any] = simpleitk().GetArrayFromImage(reader.Execute())
            return values.reshape(values.shape[-2:])
    except DICOM_PROBLEMS as problem:
        raise DatasetError(
            f"{frame.path}: its pixels, {syntax_name(frame.pixels.syntax)}, cannot be unpacked here "
            f"({_one_line(problem)})",
            hint="Install more decoders (pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg), or decompress "
            "the series first, for example with gdcmconv --raw or dcmdjpeg. If the file is damaged, fetch it again.",
        ) from None


def _lone_file(frame: Frame, packed: bytes) -> FileDataset:
    pixels = frame.pixels
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    meta.TransferSyntaxUID = UID(pixels.syntax)
    lone = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    lone.SOPClassUID, lone.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    lone.Rows, lone.Columns, lone.SamplesPerPixel = pixels.rows, pixels.columns, pixels.samples
    lone.BitsAllocated, lone.BitsStored, lone.HighBit = pixels.bits_allocated, pixels.bits_stored, pixels.high_bit
    lone.PixelRepresentation, lone.PhotometricInterpretation = int(pixels.is_signed), pixels.photometric
    lone.PixelData = encapsulate([packed])
    lone["PixelData"].is_undefined_length = True
    return lone


def _one_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return (lines[-1] if lines else type(problem).__name__).rstrip(".")
