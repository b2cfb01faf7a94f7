"""What is done when memory runs out: one step back after the other, and nothing that is finished is done again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from autoseg.inference.tiles import PlacedForward, Shape
from autoseg.runtime import is_out_of_memory

log = logging.getLogger("autoseg")

S = TypeVar("S")
T = TypeVar("T")


def if_it_fits(step: Callable[[], T], has_other_way: bool = True) -> T | None:
    """What a step gives, or None where memory ran out; other errors pass untouched.

    Args:
        step: Changes nothing when it fails.
        has_other_way: False where nothing else can be tried: then the error passes too.
    """
    if not has_other_way:
        return step()
    try:
        return step()
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
    # Beyond the handler, which keeps the tensors of the failed step alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


class AtATime:
    """How many tiles go through the network at a time where a tile has several mirror images.

    Args:
        most: At most so many.
    """

    def __init__(self, most: int = 1) -> None:
        self.most = most

    def run(self, jobs: Sequence[S], step: Callable[[Sequence[S]], Sequence[T]], tiles_each: int = 1) -> Iterator[T]:
        """What a step gives for each job, in order: some jobs at a time, and half as many once memory ran out.

        Args:
            jobs: What is to be done.
            step: Does some of them, one result each.
            tiles_each: Tiles of a job: one job at a time where these are as many as there may be.
        """
        done = 0
        while done < len(jobs):
            some = jobs[done : done + max(1, self.most // tiles_each)]
            results = if_it_fits(partial(step, some), has_other_way=len(some) > 1)
            if results is None:
                fewer = len(some) // 2
                self.most = fewer * tiles_each
                log.warning("memory ran out with %d mirror images at a time: going on with %d", len(some), fewer)
                continue
            done += len(some)
            yield from results
            del results


class Ladder:
    """The network, worked less hard whenever memory runs out.

    First half as many tiles at a time, down to one; then the sums of logits leave the device for the memory of the
    host; then the network runs on the CPU. When nothing is left the error passes.

    Args:
        forward: See `PlacedForward`.
        tile_batch: Tiles at a time.
        on_cpu: Makes the network on the CPU; None where it is there already.
    """

    def __init__(
        self, forward: PlacedForward, tile_batch: int, on_cpu: Callable[[], PlacedForward] | None = None
    ) -> None:
        self._forward = forward
        self._on_cpu = on_cpu
        self.tile_batch = tile_batch
        self.sums_on_host = False

    def run(self, starts: Sequence[Shape], cut: Callable[[Shape], Tensor]) -> Sequence[Tensor] | None:
        """Predict some tiles.

        Args:
            starts: Of at most `tile_batch` tiles.
            cut: Gives the tile (C, *patch) that starts there.

        Returns:
            Logits (K, *patch) of each; None where memory ran out and a step back was taken: ask again, for at most as
            many tiles as `tile_batch` says now, with the sums on the host if `sums_on_host`.
        """
        outputs = if_it_fits(
            lambda: self._forward(torch.stack([cut(start) for start in starts]), starts),
            self._can_step_back(len(starts)),
        )
        if outputs is None:
            self._step_back(len(starts))
        return outputs

    def _can_step_back(self, num_tiles: int) -> bool:
        return num_tiles > 1 or self._on_cpu is not None

    def _step_back(self, num_tiles: int) -> None:
        if num_tiles > 1:
            self.tile_batch = num_tiles // 2
            log.warning("memory ran out with %d tiles at a time: going on with %d", num_tiles, self.tile_batch)
        elif not self.sums_on_host:
            self.sums_on_host = True
            log.warning("memory ran out with one tile at a time: logits are summed in the memory of the host")
        else:
            assert self._on_cpu is not None
            self._forward, self._on_cpu = self._on_cpu(), None
            log.warning("the device has too little memory for one tile: the rest of this image is predicted on the CPU")
