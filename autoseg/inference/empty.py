"""Tiles that show nothing: the network need not see more than one of them.

A tile in which every channel has one value all over is padding, air, or what lies outside of the mask. The network says
the same of each tile of the same values, so that what it said of the last one is taken again.

Source: docs/decisions/0034.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoseg.inference.tiles import Forward

EMPTY_RANGE = 0.01
"""Largest difference within a channel of an empty tile, and between two tiles that count as alike. Images have a
standard deviation of about 1; resampling leaves ripples of 1e-4 beside a body's edge, and noise is far larger."""


class SkippingEmpty:
    """A network that sees only one of the empty tiles.

    Args:
        forward: (n, C, *spatial) to (n, K, *spatial); not called where every tile is known.

    Attributes:
        num_seen: Tiles that were asked for.
        num_skipped: Tiles that the network did not see.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._known: tuple[Tensor, Tensor] | None = None
        self.num_seen = 0
        self.num_skipped = 0

    def __call__(self, tiles: Tensor) -> Tensor:
        """Predict tiles; see `Forward`."""
        self.num_seen += len(tiles)
        low, high = tiles.flatten(2).aminmax(dim=2)
        is_empty = ((high - low) <= EMPTY_RANGE).all(dim=1)
        if not is_empty.any():
            return self._forward(tiles)
        rows = [self._of_empty(tiles[row : row + 1], low[row]) if is_empty[row] else None for row in range(len(tiles))]
        seen = [row for row, logits in enumerate(rows) if logits is None]
        if seen:
            for row, logits in zip(seen, self._forward(tiles[seen]), strict=True):
                rows[row] = logits[None]
        found = [logits for logits in rows if logits is not None]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _of_empty(self, tile: Tensor, values: Tensor) -> Tensor:
        """What the network says of a tile (1, C, *spatial) that has these values (C,) all over."""
        if self._known is not None:
            if bool(((self._known[0] - values).abs() <= EMPTY_RANGE).all()):
                self.num_skipped += 1
                return self._known[1]
            # One is kept, and the next does not come before it is gone.
            self._known = None
        logits = self._forward(tile)
        self._known = (values, logits)
        return logits
