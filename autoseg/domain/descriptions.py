"""Channels and labels as the `dataset.json` of the Medical Segmentation Decathlon and of nnU-Net name them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from autoseg.domain.dataset import Channel, LabelClass, LabelSchema
from autoseg.domain.values import validation_problems


class DescriptionProblem(Exception):
    """A description of a data set that cannot be understood; `messages` says each problem in words."""

    def __init__(self, messages: Sequence[str], *, hint: str = "") -> None:
        super().__init__("; ".join(messages))
        self.messages = tuple(messages)
        self.hint = hint


def parse_channels(data: dict[str, Any]) -> tuple[Channel, ...]:
    """The channels of a `dataset.json`: `channel_names` (nnU-Net) or `modality` (MSD), in the order of their numbers.

    Raises:
        DescriptionProblem: There are none, or their numbers are not 0, 1, 2, ...
    """
    named = data.get("channel_names", data.get("modality"))
    if isinstance(named, list) and named:
        return tuple(Channel(name=str(item)) for item in named)
    if not isinstance(named, dict) or not named:
        raise DescriptionProblem(['it names no channels; expected "channel_names": {"0": "T1", ...} (or "modality")'])
    if sorted(named) != sorted(str(number) for number in range(len(named))):
        raise DescriptionProblem([f"channels must be numbered 0 to {len(named) - 1}, got {', '.join(named)}"])
    return tuple(Channel(name=str(named[str(number)])) for number in range(len(named)))


def parse_labels(data: dict[str, Any]) -> LabelSchema:
    """The labels of a `dataset.json`: {"0": "background", "1": name} (MSD) or {"background": 0, name: value or values}.

    Ordinary classes are put in the order of their values, regions in the order of the file, which is also that of
    `regions_class_order`. Where there are no regions such an order means nothing. "pairs", a key of autoseg's own, may
    name the classes that a mirror image turns into each other.

    Raises:
        DescriptionProblem: The labels cannot be understood, or contradict each other.
    """
    labels = data.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise DescriptionProblem(['it names no labels; expected "labels": {"background": 0, "tumour": 1, ...}'])
    by_name = _labels_by_name(labels)
    ignore = by_name.pop("ignore", None)
    foreground = {name: values for name, values in by_name.items() if values != (0,)}
    if any(0 in values for values in foreground.values()):
        raise DescriptionProblem(["a region may not contain 0, which is the background"])
    order: tuple[int, ...] | None = None
    if all(len(values) == 1 for values in foreground.values()):
        foreground = dict(sorted(foreground.items(), key=lambda item: item[1]))
    else:
        order = _written_values(data.get("regions_class_order"))
    try:
        classes = tuple(LabelClass(name=name, values=values) for name, values in foreground.items())
        return LabelSchema(
            classes=classes,
            ignore=None if ignore is None else ignore[0],
            regions_class_order=order,
            pairs=_declared_pairs(data.get("pairs")),
        )
    except ValidationError as problem:
        raise DescriptionProblem([f"labels: {line}" for line in validation_problems(problem)]) from None


def _declared_pairs(pairs: Any) -> tuple[tuple[str, str], ...] | None:
    """Names of classes (left, right) that a mirror image turns into each other; None where nothing is declared."""
    if pairs is None:
        return None
    is_sound = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair) for pair in pairs
    )
    if not is_sound:
        raise DescriptionProblem([f'pairs must be a list such as [["left lung", "right lung"]], got {pairs!r}'])
    return tuple((left, right) for left, right in pairs)


def _labels_by_name(labels: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if all(_as_int(key) is not None for key in labels) and all(isinstance(item, str) for item in labels.values()):
        if len(set(labels.values())) != len(labels):
            raise DescriptionProblem(["two labels have the same name"])
        return {name: (int(key),) for key, name in labels.items()}
    out = {}
    for name, item in labels.items():
        values = [_as_int(value) for value in (item if isinstance(item, list) else [item])]
        if not values or any(value is None for value in values):
            raise DescriptionProblem([f"label {name!r} must be an integer or a list of integers, got {item!r}"])
        out[str(name)] = tuple(value for value in values if value is not None)
    return out


def _as_int(item: Any) -> int | None:
    if isinstance(item, bool):
        return None
    if isinstance(item, int):
        return item
    if isinstance(item, str) and re.fullmatch(r"-?\d+", item.strip()):
        return int(item)
    return int(item) if isinstance(item, float) and item.is_integer() else None


def _written_values(order: Any) -> tuple[int, ...] | None:
    """The label values of `regions_class_order`; None where there is none."""
    if order is None:
        return None
    values = [_as_int(value) for value in order] if isinstance(order, list) else [None]
    if any(value is None for value in values):
        raise DescriptionProblem([f"regions_class_order must be a list of label values, one a region, got {order!r}"])
    return tuple(value for value in values if value is not None)
