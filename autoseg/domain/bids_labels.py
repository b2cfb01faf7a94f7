"""What the values of BIDS segmentations mean: `dseg.tsv` tables, or a "LabelMap" in the JSON beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from autoseg.domain.bids_files import MASK_SUFFIX, BidsFile, parse_stem
from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.descriptions import DescriptionProblem, parse_labels
from autoseg.domain.values import validation_problems

_LABEL_MAP = "LabelMap"
_HINT = (
    "Put a table dseg.tsv with the columns index and name (separated by tabs) into the folder of the segmentations, "
    'or name the labels in a selection: {"bids": ..., "labels": [{"name": "tumour", "value": 1}]}.'
)


def label_schema(root: Path, segmentations: Sequence[BidsFile]) -> LabelSchema:
    """The classes of all segmentations of a data set.

    Args:
        root: The folder of the derivative, at which the search for tables ends.
        segmentations: Of one kind; masks have one class.

    Raises:
        DescriptionProblem: Names are missing, cannot be read, or differ between cases.
    """
    names: dict[int, str] = {}
    tables: dict[Path, dict[int, str]] = {}
    problems = []
    for item in segmentations:
        if item.suffix == MASK_SUFFIX:
            found = {1: item.entities.get("label") or item.entities.get("desc") or MASK_SUFFIX}
        else:
            table = _table_of(item, root)
            if table is None:
                raise DescriptionProblem([f"nothing says what the values of {item.path} mean"], hint=_HINT)
            found = tables.setdefault(table, {}) or _read_table(table)
            tables[table] = found
        for value, name in found.items():
            if names.setdefault(value, name) != name:
                problems.append(f"value {value} is {names[value]!r} in some cases and {name!r} in {item.path}")
    if problems:
        raise DescriptionProblem(problems, hint=_HINT)
    try:
        classes = [LabelClass(name=name, values=(value,)) for value, name in sorted(names.items()) if value != 0]
        return LabelSchema(classes=tuple(classes))
    except ValidationError as problem:
        raise DescriptionProblem([f"labels: {line}" for line in validation_problems(problem)], hint=_HINT) from None


def _table_of(item: BidsFile, root: Path) -> Path | None:
    """The table that applies to a file: the nearest folder wins, in it the one that shares most entities."""
    folder = item.path.parent
    while True:
        fitting = [
            (len(parsed[0]), path.suffix == ".tsv", path)
            for path in sorted(folder.glob(f"*{item.suffix}.*"))
            if (parsed := _parsed_table(path)) is not None
            and parsed[1] == item.suffix
            and all(item.entities.get(key) == value for key, value in parsed[0].items())
        ]
        if fitting:
            return max(fitting)[2]
        if folder in (root, folder.parent):
            return None
        folder = folder.parent


def _parsed_table(path: Path) -> tuple[Mapping[str, str], str] | None:
    if path.suffix == ".tsv" or (path.suffix == ".json" and _has_label_map(path)):
        return parse_stem(path.stem)
    return None


def _has_label_map(path: Path) -> bool:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return False  # most of these files say other things, and none of them is needed
    return isinstance(data, dict) and isinstance(data.get(_LABEL_MAP), dict)


def _read_table(path: Path) -> dict[int, str]:
    if path.suffix == ".json":
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        schema = parse_labels({"labels": data[_LABEL_MAP]})
        return {item.values[0]: item.name for item in schema.classes}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DescriptionProblem([f"{path} is not readable as a table: {problem}"]) from None
    names: dict[int, str] = {}
    for number, row in enumerate(rows, start=2):  # line 1 is the header
        index, name = (row.get("index") or "").strip(), (row.get("name") or "").strip()
        if not name or not index.isdecimal():
            raise DescriptionProblem([f"{path}, line {number}: expected an index and a name, got {list(row.values())}"])
        names[int(index)] = name
    if not names:
        raise DescriptionProblem([f"{path} has no rows"], hint=_HINT)
    return names
