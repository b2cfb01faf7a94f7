"""Laws of interleaved mirroring: which combinations tiles get, and what comes of them."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoseg.inference.interleaved import CLEAR_LEAD, Interleaving, interleaved
from autoseg.inference.ladder import Ladder
from autoseg.inference.sliding_window import PlacedForward, TileGrid, make_grid, stream_slabs
from autoseg.inference.tta import Mirrors, TileSwap, mirrored

SHAPES = st.tuples(*[st.integers(1, 11)] * 3)
PATCHES = st.tuples(*[st.integers(1, 6)] * 3).filter(lambda patch: max(patch) > 2)
OVERLAPS = st.sampled_from([0.0, 0.25, 0.5, 0.7])
AXES = st.sampled_from([(0,), (2,), (0, 1), (1, 2), (0, 1, 2)])
CLASS_OFFSETS = torch.tensor([0.0, 10.0, -3.0])[:, None, None, None]


def image_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def predicted(network: PlacedForward, image: Tensor, grid: TileGrid, tile_batch: int = 3) -> Tensor:
    slabs = stream_slabs(Ladder(network, tile_batch), image, grid, sigma_fraction=0.125)
    return torch.cat([logits.clone() for _, _, logits in slabs], dim=grid.stream_axis + 1)


def three_ways(forward, image: Tensor, grid: TileGrid, mirrors: Mirrors) -> dict[str, Tensor]:
    return {
        "none": predicted(lambda tiles, _: list(forward(tiles)), image, grid),
        "interleaved": predicted(interleaved(forward, mirrors, grid), image, grid),
        "full": predicted(lambda tiles, _: list(mirrored(forward, mirrors.axes, mirrors.swap)(tiles)), image, grid),
    }


@settings(max_examples=40)
@given(shape=SHAPES, patch=PATCHES, overlap=OVERLAPS, axes=AXES)
def test_a_network_that_works_voxel_by_voxel_gives_its_output_in_every_mode(
    shape: tuple[int, int, int], patch: tuple[int, int, int], overlap: float, axes: tuple[int, ...]
) -> None:
    image = image_of(shape)
    for result in three_ways(
        lambda tiles: tiles + CLASS_OFFSETS, image, make_grid(shape, patch, overlap), Mirrors(axes)
    ).values():
        torch.testing.assert_close(result, image + CLASS_OFFSETS, atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(shape=SHAPES, patch=PATCHES, overlap=OVERLAPS, axes=AXES)
def test_of_a_mirror_equivariant_network_every_mode_gives_the_same(
    shape: tuple[int, int, int], patch: tuple[int, int, int], overlap: float, axes: tuple[int, ...]
) -> None:
    """Means over neighbours: the mirror image of the input gives the mirror image of the output."""

    def forward(tiles: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(tiles, torch.full((1, 1, 3, 3, 3), 0.1), padding=1) + CLASS_OFFSETS

    found = three_ways(forward, image_of(shape), make_grid(shape, patch, overlap), Mirrors(axes))
    for mode in ("interleaved", "full"):
        torch.testing.assert_close(found[mode], found["none"], atol=1e-5, rtol=1e-5)


def sided(tiles: Tensor) -> Tensor:
    """Background, left, middle, right by brightness and by place along the last axis: symmetric about the middle."""
    place = torch.linspace(-1, 1, tiles.shape[-1]).expand_as(tiles)
    return torch.cat([1 - tiles, tiles - place, 0.5 * tiles, tiles + place], dim=1)


def test_left_and_right_outputs_change_places_where_their_axis_is_flipped() -> None:
    shape, patch = (12, 10, 14), (6, 4, 6)
    grid, image = make_grid(shape, patch, 0.5), image_of(shape)
    found = three_ways(sided, image, grid, Mirrors((0, 1, 2), TileSwap(2, (0, 3, 2, 1))))
    torch.testing.assert_close(found["interleaved"], found["none"], atol=1e-5, rtol=1e-5)
    naive = predicted(interleaved(sided, Mirrors((0, 1, 2)), grid), image, grid)
    assert not torch.allclose(naive, found["none"], atol=0.1)


def uneven(tiles: Tensor) -> Tensor:
    """A network whose output tells the place in the tile; there is foreground everywhere."""
    ramp = torch.arange(tiles[0, 0].numel(), dtype=torch.float32).reshape(tiles.shape[2:])
    return torch.cat([-ramp.expand_as(tiles), ramp.expand_as(tiles)], dim=1)


def passes_by_voxel(grid: TileGrid, axes: tuple[int, ...]) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """For each voxel of the image, the combinations that it is predicted under when nothing is clear."""
    plan = Interleaving(grid, axes)
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for start in grid.tiles():
        flips = plan.flips(start)
        ranges = [
            range(max(first, low), min(first + side, low + size))
            for first, side, low, size in zip(start, grid.patch_size, grid.padding, grid.shape, strict=True)
        ]
        for voxel in product(*ranges):
            found.setdefault(voxel, []).extend(flips)
    return found


@settings(max_examples=40)
@given(shape=st.tuples(*[st.integers(1, 11)] * 3), patch=st.tuples(*[st.integers(2, 6)] * 3), axes=AXES)
def test_every_voxel_is_predicted_under_four_combinations_or_all_there_are(
    shape: tuple[int, int, int], patch: tuple[int, int, int], axes: tuple[int, ...]
) -> None:
    wanted = min(4, 2 ** len(axes))
    for flips in passes_by_voxel(make_grid(shape, patch, 0.5), axes).values():
        assert len(set(flips)) >= wanted
        assert all(set(flip) <= set(axes) for flip in flips)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2), (1,)])
def test_in_the_middle_of_an_image_each_combination_counts_alike_and_each_tile_is_predicted_once(
    axes: tuple[int, ...],
) -> None:
    grid = make_grid((16, 16, 16), (4, 4, 4), 0.5)
    plan = Interleaving(grid, axes)
    middle = [start for start in grid.tiles() if all(0 < first < 12 for first in start)]
    assert all(len(plan.flips(start)) == 1 for start in middle)
    for voxel, flips in passes_by_voxel(grid, axes).items():
        if all(4 <= place < 12 for place in voxel):
            counts = {flip: flips.count(flip) for flip in flips}
            assert len(counts) == 2 ** len(axes)
            assert set(counts.values()) == {8 // 2 ** len(axes)}
        if sum(4 <= place < 12 for place in voxel) >= 2:
            # At a face of the image too, half of the predictions are flipped along each axis.
            assert len(flips) >= 4
            assert all(sum(axis in flip for flip in flips) * 2 == len(flips) for axis in axes)


@pytest.mark.parametrize(
    ("tiles", "passes"), [((1, 1, 1), 4), ((3, 1, 1), 9), ((3, 3, 1), 21), ((3, 3, 3), 51), ((4, 1, 1), 12)]
)
def test_how_many_passes_an_image_takes(tiles: tuple[int, int, int], passes: int) -> None:
    """Four for a tile whose corner no other holds, two at an edge unless corners hold it, one in the middle and at a
    face."""
    shape = tuple(4 + 2 * (count - 1) for count in tiles)
    grid = make_grid(shape, (4, 4, 4), 0.5)
    assert grid.num_tiles == tiles[0] * tiles[1] * tiles[2]
    calls: list[int] = []

    def forward(some: Tensor) -> Tensor:
        calls.append(len(some))
        return uneven(some)

    predicted(interleaved(forward, Mirrors((0, 1, 2)), grid), image_of(shape), grid, tile_batch=2)
    assert sum(calls) == passes
    assert max(calls) == min(2, grid.num_tiles)


def test_a_single_tile_is_the_mean_over_four_balanced_combinations() -> None:
    grid = make_grid((4, 4, 4), (4, 4, 4), 0.5)
    flips = Interleaving(grid, (0, 1, 2)).flips((0, 0, 0))
    assert flips == ((), (0, 2), (1, 2), (0, 1))
    found = predicted(interleaved(uneven, Mirrors((0, 1, 2)), grid), image_of((4, 4, 4)), grid)
    mirrors = Mirrors((0, 1, 2))
    tile = image_of((4, 4, 4))[None]
    expected = sum(mirrors.back(uneven(mirrors.forth(tile, flip)), flip) for flip in flips) / 4
    torch.testing.assert_close(found, expected[0])


def test_the_tile_batch_changes_nothing() -> None:
    shape = (9, 10, 11)
    grid, image = make_grid(shape, (4, 4, 4), 0.5), image_of(shape)
    network = interleaved(uneven, Mirrors((0, 1, 2)), grid)
    assert torch.equal(predicted(network, image, grid, 1), predicted(network, image, grid, 5))


@pytest.mark.parametrize("is_regions", [False, True])
def test_where_a_tile_shows_clear_background_one_pass_is_enough(is_regions: bool) -> None:
    """Only thin voxels count: what other tiles hold as well needs no further pass."""
    grid = make_grid((4, 4, 4 + 2), (4, 4, 4), 0.5)  # two tiles, which share two rows
    found: list[int] = []

    def of(image: Tensor) -> int:
        found.clear()

        def forward(tiles: Tensor) -> Tensor:
            found.append(len(tiles))
            # Bright voxels are foreground, dark ones background by twice the lead that is enough.
            logits = (tiles - 0.5) * 2 * CLEAR_LEAD * (2 if is_regions else 1)
            return logits.expand(-1, 2, -1, -1, -1) if is_regions else torch.cat([-logits, logits], dim=1)

        predicted(interleaved(forward, Mirrors((0, 1, 2)), grid, is_regions=is_regions), image, grid, tile_batch=1)
        return sum(found)

    dark = torch.zeros(1, 4, 4, 6)
    assert of(dark) == 2
    spot = dark.clone()
    spot[0, 1, 2, 0] = 1.0
    assert of(spot) == 2 + 3
    spot[0, 1, 2, 5] = 1.0
    assert of(spot) == 2 + 3 + 3
    spot[0, 1, 2, 0] = torch.nan
    spot[0, 1, 2, 5] = 0.0
    assert of(spot) == 2 + 3


def test_without_axes_and_in_a_2d_network_mirroring_stays_in_the_plane() -> None:
    grid = make_grid((3, 8, 8), (4, 4), 0.5)
    for start in grid.tiles():
        assert all(0 not in flip for flip in Interleaving(grid, (1, 2)).flips(start))
    flips = passes_by_voxel(grid, (1, 2))
    assert all(len(set(found)) == 4 for found in flips.values())
