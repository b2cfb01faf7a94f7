"""Label maps as DICOM segmentation objects that refer to the series they were made from, by highdicom (an extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from autoseg.domain.dataset import LabelSchema
from autoseg.errors import ConfigError, DatasetError
from autoseg.io.content import broken
from autoseg.io.dicom import stack_of
from autoseg.io.dicom_files import quiet
from autoseg.io.dicom_frames import DICOM_PROBLEMS
from autoseg.io.dicom_stack import Stack
from autoseg.io.files import atomic_path

SEGMENTATION_ENDING = ".seg.dcm"

ANYTHING = ("91723000", "SCT", "Anatomical Structure")
"""Category and type of every segment: class names are free text, and a code guessed from them could be a wrong one.

Source: SNOMED CT, in DICOM PS3.16, CID 7150 "Segmentation Property Categories".
"""

_ARTIFICIAL_INTELLIGENCE = ("123110", "DCM", "Artificial Intelligence")
"""Source: DICOM PS3.16, CID 7162 "Algorithm Family"."""

_UTF_8 = "ISO_IR 192"
_LABEL_LENGTH = 64
"""Longest value of the type LO. Source: DICOM PS3.5, section 6.2."""

_SERIES_NUMBER_OFFSET = 1000
"""Keeps the segmentation's series number clear of those of the study's own series."""

_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)
"""Must be in every image object, though empty; files whose owner removed them are common.

Source: DICOM PS3.3, sections C.7.1.1 and C.7.2.1 (type 2).
"""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What made a label map.

    Attributes:
        name: Of the program.
        version: Of the program.
        parameters: What else identifies it, such as the digest of the model.
    """

    name: str
    version: str
    parameters: Mapping[str, str]


def segmentation_path(label_map: Path) -> Path:
    """Where the segmentation object of a label map lies: OUT/X.nii.gz gives OUT/X.seg.dcm."""
    return label_map.with_name(label_map.name.removesuffix(".gz").removesuffix(".nii") + SEGMENTATION_ENDING)


def require_highdicom() -> None:
    """Say what to install.

    Raises:
        ConfigError: highdicom is not installed.
    """
    if find_spec("highdicom") is None:
        raise ConfigError(
            "DICOM segmentations are written by highdicom, which is not installed",
            hint="Install it with: pip install 'autoseg-unet[dicom]'",
        )


def write_segmentation(
    path: Path, labels: NDArray[np.integer[Any]], source: str | Path, schema: LabelSchema, algorithm: Algorithm
) -> None:
    """Write a label map as a BINARY segmentation object, slice on slice of the series it belongs to; atomic.

    Segment n is class n of the schema, by its name; classes that share label values overlap. Slices and segments
    without a voxel are left out, except where nothing was found at all.

    Args:
        path: Ends in ".dcm".
        labels: (I, J, K) label values on the grid of the series.
        source: Folder or file of the series, as the image was read from.
        schema: Names the classes and their values.
        algorithm: What made the label map.

    Raises:
        ConfigError: highdicom is not installed.
        DatasetError: The series cannot be read, lacks the identifiers that a reference needs, or is on another grid.
    """
    require_highdicom()
    stack = stack_of(source)
    if labels.shape != stack.geometry.shape:
        raise DatasetError(f"{source}: a label map of {labels.shape} does not fit a series of {stack.geometry.shape}")
    images = _source_images(stack)
    segments = _segments(labels.transpose(2, 1, 0), schema)  # slices, rows, columns
    if len(images) == 1 and len(stack.frames) > 1:
        segments = segments[np.argsort([frame.number for frame in stack.frames])]
    with quiet():
        segmentation = _build(images, segments, stack, schema, algorithm)
        with atomic_path(path) as temporary:
            segmentation.save_as(temporary)


