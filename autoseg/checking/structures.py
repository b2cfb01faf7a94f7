"""The classes of one label map: how large, in how many pieces, where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.checking.facts import Structure
from autoseg.domain.dataset import LabelSchema
from autoseg.domain.geometry import Geometry

_MAX_COUNTED_VOX = 1 << 26
"""Boxes of more voxels are not searched for pieces: that takes 5 bytes and about 50 ns a voxel."""

_TABLE_LIMIT = 1 << 16
"""Label values up to here are counted in a table, which is many times faster than sorting."""

Box = tuple[slice, ...]


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


def measure_structures(
    labels: NDArray[np.integer[Any]], values: Mapping[int, int], geometry: Geometry, schema: LabelSchema
) -> dict[str, Structure]:
    """Every class of the schema that occurs, by name.

    Args:
        labels: (I, J, K), any values; those that are not declared are passed over.
        values: As counted by `count_values`.
        geometry: The grid of the labels.
        schema: The classes.
    """
    known = sorted(set(values) & schema.declared_values - {0})
    if not known:
        return {}
    # Boxes are found for all values in one pass, which needs small numbers from 1 on.
    highest = known[-1]
    table = np.zeros(highest + 1, np.uint16 if len(known) > np.iinfo(np.uint8).max else np.uint8)
    table[known] = np.arange(1, len(known) + 1)
    inside = labels if min(values) >= 0 and max(values) <= highest else np.where(labels <= highest, labels, 0).clip(0)
    found = ndimage.find_objects(table[inside])
    boxes = {value: box for value, box in zip(known, found, strict=True) if box is not None}
    out = {}
    for item in schema.classes:
        own = [value for value in item.values if value in boxes]
        if own:
            box = _around([boxes[value] for value in own])
            mask = labels[box] == own[0] if len(own) == 1 else np.isin(labels[box], own)
            out[item.name] = _structure(mask, box, geometry)
    return out


def _around(boxes: list[Box]) -> Box:
    """The box around boxes."""
    return tuple(
        slice(min(part.start for part in parts), max(part.stop for part in parts)) for parts in zip(*boxes, strict=True)
    )


def _structure(mask: NDArray[np.bool_], box: Box, geometry: Geometry) -> Structure:
    voxels = int(np.count_nonzero(mask))
    centre = [part.start + _centre(mask, axis, voxels) for axis, part in enumerate(box)]
    world = geometry.affine @ [*centre, 1.0]
    pieces, strays = _pieces(mask, voxels)
    return Structure(voxels, pieces, strays, (float(world[0]), float(world[1]), float(world[2])))


def _centre(mask: NDArray[np.bool_], axis: int, voxels: int) -> float:
    others = tuple(other for other in range(mask.ndim) if other != axis)
    counts = np.count_nonzero(mask, axis=others)
    return float(counts @ np.arange(len(counts)) / voxels)


def _pieces(mask: NDArray[np.bool_], voxels: int) -> tuple[int | None, int]:
    """How many connected pieces there are, and how many voxels lie outside the largest."""
    if mask.size > _MAX_COUNTED_VOX:
        return None, 0
    numbered, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    if count <= 1:
        return count, 0
    sizes = np.bincount(numbered.ravel(order="K"))[1:]
    return int(count), voxels - int(sizes.max())
