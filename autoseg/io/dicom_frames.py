"""The slices of DICOM files as plain records: classic files of one slice, and enhanced files of many."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.tag import Tag
from pydicom.uid import UID

from autoseg.io.dicom_files import quiet
from autoseg.io.dicom_traits import TRAIT_TAGS, read_traits

DICOM_PROBLEMS = (
    InvalidDicomError,
    BytesLengthException,
    OSError,
    EOFError,
    # pydicom turns bytes into values when they are used, so damaged ones come as whatever Python makes of them.
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)

_KEYWORDS = (
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "ImageType",
    "Modality",
    "SeriesDescription",
    "SeriesNumber",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)

_TAGS = [*map(Tag, _KEYWORDS), *map(Tag, TRAIT_TAGS)]

_DEFER_BYTES = 1 << 24
"""Longer values of a header are passed over until they are asked for: a false length must not cost memory."""

_NOT_IMAGES = {
    "SEG": "segmentation",
    "RTSTRUCT": "structure set",
    "RTPLAN": "treatment plan",
    "RTDOSE": "dose",
    "SR": "report",
    "PR": "presentation state",
    "KO": "key object selection",
    "REG": "registration",
    "DOC": "document",
    "PLAN": "plan",
    "FID": "fiducials",
    "ECG": "waveform",
}
"""Objects that go with images and are none, by modality. Source: DICOM PS3.3, section C.7.3.1.1.1."""

_CLASSES_SET_APART = {
    "1.2.840.10008.1.3.10": "table of contents",
    "1.2.840.10008.5.1.4.1.1.66": "raw data",
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "segmentation",
    "1.2.840.10008.5.1.4.1.1.30": "parametric map",
    "1.2.840.10008.5.1.4.1.1.4.2": "spectroscopy",
}
"""Source: DICOM PS3.4, annex B.5 (and I.4 for the table of contents)."""

_SLICE_MODALITIES = ("CT", "MR", "PT", "NM")
"""Their images lie somewhere in the patient; others may be projections, without a position."""

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCALIZER = "LOCALIZER"
_MOSAIC = "MOSAIC"
"""Siemens' way to keep a volume in one classic file. Source: Siemens' DICOM conformance statement for MR."""


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """How the numbers of a frame are stored."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    photometric: str
    syntax: str
    num_frames: int

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame, unpacked."""
        return self.rows * self.columns * self.samples * self.bits_allocated // 8


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice.

    Attributes:
        path: Its file.
        number: Place in the file, from 0.
        instance_uid: Of the file's object; "" when removed.
        series_uid: "" when removed.
        series_number: None when unknown.
        description: Of the series.
        modality: "CT", "MR", ...
        study_uid: "" when removed.
        frame_of_reference: "" when removed.
        position: Centre of the first pixel in millimetres, LPS; None for projections and the like.
        row: Direction in which the column number grows, LPS.
        column: Direction in which the row number grows, LPS.
        spacing_mm: Between columns, then between rows; None when unknown.
        step_mm: Between slices as the header says; only used for a lone slice.
        slope: Stored numbers times this ...
        intercept: ... plus this are values.
        pixels: How they are stored.
        traits: Names and values by which slices at one position may differ.
        problem: Why this slice cannot be used; "" when it can.
    """

    path: Path
    number: int
    instance_uid: str
    series_uid: str
    series_number: int | None
    description: str
    modality: str
    study_uid: str
    frame_of_reference: str
    position: tuple[float, float, float] | None
    row: tuple[float, float, float] | None
    column: tuple[float, float, float] | None
    spacing_mm: tuple[float, float] | None
    step_mm: float | None
    slope: float
    intercept: float
    pixels: PixelFormat
    traits: tuple[tuple[str, str], ...]
    problem: str = ""


class _Places:
    """Looks a tag up in the functional groups of a frame (its own, then the shared), then in the file itself."""

    def __init__(self, dataset: Dataset, groups: Sequence[Dataset] = ()) -> None:
        macros = [element.value[0] for group in groups for element in group if element.VR == "SQ" and element.value]
        self._places = [*macros, dataset]

    def __call__(self, keyword: str) -> Any:
        for place in self._places:
            value = place.get(keyword)
            if value is not None and value != "":
                return value
        return None


