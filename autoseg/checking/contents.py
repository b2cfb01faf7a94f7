"""Opens the files of one case and says what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import Case, Dataset, LabelSchema
from autoseg.domain.findings import Finding, Findings
from autoseg.domain.geometry import (
    OBLIQUE_WARNING_DEGREES,
    Geometry,
    Volume,
    degrees_off_axis,
    grid_mismatch,
)
from autoseg.errors import DatasetError, GeometryError
from autoseg.io.images import read_header, read_image, read_labels

_LISTED_VALUES = 8
_TABLE_LIMIT = 1 << 16
"""Label values up to here are counted in a table, which is many times faster than sorting."""


@dataclass(frozen=True, slots=True)
class CaseFacts:
    """What the check of one case gave.

    Attributes:
        case: Its id.
        num_files: Files opened.
        has_labels: Whether the label map could be read.
        label_values: Foreground values in its label map.
        findings: What is wrong or worth knowing.
    """

    case: str
    num_files: int
    has_labels: bool = False
    label_values: frozenset[int] = frozenset()
    findings: tuple[Finding, ...] = field(default=())


def check_case(case: Case, dataset: Dataset) -> CaseFacts:
    """Read every file of a case once; problems become findings, each with its file.

    Args:
        case: A case whose files exist.
        dataset: Gives channels and labels.
    """
    found = Findings()
    grid = _check_images(case, len(dataset.channels), found)
    values: dict[int, int] | None = None
    if case.labels is not None:
        values = _check_labels(case.id, case.labels, grid, dataset.labels, found)
        _check_annotated(case, dataset.labels, values or {}, found)
    return CaseFacts(
        case=case.id,
        num_files=len(case.files),
        has_labels=values is not None,
        label_values=frozenset(values or {}) - {0},
        findings=tuple(found.items),
    )


def _check_images(case: Case, num_channels: int, found: Findings) -> Geometry | None:
    """Check every image file; returns the grid of the first that can be read."""
    grid: Geometry | None = None
    per_file = case.channels_in_a_file(num_channels)
    for file in case.images:
        try:
            volume = read_image(file, per_file)
        except DatasetError as problem:
            _add_error(problem, case.id, file, _code(problem), found)
            continue
        _check_intensities(case.id, file, volume, found)
        if grid is None:
            grid = volume.geometry
            _check_orientation(case.id, file, grid, found)
            _check_spacing(case.id, file, grid, found)
            continue
        mismatch = grid_mismatch(volume.geometry, grid)
        if mismatch:
            found.add(
                "channel-grid",
                f"the channel does not lie on the grid of {Path(case.images[0]).name}: {mismatch}",
                case=case.id,
                file=file,
                hint="Resample all channels of a case onto one grid.",
            )
    return grid


def _code(problem: DatasetError) -> str:
    return "bad-affine" if isinstance(problem, GeometryError) else "unreadable-image"


def _add_error(problem: DatasetError, case: str, file: str, code: str, found: Findings) -> None:
    """Turn an error into a finding; the file is a field there, so it need not lead the message."""
    found.add(code, problem.message.removeprefix(f"{file}: "), case=case, file=file, hint=problem.hint)


def _check_intensities(case: str, file: str, volume: Volume, found: Findings) -> None:
    for number, channel in enumerate(volume.array):
        low, high = channel.min(), channel.max()
        which = f"channel {number} " if volume.array.shape[0] > 1 else "the image "
        if not (np.isfinite(low) and np.isfinite(high)):
            count = int(np.count_nonzero(~np.isfinite(channel)))
            found.add(
                "not-finite",
                f"{which}holds NaN or infinite values in {count:,} of {channel.size:,} voxels",
                case=case,
                file=file,
                hint="Replace them, for example by the value of air or background.",
            )
        elif low == high:
            found.add(
                "constant-image",
                f"{which}has the value {float(low):g} everywhere",
                case=case,
                file=file,
                severity="warning",
                hint="There is nothing to learn from it; was it exported in full?",
            )


def _check_orientation(case: str, file: str, grid: Geometry, found: Findings) -> None:
    degrees = degrees_off_axis(grid.affine)
    if degrees > OBLIQUE_WARNING_DEGREES:
        found.add(
            "oblique",
            f"the axes are {degrees:.0f} degrees off the body's, so which axis is which is nearly a coin toss",
            case=case,
            file=file,
            severity="warning",
        )


def _check_spacing(case: str, file: str, grid: Geometry, found: Findings) -> None:
    if grid.stated == "nothing":
        found.add(
            "no-spacing",
            "the TIFF stack does not state its voxel size along all three axes, so its voxels are taken for cubes",
            case=case,
            file=file,
            severity="warning",
            hint='Save it with its scale (ImageJ, OME-TIFF), or put {"spacing": [between pages, rows, columns]} in '
            "millimetres into a .json file of the case's name beside it.",
        )


def _check_labels(
    case: str, file: str, grid: Geometry | None, schema: LabelSchema, found: Findings
) -> dict[int, int] | None:
    """Check a label map; returns its values with their numbers of voxels, None when it cannot be read."""
    try:
        labels, geometry = read_labels(file)
    except DatasetError as problem:
        code = "bad-affine" if isinstance(problem, GeometryError) else "unreadable-labels"
        _add_error(problem, case, file, code, found)
        return None
    mismatch = "" if grid is None else grid_mismatch(geometry, grid)
    if mismatch:
        found.add(
            "label-grid",
            f"the label map does not lie on its image's grid: {mismatch}",
            case=case,
            file=file,
            hint="Export image and labels from one grid, or resample one onto the other.",
        )
    if "float" in read_header(file).dtype:
        found.add(
            "float-labels",
            "the label map is stored as floating-point numbers; they are whole, and are read as such",
            case=case,
            file=file,
            severity="note",
        )
    values = count_values(labels)
    _check_values(case, file, values, schema, found)
    return values


def _check_values(case: str, file: str, values: dict[int, int], schema: LabelSchema, found: Findings) -> None:
    unknown = sorted(set(values) - schema.declared_values)
    if unknown:
        listed = ", ".join(f"{value} ({values[value]:,} voxels)" for value in unknown[:_LISTED_VALUES])
        more = f" and {len(unknown) - _LISTED_VALUES} more" if len(unknown) > _LISTED_VALUES else ""
        declared = ", ".join(str(value) for value in sorted(schema.declared_values))
        found.add(
            "undeclared-labels",
            f"label values that are not declared: {listed}{more}; declared are {declared}",
            case=case,
            file=file,
            hint="Name them in the labels of the data set's description, or correct the label map.",
        )
    elif not set(values) - {0, schema.ignore}:
        what = "background" if set(values) == {0} else "background and voxels to ignore"
        found.add("empty-labels", f"the label map holds {what} only", case=case, file=file, severity="warning")


def _check_annotated(case: Case, schema: LabelSchema, values: Mapping[int, int], found: Findings) -> None:
    """Voxels of classes that were not annotated in the case contradict each other."""
    if case.annotated is None:
        return
    known = {value for item in schema.classes for value in item.values if item.name in case.annotated}
    others = [item for item in schema.classes if item.name not in case.annotated]
    strays = {item.name: sum(values.get(value, 0) for value in {*item.values} - known) for item in others}
    listed = ", ".join(f"{name} ({count:,} voxels)" for name, count in strays.items() if count)
    if listed:
        found.add(
            "stray-labels",
            f"classes that are not among those annotated in this case are in its label map: {listed}",
            case=case.id,
            file=case.labels or "",
            severity="warning",
            hint="Name them among the annotated classes if they were annotated; else these voxels teach nothing.",
        )


def count_values(labels: NDArray[np.integer[Any]]) -> dict[int, int]:
    """How many voxels have each value.

    Args:
        labels: Any shape, integer.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= _TABLE_LIMIT:
        values, counts = np.unique(labels, return_counts=True)
        return {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    table = np.zeros(high + 1, np.int64)
    for index in range(labels.shape[-1]):  # slice by slice: counting widens the labels to 8 bytes
        table += np.bincount(labels[..., index].ravel(order="K"), minlength=high + 1)
    return {int(value): int(table[value]) for value in np.flatnonzero(table)}
