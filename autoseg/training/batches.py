"""From sample numbers to batches: reading ahead in one background thread, then cutting and augmenting on the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg import runtime
from autoseg.compute import Processes
from autoseg.domain.network_plan import Ints
from autoseg.domain.plan import AugmentationPlan, Configuration
from autoseg.domain.sides import Sides
from autoseg.errors import AutosegError, ConfigError
from autoseg.io.maps import IndexMap
from autoseg.preprocessing.previous import one_hot
from autoseg.training import augment
from autoseg.training.cascade import PreviousPatch, PreviousReader, PreviousStage
from autoseg.training.sampling import CasePool, PatchStore, Sampler, SampleSpec, patch_box, read_padded, unreadable

POLL_S = 0.5
"""How often a waiting thread looks whether the other still lives."""


@dataclass(frozen=True, slots=True, eq=False)
class RawSample:
    """What was read for one sample.

    Attributes:
        spec: Which patch it is.
        augmentation: What will happen to it.
        source_start: First voxel of what was read, as many entries as the network has dimensions.
        image: (C, *source) float32.
        labels: (*source) int16.
        previous: Of a cascade: the previous stage's label map on the patch; None where there is no such stage.
        annotated: Which classes were annotated in its case; None where all cases were annotated in full.
        blank: Channels that are 0 when everything has been done, whatever happens to the others.
    """

    spec: SampleSpec
    augmentation: augment.Augmentation
    source_start: tuple[int, ...]
    image: NDArray[np.float32]
    labels: NDArray[np.int16]
    previous: PreviousPatch | None = None
    annotated: tuple[bool, ...] | None = None
    blank: Ints = ()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What a step computes with.

    Attributes:
        images: (N, C, *patch) float32; in a cascade the channels of the previous stage come last.
        labels: (N, *patch) int16 value indices.
        case_ids: Of the samples.
        annotated: (N, foreground classes) bool, which classes were annotated in each sample; None: all in all.
    """

    images: Tensor
    labels: Tensor
    case_ids: tuple[str, ...]
    annotated: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BatchReader:
    """Draws and reads the samples of a step.

    Attributes:
        sampler: Which samples.
        pool: Where they are read.
        dims: 2 or 3, the network's.
        augmentation: What may happen to them; None for validation.
        steps_per_epoch: Steps of a nominal epoch, which is part of the random keys.
        previous: Reads the label maps of a cascade's previous stage; None where there is none.
        sides: What mirroring from left to right does to the labels; None: nothing.
        rank: Of the processes that share a batch, this one's number ...
        num_ranks: ... and how many they are. Each reads every so-manieth sample.
    """

    sampler: Sampler
    pool: CasePool
    dims: int
    augmentation: AugmentationPlan | None
    steps_per_epoch: int
    previous: PreviousReader | None = None
    sides: Sides | None = None
    rank: int = 0
    num_ranks: int = 1

    @classmethod
    def of(
        cls,
        part: Configuration,
        store: PatchStore,
        case_ids: tuple[str, ...],
        seed: int,
        stage: int,
        previous: PreviousStage | None = None,
        annotated: Mapping[str, tuple[bool, ...]] = MappingProxyType({}),
    ) -> Self:
        """The reader of a configuration's training or validation samples.

        Args:
            part: The configuration.
            store: Where its cases are.
            case_ids: Which of them.
            seed: Of the run.
            stage: `runtime.STAGE_SAMPLE` for training, with augmentation; another without.
            previous: Of a cascade, and only of one.
            annotated: See `Sampler`.

        Raises:
            ConfigError: The configuration has a previous stage of which nothing is known, or the other way round.
        """
        if (previous and previous.configuration) != part.previous_stage:
            raise ConfigError(f"the previous stage is {part.previous_stage}, got the label maps of {previous}")
        network, training = part.network, part.training
        augmentation = None
        if stage == runtime.STAGE_SAMPLE:
            axes = part.mirrored(training.augmentation.mirror_axes)
            augmentation = training.augmentation.model_copy(update={"mirror_axes": axes})
        box, fraction = patch_box(network.patch_size), training.foreground_fraction
        maps = None
        if previous is not None:
            maps = PreviousReader(previous.maps, part.num_previous_channels + 1, augmentation, seed, part.sides)
        sampler = Sampler(case_ids, box, training.batch_size, fraction, seed, stage, annotated)
        return cls(sampler, CasePool(store), network.dims, augmentation, training.steps_per_epoch, maps, part.sides)

    def shared(self, processes: Processes) -> Self:
        """A reader of this process's share of each batch."""
        return replace(self, rank=processes.rank, num_ranks=processes.world_size)

    def read(self, step: int) -> list[RawSample]:
        """The samples of that step, or this process's share of them.

        Raises:
            DatasetError: A case of the cache cannot be read; it is named.
        """
        first = step * self.sampler.batch_size
        epoch = step // self.steps_per_epoch
        places = range(self.rank, self.sampler.batch_size, self.num_ranks)
        plan = None if self.augmentation is None else augment.at_step(self.augmentation, step)
        return [self._read(self.sampler.draw(self.pool, epoch, first + place), plan) for place in places]

    def _read(self, spec: SampleSpec, plan: AugmentationPlan | None) -> RawSample:
        start: Ints = spec.start
        stop: Ints = tuple(low + size for low, size in zip(spec.start, spec.size, strict=True))
        case = self.pool.get(spec.case_id)
        drawn = augment.IDENTITY
        if plan is not None:
            rng = runtime.rng(self.sampler.seed, runtime.STAGE_AUGMENT, spec.epoch, spec.index)
            drawn = augment.draw(plan, self.dims, case.channels, rng)
        skipped = 3 - self.dims
        if drawn.matrix is not None:
            low, high = augment.source_box(start[skipped:], spec.size[skipped:], drawn.matrix)
            start, stop = (*start[:skipped], *low), (*stop[:skipped], *high)
        try:
            image, labels = read_padded(case, start, stop)
        except (OSError, ValueError) as problem:
            raise unreadable(spec.case_id, problem) from problem
        annotated = self.sampler.annotated_in(spec.case_id)
        if self.sides is not None and self.sides.swaps(drawn.flips):
            # What a voxel is called does not depend on where it goes: the patch is cut and mirrored afterwards.
            labels = self.sides.swapped(labels)
            annotated = None if annotated is None else self.sides.swapped_classes(annotated)
        has_dropout = plan is not None and bool(plan.channel_dropout)
        previous = None
        if self.previous is not None:
            previous = self.previous.read(spec, case, (start, stop), drawn, self.dims)
        # A 2D network sees one slice: the first of three axes goes.
        return RawSample(
            spec,
            drawn,
            tuple(start[skipped:]),
            image.reshape(image.shape[0], *image.shape[1 + skipped :]),
            labels.reshape(labels.shape[skipped:]),
            previous,
            annotated,
            augment.blank_channels(image, drawn.dropped) if has_dropout else (),
        )


