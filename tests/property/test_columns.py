"""Laws of columns: an image predicted part by part is the image predicted at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.inference.columns import Column, make_columns
from autoseg.inference.ladder import Ladder
from autoseg.inference.sliding_window import TileGrid, make_grid, stream_slabs
from autoseg.preprocessing.resample import GridChange, SlabResampler, grid_change

SHAPES = st.tuples(*[st.integers(1, 17)] * 3)
PATCHES = st.tuples(*[st.integers(1, 9)] * 3).filter(lambda patch: max(patch) > 2)
OVERLAPS = st.sampled_from([0.0, 0.25, 0.5, 0.8])
SPACINGS = st.sampled_from([(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 1.0, 4.0)])
BYTES = st.integers(1, 40_000)


def changed(shape: tuple[int, int, int], new_shape: tuple[int, int, int], spacing: tuple[float, ...]) -> GridChange:
    return grid_change(shape, new_shape, spacing, order=1)


@settings(max_examples=40)
@given(shape=SHAPES, new_shape=SHAPES, patch=PATCHES, overlap=OVERLAPS, spacing=SPACINGS, most=BYTES)
def test_columns_cover_the_crop_once_and_hold_what_their_labels_are_made_of(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    patch: tuple[int, int, int],
    overlap: float,
    spacing: tuple[float, ...],
    most: int,
) -> None:
    grid, change = make_grid(shape, patch, overlap), changed(shape, new_shape, spacing)
    covered = np.zeros(new_shape, int)
    for column in make_columns(grid, change, 3, 4, most):
        covered[column.new_rows] += 1
        for axis in range(3):
            rows, new_rows = column.rows[axis], column.new_rows[axis]
            low, high = change.operator(axis).rows_needed(new_rows.start, new_rows.stop)
            assert rows.start <= low < high <= rows.stop <= shape[axis]
        along = grid.stream_axis
        assert column.rows[along] == slice(0, shape[along])
        assert column.new_rows[along] == slice(0, new_shape[along])
    assert (covered == 1).all()


def ramp_network(patch: tuple[int, int, int], calls: list[int] | None = None) -> Ladder:
    """Its output depends on the place in the tile, so that every weight and every tile counts."""
    ramp = torch.linspace(-1, 1, patch[0] * patch[1] * patch[2]).reshape(patch)

    def forward(tiles: torch.Tensor, starts: object) -> list[torch.Tensor]:
        if calls is not None:
            calls.append(len(tiles))
        return list(torch.cat((tiles * ramp, tiles - ramp, -tiles), dim=1))

    return Ladder(forward, 2)


def logits_of(grid: TileGrid, image: torch.Tensor, column: Column | None) -> torch.Tensor:
    slabs = stream_slabs(
        ramp_network(grid.patch_size),
        image,
        grid,
        sigma_fraction=0.125,
        box=None if column is None else column.rows,
    )
    return torch.cat([logits.clone() for _, _, logits in slabs], dim=grid.stream_axis + 1)


def image_of(shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(sum(shape)))


@settings(max_examples=40)
@given(shape=SHAPES, patch=PATCHES, overlap=OVERLAPS, most=BYTES)
def test_logits_of_a_column_are_those_of_the_whole_image_bit_for_bit(
    shape: tuple[int, int, int], patch: tuple[int, int, int], overlap: float, most: int
) -> None:
    grid, image = make_grid(shape, patch, overlap), image_of(shape)
    whole = logits_of(grid, image, None)
    for column in make_columns(grid, changed(shape, shape, (1.0, 1.0, 1.0)), 3, 4, most):
        assert torch.equal(logits_of(grid, image, column), whole[(slice(None), *column.rows)])


@settings(max_examples=40)
@given(shape=SHAPES, new_shape=SHAPES, patch=PATCHES, spacing=SPACINGS, most=BYTES)
def test_a_column_is_resampled_as_it_is_in_the_whole_image(
    shape: tuple[int, int, int],
    new_shape: tuple[int, int, int],
    patch: tuple[int, int, int],
    spacing: tuple[float, ...],
    most: int,
) -> None:
    grid, change = make_grid(shape, patch, 0.5), changed(shape, new_shape, spacing)
    axis, logits = grid.stream_axis, image_of(shape)[0]

    def resampled(part: tuple | None, rows: torch.Tensor) -> torch.Tensor:
        resampler = SlabResampler(change, axis, part=part)
        return torch.cat([resampler.push(row)[2] for row in torch.split(rows, 2, dim=axis)], dim=axis)

    whole = resampled(None, logits)
    assert whole.shape == new_shape
    for column in make_columns(grid, change, 3, 4, most):
        found = resampled((column.rows, column.new_rows), logits[column.rows])
        torch.testing.assert_close(found, whole[column.new_rows], atol=1e-5, rtol=1e-5)


def num_tiles(grid: TileGrid, change: GridChange, most: int) -> tuple[int, int]:
    """Columns, and tiles predicted."""
    columns = make_columns(grid, change, 40, 2, most)
    calls: list[int] = []
    for column in columns:
        ladder = ramp_network(grid.patch_size, calls)
        for _ in stream_slabs(ladder, torch.zeros(1, *grid.shape), grid, sigma_fraction=0.125, box=column.rows):
            pass
    return len(columns), sum(calls)


def test_an_image_is_divided_no_more_than_needed_and_only_shared_tiles_are_predicted_twice() -> None:
    shape = (80, 64, 24)
    grid = make_grid(shape, (16, 16, 16), 0.5)
    change = changed(shape, shape, (1.0, 1.0, 1.0))
    slab = 40 * 2 * 16 * 64 * 24
    along, across = 9, 7 * 2
    assert num_tiles(grid, change, slab) == (1, along * across)
    # The longer side is cut in two: seven tiles become four and four (the one in the middle holds voxels of both).
    assert num_tiles(grid, change, slab - 1) == (2, along * 8 * 2)
    assert num_tiles(grid, change, slab // 2) == (2, along * 8 * 2)
    assert num_tiles(grid, change, slab // 2 - 1)[0] > 2


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0)])
def test_sums_and_the_rows_kept_by_resampling_stay_below_the_limit(spacing: tuple[float, ...]) -> None:
    shape, new_shape, most = (60, 50, 40), (60, 100, 80), 400_000
    grid, change = make_grid(shape, (8, 8, 8), 0.5), changed(shape, new_shape, spacing)
    columns = make_columns(grid, change, 7, 4, most)
    assert len(columns) > 1
    for column in columns:
        sides = [rows.stop - rows.start for rows in column.rows]
        sides[grid.stream_axis] = 8
        assert 7 * 4 * np.prod(sides) <= most


def test_by_default_a_column_holds_the_outputs_of_four_tiles() -> None:
    """Thinner ones would share more tiles than they have for themselves."""
    shape = (60, 60, 60)
    grid, change = make_grid(shape, (8, 8, 8), 0.5), changed(shape, shape, (1.0, 1.0, 1.0))
    assert len(make_columns(grid, change, 3, 4)) == 1
    # So many classes that one tile's outputs are a gigabyte.
    many = 2**30 // (8**3 * 4)
    (first, *_) = make_columns(grid, change, many, 4)
    sides = sorted(rows.stop - rows.start for axis, rows in enumerate(first.rows) if axis != grid.stream_axis)
    assert 2 * 8**2 <= np.prod(sides) <= 4 * 8**2
