"""Which patch of which case every sample is: drawn from explicit keys, so that nobody's order of work matters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoseg import runtime
from autoseg.domain.network_plan import Ints
from autoseg.errors import DatasetError

OPEN_CASES = 128
"""Cases kept open at a time: their headers and foreground tables, not their voxels."""


_ANNOTATED = 0
"""The table of annotated voxels of a case that has others; those of classes count from 1."""


class PatchCase(Protocol):
    """A preprocessed case that boxes are read from."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels in network axis order."""

    @property
    def channels(self) -> int:
        """Channels of the image."""

    @property
    def foreground(self) -> Mapping[int, NDArray[np.int32]]:
        """Voxel coordinates (n, 3) by class (or region), from 1; at 0 those of any annotated voxel, see `Sampler`."""

    def read(
        self, start: tuple[int, int, int], stop: tuple[int, int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Image (C, ...) and labels (...) of a box inside the case."""


class PatchStore(Protocol):
    """Where cases are opened by id."""

    def open(self, case_id: str) -> PatchCase:
        """The case of that id."""


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """One sample of the training, before anything is read.

    Attributes:
        index: Global number of the sample: step x batch size + position in the batch.
        epoch: Nominal epoch, part of the random key.
        case_id: The case.
        start: First voxel of the patch in the case's grid; may be negative (padding).
        size: Voxels of the patch, three entries.
        forced_class: The foreground class that the patch was centred on, if it was; 0 for any annotated voxel.
    """

    index: int
    epoch: int
    case_id: str
    start: tuple[int, int, int]
    size: tuple[int, int, int]
    forced_class: int | None


class CasePool:
    """Opened cases, the least recently used closed first."""

    def __init__(self, store: PatchStore, capacity: int = OPEN_CASES) -> None:
        self._store = store
        self._capacity = capacity
        self._cases: OrderedDict[str, PatchCase] = OrderedDict()

    def get(self, case_id: str) -> PatchCase:
        """The case of that id, opened when it is not.

        Raises:
            DatasetError: It cannot be opened.
        """
        case = self._cases.pop(case_id, None)
        if case is None:
            try:
                case = self._store.open(case_id)
            except OSError as problem:
                raise unreadable(case_id, problem) from problem
        self._cases[case_id] = case
        if len(self._cases) > self._capacity:
            self._cases.popitem(last=False)
        return case


@dataclass(frozen=True, slots=True)
class Sampler:
    """The rule by which samples are drawn.

    A case is drawn uniformly. The last samples of each batch are centred on a voxel of a class that is drawn uniformly
    among those present (and annotated) in the case; the others lie anywhere inside. An axis shorter than the patch is
    padded on both sides.

    Where parts of a case are labelled to be ignored, its table 0 holds annotated voxels, background included. Then the
    samples that would lie anywhere, or find no class, are centred on one of these: a patch always has something to
    learn from.

    Attributes:
        case_ids: The cases to draw from.
        size: Voxels of a patch, three entries (2D: the first is 1).
        batch_size: Samples a step.
        foreground_fraction: Part of a batch that is centred on foreground.
        seed: Seed of the run.
        stage: Random stream (`runtime.STAGE_*`).
        annotated: Of the cases in which not every class was annotated: for each class whether it was.

    Source: nnU-Net v2 (foreground oversampling and ignore label, its data loader); it centres every patch on an
    annotated voxel as soon as the data set has an ignore label, here it depends on the case.
    """

    case_ids: tuple[str, ...]
    size: tuple[int, int, int]
    batch_size: int
    foreground_fraction: float
    seed: int
    stage: int = runtime.STAGE_SAMPLE
    annotated: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)

    def annotated_in(self, case_id: str) -> tuple[bool, ...] | None:
        """Which classes were annotated in a case; None where every case was annotated in full."""
        if not self.annotated:
            return None
        return self.annotated.get(case_id) or (True,) * len(next(iter(self.annotated.values())))

    def is_forced(self, index: int) -> bool:
        """Whether the sample of that number must contain foreground."""
        return index % self.batch_size >= round(self.batch_size * (1 - self.foreground_fraction))

    def draw(self, pool: CasePool, epoch: int, index: int) -> SampleSpec:
        """The sample of that number; the same arguments always give the same sample."""
        rng = runtime.rng(self.seed, self.stage, epoch, index)
        case_id = self.case_ids[int(rng.integers(len(self.case_ids)))]
        case = pool.get(case_id)
        choices = self._choices(case, case_id, index)
        if not choices:
            start = tuple(_random_start(rng, n, size) for n, size in zip(case.shape, self.size, strict=True))
            return SampleSpec(index, epoch, case_id, _three(start), self.size, None)
        label = choices[int(rng.integers(len(choices)))]
        voxels = case.foreground[label]
        voxel = voxels[int(rng.integers(len(voxels)))]
        start = tuple(
            max(_lowest_start(n, size), int(centre) - size // 2)
            for n, size, centre in zip(case.shape, self.size, voxel, strict=True)
        )
        return SampleSpec(index, epoch, case_id, _three(start), self.size, label)

    def _choices(self, case: PatchCase, case_id: str, index: int) -> list[int]:
        """Tables of voxels that the sample may be centred on; none when it may lie anywhere."""
        present = sorted(label for label, voxels in case.foreground.items() if len(voxels))
        anywhere = [_ANNOTATED] if _ANNOTATED in present else []
        if not self.is_forced(index):
            return anywhere
        known = self.annotated.get(case_id)
        return [label for label in present if label > 0 and (known is None or known[label - 1])] or anywhere


def unreadable(case_id: str, problem: Exception) -> DatasetError:
    """The error that names a case which the cache cannot give."""
    return DatasetError(
        f"case {case_id} cannot be read from the cache: {problem}",
        hint="Delete the cache folder of this configuration and train again: it is made anew.",
    )


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = values
    return first, second, third


def _lowest_start(length: int, size: int) -> int:
    """0, or where an axis shorter than the patch lies in its middle."""
    return min(0, -((size - length) // 2))


def _random_start(rng: np.random.Generator, length: int, size: int) -> int:
    """Anywhere inside; an axis shorter than the patch lies in its middle."""
    return int(rng.integers(length - size + 1)) if length > size else _lowest_start(length, size)


def patch_box(patch_size: Ints) -> tuple[int, int, int]:
    """The patch with three entries: a 2D patch is one slice."""
    return _three((1,) * (3 - len(patch_size)) + tuple(patch_size))


def inner_box(
    shape: Sequence[int], start: Sequence[int], stop: Sequence[int]
) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """The part of a box that lies inside the case, as start and stop; None when nothing does."""
    inner_start = _three([min(max(low, 0), n) for low, n in zip(start, shape, strict=True)])
    inner_stop = _three([max(min(high, n), 0) for high, n in zip(stop, shape, strict=True)])
    is_empty = any(high <= low for low, high in zip(inner_start, inner_stop, strict=True))
    return None if is_empty else (inner_start, inner_stop)


def read_padded(
    case: PatchCase, start: Sequence[int], stop: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Image (C, ...) and labels (...) of a box that may reach outside the case, where both are 0."""
    size = tuple(high - low for low, high in zip(start, stop, strict=True))
    inner = inner_box(case.shape, start, stop)
    if inner is None:
        return np.zeros((case.channels, *size), np.float32), np.zeros(size, np.int16)
    inner_start, inner_stop = inner
    image, labels = case.read(inner_start, inner_stop)
    if labels.shape == size:
        return image, labels
    where = tuple(
        slice(inner_low - low, inner_high - low)
        for low, inner_low, inner_high in zip(start, inner_start, inner_stop, strict=True)
    )
    padded_image = np.zeros((image.shape[0], *size), np.float32)
    padded_labels = np.zeros(size, np.int16)
    padded_image[(slice(None), *where)] = image
    padded_labels[where] = labels
    return padded_image, padded_labels