def assemble(samples: Sequence[RawSample], device: torch.device) -> Batch:
    """Cut, augment and stack samples on the device."""
    images, labels = [], []
    for sample in samples:
        image, target = (_to_device(array, device) for array in (sample.image, sample.labels))
        drawn = sample.augmentation
        skipped = 3 - target.ndim
        if drawn.matrix is not None:
            image, target = augment.transform(
                image,
                target,
                sample.source_start,
                sample.spec.start[skipped:],
                sample.spec.size[skipped:],
                drawn.matrix,
            )
        if drawn.flips:
            image = image.flip([axis + 1 for axis in drawn.flips])
            target = target.flip(list(drawn.flips))
        images.append(image)
        labels.append(target)
    stacked = torch.stack(images)
    augment.change_intensities(stacked, [sample.augmentation for sample in samples])
    for number, sample in enumerate(samples):
        if sample.blank:
            stacked[number, list(sample.blank)] = 0
    previous = [sample.previous for sample in samples if sample.previous is not None]
    if previous:
        # After the intensities, which are none of the maps' business.
        maps = torch.stack([_to_device(patch.labels, device) for patch in previous])
        stacked = torch.cat([stacked, one_hot(maps, previous[0].num_classes)], dim=1)
    case_ids = tuple(sample.spec.case_id for sample in samples)
    return Batch(stacked, torch.stack(labels), case_ids, _annotated(samples, device))


def _annotated(samples: Sequence[RawSample], device: torch.device) -> Tensor | None:
    rows = [sample.annotated for sample in samples if sample.annotated is not None]
    return torch.tensor(rows, device=device) if rows else None


def _to_device(array: NDArray[np.float32] | IndexMap, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


class Prefetcher:
    """Reads the samples of coming steps in one background thread.

    What is read depends on the step alone, never on the thread: depth 0 reads the same in the calling thread. An error
    while reading is raised by `take`. Leaving the context stops the thread.

    Args:
        read: Reads the samples of a step.
        first_step: The step to begin with.
        depth: Steps that are held ready; 0 reads when asked.
    """

    def __init__(self, read: Callable[[int], list[RawSample]], first_step: int, depth: int) -> None:
        self._read = read
        self._step = first_step
        self._settle = runtime.one_core_each()
        self._stop = threading.Event()
        self._ready: queue.Queue[list[RawSample] | BaseException] = queue.Queue(max(depth, 1))
        self._thread = threading.Thread(target=self._work, name="autoseg-read-ahead", daemon=True) if depth else None

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def take(self) -> list[RawSample]:
        """The samples of the next step."""
        if self._thread is None:
            self._step += 1
            return self._read(self._step - 1)
        while True:
            try:
                item = self._ready.get(timeout=POLL_S)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                raise AutosegError("the thread that reads samples has ended unexpectedly") from None
            if isinstance(item, BaseException):
                raise item
            return item

    def _work(self) -> None:
        self._settle()
        for item in self._items():
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=POLL_S)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set():
                return

    def _items(self) -> Iterator[list[RawSample] | BaseException]:
        while True:
            try:
                samples = self._read(self._step)
            except BaseException as problem:
                # Whatever it is, the main thread must hear of it: a silent death here would look like a hang.
                yield problem
                return
            self._step += 1
            yield samples
