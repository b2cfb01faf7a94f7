"""Rules about connected components, applied to a label map: what they mean is said in `domain.inference`.

Beside the label map itself memory is needed for one mask of it, and for component numbers in the box that the classes
of a rule fill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import (
    Connectivity,
    DropSmall,
    DropUnlikely,
    FillHoles,
    KeepLargest,
    Rule,
    Threshold,
    rules_problems,
)
from autoseg.domain.regions import own_value
from autoseg.errors import ConfigError
from autoseg.io.fractions import LEVELS

Labels = TypeVar("Labels", bound=np.integer)
Scalar = TypeVar("Scalar", bound=np.generic)

_MM3_PER_ML = 1000.0

Likelihoods = Mapping[str, NDArray[np.uint8]]
"""By class: its probability in 255ths, on the axes of a label map, at the voxels that were given to it; elsewhere
anything. Classes that exclude each other may share an array."""

_RANKS: dict[Connectivity, int] = {"faces": 1, "edges": 2, "corners": 3}
"""Along how many axes neighbours may differ."""


def apply_rules(
    labels: NDArray[Labels],
    rules: Sequence[Rule],
    schema: LabelSchema,
    spacing_mm: Sequence[float],
    likelihoods: Likelihoods | None = None,
) -> NDArray[Labels]:
    """Apply rules to a label map, one after the other.

    Args:
        labels: (I, J, K) label values.
        rules: In order. Thresholds are left aside: they have decided the map, see `inference.deciding`.
        schema: What the values mean.
        spacing_mm: Of a voxel, in the axis order of the map.
        likelihoods: Of the classes that have a rule about their probability, as the map was decided.

    Returns:
        A new map of the same type and memory order.

    Raises:
        ConfigError: A rule names a class or value that the schema does not have, or a class whose probabilities are not
            known.
    """
    problems = rules_problems(rules, schema)
    if problems:
        raise ConfigError("the post-processing rules do not fit the labels", problems=problems)
    out = labels.copy(order="K")
    # Axes of one voxel have no neighbours; with them every voxel of a picture would touch a side of the image.
    flat = _flat(out)
    voxel_ml = prod(spacing_mm) / _MM3_PER_ML
    for rule in rules:
        if isinstance(rule, Threshold):
            continue
        groups = (rule.classes,) if rule.joined else tuple((name,) for name in rule.classes)
        for names in groups:
            if isinstance(rule, DropUnlikely):
                _drop_unlikely(flat, _flat(labels), rule, names[0], schema, likelihoods or {})
            else:
                _apply(flat, rule, names, schema, voxel_ml)
    return out


def _flat(array: NDArray[Scalar]) -> NDArray[Scalar]:
    """A view without axes of one voxel."""
    return array.squeeze() if array.size > 1 else array.reshape(1)


def _drop_unlikely(
    labels: NDArray[Labels],
    decided: NDArray[Labels],
    rule: DropUnlikely,
    name: str,
    schema: LabelSchema,
    likelihoods: Likelihoods,
) -> None:
    """The rule for one class; changes `labels`.

    Raises:
        ConfigError: The class' probabilities are not known.
    """
    if name not in likelihoods:
        raise ConfigError(f"a rule about the probability of {name} needs these, and there is only a label map")
    mask = np.isin(labels, schema.classes[schema.names.index(name)].values)
    box = next(iter(ndimage.find_objects(mask.view(np.uint8))), None)
    if box is None:
        return
    components, sizes = _components(mask[box], rule.connectivity)
    counts = labels[box] == decided[box]
    means = mean_likelihoods(components[counts], _flat(likelihoods[name])[box][counts], len(sizes))
    labels[box][(means < rule.min_mean)[components] & mask[box]] = rule.becomes


def mean_likelihoods(owner: NDArray[np.integer], levels: NDArray[np.uint8], num: int) -> NDArray[np.float64]:
    """Mean probability of each component; 1 of one without voxels.

    Args:
        owner: (n,) component numbers of voxels, 0 ... num - 1.
        levels: (n,) their probabilities in 255ths.
        num: How many components there are.
    """
    voxels = np.bincount(owner, minlength=num)
    sums = np.bincount(owner, levels, minlength=num)
    return np.where(voxels > 0, sums / (LEVELS * np.maximum(voxels, 1)), 1.0)


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
