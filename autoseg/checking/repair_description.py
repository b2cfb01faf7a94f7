"""The `dataset.json` of a repaired copy: nnU-Net's form, with what the original said besides."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.domain import missing
from autoseg.domain.dataset import Case, Dataset, Fold, LabelSchema, Splits
from autoseg.domain.grouping import PATIENTS_KEY
from autoseg.errors import DatasetError

_LAYOUT_KEYS = ("training", "test", "dataset", "modality", "numTest", "cases")
"""Where the original's files lie. The copy's follow from their names."""

_BACKGROUND, _IGNORE = "background", "ignore"
_ORDER_KEY, _PAIRS_KEY = "regions_class_order", "pairs"
_CASE_KEYS = {"patient": PATIENTS_KEY, "missing": missing.KEY}
"""What a description calls the fields of its cases, where it has another word."""


def described_content(description: Path) -> dict[str, Any]:
    """What a data set's description holds, if it is JSON; tables and broken files hold nothing.

    Args:
        description: The file.
    """
    if description.suffix.lower() != ".json":
        return {}
    try:
        data = json.loads(description.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def new_description(
    original: Mapping[str, Any],
    dataset: Dataset,
    cases: Sequence[Case],
    tests: Sequence[Case],
    schema: LabelSchema,
    file_ending: str,
) -> dict[str, Any]:
    """The content of the copy's `dataset.json`.

    Args:
        original: Of the original's; keys that are not about its layout are kept.
        dataset: The original.
        cases: Its training cases that are in the copy.
        tests: Its test cases that are in the copy.
        schema: The labels with their new values.
        file_ending: Of the copy's label maps.

    Raises:
        DatasetError: A class is called as nnU-Net calls something else.
    """
    taken = sorted({_BACKGROUND, _IGNORE} & set(schema.names))
    if taken:
        raise DatasetError(
            f"a class is called {taken[0]!r}, which a dataset.json keeps for something else",
            hint="Give the class another name.",
        )
    is_ours = "cases" in original or "schema_version" in original
    kept = {} if is_ours else {key: item for key, item in original.items() if key not in _LAYOUT_KEYS}
    values = {item.name: item.values[0] if len(item.values) == 1 else list(item.values) for item in schema.classes}
    ignore = {} if schema.ignore is None else {_IGNORE: schema.ignore}
    about = _about_cases((*cases, *tests))
    for key in (*_CASE_KEYS.values(), *Case.model_fields):
        kept.pop(key, None)
    written: dict[str, Any] = {}
    if schema.regions_class_order is not None:
        written[_ORDER_KEY] = list(schema.regions_class_order)
    if schema.pairs is not None:
        written[_PAIRS_KEY] = [list(pair) for pair in schema.pairs]
    ours = {
        "name": dataset.name,
        "channel_names": {str(number): item.name for number, item in enumerate(dataset.channels)},
        "labels": {_BACKGROUND: 0} | values | ignore,
        **written,
        "numTraining": len(cases),
        "file_ending": file_ending,
    }
    return ours | {key: item for key, item in kept.items() if key not in ours} | about


def _about_cases(cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """What is known of single cases besides their files: patients, strata and whatever else a case may say."""
    about: dict[str, dict[str, Any]] = {}
    for case in cases:
        for key, item in case.model_dump(mode="json", exclude={"id", "images", "labels"}).items():
            if item:
                about.setdefault(_CASE_KEYS.get(key, key), {})[case.id] = item
    return about


def kept_splits(splits: Splits, kept: Collection[str]) -> Splits | None:
    """The folds without the cases that were set aside; None when a side of a fold would be empty."""
    folds = tuple(
        Fold(
            train=tuple(item for item in fold.train if item in kept),
            validation=tuple(item for item in fold.validation if item in kept),
        )
        for fold in splits.folds
    )
    return splits.model_copy(update={"folds": folds}) if all(fold.train and fold.validation for fold in folds) else None