def _source_images(stack: Stack) -> list[Dataset]:
    """Headers of the files in the order of the slices; of one file with many frames, that file.

    Raises:
        DatasetError: The series cannot be referred to.
    """
    first = stack.frames[0]
    if first.position is None:
        raise DatasetError(
            f"{first.path}: a projection has no place in the patient, so no segmentation can refer to it"
        )
    if first.pixels.num_frames > 1:
        if {frame.path for frame in stack.frames} != {first.path} or len(stack.frames) != first.pixels.num_frames:
            raise DatasetError(
                f"{first.path}: the volume is not one whole file of many frames, so no segmentation is written for it"
            )
        return [_source_image(first.path)]
    return [_source_image(frame.path) for frame in stack.frames]


def _source_image(path: Path) -> Dataset:
    try:
        with quiet():
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
            missing = [keyword for keyword in _NEEDED if not dataset.get(keyword)]
            for keyword in _MAY_BE_EMPTY:
                if keyword not in dataset:
                    setattr(dataset, keyword, "")
    except DICOM_PROBLEMS as problem:
        raise broken(path, f"its header cannot be read ({problem})") from None
    if missing:
        raise DatasetError(
            f"{path}: no segmentation can refer to this image, because it lacks {', '.join(missing)}",
            hint="Use the series as it came from the scanner or archive, or anonymise it with new UIDs, not empty.",
        )
    return dataset


def _segments(slices: NDArray[np.integer[Any]], schema: LabelSchema) -> NDArray[Any]:
    """Segment numbers (slices, rows, columns); where classes overlap, 0 and 1 with a last axis of segments."""
    values = [value for item in schema.classes for value in item.values]
    if len(set(values)) < len(values):
        return np.stack([np.isin(slices, item.values) for item in schema.classes], axis=-1).astype(np.uint8)
    table = np.zeros(int(max(*values, slices.max(), 1)) + 1, np.uint8 if len(schema.classes) <= 255 else np.uint16)
    for number, item in enumerate(schema.classes, start=1):
        table[list(item.values)] = number
    numbers: NDArray[Any] = table[slices]
    return numbers


def _build(
    images: Sequence[Dataset], segments: NDArray[Any], stack: Stack, schema: LabelSchema, algorithm: Algorithm
) -> Dataset:
    import highdicom

    spacing = stack.geometry.spacing_mm
    series_number = stack.frames[0].series_number or 0
    segmentation: Dataset = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=segments,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=_descriptions(schema, algorithm),
        series_instance_uid=generate_uid(),
        series_number=_SERIES_NUMBER_OFFSET + max(series_number, 0),
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=algorithm.name,
        manufacturer_model_name=algorithm.name,
        software_versions=algorithm.version,
        device_serial_number=next(iter(algorithm.parameters.values()), algorithm.version)[:_LABEL_LENGTH],
        pixel_measures=highdicom.PixelMeasuresSequence(
            pixel_spacing=(spacing[1], spacing[0]), slice_thickness=spacing[2], spacing_between_slices=spacing[2]
        ),
        content_label="SEGMENTATION",
        content_description=f"Made by {algorithm.name} {algorithm.version}",
        series_description=f"{algorithm.name} segmentation",
        specific_character_set=_UTF_8,
    )
    return segmentation


def _descriptions(schema: LabelSchema, algorithm: Algorithm) -> list[Any]:
    import highdicom
    from pydicom.sr.coding import Code

    identification = highdicom.AlgorithmIdentificationSequence(
        name=algorithm.name,
        family=Code(*_ARTIFICIAL_INTELLIGENCE),
        version=algorithm.version,
        parameters=dict(algorithm.parameters),
    )
    descriptions = []
    for number, item in enumerate(schema.classes, start=1):
        description = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=item.name.replace("\\", "/")[:_LABEL_LENGTH],
            segmented_property_category=Code(*ANYTHING),
            segmented_property_type=Code(*ANYTHING),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=identification,
        )
        values = ", ".join(map(str, item.values))
        description.SegmentDescription = f"{item.name}: label value {values} of the label map"
        descriptions.append(description)
    return descriptions
