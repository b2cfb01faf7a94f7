"""A training as the processes beside the main one see it: they read and learn from their share, and decide nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autoseg import runtime
from autoseg.compute import Processes
from autoseg.domain.plan import Configuration, Plan
from autoseg.errors import AutosegError, ConfigError
from autoseg.training import orders
from autoseg.training.batches import BatchReader, Prefetcher, assemble
from autoseg.training.cascade import PreviousStage
from autoseg.training.interrupt import StopRequest
from autoseg.training.learner import Learner
from autoseg.training.records import TrainSettings
from autoseg.training.sampling import PatchStore


def require_shares(part: Configuration, processes: Processes) -> None:
    """Refuse more processes than a batch has samples.

    Raises:
        ConfigError: Some would have nothing to do.
    """
    size = part.training.batch_size
    if size < processes.world_size:
        raise ConfigError(
            f"a batch of {size} samples cannot be shared by {processes.world_size} processes",
            hint="Start fewer of them, or plan a larger batch: autoseg plan --set CONFIG.training.batch_size=N",
        )


def follow(
    plan: Plan,
    configuration: str,
    store: PatchStore,
    train_ids: Sequence[str],
    settings: TrainSettings,
    processes: Processes,
    previous: PreviousStage | None = None,
    annotated: Mapping[str, tuple[bool, ...]] | None = None,
) -> None:
    """Take part in a training of a fold that the main process leads, to its end.

    Args:
        plan: As the main process has it.
        configuration: Which of its configurations.
        store: Preprocessed cases.
        train_ids: Cases to learn from.
        settings: As the main process has them.
        processes: Those that share the training.
        previous: Of a cascade: what the previous stage predicted.
        annotated: Of the cases in which not every class was annotated: for each class whether it was.

    Raises:
        LeaderStopped: The main process ends with an error.
        ProcessLost: Another process has ended or failed.
        DatasetError: A cached case cannot be read.
        DeviceMemoryError: The device has too little memory.
    """
    runtime.configure_allocator()
    order = orders.hear(processes)
    if isinstance(order, orders.Done):
        return
    assert isinstance(order, orders.Begin), f"out of step: {order}"
    part, device = plan.configurations[configuration], runtime.pick_device(settings.device)
    learner = Learner(
        part.network,
        part.training,
        device=device,
        precision=order.precision,
        seed=settings.seed,
        regions=plan.labels.region_table() if plan.labels.has_regions else None,
        processes=processes,
        choices=order.choices,
    )
    learner.gradients.lowers_micro_batch = True
    reader = BatchReader.of(
        part, store, tuple(train_ids), settings.seed, runtime.STAGE_SAMPLE, previous, annotated or {}
    ).shared(processes)
    with StopRequest() as stop:
        _Follower(learner, reader, settings.prefetch, device, processes, stop).run()


class _Follower:
    """Does what it is told, step after step."""

    def __init__(
        self,
        learner: Learner,
        reader: BatchReader,
        prefetch: int,
        device: torch.device,
        processes: Processes,
        stop: StopRequest,
    ) -> None:
        self._learner, self._reader, self._prefetch = learner, reader, prefetch
        self._device, self._processes, self._stop = device, processes, stop

    def run(self) -> None:
        """Until all is done."""
        order = orders.hear(self._processes)
        while not isinstance(order, orders.Done):
            if isinstance(order, orders.Step):
                order = self._run_steps(order)
                continue
            assert isinstance(order, orders.State), f"out of step: {order}"
            self._learner.take_over(order)
            order = orders.hear(self._processes)

    def _run_steps(self, order: orders.Order) -> orders.Order:
        """Steps one after the other, as long as their numbers are; the order that is something else."""
        assert isinstance(order, orders.Step)
        number = order.number
        with Prefetcher(self._reader.read, number, self._prefetch) as ahead:
            while isinstance(order, orders.Step) and order.number == number:
                self._step(order, ahead)
                number += 1
                order = orders.hear(self._processes)
        return order

    def _step(self, order: orders.Step, ahead: Prefetcher) -> None:
        gradients = self._learner.gradients
        gradients.wants_to_stop = self._stop.is_set
        gradients.micro_batch = order.micro_batch
        try:
            batch = assemble(ahead.take(), self._device)
        except (AutosegError, RuntimeError, MemoryError):
            gradients.fail()
            raise
        self._learner.step(batch, order.learning_rate, order.number, order.momentum)
