"""By what slices at one position differ: b-value, echo, time and the like, and the vendors' own tags for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydicom.dataset import Dataset

_NAMED: tuple[tuple[str, str, str], ...] = (
    # What it is called, the tag's keyword, its unit. The order is the order of trust: the first that explains wins.
    ("echo time", "EchoTime", " ms"),
    ("echo time", "EffectiveEchoTime", " ms"),
    ("echo", "EchoNumbers", ""),
    ("time point", "TemporalPositionIdentifier", ""),
    ("time point", "TemporalPositionIndex", ""),
    ("inversion time", "InversionTime", " ms"),
    ("trigger time", "TriggerTime", " ms"),
    ("cardiac phase", "NominalPercentageOfCardiacPhase", " %"),
    ("flip angle", "FlipAngle", " degrees"),
    ("image type", "ImageType", ""),
    ("image type", "FrameType", ""),
    ("voltage", "KVP", " kV"),
    ("kernel", "ConvolutionKernel", ""),
    ("sequence", "SequenceName", ""),
    ("diffusion direction", "DiffusionGradientOrientation", ""),
    ("stack", "StackID", ""),
    ("contrast agent", "ContrastBolusAgent", ""),
    ("acquisition", "AcquisitionNumber", ""),
    ("acquisition time", "AcquisitionTime", ""),
)

B_VALUE = "b"

_PRIVATE_B_VALUES: tuple[tuple[int, int, int, str], ...] = (
    # Group, element of its creator, element, how the creator's name begins.
    (0x0019, 0x0010, 0x100C, "SIEMENS"),
    (0x0043, 0x0010, 0x1039, "GEMS_PARM"),
    (0x2001, 0x0010, 0x1003, "Philips Imaging"),
    (0x0065, 0x0010, 0x1009, "Image Private Header"),
)
"""Source: the DICOM conformance statements of Siemens, GE, Philips and United Imaging for their MR scanners."""

_GE_B_VALUE_MODULUS = 100_000
"""GE adds 10^9 to the b-value of some scans. Source: GE's DICOM conformance statement, (0043,1039)."""

TRAIT_TAGS: tuple[str | int, ...] = (
    "DiffusionBValue",
    *dict.fromkeys(keyword for _, keyword, _ in _NAMED),
    *(group << 16 | number for group, creator, element, _ in _PRIVATE_B_VALUES for number in (creator, element)),
)
"""What of a header must be read for `read_traits`."""


def read_traits(find: Callable[[str], Any], dataset: Dataset) -> tuple[tuple[str, str], ...]:
    """Names and values by which slices may differ, the most telling first: ("b", "800"), ("echo time", "63 ms").

    Args:
        find: Gives the value of a tag by keyword, None when there is none.
        dataset: The file, for the vendors' own tags.
    """
    traits: dict[str, str] = {}
    b_value = _b_value(find, dataset)
    if b_value:
        traits[B_VALUE] = b_value
    for name, keyword, unit in _NAMED:
        value = find(keyword)
        if value is not None and name not in traits and (text := _words(value)):
            traits[name] = text + unit
    return tuple(traits.items())


def _b_value(find: Callable[[str], Any], dataset: Dataset) -> str:
    value = find("DiffusionBValue")
    if value is not None:
        return _number(value)
    for group, creator, element, name in _PRIVATE_B_VALUES:
        maker = dataset.get((group, creator))
        if maker is None or not _words(maker.value).startswith(name):
            continue
        found = dataset.get((group, element))
        if found is not None and found.value not in (None, "", b""):
            return _number(found.value)
    return ""


def _number(value: Any) -> str:
    """A b-value as people write it; "" when it is none. Private tags may come as bytes or as several numbers."""
    first = _words(value).split("\\")[0]
    try:
        number = float(first)
    except ValueError:
        return ""
    return f"{number % _GE_B_VALUE_MODULUS if number >= _GE_B_VALUE_MODULUS else number:g}"


def _words(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip(" \x00")
    if isinstance(value, str | int | float):
        return str(value).strip()
    return "\\".join(str(item) for item in value)