def read_frames(path: Path) -> tuple[Frame, ...] | str:
    """Every slice of a DICOM file, without its pixels; or, for an object that is no image to segment, what it is.

    Raises:
        DICOM_PROBLEMS: The header is broken.
    """
    with quiet():
        dataset = pydicom.dcmread(path, defer_size=_DEFER_BYTES, stop_before_pixels=True, specific_tags=_TAGS)
        kind = _kind_set_apart(dataset)
        return kind or _frames(path, dataset)


def _kind_set_apart(dataset: Dataset) -> str:
    modality, sop_class = _text(dataset.get("Modality")), _text(dataset.get("SOPClassUID"))
    sop_class = sop_class or _text(dataset.file_meta.get("MediaStorageSOPClassUID"))
    if sop_class in _CLASSES_SET_APART:
        return _CLASSES_SET_APART[sop_class]
    if modality in _NOT_IMAGES:
        return _NOT_IMAGES[modality]
    if dataset.get("Rows") is None:
        name = UID(sop_class).name
        # A file whose class says nothing may be a slice that was cut short, and must not vanish without a word.
        return "object without pixels" if name != sop_class and "Image" not in name else ""
    if _LOCALIZER in _image_type(dataset):
        return "localizer"
    is_capture = sop_class == _SECONDARY_CAPTURE or sop_class.startswith(f"{_SECONDARY_CAPTURE}.")
    return "screen capture" if is_capture and dataset.get("ImagePositionPatient") is None else ""


def _image_type(dataset: Dataset) -> list[str]:
    return [str(item).upper() for item in _sequence(dataset.get("ImageType"))]


def _frames(path: Path, dataset: Dataset) -> tuple[Frame, ...]:
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
    if not per_frame:
        frame = _frame(path, 0, dataset, _Places(dataset, shared), num_frames)
        if num_frames > 1:
            reason = f"the file holds {num_frames} frames and does not say where each of them lies"
            return (_with_problem(frame, reason),)
        return (frame,)
    if len(per_frame) != num_frames:
        frame = _frame(path, 0, dataset, _Places(dataset, shared), num_frames)
        return (_with_problem(frame, f"the file holds {num_frames} frames and describes {len(per_frame)}"),)
    return tuple(
        _frame(path, number, dataset, _Places(dataset, [group, *shared]), num_frames)
        for number, group in enumerate(per_frame)
    )


def _with_problem(frame: Frame, problem: str) -> Frame:
    values = {name: getattr(frame, name) for name in Frame.__dataclass_fields__}
    return Frame(**{**values, "problem": problem})


def _frame(path: Path, number: int, dataset: Dataset, find: _Places, num_frames: int) -> Frame:
    problems: list[str] = []
    position = _vector(find, "ImagePositionPatient", 3, problems)
    directions = _vector(find, "ImageOrientationPatient", 6, problems)
    spacing = _vector(find, "PixelSpacing", 2, problems)
    if spacing is None and position is None:
        spacing = _vector(find, "ImagerPixelSpacing", 2, problems)
    if spacing is not None and min(spacing) <= 0:
        problems.append(f"PixelSpacing must be above 0, got {_listed(spacing)}")
    problems += _missing_places(position, directions, spacing, _text(dataset.get("Modality")))
    if _MOSAIC in _image_type(dataset):
        problems.append("it is a mosaic, many slices side by side in one picture; convert it, for example by dcm2niix")
    if find("ModalityLUTSequence"):
        problems.append("its values go through a look-up table (ModalityLUTSequence), which is not supported")
    pixels = _pixel_format(dataset, num_frames, problems)
    slope = _vector(find, "RescaleSlope", 1, problems)
    intercept = _vector(find, "RescaleIntercept", 1, problems)
    step = _vector(find, "SpacingBetweenSlices", 1, []) or _vector(find, "SliceThickness", 1, [])
    series_number = _vector(find, "SeriesNumber", 1, [])
    return Frame(
        path=path,
        number=number,
        instance_uid=_text(dataset.get("SOPInstanceUID")),
        series_uid=_text(dataset.get("SeriesInstanceUID")),
        series_number=None if series_number is None else int(series_number[0]),
        description=_text(dataset.get("SeriesDescription")),
        modality=_text(dataset.get("Modality")),
        study_uid=_text(dataset.get("StudyInstanceUID")),
        frame_of_reference=_text(dataset.get("FrameOfReferenceUID")),
        position=None if position is None else (position[0], position[1], position[2]),
        row=None if directions is None else (directions[0], directions[1], directions[2]),
        column=None if directions is None else (directions[3], directions[4], directions[5]),
        spacing_mm=None if spacing is None else (spacing[1], spacing[0]),
        step_mm=abs(step[0]) if step is not None and step[0] else None,
        slope=1.0 if slope is None else slope[0],
        intercept=0.0 if intercept is None else intercept[0],
        pixels=pixels,
        traits=read_traits(find, dataset),
        problem=problems[0] if problems else "",
    )


