"""The voxel size that a TIFF stack states: in a file beside it, as OME-XML, as ImageJ does, or nowhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import tifffile

from autoseg.domain.endings import TIFF_ENDINGS, split_ending
from autoseg.errors import DatasetError

Spacing = tuple[float, float, float]
"""Along (I, J, K), that is column, row and page, in millimetres."""

_MM_PER_UNIT = {
    "pm": 1e-9,
    "å": 1e-7,
    "angstrom": 1e-7,
    "nm": 1e-6,
    "nanometer": 1e-6,
    "µm": 1e-3,
    "um": 1e-3,
    "micron": 1e-3,
    "microns": 1e-3,
    "micrometer": 1e-3,
    "mm": 1.0,
    "millimeter": 1.0,
    "cm": 10.0,
    "centimeter": 10.0,
    "dm": 100.0,
    "m": 1000.0,
    "meter": 1000.0,
    "in": 25.4,
    "inch": 25.4,
    "inches": 25.4,
}
_RESOLUTION_UNITS = {2: "inch", 3: "cm"}
"""Source: TIFF 6.0, field ResolutionUnit; 1 is "no absolute unit"."""

_OME_DEFAULT_UNIT = "µm"
"""Source: the OME schema, default of PhysicalSizeXUnit, PhysicalSizeYUnit and PhysicalSizeZUnit."""

_FORBIDDEN_XML = ("<!DOCTYPE", "<!ENTITY")
_CHANNEL_NUMBER = re.compile(r"_\d{4}$")


def stating_sidecars(path: Path) -> list[Path]:
    """The JSON files beside a TIFF file that state its spacing; none beside files of other formats.

    They are called as the file, or as its case (CASE_0000.tif belongs to CASE.json); JSON files that state no spacing
    are others' business.

    Raises:
        DatasetError: One states a spacing that is none.
    """
    is_tiff = split_ending(path)[1].lower() in TIFF_ENDINGS
    return [file for file in sidecars(path) if _sidecar_spacing(file) is not None] if is_tiff else []


def case_name(path: Path) -> str:
    """The name of a file without ending and channel number, as which its case's file is called."""
    return _CHANNEL_NUMBER.sub("", split_ending(path)[0])


def stated_spacing(path: Path, file: tifffile.TiffFile) -> Spacing | None:
    """The voxel size of a stack in millimetres; None where it is not stated along all three axes.

    A file beside it goes before what stands in the stack itself.

    Raises:
        DatasetError: The file beside it states a spacing that is none.
    """
    for beside in stating_sidecars(path):
        return _sidecar_spacing(beside)
    if file.is_ome:
        return _ome_spacing(str(file.ome_metadata))
    return _imagej_spacing(file) if file.is_imagej else None


def refuse_entities(path: Path, xml: str) -> None:
    """Metadata needs no document type and no entities of its own, which can blow up or name other files.

    Raises:
        DatasetError: It has them.
    """
    if any(mark in xml for mark in _FORBIDDEN_XML):
        raise DatasetError(f"{path}: its OME-XML declares a document type or entities, which are not read")


def sidecars(path: Path) -> list[Path]:
    """The JSON files beside a TIFF stack that may state its spacing, as far as they exist."""
    names = dict.fromkeys((split_ending(path)[0], case_name(path)))
    return [file for name in names if (file := path.with_name(f"{name}.json")).is_file()]


def _sidecar_spacing(file: Path) -> Spacing | None:
    """nnU-Net's files beside TIFF stacks: {"spacing": [page, row, column]}. Source: nnU-Net v2, Tiff3DIO."""
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise DatasetError(f"{file}: the file beside a TIFF stack is not readable JSON: {problem}") from None
    if not isinstance(data, dict) or "spacing" not in data:
        return None
    stated = data["spacing"]
    spacing = _positive(stated[::-1]) if isinstance(stated, list) else None
    if spacing is None:
        raise DatasetError(
            f"{file}: expected a spacing of three positive numbers (between pages, rows, columns; in millimetres), "
            f"got {stated!r}"
        )
    return spacing


def _positive(numbers: Sequence[Any]) -> Spacing | None:
    if len(numbers) != 3 or any(isinstance(item, bool) or not isinstance(item, int | float) for item in numbers):
        return None
    values = tuple(float(item) for item in numbers)
    return (values[0], values[1], values[2]) if all(0 < item < math.inf for item in values) else None


def _ome_spacing(xml: str) -> Spacing | None:
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None
    pixels = next((item for item in root.iter() if item.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return None
    sizes = []
    for axis in "XYZ":
        factor = _factor(pixels.get(f"PhysicalSize{axis}Unit", _OME_DEFAULT_UNIT))
        size = _number(pixels.get(f"PhysicalSize{axis}"))
        sizes.append(None if factor is None or size is None else size * factor)
    return _positive(sizes)


def _imagej_spacing(file: tifffile.TiffFile) -> Spacing | None:
    metadata = file.imagej_metadata or {}
    factor = _factor(str(metadata.get("unit", "")) or _resolution_unit(file))
    columns, rows = (_edge(file, name) for name in ("XResolution", "YResolution"))
    if factor is None or columns is None or rows is None:
        return None
    # ImageJ writes no depth of 1. Source: ImageJ's FileSaver.getDescriptionString.
    depth = _number(metadata.get("spacing", 1.0))
    return _positive([columns * factor, rows * factor, abs(depth or 0.0) * factor])


def _resolution_unit(file: tifffile.TiffFile) -> str:
    tag = file.pages.first.tags.get("ResolutionUnit")
    return "" if tag is None else _RESOLUTION_UNITS.get(int(tag.value), "")


def _edge(file: tifffile.TiffFile, name: str) -> float | None:
    """The edge of a pixel in the file's unit: resolutions are fractions, pixels per unit."""
    tag = file.pages.first.tags.get(name)
    value = None if tag is None else tag.value
    if not isinstance(value, tuple) or len(value) != 2 or not all(value):
        return None
    return float(value[1]) / float(value[0])


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _factor(unit: str) -> float | None:
    """Millimetres of a unit; None where it is none, such as pixels."""
    # ImageJ writes the micro sign as an escape; the Greek letter looks the same.
    plain = unit.strip().replace("\\u00B5", "µ").replace("\\u00b5", "µ").replace("μ", "µ")
    return _MM_PER_UNIT.get(plain.lower() if plain != "M" else plain)
