"""Small DICOM series, made up: files of one slice, and enhanced files of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

MR, ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1"
STRAIGHT = np.eye(3)
ORIGIN = np.array([-20.0, 35.5, 100.25])
SPACING = (0.8, 1.5, 2.5)
"""Between columns, rows, slices."""

Change = Callable[[FileDataset, int], None]


def rotation(seed: int) -> NDArray[np.float64]:
    """Three directions at right angles: along rows, along columns, and their normal."""
    axes, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    axes[:, 2] = np.cross(axes[:, 0], axes[:, 1])
    return axes


def stored_numbers(shape: tuple[int, int, int] = (7, 6, 5), dtype: str = "int16", seed: int = 0) -> NDArray[Any]:
    """(I, J, K)."""
    low = -900 if dtype.startswith("i") else 0
    return np.random.default_rng(seed).integers(low, 1500 if "16" in dtype else 200, shape).astype(dtype)


def uid(*words: object) -> str:
    return generate_uid(entropy_srcs=[str(word) for word in words])


def base(array: NDArray[Any], instance: str, series: str, *, is_little: bool = True) -> FileDataset:
    """Everything but place and pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MR, instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128, is_implicit_VR=False, is_little_endian=is_little)
    out.SOPClassUID, out.SOPInstanceUID, out.Modality = MR, instance, "MR"
    out.StudyInstanceUID, out.SeriesInstanceUID = uid("study"), uid(series)
    out.FrameOfReferenceUID = uid("frame")
    out.SeriesDescription, out.SeriesNumber = series, 3
    out.PatientID, out.PatientName = "p1", "Doe^Jane"
    out.SamplesPerPixel, out.PhotometricInterpretation = 1, "MONOCHROME2"
    out.Columns, out.Rows = array.shape[:2]
    bits = array.dtype.itemsize * 8
    out.BitsAllocated, out.BitsStored, out.HighBit = bits, bits, bits - 1
    out.PixelRepresentation = int(array.dtype.kind == "i")
    return out


def numbers(values: Sequence[float] | NDArray[Any]) -> list[str]:
    return [f"{value:.10g}" for value in values]


def write_series(
    folder: Path,
    array: NDArray[Any],
    axes: NDArray[np.float64] = STRAIGHT,
    *,
    series: str = "T1",
    prefix: str = "",
    places: Sequence[float] | None = None,
    change: Change | None = None,
) -> list[Path]:
    """One file a slice; names run against the order of the slices.

    Args:
        folder: Made when missing.
        array: Stored numbers (I, J, K).
        axes: Columns are the directions of rows, of columns, and of the slices.
        series: Names the series.
        prefix: Of file names and instances.
        places: Of each slice along the third axis, in millimetres.
        change: Is given each file before it is written, and the number of its slice.

    Returns:
        The files in the order of the slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index in range(array.shape[2]):
        out = base(array, uid(series, prefix, index), series)
        step = index * SPACING[2] if places is None else places[index]
        out.ImagePositionPatient = numbers(ORIGIN + axes[:, 2] * step)
        out.ImageOrientationPatient = numbers(axes[:, :2].T.flatten())
        out.PixelSpacing = numbers([SPACING[1], SPACING[0]])
        out.SliceThickness = "9"  # says nothing about the distance of slices
        out.InstanceNumber = (index * 7) % array.shape[2] + 1
        out.PixelData = np.ascontiguousarray(array[:, :, index].T).tobytes()
        if len(out.PixelData) % 2:
            out.PixelData += b"\0"
        if change is not None:
            change(out, index)
        files.append(folder / f"{prefix}{(97 * (index + 1)) % 101}")  # no ending, in no order
        out.save_as(files[-1], enforce_file_format=True)
    return files


def write_enhanced(
    path: Path, array: NDArray[Any], order: Sequence[int], echoes: Sequence[float] = (), slopes: Sequence[float] = ()
) -> None:
    """One file of many frames, the slices in this order; of several echoes, one after the other."""
    out = base(array, uid("enhanced"), "enhanced")
    out.SOPClassUID = out.file_meta.MediaStorageSOPClassUID = ENHANCED_MR
    axes = rotation(3)
    frames, data = [], b""
    for echo in echoes or (0.0,):
        for index in order:
            group = Dataset()
            group.PlanePositionSequence = item(ImagePositionPatient=numbers(ORIGIN + axes[:, 2] * index * SPACING[2]))
            if echoes:
                group.MREchoSequence = item(EffectiveEchoTime=echo)
            slope = slopes[index] if slopes else 1
            group.PixelValueTransformationSequence = item(RescaleSlope=str(slope), RescaleIntercept="0")
            frames.append(group)
            data += np.ascontiguousarray(array[:, :, index].T + int(echo)).astype(array.dtype).tobytes()
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=numbers(axes[:, :2].T.flatten()))
    shared.PixelMeasuresSequence = item(PixelSpacing=numbers([SPACING[1], SPACING[0]]), SliceThickness="9")
    out.SharedFunctionalGroupsSequence = Items([shared])
    out.PerFrameFunctionalGroupsSequence = Items(frames)
    out.NumberOfFrames, out.PixelData = len(frames), data
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save_as(path, enforce_file_format=True)


def item(**values: Any) -> Items:
    content = Dataset()
    for keyword, value in values.items():
        setattr(content, keyword, value)
    return Items([content])


def expected_affine(axes: NDArray[np.float64]) -> NDArray[np.float64]:
    """RAS+."""
    affine = np.eye(4)
    affine[:3, :3] = axes * SPACING
    affine[:3, 3] = ORIGIN
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
