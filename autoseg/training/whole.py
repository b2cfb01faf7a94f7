"""A look during training at a few whole validation cases, which tells more than patches: Dice as it will be scored.

The cases are those of the cache, at the network's spacing, predicted with the sliding window. Which ones is chosen once
by the seed, and bounded by the time that these looks may take.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from autoseg import machine, runtime
from autoseg.domain.plan import Configuration
from autoseg.errors import DeviceMemoryError
from autoseg.inference.fitting import default_tile_batch
from autoseg.inference.sliding_window import Forward, TileGrid, make_grid, stream_logits
from autoseg.network import channels_last
from autoseg.preprocessing.previous import one_hot
from autoseg.training.batches import BatchReader
from autoseg.training.checkpoint import Counters
from autoseg.training.learner import Learner
from autoseg.training.sampling import PatchCase, unreadable
from autoseg.training.schedule import Schedule
from autoseg.training.validation import FORWARD_FRACTION, WHOLE_FRACTION, count_agreement, count_region_agreement

log = logging.getLogger("autoseg")

MOST_CASES = 8
"""More cases would say little more about a training that still changes. Source: decision 27."""

CANDIDATES = 32
"""Cases that the choice is made among, in the order that the seed gives them."""

WANTED_LOOKS = 5
"""Cases are left out until so many looks fit into their time. Source: decision 27."""

USEFUL_DICE = 0.1
"""Before the pseudo-Dice has come so far there is nothing to see in whole cases. Source: decision 27."""

MEMORY_FRACTION = 0.25
"""A case may take this part of the memory that is free."""

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class WholeLook:
    """What a look gave.

    Attributes:
        dice: A foreground class or region each: the mean over the cases that contain it, None where none does.
        num_cases: How many cases were looked at.
        seconds: What it took.
    """

    dice: tuple[float | None, ...]
    num_cases: int
    seconds: float

    @property
    def mean(self) -> float | None:
        """Mean of the classes that a case contains. Source: design, section 4, mean foreground Dice."""
        defined = [value for value in self.dice if value is not None]
        return sum(defined) / len(defined) if defined else None


def _go_on() -> None:
    """Nobody asks for a stop."""


@dataclass(slots=True)
class WholeLooks:
    """Looks at whole validation cases during one training.

    Attributes:
        part: What is trained.
        learner: What learns.
        reader: Of the validation cases.
        device: Where the network is.
        precision: Of its forward pass.
        case_ids: The cases; empty: none can be looked at; None: not chosen yet.
        check: Called in the course of each case; may raise to leave the look.
    """

    part: Configuration
    learner: Learner
    reader: BatchReader
    device: torch.device
    precision: str
    case_ids: tuple[str, ...] | None = None
    check: Callable[[], None] = _go_on

    def look(
        self, counters: Counters, schedule: Schedule, pseudo_dice: float | None, used_s: float
    ) -> WholeLook | None:
        """Look at the cases, if there is something to see and time for it.

        Args:
            counters: Where the training is.
            schedule: Its length.
            pseudo_dice: Of the newest quick look.
            used_s: Seconds of training used.
        """
        if (pseudo_dice or 0.0) < USEFUL_DICE or not self._may_look(counters, schedule, used_s):
            return None
        began = time.monotonic()
        try:
            with runtime.device_memory_errors("a look at whole cases ran out of memory", hint=""):
                counts = [self._count(case_id) for case_id in self.case_ids or ()]
        except DeviceMemoryError as problem:
            self.case_ids = ()
            log.warning("%s: the training goes on without such looks", problem.message)
            return None
        return WholeLook(mean_dice(counts), len(counts), time.monotonic() - began)

    def _may_look(self, counters: Counters, schedule: Schedule, used_s: float) -> bool:
        left_s = schedule.left_s(counters.step, used_s, counters.step_s)
        if self.case_ids is None:
            self.case_ids = self._choose(counters, WHOLE_FRACTION * (used_s + left_s))
        if not self.case_ids:
            return False
        cost_s = counters.whole_cost_s or sum(self._seconds(case_id, counters) for case_id in self.case_ids)
        return counters.whole_s + cost_s <= WHOLE_FRACTION * used_s and cost_s < left_s

    def _choose(self, counters: Counters, share_s: float) -> tuple[str, ...]:
        """The first of a random order that can be looked at `WANTED_LOOKS` times in these seconds; or one, once."""
        rng = runtime.rng(self.reader.sampler.seed, runtime.STAGE_WHOLE_LOOK)
        known = self.reader.sampler.case_ids
        chosen: list[str] = []
        total_s = 0.0
        for case_id in [known[index] for index in rng.permutation(len(known))[:CANDIDATES]]:
            limit_s = share_s / WANTED_LOOKS if chosen else share_s
            cost_s = self._seconds(case_id, counters)
            if total_s + cost_s <= limit_s and self._fits_memory(case_id):
                chosen.append(case_id)
                total_s += cost_s
            if len(chosen) == MOST_CASES:
                break
        return tuple(chosen)

    def _seconds(self, case_id: str, counters: Counters) -> float:
        """What predicting a case takes, judged by the training steps."""
        patch_s = FORWARD_FRACTION * counters.step_s / self.part.training.batch_size
        return self._grid(self.reader.pool.get(case_id)).num_tiles * patch_s

    def _fits_memory(self, case_id: str) -> bool:
        memory = machine.host_memory_bytes()
        if memory is None:
            return True
        case = self.reader.pool.get(case_id)
        grid = self._grid(case)
        row = prod(grid.padded_shape) // grid.padded_shape[grid.stream_axis]
        sums = self.part.network.num_classes * row * grid.patch_size[grid.stream_axis]
        # The image twice, because it may be padded.
        needed = _FLOAT_BYTES * (2 * case.channels * prod(grid.padded_shape) + 2 * sums)
        return needed <= MEMORY_FRACTION * memory[0]

    def _grid(self, case: PatchCase) -> TileGrid:
        return make_grid(case.shape, self.part.network.patch_size, self.part.inference.overlap)

    def _count(self, case_id: str) -> Tensor:
        """Voxels of each class or region in one case; see `count_agreement`."""
        case = self.reader.pool.get(case_id)
        grid = self._grid(case)
        try:
            image, labels = case.read((0, 0, 0), case.shape)
        except (OSError, ValueError) as problem:
            raise unreadable(case_id, problem) from problem
        previous = None
        if self.reader.previous is not None:
            previous = torch.from_numpy(self.reader.previous.maps.open(case_id).read((0, 0, 0), case.shape))
        annotated = self.reader.sampler.annotated_in(case_id)
        known = None if annotated is None else torch.tensor([annotated], device=self.device)
        truth = torch.from_numpy(labels)
        total: Tensor | None = None
        network = self.learner.network
        was_training = network.training
        network.eval()
        try:
            with torch.inference_mode(), runtime.autocast(self.device, self.precision):
                stream = stream_logits(
                    self._forward(),
                    torch.from_numpy(image),
                    grid,
                    sigma_fraction=self.part.inference.gaussian_sigma_fraction,
                    tile_batch=min(default_tile_batch(grid.patch_size, self.device), self.part.training.batch_size),
                    previous=previous,
                )
                for start, stop, logits in stream:
                    self.check()  # a large case takes long
                    rows = truth.narrow(grid.stream_axis, start, stop - start).to(logits.device)[None]
                    found = self._agreement(logits[None], rows, known)
                    total = found if total is None else total + found
        finally:
            network.train(was_training)
        assert total is not None
        return total.cpu()

    def _agreement(self, logits: Tensor, labels: Tensor, known: Tensor | None) -> Tensor:
        regions = self.learner.regions
        if regions is not None:
            return count_region_agreement(logits, labels, regions, known)
        return count_agreement(logits.argmax(1), labels, logits.shape[1], known)

    def _forward(self) -> Forward:
        """The network with the weights to predict with, for tiles with three spatial axes."""
        network, weights = self.learner.network, dict(self.learner.weights)
        is_flat, is_quick = self.part.network.dims == 2, self.device.type == "cpu" and self.precision == "bf16"

        def forward(tiles: Tensor) -> Tensor:
            x = tiles.to(self.device)
            if self.reader.previous is not None:
                x = torch.cat([x[:, :-1], one_hot(x[:, -1], self.reader.previous.num_classes)], dim=1)
            x = x.squeeze(2) if is_flat else x
            x = channels_last.to_channels_last(x) if is_quick else x
            logits: Tensor = torch.func.functional_call(network, weights, (x,))
            return logits.unsqueeze(2) if is_flat else logits

        return forward


def mean_dice(counts: Sequence[Tensor]) -> tuple[float | None, ...]:
    """Dice of each class: the mean over the cases that contain it, None where none does.

    Args:
        counts: Of each case (K, 3): voxels in both, in the prediction, in the labels.
    """
    means = []
    for rows in zip(*(case.tolist() for case in counts), strict=True):
        scores = [2 * both / (predicted + labelled) for both, predicted, labelled in rows if labelled]
        means.append(sum(scores) / len(scores) if scores else None)
    return tuple(means)
