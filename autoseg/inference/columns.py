"""An image in columns: parts of its cross-section, each predicted from end to end along the streaming axis.

The slab of logits that is summed grows with the cross-section and with the number of classes. Where it would be too
big, one part of it after the other is predicted; the tiles that two parts share are predicted twice.

Source: docs/decisions/0032.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from math import prod

from autoseg.inference.tiles import TileGrid, touching
from autoseg.preprocessing.crop import Box
from autoseg.preprocessing.resample import GridChange

MOST_SUMS_BYTES = 2**30
"""Sums of logits at a time: 512 x 512 x 200 voxels and 40 classes in 16 bit are still one column (of 128^3 tiles)."""

LEAST_TILES = 4
"""... or the outputs of so many tiles, where these are more: the network itself then takes as much, and smaller columns
share so many tiles that they cost more time than they save memory."""

# Along one axis. More would be thinner than anybody's tiles.
_MOST_PARTS = 32

# Rows of the image's own cross-section that resampling with order 1 keeps between two slabs, in float32.
_KEPT_ROWS = 2
_KEPT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Column:
    """A part of an image.

    Attributes:
        rows: Of the prepared grid: where logits are needed.
        new_rows: Of the crop's own grid: where labels come of them.
    """

    rows: Box
    new_rows: Box

    def summed_voxels(self, grid: TileGrid) -> int:
        """Voxels whose logits are summed at a time: one patch deep along the streaming axis."""
        sides = [rows.stop - rows.start for rows in self.rows]
        sides[grid.stream_axis] = grid.patch_size[grid.stream_axis]
        return prod(sides)


def whole_column(change: GridChange) -> Column:
    """All of an image.

    Args:
        change: From the prepared grid to the crop's own.
    """
    parts = [_parts(change, axis, 1)[0] for axis in range(3)]
    return _column(parts)


def make_columns(
    grid: TileGrid, change: GridChange, num_outputs: int, value_bytes: int, most_bytes: int | None = None
) -> tuple[Column, ...]:
    """Divide an image so that what is summed at a time fits, with as few tiles as possible predicted twice.

    Args:
        grid: Where the tiles lie.
        change: From the prepared grid to the crop's own.
        num_outputs: Classes or regions.
        value_bytes: Of one sum.
        most_bytes: For the sums; None takes `MOST_SUMS_BYTES`, or the outputs of `LEAST_TILES` tiles where these are
            more. Where it cannot be done, the columns are as thin as they may be.

    Returns:
        Columns whose `new_rows` cover the crop once.
    """
    tile_bytes = num_outputs * value_bytes * prod(grid.patch_size)
    most = max(MOST_SUMS_BYTES, LEAST_TILES * tile_bytes) if most_bytes is None else most_bytes
    first, second = (axis for axis in range(3) if axis != grid.stream_axis)
    is_resampled = not change.operator(grid.stream_axis).is_identity

    def order(pair: tuple[_Way, _Way]) -> tuple[int, int, int]:
        """What fits first, by tiles; then what does not, by bytes."""
        one, other = pair
        summed = grid.patch_size[grid.stream_axis] * one.most_rows * other.most_rows * value_bytes
        kept = _KEPT_ROWS * one.most_new_rows * other.most_new_rows * _KEPT_BYTES if is_resampled else 0
        num_bytes = num_outputs * (summed + kept)
        too_many = num_bytes if num_bytes > most else 0
        return too_many, one.num_tiles * other.num_tiles, len(one.parts) * len(other.parts)

    best = min(product(_ways(grid, change, first), _ways(grid, change, second)), key=order)
    along = _parts(change, grid.stream_axis, 1)[0]
    columns = []
    for across in product(best[0].parts, best[1].parts):
        by_axis = {grid.stream_axis: along, first: across[0], second: across[1]}
        columns.append(_column([by_axis[axis] for axis in range(3)]))
    return tuple(columns)


_Part = tuple[slice, slice]
"""Rows along one axis: of the prepared grid, of the crop's own."""


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to divide an axis: its parts, rows of the largest on either grid, and tiles of all parts together."""

    parts: tuple[_Part, ...]
    most_rows: int
    most_new_rows: int
    num_tiles: int


def _ways(grid: TileGrid, change: GridChange, axis: int) -> list[_Way]:
    ways = []
    for count in range(1, min(_MOST_PARTS, change.new_shape[axis]) + 1):
        parts = _parts(change, axis, count)
        most = max(rows.stop - rows.start for rows, _ in parts)
        most_new = max(rows.stop - rows.start for _, rows in parts)
        ways.append(_Way(parts, most, most_new, _num_tiles(grid, axis, parts)))
    return ways


def _parts(change: GridChange, axis: int, count: int) -> tuple[_Part, ...]:
    """Rows along one axis in parts of about equal size."""
    size, operator = change.new_shape[axis], change.operator(axis)
    edges = [round(number * size / count) for number in range(count + 1)]
    if count == 1:
        return ((slice(0, change.shape[axis]), slice(0, size)),)
    return tuple((slice(*operator.rows_needed(low, high)), slice(low, high)) for low, high in pairwise(edges))


def _num_tiles(grid: TileGrid, axis: int, parts: tuple[_Part, ...]) -> int:
    of_axis = partial(touching, grid.starts[axis], grid.patch_size[axis])
    padded = grid.padding[axis]
    return sum(len(of_axis(rows.start + padded, rows.stop + padded)) for rows, _ in parts)


def _column(parts: list[_Part]) -> Column:
    rows, new_rows = zip(*parts, strict=True)
    return Column((rows[0], rows[1], rows[2]), (new_rows[0], new_rows[1], new_rows[2]))
