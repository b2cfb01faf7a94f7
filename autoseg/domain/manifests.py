"""Manifests: autoseg's own description of a data set, for files that lie wherever they lie.

As JSON::

    {"name": "Knees",
     "channels": ["T1", "T2"],
     "labels": [{"name": "femur", "value": 1}, {"name": "cartilage", "values": [2, 3]}],
     "ignore": 255,
     "cases": [{"id": "k1", "images": ["a/t1.nii.gz", "a/t2.nii.gz"], "labels": "a/seg.nii.gz", "patient": "p1",
                "annotated": ["femur"], "strata": {"site": "Lyon"}}]}

A channel that a case lacks is null in its "images". "pairs" may name classes that a mirror image turns into each other,
as [["left lung", "right lung"]]; without it they are told by their names, [] says that there are none. A channel that
new images may lack is {"name": "T2", "may_be_missing": true}; one that a case lacks is so by itself.

Of regions (classes with several values), "regions_class_order" may say which value each is written with; see
`domain/regions.py`. "annotated" names the classes that were annotated in the case, where not all were.

As CSV, one case a row, with the columns `id`, `image` (or `image_0`, `image_1`, ... for one file a channel, an empty
cell for a channel that the case lacks), `label`, `patient` and `annotated` (names separated by semicolons); the last
three are optional. Columns such as `stratify_site` and `stratify_scanner` give the strata, of which folds then have
like numbers. A table cannot say what labels and channels are called, and guessing would be silent guessing; so beside
`cases.csv` lies `cases.json` or `dataset.json` with "channels" and "labels" as above, or as in nnU-Net's
`dataset.json`. Paths are relative to the manifest's folder. A case without a label map is set aside for testing.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from autoseg.domain.dataset import Channel, LabelClass, LabelSchema
from autoseg.domain.descriptions import DescriptionProblem, parse_channels, parse_labels
from autoseg.domain.values import Value, validation_problems

_IMAGE_COLUMN = re.compile(r"^image_(\d+)$")
_STRATUM_PREFIX = "stratify_"
_COLUMNS_HINT = (
    "Columns are id, image (or image_0, image_1, ...), label, patient, annotated, and stratify_... for even folds."
)


@dataclass(frozen=True, slots=True)
class ManifestCase:
    """A row of a manifest; paths as written, None or empty for a channel that the case lacks."""

    id: str
    images: tuple[str | None, ...]
    labels: str | None
    patient: str | None
    annotated: tuple[str, ...] | None = None
    strata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest as understood."""

    name: str
    channels: tuple[Channel, ...]
    labels: LabelSchema
    cases: tuple[ManifestCase, ...]


class LabelEntry(Value):
    """A class as written: its name with one value, or with several."""

    name: str
    value: int | None = None
    values: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.value is None) == (self.values is None):
            raise ValueError(f'label {self.name!r} needs either "value" or "values"')
        return self

    @property
    def all_values(self) -> tuple[int, ...]:
        """Its values."""
        return self.values if self.values is not None else (self.value or 0,)


class _CaseEntry(Value):
    id: str
    image: str | None = None
    images: tuple[str | None, ...] | None = None
    labels: str | None = None
    patient: str | None = None
    annotated: tuple[str, ...] | None = None
    strata: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_images(self) -> Self:
        if (self.image is None) == (not self.images):
            raise ValueError(f'case {self.id!r} needs either "image" or "images"')
        if self.images and not any(self.images):
            raise ValueError(f"case {self.id!r} lacks every channel")
        if self.images and "" in self.images:
            raise ValueError(f"case {self.id!r} has an image without a name; write null for a channel that it lacks")
        return self


class _Description(Value):
    """What a manifest says besides its cases."""

    name: str = ""
    channels: tuple[str | Channel, ...]
    labels: tuple[LabelEntry, ...]
    ignore: int | None = None
    regions_class_order: tuple[int, ...] | None = None
    pairs: tuple[tuple[str, str], ...] | None = None


class _JsonManifest(_Description):
    cases: tuple[_CaseEntry, ...]


def read_json_manifest(path: Path, data: dict[str, Any]) -> Manifest:
    """A JSON manifest.

    Args:
        path: The file, for the default name.
        data: Its content.

    Raises:
        DescriptionProblem: Keys are unknown, missing or wrong; all are listed.
    """
    try:
        content = _JsonManifest.model_validate_json(json.dumps(data))
        labels = _schema(content)
    except ValidationError as problem:
        raise DescriptionProblem(validation_problems(problem)) from None
    cases = tuple(
        ManifestCase(
            item.id, item.images or (item.image or "",), item.labels, item.patient, item.annotated, strata=item.strata
        )
        for item in content.cases
    )
    return Manifest(content.name or path.stem, _channels(content), labels, cases)


