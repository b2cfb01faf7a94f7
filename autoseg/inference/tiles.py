"""Where the tiles of an image lie, and what each weighs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autoseg.preprocessing.crop import Box

Shape = tuple[int, int, int]

Forward = Callable[[Tensor], Tensor]
"""A network: (n, C, *patch) to (n, K, *patch), any device and floating type."""

PlacedForward = Callable[[Tensor, Sequence[Shape]], Sequence[Tensor]]
"""The same, told where each tile starts; gives n times (K, *patch)."""


def tile_starts(size: int, patch: int, overlap: float) -> tuple[int, ...]:
    """First voxels of the tiles along one axis: evenly spread, the first at 0, the last at the end.

    Args:
        size: Voxels of the image along the axis, at least `patch`.
        patch: Voxels of a tile.
        overlap: Least overlap of neighbours, as a fraction of the patch; tiles are at least one voxel apart.

    Source: nnU-Net v2.
    """
    free = size - patch
    count = ceil(free / max(1.0, patch * (1 - overlap))) + 1
    if count == 1:
        return (0,)
    return tuple(round(free / (count - 1) * number) for number in range(count))


def profile(patch: int, sigma_fraction: float) -> NDArray[np.float64]:
    """Weights of a tile along one axis: a Gaussian around voxel patch // 2, its largest value 1; all above 0.

    Args:
        patch: Voxels of the tile.
        sigma_fraction: Sigma as a fraction of the patch.

    Source: nnU-Net v2 (its sigma is 1/8; ours see decision 51).
    """
    distance = np.arange(patch) - patch // 2
    weights = np.exp(-0.5 * (distance / (sigma_fraction * patch)) ** 2)
    return np.maximum(weights, np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Where the tiles of an image lie.

    An image smaller than the patch is padded with zeros on both sides; `starts` count from the padding's first voxel.

    Attributes:
        shape: Voxels of the image (D, H, W).
        patch_size: Voxels of a tile; 1 along the first axis for 2D networks.
        padding: Voxels added in front, per axis.
        starts: Per axis.
        stream_axis: The axis with most tiles; slabs of logits are finished along it.
    """

    shape: Shape
    patch_size: Shape
    padding: Shape
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    stream_axis: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the whole image."""
        return len(self.starts[0]) * len(self.starts[1]) * len(self.starts[2])

    @property
    def padded_shape(self) -> Shape:
        """The image's shape, at least that of a tile."""
        sizes = [max(size, patch) for size, patch in zip(self.shape, self.patch_size, strict=True)]
        return (sizes[0], sizes[1], sizes[2])

    @property
    def box(self) -> Box:
        """The whole image."""
        return (slice(0, self.shape[0]), slice(0, self.shape[1]), slice(0, self.shape[2]))

    def tiles(self) -> Iterator[Shape]:
        """First voxel of every tile, ordered along the streaming axis."""
        others = [axis for axis in range(3) if axis != self.stream_axis]
        for along in self.starts[self.stream_axis]:
            for across in product(*(self.starts[axis] for axis in others)):
                start = dict(zip(others, across, strict=True)) | {self.stream_axis: along}
                yield (start[0], start[1], start[2])


def make_grid(shape: Sequence[int], patch_size: Sequence[int], overlap: float) -> TileGrid:
    """Lay tiles over an image.

    Args:
        shape: Voxels of the image (D, H, W).
        patch_size: Of the network: three entries, or two for a 2D network, which goes slice by slice.
        overlap: See `tile_starts`.
    """
    patch = (1,) * (3 - len(patch_size)) + tuple(patch_size)
    starts = [tile_starts(max(size, side), side, overlap) for size, side in zip(shape, patch, strict=True)]
    padding = [max(0, side - size) // 2 for size, side in zip(shape, patch, strict=True)]
    return TileGrid(
        shape=(shape[0], shape[1], shape[2]),
        patch_size=(patch[0], patch[1], patch[2]),
        padding=(padding[0], padding[1], padding[2]),
        starts=(starts[0], starts[1], starts[2]),
        # Of several with as many, that with the smallest slab.
        stream_axis=max(range(3), key=lambda axis: (len(starts[axis]), shape[axis] / patch[axis])),
    )


def touching(starts: Sequence[int], patch: int, low: int, high: int) -> list[int]:
    """The tiles along one axis that hold some of the voxels [low, high), counted from the padding's first.

    Args:
        starts: First voxels of the tiles.
        patch: Voxels of a tile.
        low: First voxel wanted.
        high: One past the last.
    """
    return [start for start in starts if start < high and start + patch > low]
