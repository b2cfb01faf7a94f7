"""The text header of MetaImage files, read strictly: MetaIO trusts it and writes beyond its own arrays."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from autoseg.errors import DatasetError
from autoseg.io.content import broken

_LIMIT_BYTES = 1 << 16
_LINE_LIMIT_BYTES = 4096
"""Far beyond real headers, and below MetaIO's own buffers of 32 KiB."""

_LINE = re.compile(r"(?P<key>[A-Za-z_][\w.-]{0,120})[ \t]*[=:][ \t]*(?P<value>.*?)[ \t\r]*")
_NAME_OF_DATA = "ElementDataFile"
_MAX_DIMENSIONS = 4
_MAX_CHANNELS = 1 << 16
_NUMBERS_PER_AXIS = ("DimSize", "ElementSpacing", "ElementSize", "Offset", "Origin", "Position", "CenterOfRotation")
_NUMBERS_PER_PAIR = ("TransformMatrix", "Rotation", "Orientation")
_UNIQUE = ("NDims", "ElementType", "CompressedData", "CompressedDataSize", "BinaryData", "HeaderSize", "ObjectType")
"""Keys of which MetaIO knows one; of the others, such as comments, there may be several."""


@dataclass(frozen=True, slots=True)
class MetaHeader:
    """What a MetaImage header says of where its voxels lie.

    Attributes:
        data_file: "LOCAL", or as written.
        offset: Bytes of the header, after which local voxels begin.
        is_binary: Whether they are binary.
        is_compressed: Whether they are deflated.
        compressed_bytes: How many bytes are deflated; None where it is not said.
        skips: Whether the file with the voxels has a header of its own.
    """

    data_file: str
    offset: int
    is_binary: bool
    is_compressed: bool
    compressed_bytes: int | None
    skips: bool


def read_meta_header(path: Path) -> MetaHeader:
    """Read and check a header.

    Raises:
        DatasetError: It is no list of keys and values, or a list of numbers has another length than the axes ask for.
    """
    values, offset = _values(path)
    _check(path, values)
    size = values.get("CompressedDataSize")
    if size is not None and not size.isdecimal():
        raise broken(path, f"the header gives CompressedDataSize = {size}, which is no number of bytes")
    return MetaHeader(
        data_file=values[_NAME_OF_DATA],
        offset=offset,
        is_binary=_is_true(values.get("BinaryData", "True")),
        is_compressed=_is_true(values.get("CompressedData", "False")),
        compressed_bytes=None if size is None else int(size),
        skips=values.get("HeaderSize", "0") != "0",
    )


def _values(path: Path) -> tuple[dict[str, str], int]:
    """Keys and values, and the bytes up to the end of the line that names the voxels, which is the last."""
    with path.open("rb") as stream:
        head = stream.read(_LIMIT_BYTES)
    values: dict[str, str] = {}
    offset = 0
    for number, line in enumerate(head.splitlines(keepends=True), start=1):
        offset += len(line)
        text = line.rstrip(b"\r\n").decode("utf-8", "replace")
        if not text.strip():
            continue
        match = _LINE.fullmatch(text)
        if (
            match is None
            or len(line) > _LINE_LIMIT_BYTES
            or "\ufffd" in text
            or not text.replace("\t", " ").isprintable()
        ):
            raise broken(path, f"line {number} of the header is not of the form Key = Value")
        key, value = match["key"], match["value"]
        if key in values and key in (*_UNIQUE, *_NUMBERS_PER_AXIS, *_NUMBERS_PER_PAIR):
            raise broken(path, f"the header gives {key} twice")
        values[key] = value
        if key == _NAME_OF_DATA:
            return values, offset
    raise broken(path, f"the header does not say where the voxels are ({_NAME_OF_DATA})")


def _check(path: Path, values: dict[str, str]) -> None:
    dimensions = values.get("NDims", "")
    if not dimensions.isdecimal() or not 1 < int(dimensions) <= _MAX_DIMENSIONS:
        raise DatasetError(f"{path}: the header gives NDims = {dimensions or 'nothing'}, expected 2, 3 or 4")
    axes = int(dimensions)
    lengths = dict.fromkeys(_NUMBERS_PER_AXIS, axes) | dict.fromkeys(_NUMBERS_PER_PAIR, axes * axes)
    for key, length in lengths.items():
        numbers = values.get(key, "").split()
        if (key in values or key == "DimSize") and (len(numbers) != length or not all(map(_is_number, numbers))):
            raise broken(path, f"the header gives {key} = {values.get(key, 'nothing')}, expected {length} numbers")
    channels = values.get("ElementNumberOfChannels", "1")
    if not channels.isdecimal() or not 0 < int(channels) <= _MAX_CHANNELS:
        raise broken(path, f"the header gives ElementNumberOfChannels = {channels}")
    if not values.get("ElementType", "").startswith("MET_"):
        raise broken(path, f"the header gives ElementType = {values.get('ElementType', 'nothing')}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_true(value: str) -> bool:
    """MetaIO looks at the first letter only."""
    return value[:1] in ("T", "t", "1")
