"""Reads a label map and says what is wrong with its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.checking.facts import LabelFacts
from autoseg.checking.prints import content_digest
from autoseg.checking.structures import count_values, measure_structures
from autoseg.domain.dataset import Case, LabelSchema
from autoseg.domain.findings import Findings
from autoseg.domain.geometry import Geometry, grid_mismatch
from autoseg.errors import DatasetError
from autoseg.io.images import ImageHeader, read_image, whole_numbers

MANY_VALUES = 64
"""So many values that are not declared are no forgotten classes: such a file is an image.

The largest schemes in use name 117 structures, but they are declared; the sets of this project have at most 37 classes.
"""

PROBABILITY_LIMIT = 1.5
"""Probabilities that were resampled with splines overshoot 1 (a real soft label reaches 1.06), but not by half."""

_LISTED_VALUES = 8
_PROBABILITY_CUT = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class LabelMap:
    """A label map that could be read.

    Attributes:
        array: (I, J, K), integer.
        facts: What is remembered of it.
    """

    array: NDArray[np.integer[Any]]
    facts: LabelFacts


def check_labels(
    case: Case, file: str, header: ImageHeader, grid: Geometry | None, schema: LabelSchema, found: Findings
) -> LabelMap | None:
    """Read and check the label map of a case; None when it cannot be used.

    Args:
        case: The case.
        file: Its label map.
        header: Of that file.
        grid: Of the images, where one could be read.
        schema: The classes.
        found: Takes the findings.
    """
    _check_grid(case.id, file, header.geometry, grid, found)
    try:
        stored = read_image(file, 1).array[0]
    except (DatasetError, OSError) as problem:
        told = problem if isinstance(problem, DatasetError) else DatasetError(f"the file cannot be read: {problem}")
        message = told.message.removeprefix(f"{file}: ")
        found.add("unreadable-labels", message, case=case.id, file=file, hint=told.hint)
        return None
    try:
        labels = whole_numbers(file, stored)
    except DatasetError as problem:
        _add_not_whole(case.id, file, stored, problem, found)
        return None
    if stored.dtype.kind == "f":
        found.add(
            "float-labels",
            "the label values are floating-point numbers; they are whole, and are read as such",
            case=case.id,
            file=file,
            severity="note",
        )
    values = count_values(labels)
    _check_values(case.id, file, values, schema, found)
    _check_annotated(case, schema, values, found)
    structures = measure_structures(labels, values, header.geometry, schema)
    foreground = sum(count for value, count in values.items() if value not in (0, schema.ignore))
    return LabelMap(labels, LabelFacts(content_digest(labels), values, foreground, structures))


def _check_grid(case: str, file: str, geometry: Geometry, grid: Geometry | None, found: Findings) -> None:
    mismatch = "" if grid is None else grid_mismatch(geometry, grid)
    if mismatch:
        found.add(
            "label-grid",
            f"the label map does not lie on its image's grid: {mismatch}",
            case=case,
            file=file,
            hint="Export image and labels from one grid, or resample one onto the other.",
        )


def _add_not_whole(case: str, file: str, stored: NDArray[Any], problem: DatasetError, found: Findings) -> None:
    """Say what a label map of fractions most likely is: probabilities, an image, or damaged."""
    finite = stored[np.isfinite(stored)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if finite.size < stored.size:
        code, message, hint = "labels-not-whole", problem.message.removeprefix(f"{file}: "), problem.hint
    elif low >= -(PROBABILITY_LIMIT - 1) and high <= PROBABILITY_LIMIT:
        between = int(np.count_nonzero((finite > 0) & (finite < 1) & (finite != np.rint(finite))))
        kept = int(np.count_nonzero(finite >= _PROBABILITY_CUT))
        code = "probability-map"
        message = (
            f"the label map holds probabilities, not classes: values from {low:.4g} to {high:.4g}, {between:,} of "
            f"{stored.size:,} voxels strictly between 0 and 1; cut at {_PROBABILITY_CUT:g}, {kept:,} voxels are left"
        )
        hint = "Cut it at a threshold and save integers."
    elif np.unique(finite[:: max(1, finite.size // 10_000)]).size > MANY_VALUES:
        code = "image-as-labels"
        message = f"the label map looks like an image: values from {low:.4g} to {high:.4g}, most of them not whole"
        hint = "Name the file that holds the labels."
    else:
        code, message, hint = "labels-not-whole", problem.message.removeprefix(f"{file}: "), problem.hint
    found.add(code, message, case=case, file=file, hint=hint, voxels=int(stored.size))


def _check_values(case: str, file: str, values: Mapping[int, int], schema: LabelSchema, found: Findings) -> None:
    unknown = sorted(set(values) - schema.declared_values)
    if len(unknown) > MANY_VALUES:
        found.add(
            "image-as-labels",
            f"the label map looks like an image: {len(values):,} different values from {min(values)} to {max(values)}, "
            f"of which {len(unknown):,} are not declared",
            case=case,
            file=file,
            hint="Name the file that holds the labels, or every label value in the data set's description.",
            voxels=sum(values[value] for value in unknown),
        )
    elif unknown:
        listed = ", ".join(f"{value} ({values[value]:,} voxels)" for value in unknown[:_LISTED_VALUES])
        more = f" and {len(unknown) - _LISTED_VALUES} more" if len(unknown) > _LISTED_VALUES else ""
        declared = ", ".join(str(value) for value in sorted(schema.declared_values))
        found.add(
            "undeclared-labels",
            f"label values that are not declared: {listed}{more}; declared are {declared}",
            case=case,
            file=file,
            hint="Name them in the labels of the data set's description, or correct the label map.",
            voxels=sum(values[value] for value in unknown),
        )
    elif not set(values) - {0, schema.ignore}:
        what = "background" if set(values) == {0} else "background and voxels to ignore"
        found.add(
            "empty-labels",
            f"the label map holds {what} only",
            case=case,
            file=file,
            severity="warning",
            hint="Right where nothing is to be found; else the case teaches the network to find nothing.",
        )


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
            voxels=sum(strays.values()),
        )