def _channels(content: _Description) -> tuple[Channel, ...]:
    if not content.channels:
        raise DescriptionProblem(["channels: at least one channel is needed"])
    return tuple(item if isinstance(item, Channel) else Channel(name=item) for item in content.channels)


def _schema(content: _Description) -> LabelSchema:
    return LabelSchema(
        classes=_classes(content.labels),
        ignore=content.ignore,
        regions_class_order=content.regions_class_order,
        pairs=content.pairs,
    )


def schema_of(entries: Sequence[LabelEntry]) -> LabelSchema:
    """The labels of such entries, without further rules.

    Raises:
        DescriptionProblem: They contradict each other.
    """
    try:
        return LabelSchema(classes=_classes(entries))
    except ValidationError as problem:
        raise DescriptionProblem(validation_problems(problem)) from None


def _classes(entries: Sequence[LabelEntry]) -> tuple[LabelClass, ...]:
    foreground = [item for item in entries if item.all_values != (0,)]  # a background entry says nothing new
    return tuple(LabelClass(name=item.name, values=item.all_values) for item in foreground)


def read_csv_manifest(path: Path) -> Manifest:
    """A CSV manifest with its description beside it.

    Raises:
        DescriptionProblem: Columns or rows are wrong, or no description lies beside it; all problems are listed.
    """
    name, channels, labels = _description_beside(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream, restkey="(more)", strict=True))
            columns = [] if not rows else [str(item) for item in rows[0]]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DescriptionProblem([f"it is not readable as CSV: {problem}"]) from None
    if not rows:
        raise DescriptionProblem(["the table has no rows"], hint=_COLUMNS_HINT)
    image_columns = _image_columns(columns)
    problems: list[str] = []
    cases = []
    for number, row in enumerate(rows, start=2):  # line 1 is the header
        values = {key: item.strip() for key, item in row.items() if isinstance(item, str)}
        images = tuple(values.get(column, "") for column in image_columns)
        if not values.get("id") or not any(images) or "(more)" in row:
            problems.append(f"line {number}: expected an id and {', '.join(image_columns)}, got {list(row.values())}")
            continue
        label, patient, names = (values.get(column) or None for column in ("label", "patient", "annotated"))
        annotated = None if names is None else tuple(name.strip() for name in names.split(";") if name.strip())
        strata = {key.removeprefix(_STRATUM_PREFIX): item for key, item in values.items() if _is_stratum(key)}
        cases.append(ManifestCase(values["id"], images, label, patient, annotated, strata=strata))
    if problems:
        raise DescriptionProblem(problems)
    return Manifest(name, channels, labels, tuple(cases))


def _is_stratum(column: str) -> bool:
    return column.startswith(_STRATUM_PREFIX) and column != _STRATUM_PREFIX


def _image_columns(columns: Sequence[str]) -> list[str]:
    numbered = sorted(
        (item for item in columns if _IMAGE_COLUMN.match(item)), key=lambda item: int(item[len("image_") :])
    )
    problems = []
    known = ("id", "image", "label", "patient", "annotated", "(more)", *numbered)
    unknown = [item for item in columns if item not in known and not _is_stratum(item)]
    if unknown:
        problems.append(f"unknown columns: {', '.join(unknown)}")
    if "id" not in columns:
        problems.append("there is no column id")
    if ("image" in columns) == bool(numbered):
        problems.append("there must be either a column image or columns image_0, image_1, ...")
    if numbered != [f"image_{number}" for number in range(len(numbered))]:
        problems.append(f"image columns must be numbered from 0 without gaps, got {', '.join(numbered)}")
    if problems:
        raise DescriptionProblem(problems, hint=_COLUMNS_HINT)
    return numbered or ["image"]


def _description_beside(path: Path) -> tuple[str, tuple[Channel, ...], LabelSchema]:
    candidates = (path.with_suffix(".json"), path.parent / "dataset.json")
    source = next((item for item in candidates if item.is_file()), None)
    if source is None:
        raise DescriptionProblem(
            [
                "a table does not say what its labels and channels are, and neither "
                f"{candidates[0].name} nor dataset.json is beside it"
            ],
            hint='Write one of them, such as {"channels": ["T1"], "labels": [{"name": "tumour", "value": 1}]}.',
        )
    try:
        data = json.loads(source.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise DescriptionProblem([f"{source} is not readable JSON: {problem}"]) from None
    if not isinstance(data, dict):
        raise DescriptionProblem([f"{source} must be a JSON object"])
    if "channels" not in data:
        return str(data.get("name") or path.stem), parse_channels(data), parse_labels(data)
    try:
        content = _Description.model_validate_json(json.dumps(data))
        return content.name or path.stem, _channels(content), _schema(content)
    except ValidationError as problem:
        raise DescriptionProblem([f"{source}: {line}" for line in validation_problems(problem)]) from None
