"""The gradient of a batch's loss: of as many samples at a time as fit, in one process or shared by several.

Whatever the parts, the gradient is that of the whole batch. A part needs a few sums over the batch (see `shares`). Most
are counts of voxels, known before the network has run. Where the loss needs sums of what the network says (Dice over
the batch, the hardest voxels), a batch in micro-batches runs forward twice: first for the sums, then with the backward
pass; a process with one micro-batch keeps its first pass. Two things are not the same for every cut of a batch: batch
norm, which looks at the samples that come together, and the random numbers of dropout.

When memory runs out, the micro-batch is halved and the step begins again: nothing has been changed by then.

Source: docs/decisions/0024.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from autoseg.compute import ALONE, Compute, Processes
from autoseg.errors import DeviceMemoryError, ProcessLost
from autoseg.training.batches import Batch
from autoseg.training.passes import Outputs, Passes
from autoseg.training.shares import WHOLE, Known, Measured, Share

log = logging.getLogger("autoseg")


class Gradients:
    """Leaves the gradient of a batch's loss in the weights of a network.

    Args:
        passes: Of the network.
        compute: Where, and with whom.

    Attributes:
        micro_batch: Most samples of this process at a time; None: all.
        lowers_micro_batch: Whether to go on with fewer samples at a time when memory runs out.
        wants_to_stop: Whether this process was asked to stop, which the others are told.
        is_stop_asked: Whether any process was.
    """

    def __init__(self, passes: Passes, compute: Compute) -> None:
        self.micro_batch: int | None = None
        self.lowers_micro_batch = False
        self.wants_to_stop = self.is_stop_asked = False
        self._passes, self._compute = passes, compute

    def of(self, batch: Batch, number: int, scaled: Callable[[Tensor], Tensor], *, alone: bool = False) -> Tensor:
        """Compute the gradient, which replaces what was there.

        Args:
            batch: The samples; with several processes this one's.
            number: Steps done before; keys the random numbers.
            scaled: What is done to a loss in front of its backward pass.
            alone: Leave other processes out: this batch is all there is.

        Returns:
            The loss of the whole batch.

        Raises:
            DeviceMemoryError: Not even one sample at a time fits, in several processes. (One process raises what torch
                raised.)
            ProcessLost: Another process has ended or failed.
        """
        processes = ALONE if alone else self._compute.processes
        statistics = self._passes.statistics()
        while (found := self._try(processes, batch, number, scaled)) is None:
            self._passes.set_statistics(statistics)
            self._take_fewer(len(batch.labels))
        return found

    def fail(self) -> None:
        """Tell the other processes, which have begun a step, that this one cannot take part."""
        self._agree(self._compute.processes, has_failed=True)

    def _try(
        self, processes: Processes, batch: Batch, number: int, scaled: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """The loss of the whole batch; None when a process ran out of memory that can do with fewer at a time."""
        parts = _Parts(self._passes, processes, _cut(batch, self.micro_batch), number)
        if not parts.is_whole:
            if self._runs_out(parts.measure, parts, processes):
                return None
            parts.add_up_measured()
        if self._runs_out(lambda: parts.go_back(scaled), parts, processes):
            return None
        return parts.add_up_gradients()

    def _runs_out(self, work: Callable[[], None], parts: _Parts, processes: Processes) -> bool:
        """Do one's own work; whether any process ran out of memory at it, and the step is to begin again."""
        try:
            problem = self._passes.forward.guarded(work)
        except BaseException:
            # The others have to hear of it where they wait for this process next.
            self._agree(processes, has_failed=True)
            raise
        if problem is not None:
            parts.forget()
        is_last_try = parts.is_smallest or not self.lowers_micro_batch
        if processes.world_size == 1:
            if problem is not None and is_last_try:
                raise problem
            return problem is not None
        num_out, num_hopeless = self._agree(
            processes, is_out=problem is not None, is_hopeless=problem is not None and is_last_try
        )
        if num_hopeless:
            raise DeviceMemoryError(
                f"{num_hopeless} of {processes.world_size} processes ran out of memory with one sample at a time",
                hint="Plan for less memory (autoseg plan --vram), or stop what else uses the device.",
            )
        return num_out > 0

    def _agree(
        self, processes: Processes, *, is_out: bool = False, is_hopeless: bool = False, has_failed: bool = False
    ) -> tuple[int, int]:
        """How many processes ran out of memory, and how many of them for good.

        Raises:
            ProcessLost: One of the others has failed.
        """
        sums = processes.sums(is_out, is_hopeless, has_failed, self.wants_to_stop)
        num_out, num_hopeless, num_failed, num_stops = (round(number) for number in sums)
        self.is_stop_asked |= num_stops > 0
        if num_hopeless + num_failed:
            processes.part()
        if num_failed and not has_failed:
            raise ProcessLost("another process of this training has failed", hint="See its message.")
        return num_out, num_hopeless

    def _take_fewer(self, num_samples: int) -> None:
        """Halve the micro-batch."""
        before = min(self.micro_batch or num_samples, num_samples)
        self.micro_batch = max(1, -(-before // 2))
        self._compute.free_cache()
        if self._compute.processes.is_main:
            log.warning(
                "memory does not hold %d samples at a time: going on with %d at a time, and the same batch",
                before,
                self.micro_batch,
            )


class _Parts:
    """The parts of a batch that a process computes in one try.

    Args:
        passes: Of the network.
        processes: Those that have the other parts.
        parts: One's own.
        number: Steps done before.
    """

    def __init__(self, passes: Passes, processes: Processes, parts: list[Batch], number: int) -> None:
        self._passes, self._processes, self._parts, self._number = passes, processes, parts, number
        self.is_whole = processes.world_size == 1 and len(parts) == 1
        self.is_smallest = max(len(part.labels) for part in parts) == 1
        self._measured: list[Measured] = []
        self._totals: Tensor | None = None
        self._kept: Outputs | None = None
        self._loss = torch.zeros(())

    def forget(self) -> None:
        """Give back the memory."""
        self._kept = None
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for weight in self._passes.weights:
            weight.grad = None

    def measure(self) -> None:
        """Take down the sums of one's own parts."""
        passes, self._measured = self._passes, []
        if not passes.needs_outputs:
            self._measured = [passes.measured(passes.blank_outputs(part), part) for part in self._parts]
        elif len(self._parts) == 1:
            self._kept = passes.outputs(self._parts[0], self._key(0))
            self._measured = [passes.measured(self._kept, self._parts[0])]
        else:
            # With gradients, although they are not used: other kernels would round in other ways.
            statistics = passes.statistics()
            for index, part in enumerate(self._parts):
                self._measured.append(passes.measured(passes.outputs(part, self._key(index)), part))
            passes.set_statistics(statistics)

    def add_up_measured(self) -> None:
        """The sums over all parts of all processes."""
        self._totals = torch.stack([measured.flat() for measured in self._measured]).sum(0)
        self._processes.add_up(self._totals)

    def go_back(self, scaled: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward, part after part."""
        passes = self._passes
        self._drop_gradients()
        losses = []
        for index, part in enumerate(self._parts):
            outputs, self._kept = self._kept, None
            if outputs is None:
                outputs = passes.outputs(part, self._key(index))
            loss = passes.loss(outputs, part, self._share(index))
            del outputs
            torch.autograd.backward(scaled(loss))
            losses.append(loss.detach())
        self._loss = torch.stack(losses).sum()

    def _share(self, index: int) -> Share:
        if self._totals is None:
            return WHOLE
        is_first = self._processes.is_main and index == 0
        return Known.of(self._totals, self._measured[index].sums, is_first=is_first)

    def _key(self, index: int) -> tuple[int, ...]:
        """Of the random numbers of a part: a batch that is whole has the step alone."""
        return (self._number,) if self.is_whole else (self._number, self._processes.rank, index)

    @torch.no_grad()
    def add_up_gradients(self) -> Tensor:
        """Add up gradients and loss over the processes, in one row; the loss."""
        if self._processes.world_size == 1:
            return self._loss
        gradients = [weight.grad for weight in self._passes.weights if weight.grad is not None]
        row = torch.cat([*(gradient.flatten() for gradient in gradients), self._loss.view(1).to(gradients[0])])
        self._processes.add_up(row)
        pieces = torch.split(row, [*(gradient.numel() for gradient in gradients), 1])
        for gradient, piece in zip(gradients, pieces, strict=False):
            gradient.copy_(piece.view(gradient.shape))
        for weight in self._passes.weights:
            if not weight.requires_grad:
                # Running statistics, of which each process has its own samples'.
                self._processes.add_up(weight)
                weight.div_(self._processes.world_size)
        return pieces[-1][0]


def _cut(batch: Batch, micro_batch: int | None) -> list[Batch]:
    """The batch in parts of at most so many samples, as even as possible."""
    num = len(batch.labels)
    num_parts = -(-num // min(micro_batch or num, num))
    if num_parts == 1:
        return [batch]
    bounds = [num * index // num_parts for index in range(num_parts + 1)]
    return [
        replace(
            batch,
            images=batch.images[low:high],
            labels=batch.labels[low:high],
            case_ids=batch.case_ids[low:high],
            annotated=None if batch.annotated is None else batch.annotated[low:high],
        )
        for low, high in pairwise(bounds)
    ]
