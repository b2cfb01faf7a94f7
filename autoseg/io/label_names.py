"""Names and colours of labels inside a NIfTI header, and in the files that viewers read beside a label map.

A NIfTI label map carries them twice, as header extensions: as JSON (code 6, "comment"), which needs nothing but a JSON
reader, and as the XML of Connectome Workbench (code 30, "CARET").

Source: nifti1.h (codes); Connectome Workbench's label volumes (XML); the manual of ITK-SNAP (label descriptions); the
documentation of 3D Slicer (colour tables); BIDS 1.8, "Imaging derivatives" (dseg.tsv).
"""

# nibabel's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import nibabel as nib
from pydantic import ValidationError

from autoseg.domain.label_table import Label
from autoseg.errors import DatasetError
from autoseg.io.content import broken
from autoseg.io.files import write_text

COMMENT_CODE = 6
"""NIFTI_ECODE_COMMENT: plain ASCII text."""

CARET_CODE = 30
"""NIFTI_ECODE_CARET: XML of Caret and Connectome Workbench."""

LABELS_KEY = "labels"
"""Of the JSON object in the comment: a list of {"value", "name", "colour"}."""

_CLEAR = (0, "Clear Label", (0, 0, 0))
"""Background, as ITK-SNAP calls it."""


def label_extensions(labels: Sequence[Label]) -> list[Any]:
    """Header extensions that name labels; none where there is none to name.

    Args:
        labels: See `label_table`.
    """
    if not labels:
        return []
    rows = [item.model_dump(mode="json") for item in labels]
    return [
        json_extension({LABELS_KEY: rows}),
        nib.nifti1.Nifti1Extension(CARET_CODE, _caret_xml(labels).encode()),
    ]


def json_extension(content: Mapping[str, Any]) -> Any:
    """A header extension that holds JSON, in ASCII, as code 6 asks for."""
    return nib.nifti1.Nifti1Extension(COMMENT_CODE, json.dumps(content, ensure_ascii=True).encode("ascii"))


def read_comment(path: str | Path) -> Mapping[str, Any]:
    """The JSON object in a NIfTI header's comment; empty where there is none.

    Raises:
        DatasetError: The header cannot be read.
    """
    try:
        extensions = nib.load(path).header.extensions  # type: ignore[attr-defined]
    except (OSError, nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError) as problem:
        raise broken(Path(path), f"the NIfTI header cannot be read ({problem})") from None
    for extension in extensions:
        if extension.get_code() != COMMENT_CODE:
            continue
        try:
            content = json.loads(extension.content.rstrip(b"\0"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            continue  # somebody else's comment
        if isinstance(content, dict):
            return content
    return {}


def read_label_names(path: str | Path) -> tuple[Label, ...]:
    """Names and colours in the header of a NIfTI label map that autoseg has written; none in others.

    Raises:
        DatasetError: The header cannot be read, or its names are not valid.
    """
    try:
        return tuple(Label.model_validate(row) for row in read_comment(path).get(LABELS_KEY, ()))
    except ValidationError as problem:
        raise DatasetError(f"{path}: the header's label names are not valid: {problem}") from None


def _caret_xml(labels: Sequence[Label]) -> str:
    rows = ['<Label Key="0" Red="0" Green="0" Blue="0" Alpha="0">background</Label>']
    for item in labels:
        red, green, blue = (f"{level:.6g}" for level in item.fractions)
        colour = f'Red="{red}" Green="{green}" Blue="{blue}" Alpha="1"'
        rows.append(f'<Label Key="{item.value}" {colour}>{escape(item.name)}</Label>')
    table = "".join(rows)
    return (
        '<?xml version="1.0" encoding="UTF-8"?><CaretExtension><VolumeInformation Index="0">'
        f"<LabelTable>{table}</LabelTable><StudyMetaDataLinkSet></StudyMetaDataLinkSet>"
        "<VolumeType>Label</VolumeType></VolumeInformation></CaretExtension>\n"
    )


def write_itksnap(path: Path, labels: Sequence[Label]) -> None:
    """Write a label description file of ITK-SNAP; atomic.

    Args:
        path: Ends in ".label.txt", by convention.
        labels: See `label_table`. Double quotes in a name become single ones, because the format has no escape.
    """
    head = (
        "################################################\n"
        "# ITK-SnAP Label Description File\n"
        "# File format:\n"
        "# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL\n"
        "################################################\n"
    )
    value, name, colour = _CLEAR
    lines = [_itksnap_row(value, colour, 0, name)]
    lines += [_itksnap_row(item.value, item.colour, 1, item.name) for item in labels]
    write_text(path, head + "\n".join(lines) + "\n")


def _itksnap_row(value: int, colour: Sequence[int], shown: int, name: str) -> str:
    red, green, blue = colour
    plain = " ".join(name.replace('"', "'").split())
    return f'{value:5d} {red:5d} {green:4d} {blue:4d} {shown:8d} {shown:2d} {shown:2d}    "{plain}"'


def write_colour_table(path: Path, labels: Sequence[Label]) -> None:
    """Write a colour table of 3D Slicer; atomic.

    Args:
        path: Ends in ".ctbl".
        labels: See `label_table`. Blanks in a name become underscores, because they separate the columns.
    """
    lines = [f"# Color table file {path.name}", f"# {len(labels) + 1} values", "0 background 0 0 0 0"]
    for item in labels:
        lines.append(f"{item.value} {'_'.join(item.name.split())} {' '.join(map(str, item.colour))} 255")
    write_text(path, "\n".join(lines) + "\n")


def write_bids_table(path: Path, labels: Sequence[Label]) -> None:
    """Write the table of a BIDS segmentation, with columns index, name and color; atomic.

    Args:
        path: Ends in "_dseg.tsv".
        labels: See `label_table`. Tabs and line ends in a name become blanks.
    """
    rows = ["index\tname\tcolor", "0\tbackground\t#000000"]
    rows += [f"{item.value}\t{' '.join(item.name.split())}\t{item.hexadecimal}" for item in labels]
    write_text(path, "\n".join(rows) + "\n")
