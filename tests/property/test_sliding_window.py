"""Laws of the sliding window: any size, patch (larger than the image too) and overlap."""

import weakref
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.inference.ladder import Ladder
from autoseg.inference.sliding_window import (
    TileGrid,
    make_grid,
    profile,
    stream_logits,
    stream_slabs,
    tile_starts,
)

SHAPES = st.tuples(*[st.integers(1, 17)] * 3)
OVERLAPS = st.sampled_from([0.0, 0.25, 0.5, 0.8])
CLASS_OFFSETS = torch.tensor([0.0, 10.0, -3.0])


def image_of(shape: tuple[int, ...], channels: int = 1) -> torch.Tensor:
    return torch.randn(channels, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def classes_of(tiles: torch.Tensor) -> torch.Tensor:
    """A network that works voxel by voxel: three classes of the first channel."""
    return tiles[:, :1] + CLASS_OFFSETS[:, None, None, None]


def whole(grid: TileGrid, image: torch.Tensor, forward=classes_of, tile_batch: int = 3) -> torch.Tensor:
    slabs = []
    expected_start = 0
    for start, stop, logits in stream_logits(forward, image, grid, tile_batch=tile_batch):
        assert start == expected_start < stop
        expected_start = stop
        assert logits.shape[grid.stream_axis + 1] == stop - start
        slabs.append(logits.clone())
    assert expected_start == grid.shape[grid.stream_axis]
    return torch.cat(slabs, dim=grid.stream_axis + 1)


@given(shape=SHAPES, patch=SHAPES, overlap=OVERLAPS)
def test_a_network_that_works_voxel_by_voxel_gives_its_output_everywhere(
    shape: tuple[int, int, int], patch: tuple[int, int, int], overlap: float
) -> None:
    image = image_of(shape)
    result = whole(make_grid(shape, patch, overlap), image)
    torch.testing.assert_close(result, classes_of(image[None])[0], atol=1e-5, rtol=1e-5)


@given(shape=SHAPES, patch=st.tuples(*[st.integers(1, 9)] * 2), overlap=OVERLAPS)
def test_a_2d_patch_goes_slice_by_slice(shape: tuple[int, int, int], patch: tuple[int, int], overlap: float) -> None:
    grid = make_grid(shape, patch, overlap)
    assert grid.starts[0] == tuple(range(shape[0]))
    image = image_of(shape)
    torch.testing.assert_close(whole(grid, image), classes_of(image[None])[0], atol=1e-5, rtol=1e-5)


@given(shape=SHAPES, patch=SHAPES, overlap=OVERLAPS)
def test_streaming_equals_summing_the_whole_image(
    shape: tuple[int, int, int], patch: tuple[int, int, int], overlap: float
) -> None:
    """A network whose output depends on the place in the tile, so that every weight counts."""
    ramp = torch.linspace(-1, 1, patch[0] * patch[1] * patch[2]).reshape(patch)

    def forward(tiles: torch.Tensor) -> torch.Tensor:
        return torch.cat((tiles * ramp, tiles - ramp), dim=1)

    grid, image = make_grid(shape, patch, overlap), image_of(shape)
    weight = torch.ones(patch, dtype=torch.float64)
    for axis, side in enumerate(patch):
        weight = weight * torch.from_numpy(profile(side, 0.125)).reshape([-1 if axis == a else 1 for a in range(3)])
    pads = [(grid.padding[a], grid.padded_shape[a] - shape[a] - grid.padding[a]) for a in (2, 1, 0)]
    padded = torch.nn.functional.pad(image, [value for pad in pads for value in pad])
    sums = torch.zeros(2, *grid.padded_shape, dtype=torch.float64)
    total = torch.zeros(grid.padded_shape, dtype=torch.float64)
    for start in grid.tiles():
        box = tuple(slice(low, low + side) for low, side in zip(start, patch, strict=True))
        sums[(slice(None), *box)] += forward(padded[(slice(None), *box)][None])[0].double() * weight
        total[box] += weight
    assert float(total.min()) > 0
    inner = tuple(slice(grid.padding[a], grid.padding[a] + shape[a]) for a in range(3))
    expected = (sums / total)[(slice(None), *inner)].float()
    torch.testing.assert_close(whole(grid, image, forward), expected, atol=1e-5, rtol=1e-4)


@given(shape=SHAPES, patch=SHAPES)
def test_the_tile_batch_changes_nothing(shape: tuple[int, int, int], patch: tuple[int, int, int]) -> None:
    grid, image = make_grid(shape, patch, 0.5), image_of(shape)
    assert torch.equal(whole(grid, image, tile_batch=1), whole(grid, image, tile_batch=7))


@given(size=st.integers(1, 300), patch=st.integers(1, 64), overlap=OVERLAPS)
def test_tiles_cover_the_axis_evenly_with_the_overlap_asked_for(size: int, patch: int, overlap: float) -> None:
    size = max(size, patch)
    starts = tile_starts(size, patch, overlap)
    assert starts[0] == 0
    assert starts[-1] == size - patch
    steps = [after - before for before, after in pairwise(starts)]
    assert all(1 <= step <= max(1, patch * (1 - overlap)) + 1 for step in steps)
    assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("size", "patch", "overlap", "starts"),
    [
        (128, 128, 0.5, (0,)),
        (129, 128, 0.5, (0, 1)),
        (110, 64, 0.5, (0, 23, 46)),
        (123, 54, 0.5, (0, 23, 46, 69)),
        (5, 1, 0.5, (0, 1, 2, 3, 4)),
        (100, 50, 0.0, (0, 50)),
    ],
)
def test_starts_equal_nnunets(size: int, patch: int, overlap: float, starts: tuple[int, ...]) -> None:
    assert tile_starts(size, patch, overlap) == starts


