"""One table of all cases in an output folder: each case leaves its rows, and the table is put together from them.

A case's rows lie in OUT/statistics/CASE.json, written before its label map. So the table is whole however a prediction
ended: another start, another shard or another process adds to it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from autoseg.domain.values import Value
from autoseg.errors import DatasetError
from autoseg.inference.statistics import CaseStatistics, ClassStatistics
from autoseg.io.files import Lock, read_text, write_text

SCHEMA_VERSION = 1

PARTS_FOLDER = "statistics"
TABLE_NAME = "statistics"
"""OUT/statistics.json and OUT/statistics.csv."""

_LOCK = ".lock"
_COLUMNS = (
    "voxels",
    "volume_ml",
    "volume_low_ml",
    "volume_high_ml",
    "volume_expected_ml",
    "pieces",
    "touches_border",
)
_MEASURES = ("mean", "sd", "median", "minimum", "maximum")


class StatisticsTable(Value):
    """Every case of an output folder, by its id."""

    schema_version: int = SCHEMA_VERSION
    cases: tuple[CaseStatistics, ...]


def write_part(out: Path, rows: CaseStatistics) -> Path:
    """Leave the rows of a case; atomic. Returns where."""
    name = quote(rows.case, safe=" ")
    # Names that begin with a dot are those of files being written.
    path = out / PARTS_FOLDER / f"{name.replace('.', '%2E', 1) if name.startswith('.') else name}.json"
    write_text(path, rows.to_json())
    return path


def write_table(out: Path) -> StatisticsTable | None:
    """Put the table together from the rows of all cases whose label map is there, and write it as JSON and CSV.

    Args:
        out: The output folder.

    Returns:
        The table; None where no case has left rows.

    Raises:
        DatasetError: Rows of a case cannot be read.
    """
    folder = out / PARTS_FOLDER
    if not folder.is_dir():
        return None
    # What another process has written since is read, or it reads what this one has: the last table is whole.
    with Lock(folder / _LOCK, what=f"the table in {out}", wait=True):
        parts = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
        cases = [CaseStatistics.from_json(read_text(path, DatasetError), path, DatasetError) for path in parts]
        table = StatisticsTable(cases=tuple(case for case in cases if (out / case.label_map).is_file()))
        write_text(out / f"{TABLE_NAME}.json", table.to_json())
        write_text(out / f"{TABLE_NAME}.csv", _as_csv(table))
    return table


def _as_csv(table: StatisticsTable) -> str:
    """A row for each case and class; a class that lacks a number has an empty cell."""
    rows = [(case, item) for case in table.cases for item in case.classes]
    channels = list(dict.fromkeys(found.channel for _, item in rows for found in item.intensities))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measures = [f"{channel} {measure}" for channel in channels for measure in _MEASURES]
    writer.writerow(["case", "class", "values", *_COLUMNS, *measures, "outside"])
    for case, item in rows:
        outside = " ".join(sorted({found.what for found in case.outside}))
        numbers = [*_numbers(item), *_intensities(item, channels)]
        writer.writerow([case.case, item.name, " ".join(map(str, item.values)), *map(_cell, numbers), outside])
    return text.getvalue()


def _numbers(item: ClassStatistics) -> Iterable[Any]:
    return (getattr(item, name) for name in _COLUMNS)


def _intensities(item: ClassStatistics, channels: Sequence[str]) -> Iterable[Any]:
    by_channel = {found.channel: found for found in item.intensities}
    for channel in channels:
        found = by_channel.get(channel)
        yield from (None if found is None else getattr(found, measure) for measure in _MEASURES)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.10g}" if isinstance(value, float) else str(value)
