"""Rules about connected components, applied to a label map: what they mean is said in `domain.inference`.

Beside the label map itself memory is needed for one mask of it, and for component numbers in the box that the classes
of a rule fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import (
    Connectivity,
    DropSmall,
    FillHoles,
    KeepLargest,
    Rule,
    Threshold,
    rules_problems,
)
from autoseg.domain.regions import own_value
from autoseg.errors import ConfigError

Labels = TypeVar("Labels", bound=np.integer)

_MM3_PER_ML = 1000.0

_RANKS: dict[Connectivity, int] = {"faces": 1, "edges": 2, "corners": 3}
"""Along how many axes neighbours may differ."""


def apply_rules(
    labels: NDArray[Labels], rules: Sequence[Rule], schema: LabelSchema, spacing_mm: Sequence[float]
) -> NDArray[Labels]:
    """Apply rules to a label map, one after the other.

    Args:
        labels: (I, J, K) label values.
        rules: In order. Thresholds are left aside: they have decided the map, see `inference.deciding`.
        schema: What the values mean.
        spacing_mm: Of a voxel, in the axis order of the map.

    Returns:
        A new map of the same type and memory order.

    Raises:
        ConfigError: A rule names a class or value that the schema does not have.
    """
    problems = rules_problems(rules, schema)
    if problems:
        raise ConfigError("the post-processing rules do not fit the labels", problems=problems)
    out = labels.copy(order="K")
    # Axes of one voxel have no neighbours; with them every voxel of a picture would touch a side of the image.
    flat = out.squeeze() if out.size > 1 else out.reshape(1)
    voxel_ml = prod(spacing_mm) / _MM3_PER_ML
    for rule in rules:
        if isinstance(rule, Threshold):
            continue
        groups = (rule.classes,) if rule.joined else tuple((name,) for name in rule.classes)
        for names in groups:
            _apply(flat, rule, names, schema, voxel_ml)
    return out


def _apply(
    labels: NDArray[Labels],
    rule: KeepLargest | DropSmall | FillHoles,
    names: Sequence[str],
    schema: LabelSchema,
    voxel_ml: float,
) -> None:
    """One rule for one class, or for classes that are joined; changes `labels`."""
    numbers = [schema.names.index(name) for name in names]
    values = sorted({value for number in numbers for value in schema.classes[number].values})
    mask = np.isin(labels, values)
    box = next(iter(ndimage.find_objects(mask.view(np.uint8))), None)
    if box is None:
        return
    if isinstance(rule, FillHoles):
        _fill(labels[box], ~mask[box], rule, _written_value(schema, numbers[0]), voxel_ml)
        return
    components, sizes = _components(mask[box], rule.connectivity)
    goes = np.zeros(len(sizes), np.bool_)
    goes[_leaving(sizes, rule, voxel_ml)] = True
    labels[box][goes[components]] = rule.becomes


def _components(mask: NDArray[np.bool_], connectivity: Connectivity) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Component numbers of the voxels, 0 elsewhere, and the number of voxels of each number."""
    structure = ndimage.generate_binary_structure(mask.ndim, min(mask.ndim, _RANKS[connectivity]))
    components = np.empty(mask.shape, np.int32)
    count = int(ndimage.label(mask, structure, output=components))
    return components, np.bincount(components.reshape(-1), minlength=count + 1)


def _leaving(sizes: NDArray[np.int64], rule: KeepLargest | DropSmall, voxel_ml: float) -> NDArray[np.int64]:
    """Numbers of the components that go; number 0 is no component."""
    if isinstance(rule, DropSmall):
        return np.flatnonzero(sizes[1:] * voxel_ml < rule.min_ml) + 1
    by_size = np.argsort(-sizes[1:], kind="stable") + 1
    return by_size[rule.count :]


def _fill(labels: NDArray[Labels], is_outside: NDArray[np.bool_], rule: FillHoles, value: int, voxel_ml: float) -> None:
    """Fill the holes in a box that holds a class and no more: what touches a side of the box is no hole.

    Beyond a side of the box lies the image's end, or nothing of the class.
    """
    components, sizes = _components(is_outside, rule.connectivity)
    is_hole = np.ones(len(sizes), np.bool_)
    is_hole[0] = False
    for axis in range(components.ndim):
        is_hole[components.take([0, -1], axis)] = False
    if rule.max_ml is not None:
        is_hole &= sizes * voxel_ml <= rule.max_ml
    labels[is_hole[components] & (labels == 0)] = value


def _written_value(schema: LabelSchema, number: int) -> int:
    """The label value that a class is written with where it is alone."""
    if not schema.has_regions:
        return schema.classes[number].values[0]
    if schema.regions_class_order is not None:
        return schema.regions_class_order[number]
    return own_value([item.values for item in schema.classes], number)
