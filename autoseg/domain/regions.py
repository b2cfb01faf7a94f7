"""Regions: classes that join several label values and may overlap, and the one value that a voxel is written with.

A region network says of every region whether a voxel is in it. The label map that is written holds one value a voxel,
so each combination of regions needs a value:

- with a `regions_class_order` (nnU-Net's), region i is painted with `order[i]`, one region after the other;
- without one, a combination that a label value stands for is written with that value. Any other is painted: larger
  regions first, so that a region nested in another one lies on top, each with its own value (`own_value`).

Source: nnU-Net v2 (its documentation, "region-based training") for the order; docs/decisions/0020 for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Regions = Sequence[Sequence[int]]
"""The label values of each region."""

MOST_REGIONS = 62
"""A combination of regions is one bit a region of a 64-bit integer."""

_TABLE_BITS = 16
"""Up to so many regions, combinations are looked up in a table of all; beyond, among those that occur."""


def memberships(regions: Regions) -> dict[int, frozenset[int]]:
    """For each label value, ascending, the numbers of the regions that it is in."""
    values = sorted({value for region in regions for value in region})
    return {value: frozenset(i for i, region in enumerate(regions) if value in region) for value in values}


def own_value(regions: Regions, number: int) -> int:
    """The value that stands for a region where no order is given: the one that lies in the fewest other regions.

    Args:
        regions: All of them.
        number: Of the region.

    Raises:
        ValueError: Several values do, and they lie in different regions: none of them says "this region and no more".
    """
    inside = {value: members for value, members in memberships(regions).items() if number in members}
    fewest = min(len(members) for members in inside.values())
    candidates = {value: members for value, members in inside.items() if len(members) == fewest}
    if len(set(candidates.values())) > 1:
        raise ValueError(f"the label values {sorted(candidates)} each lie in other regions too")
    return min(candidates)


def regions_problems(regions: Regions, names: Sequence[str], order: Sequence[int] | None) -> tuple[str, ...]:
    """Why the regions cannot be written into a label map, in words; nothing when they can.

    Args:
        regions: All of them.
        names: Theirs.
        order: `regions_class_order`, or None.
    """
    if len(regions) > MOST_REGIONS:
        return (f"there are {len(regions)} regions, at most {MOST_REGIONS} are possible",)
    if order is not None and len(order) != len(regions):
        return (f"regions_class_order needs one label value a region, {len(regions)} of them, got {len(order)}",)
    if order is not None:
        return tuple(
            f"regions_class_order writes region {name!r} with {value}, which is none of its values {list(region)}"
            for name, region, value in zip(names, regions, order, strict=True)
            if value not in region
        )
    problems = []
    for number, name in enumerate(names):
        try:
            own_value(regions, number)
        except ValueError as problem:
            problems.append(
                f"region {name!r} has no label value of its own to be written with: {problem}; "
                "say which to write with regions_class_order"
            )
    return tuple(problems)


def written_value(regions: Regions, order: Sequence[int] | None, code: int) -> int:
    """The label value that a combination of regions is written with; 0 for none of them.

    Args:
        regions: All of them, without `regions_problems`.
        order: `regions_class_order`, or None.
        code: Bit i is set where the voxel is in region i.
    """
    inside = frozenset(i for i in range(len(regions)) if code >> i & 1)
    if not inside:
        return 0
    if order is not None:
        return order[max(inside)]
    for value, members in memberships(regions).items():
        if members == inside:
            return value
    on_top = min(inside, key=lambda number: (len(regions[number]), -number))
    return own_value(regions, on_top)


def values_of_codes(
    codes: NDArray[np.integer], regions: Regions, order: Sequence[int] | None, dtype: np.dtype[np.unsignedinteger]
) -> NDArray[np.unsignedinteger]:
    """Label values of an array of combinations; see `written_value`.

    Args:
        codes: Any shape; bit i is set where the voxel is in region i.
        regions: All of them.
        order: `regions_class_order`, or None.
        dtype: Of the values.
    """
    if len(regions) > _TABLE_BITS:
        found, places = np.unique(codes, return_inverse=True)
        values = np.array([written_value(regions, order, int(code)) for code in found], dtype)
        spread: NDArray[np.unsignedinteger] = values[places.reshape(codes.shape)]
        return spread
    table = np.zeros(1 << len(regions), dtype)
    found = np.flatnonzero(np.bincount(codes.reshape(-1), minlength=len(table)))
    table[found] = [written_value(regions, order, int(code)) for code in found]
    looked_up: NDArray[np.unsignedinteger] = table[codes]
    return looked_up