def test_memory_for_logits_is_one_patch_depth_along_the_axis_with_most_tiles() -> None:
    for shape, axis in (((8, 8, 200), 2), ((8, 200, 8), 1), ((200, 8, 8), 0)):
        grid = make_grid(shape, (8, 8, 8), 0.5)
        assert grid.stream_axis == axis
        stream = stream_logits(classes_of, image_of(shape), grid)
        assert max(logits.untyped_storage().nbytes() for _, _, logits in stream) == 3 * 8**3 * 4


def test_of_axes_with_as_many_tiles_the_one_with_the_smallest_slab_is_streamed() -> None:
    """The first one was, whose slab may be larger."""
    grid = make_grid((21, 24, 22), (8, 8, 8), 0.5)
    assert len({len(starts) for starts in grid.starts}) == 1
    assert grid.stream_axis == 1


def test_the_slab_of_logits_is_never_in_memory_twice() -> None:
    """Finishing rows made a second slab, which the rows given out kept company with the first."""
    shape = (8, 8, 50)
    stream = stream_logits(classes_of, image_of(shape), make_grid(shape, (8, 8, 8), 0.5))
    assert len({logits.untyped_storage().data_ptr() for _, _, logits in stream}) == 1


def test_outputs_of_the_network_are_gone_before_it_runs_again_and_before_rows_are_given_out() -> None:
    outputs: list[weakref.ref[torch.Tensor]] = []

    def forward(tiles: torch.Tensor) -> torch.Tensor:
        assert not any(reference() is not None for reference in outputs)
        result = classes_of(tiles)
        outputs.append(weakref.ref(result))
        return result

    shape = (8, 8, 50)
    for _ in stream_logits(forward, image_of(shape), make_grid(shape, (8, 8, 8), 0.5)):
        assert outputs[-1]() is None


def in_16_bit(grid: TileGrid, image: torch.Tensor, forward) -> torch.Tensor:
    ladder = Ladder(lambda tiles, _: list(forward(tiles)), 2)
    slabs = stream_slabs(ladder, image, grid, sigma_fraction=0.125, sums_dtype=torch.float16)
    return torch.cat([logits.clone() for _, _, logits in slabs], dim=grid.stream_axis + 1)


@given(shape=SHAPES, patch=SHAPES, overlap=OVERLAPS)
@settings(max_examples=40)
def test_sums_in_16_bit_are_rounded_once_an_addition(
    shape: tuple[int, int, int], patch: tuple[int, int, int], overlap: float
) -> None:
    grid, image = make_grid(shape, patch, overlap), image_of(shape)
    found = in_16_bit(grid, image, classes_of)
    assert found.dtype == torch.float16
    # As many additions as tiles hold a voxel, each off by at most half a unit in the last of 11 bits.
    counts = [
        max(sum(start <= place < start + side for start in starts) for place in range(size))
        for starts, side, size in zip(grid.starts, grid.patch_size, grid.padded_shape, strict=True)
    ]
    exact = classes_of(image[None])[0]
    most = prod(counts) * 2**-11 * exact.abs() + 1e-6
    assert ((found.float() - exact).abs() <= most).all()


def test_logits_too_large_for_16_bit_stay_finite_and_win() -> None:
    def forward(tiles: torch.Tensor) -> torch.Tensor:
        return torch.cat([tiles * 1e6, -tiles * 1e6], dim=1)

    grid, image = make_grid((9, 9, 9), (4, 4, 4), 0.5), image_of((9, 9, 9))
    found = in_16_bit(grid, image, forward)
    assert torch.isfinite(found).all()
    assert torch.equal(found.argmax(0), (image[0] < 0).long())


def test_weights_stay_above_zero_for_any_patch() -> None:
    for patch in range(1, 400):
        assert profile(patch, 0.01).min() > 0
        assert profile(patch, 0.125).max() == 1