def _missing_places(position: Any, directions: Any, spacing: Any, modality: str) -> list[str]:
    """What a slice lacks to have a place in the patient; nothing for projections, which have none."""
    if position is None and directions is None and modality not in _SLICE_MODALITIES:
        return []
    places = {"ImagePositionPatient": position, "ImageOrientationPatient": directions, "PixelSpacing": spacing}
    return [f"{keyword} is missing" for keyword, value in places.items() if value is None]


def _pixel_format(dataset: Dataset, num_frames: int, problems: list[str]) -> PixelFormat:
    numbers = {}
    for keyword in ("Rows", "Columns", "BitsAllocated"):
        value = dataset.get(keyword)
        numbers[keyword] = value if isinstance(value, int) and value > 0 else 0
        if not numbers[keyword]:
            problems.append(f"{keyword} is {'missing' if value is None else f'{value!r}, expected a number above 0'}")
    allocated = numbers["BitsAllocated"]
    stored = int(dataset.get("BitsStored") or allocated)
    high = dataset.get("HighBit")
    samples = int(dataset.get("SamplesPerPixel") or 1)
    photometric = _text(dataset.get("PhotometricInterpretation")) or "MONOCHROME2"
    if samples != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        problems.append(f"it is a colour image ({photometric}, {samples} numbers a pixel); only grey images are read")
    elif allocated and (allocated not in (8, 16, 32) or not 0 < stored <= allocated):
        problems.append(f"pixels of {stored} bits in {allocated} are not supported; 8, 16 and 32 are")
    syntax = _text(dataset.file_meta.get("TransferSyntaxUID"))
    if not syntax:
        problems.append("TransferSyntaxUID is missing, so nobody can tell how the pixels are stored")
    return PixelFormat(
        rows=numbers["Rows"],
        columns=numbers["Columns"],
        samples=samples,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high is None else int(high),
        is_signed=bool(dataset.get("PixelRepresentation")),
        photometric=photometric,
        syntax=syntax,
        num_frames=num_frames,
    )


def _vector(find: _Places, keyword: str, count: int, problems: list[str]) -> tuple[float, ...] | None:
    """The numbers of a tag; None when it is missing, empty or wrong, the latter noted as a problem."""
    try:
        value = find(keyword)
        if value is None:
            return None
        numbers = tuple(float(item) for item in _sequence(value))
    except DICOM_PROBLEMS as problem:
        problems.append(f"{keyword} cannot be read ({problem})")
        return None
    if not numbers:
        return None
    if len(numbers) != count or not all(math.isfinite(item) for item in numbers):
        problems.append(f"{keyword} is {_listed(numbers)}, expected {count} finite number{'s' if count > 1 else ''}")
        return None
    return numbers


def _sequence(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str | bytes | int | float) else list(value)


def _listed(numbers: Sequence[float]) -> str:
    return "\\".join(f"{item:g}" for item in numbers) or "empty"


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def syntax_name(syntax: str) -> str:
    """A transfer syntax in words, with its number."""
    with quiet():
        name = UID(syntax).name
    return syntax if name == syntax else f"{name} ({syntax})"
