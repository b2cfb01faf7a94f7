"""Tiles that show nothing are predicted once."""

import torch
from torch import Tensor

from autoseg.inference.empty import EMPTY_RANGE, SkippingEmpty
from autoseg.inference.tta import mirrored

WEIGHT = torch.randn(3, 2, 3, 3, 3, generator=torch.Generator().manual_seed(0))


class Network:
    """A convolution that remembers how many tiles it saw."""

    def __init__(self) -> None:
        self.num_seen = 0

    def __call__(self, tiles: Tensor) -> Tensor:
        self.num_seen += len(tiles)
        return torch.nn.functional.conv3d(tiles, WEIGHT, padding=1)


def tiles_of(*kinds: str) -> Tensor:
    """(n, 2, 4, 5, 6): noise, or two channels of air."""
    generator = torch.Generator().manual_seed(1)
    values = {"air": (-1.5, 0.0), "water": (0.2, 0.0)}
    rows = [
        torch.randn(2, 4, 5, 6, generator=generator)
        if kind == "noise"
        else torch.tensor(values[kind])[:, None, None, None].expand(2, 4, 5, 6)
        for kind in kinds
    ]
    return torch.stack(rows)


def test_outputs_are_what_the_network_says_of_every_tile() -> None:
    tiles = tiles_of("noise", "air", "noise", "air", "air", "water", "noise", "air")
    for batch in (1, 3, 8):
        network = Network()
        quick = SkippingEmpty(network)
        found = torch.cat([quick(some) for some in torch.split(tiles, batch)])
        torch.testing.assert_close(found, Network()(tiles))
        # Air comes back after water, of which the output was kept instead.
        assert network.num_seen == 3 + 3
        assert (quick.num_seen, quick.num_skipped) == (8, 2)


def test_a_tile_is_empty_only_when_every_channel_is() -> None:
    tiles = tiles_of("air", "air")
    tiles[1, 1, 0, 0, 0] = 2 * EMPTY_RANGE
    network = Network()
    SkippingEmpty(network)(tiles)
    assert network.num_seen == 2
    tiles[1, 1, 0, 0, 0] = EMPTY_RANGE / 2
    network = Network()
    SkippingEmpty(network)(tiles)
    assert network.num_seen == 1


def test_values_that_are_no_numbers_are_not_empty() -> None:
    tiles = tiles_of("air", "air")
    tiles[1, 0, 0, 0, 0] = torch.nan
    network = Network()
    assert torch.isnan(SkippingEmpty(network)(tiles)[1]).any()
    assert network.num_seen == 2


def test_what_was_remembered_is_not_changed_by_what_becomes_of_it() -> None:
    network = Network()
    quick = mirrored(SkippingEmpty(network), (0, 1))
    tiles = tiles_of("air")
    first, second = quick(tiles), quick(tiles)
    torch.testing.assert_close(first, mirrored(Network(), (0, 1))(tiles))
    assert torch.equal(first, second)
    assert network.num_seen == 1
