"""Models resident in memory that turn volumes into label maps, and the same for many files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.domain.dataset import Case
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.plan import Configuration
from autoseg.errors import ConfigError, DatasetError, ModelError
from autoseg.inference.export import LabelMap, labels_from_stream
from autoseg.inference.inputs import output_ending, require_channels, warn_of_cubes
from autoseg.inference.outcome import MEMORY_HINT, Attempt, PredictionOutcome, attempt
from autoseg.inference.resident import averaged, resident
from autoseg.inference.sliding_window import make_grid, stream_logits
from autoseg.inference.tta import Tta, with_mirroring
from autoseg.io.images import read_case, read_labels, write_labels
from autoseg.io.maps import IndexMap
from autoseg.io.model import Model
from autoseg.preprocessing.previous import previous_map
from autoseg.preprocessing.transform import Prepared, apply
from autoseg.runtime import (
    NoProgress,
    Progress,
    configure_allocator,
    device_memory_errors,
    one_core_each,
    pick_device,
    pick_precision,
)

# Voxels of the network's input in one forward pass. On the CPU more only costs memory; small 2D patches are 2 to 3
# times faster in batches. Source: docs/decisions/0006. The figure for other devices fills one with a 128^3 patch.
_BATCH_VOXELS = {"cpu": 2**18}
_BATCH_VOXELS_ELSEWHERE = 2**22
_MAX_TILE_BATCH = 32

WriteBeside = Callable[[Case, Path, LabelMap], None]
"""Gets a case, where its label map was written, and the label map."""


class Predictor:
    """Models of one configuration (its folds, as a rule) in memory, ready to segment volumes.

    Args:
        models: At least one; their logits are averaged.
        device: See `runtime.pick_device`.
        precision: See `runtime.pick_precision`; "auto" is what the plan says, where it says anything.
        tta: "none", or "full": the average over every combination of the plan's mirror axes.
        overlap: Of neighbouring tiles as a fraction of the patch; None takes the plan's.
        tile_batch: Tiles a forward pass; None chooses by patch and device.

    Raises:
        ConfigError: Device, precision, overlap or tile_batch are not possible.
        ModelError: There is no model, or the models do not belong together.
        DeviceMemoryError: The device has too little memory for the networks.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        device: str = "auto",
        precision: str = "auto",
        tta: Tta = "none",
        overlap: float | None = None,
        tile_batch: int | None = None,
    ) -> None:
        self.settings = _common_settings(models)
        self.labels = models[0].card.plan.labels
        self.channels = models[0].card.plan.channels
        self.device = pick_device(device)
        wanted = self.settings.inference.precision if precision == "auto" else precision
        self.precision = pick_precision(wanted, self.device)
        self.overlap = self.settings.inference.overlap if overlap is None else overlap
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"the overlap must be at least 0 and less than 1, got {self.overlap}")
        network = self.settings.network
        self.tile_batch = default_tile_batch(network.patch_size, self.device) if tile_batch is None else tile_batch
        if self.tile_batch < 1:
            raise ConfigError(f"at least one tile goes through the network at a time, got {self.tile_batch}")
        with device_memory_errors(f"{self.device} has too little memory for the networks", _device_hint(self.device)):
            networks = [resident(model, self.device, self.precision) for model in models]
        forward = averaged(networks, self.settings, self.device, self.precision)
        self._forward = with_mirroring(forward, self.settings) if tta == "full" else forward

    @property
    def num_channels(self) -> int:
        """Channels of the image."""
        return len(self.channels)

    def __call__(self, volume: Volume) -> LabelMap:
        """Segment a volume.

        Args:
            volume: (C, I, J, K) as read from its file.

        Returns:
            (I, J, K) label values on the volume's own grid, uint8 or uint16.

        Raises:
            DatasetError: The number of channels is not the model's, or values are not finite.
            DeviceMemoryError: The device has too little memory.
        """
        return self.segment(self.prepare(volume))

    def prepare(self, volume: Volume) -> Prepared:
        """The first half of a prediction, without the network: may run in another thread.

        Raises:
            DatasetError: See `__call__`; also where a channel is missing that may not be.
        """
        require_channels(volume, self.channels)
        with device_memory_errors("memory ran out while preparing an image", MEMORY_HINT):
            return apply(volume, self.settings.preprocess)

    def logits(
        self, prepared: Prepared, previous: IndexMap | None = None
    ) -> tuple[int, Iterator[tuple[int, int, Tensor]]]:
        """Logits on the prepared grid: the streaming axis, and slabs along it as `stream_logits` gives them.

        Args:
            prepared: See `prepare`.
            previous: Of a cascade: what the previous stage found, see `previous_map`.

        Raises:
            ModelError: It is a cascade and there is no map, or the other way round.
        """
        stage = self.settings.previous_stage
        if (previous is None) != (stage is None):
            raise ModelError(
                "this model sees images alone, but got the label map of a previous stage"
                if stage is None
                else f"this model is a cascade: besides the image it needs the label map of {stage}"
            )
        grid = make_grid(prepared.image.shape[1:], self.settings.network.patch_size, self.overlap)
        stream = stream_logits(
            self._forward,
            torch.from_numpy(prepared.image),
            grid,
            sigma_fraction=self.settings.inference.gaussian_sigma_fraction,
            tile_batch=self.tile_batch,
            previous=None if previous is None else torch.from_numpy(previous),
        )
        return grid.stream_axis, stream

    def previous_map(self, values: NDArray[np.integer], prepared: Prepared) -> IndexMap:
        """Bring the label map of the previous stage, on the file's grid, to that of the prepared image.

        Raises:
            DatasetError: It holds values that the labels do not have.
        """
        try:
            return previous_map(values, prepared.trail, self.settings.preprocess, self.labels)
        except ValueError as problem:
            raise DatasetError(f"the label map of {self.settings.previous_stage}: {problem}") from None

    def segment(self, prepared: Prepared, previous: IndexMap | None = None) -> LabelMap:
        """The second half of a prediction; see `__call__` and `logits`."""
        patch = self.settings.network.patch_size
        what = f"{self.device} ran out of memory with {self.tile_batch} tiles of {patch} voxels at a time"
        with device_memory_errors(what, _device_hint(self.device)), torch.inference_mode():
            axis, stream = self.logits(prepared, previous)
            return labels_from_stream(stream, axis, prepared.trail, self.settings.preprocess, self.labels)


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A case that is ready for the networks.

    Attributes:
        image: For the network that gives the result.
        earlier: Of a cascade: the image as the previous stage sees it, or the label map that it made of it before.
    """

    image: Prepared
    earlier: Prepared | NDArray[np.integer] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """The network that gives the result, and what comes before it in a cascade.

    Attributes:
        last: Gives the result.
        first: Of a cascade: its previous stage, or label maps that it made before, by case id; else None.
    """

    last: Predictor
    first: Predictor | Mapping[str, Path] | None = None

    def read(self, case: Case) -> Ready:
        """Read and prepare a case, without the networks: may run in another thread."""
        volume = read_case(case, self.last.num_channels)
        warn_of_cubes(case, volume.geometry)
        image = self.last.prepare(volume)
        if self.first is None:
            return Ready(image)
        if isinstance(self.first, Predictor):
            return Ready(image, self.first.prepare(volume))
        return Ready(image, read_labels(self.first[case.id], volume.geometry)[0])

    def segment(self, ready: Ready) -> LabelMap:
        """Label values on the file's grid, by one stage after the other."""
        earlier = ready.earlier
        if earlier is None:
            return self.last.segment(ready.image)
        if isinstance(earlier, Prepared):
            assert isinstance(self.first, Predictor)
            earlier = self.first.segment(earlier)
        return self.last.segment(ready.image, self.last.previous_map(earlier, ready.image))


def predict_cases(
    models: Sequence[Model],
    cases: Sequence[Case],
    out: Path,
    ending: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    *,
    tta: Tta = "none",
    overlap: float | None = None,
    previous: Sequence[Model] | Mapping[str, Path] | None = None,
    write_beside: WriteBeside | None = None,
    progress: Progress | None = None,
) -> PredictionOutcome:
    """Segment cases and write one label map each; a failing case does not stop the others.

    While the network works on one case, the next is read and prepared and the last one is written: at most three cases
    are in memory.

    Args:
        models: See `Predictor`.
        cases: What to segment; their labels are not read.
        out: Folder for OUT/ID.ending, made when missing.
        ending: Of the label maps; None takes each image's own (PNG for pictures).
        device: See `Predictor`.
        precision: See `Predictor`.
        tta: See `Predictor`.
        overlap: See `Predictor`; of a cascade, of both stages.
        previous: Of a cascade: the models of its previous stage, or label maps that they made before, by case id.
        write_beside: Writes what else is made of a label map, after it.
        progress: One step a case.

    Raises:
        ConfigError: An output would overwrite an input, or a setting is not possible.
        ModelError: See `Predictor`.
        DeviceMemoryError: See `Predictor`; where memory ran out for single cases the outcome says so.
    """
    targets = [Path(out) / f"{case.id}{ending or output_ending(case)}" for case in cases]
    _refuse_overwriting(cases, targets)
    configure_allocator()

    def load(members: Sequence[Model]) -> Predictor:
        return Predictor(members, device=device, precision=precision, tta=tta, overlap=overlap)

    last = load(models)
    first = previous if previous is None or isinstance(previous, Mapping) else load(previous)
    _require_that_stages_fit(last, first)
    return _run(Stages(last, first), cases, targets, write_beside, progress or NoProgress())


def _run(
    stages: Stages,
    cases: Sequence[Case],
    targets: Sequence[Path],
    write_beside: WriteBeside | None,
    progress: Progress,
) -> PredictionOutcome:
    """Read, segment and write in three threads, one case apart."""
    progress.start("Segmenting", len(cases))
    written: list[Path] = []
    failures: list[tuple[str, bool]] = []

    def read(case: Case) -> Attempt[Ready]:
        return attempt(lambda: stages.read(case))

    def note(case: Case, target: Path, outcome: Attempt[Any]) -> None:
        if outcome.failure is None:
            written.append(target)
        else:
            failures.append((f"{case.id}: {outcome.failure}", outcome.is_short_of_memory))
        progress.advance(note=case.id)

    beside = one_core_each()
    with ThreadPoolExecutor(1, "read", beside) as reader, ThreadPoolExecutor(1, "write", beside) as writer:
        coming = [reader.submit(read, case) for case in cases[:1]]
        writing: list[tuple[Case, Path, Future[Attempt[None]]]] = []
        for number, (case, target) in enumerate(zip(cases, targets, strict=True)):
            ready = coming.pop().result()
            coming += [reader.submit(read, later) for later in cases[number + 1 : number + 2]]
            outcome = _segment(stages, ready)
            del ready
            while writing:
                _note_written(writing.pop(), note)
            if outcome.value is None:
                note(case, target, outcome)
                continue
            labels, geometry = outcome.value
            writing.append((case, target, writer.submit(_write, case, target, labels, geometry, write_beside)))
        while writing:
            _note_written(writing.pop(), note)
    progress.finish(f"{len(written)} label maps")
    num_short_of_memory = sum(is_short for _, is_short in failures)
    return PredictionOutcome(tuple(written), tuple(text for text, _ in failures), num_short_of_memory)


def _note_written(
    item: tuple[Case, Path, Future[Attempt[None]]], note: Callable[[Case, Path, Attempt[Any]], None]
) -> None:
    case, target, future = item
    note(case, target, future.result())


def _segment(stages: Stages, ready: Attempt[Ready]) -> Attempt[tuple[LabelMap, Geometry]]:
    case = ready.value
    if case is None:
        return Attempt(failure=ready.failure, is_short_of_memory=ready.is_short_of_memory)
    return attempt(lambda: (stages.segment(case), case.image.trail.geometry))


def _write(
    case: Case, target: Path, labels: LabelMap, geometry: Geometry, write_beside: WriteBeside | None
) -> Attempt[None]:
    def write() -> None:
        write_labels(target, labels, geometry)
        if write_beside is not None:
            write_beside(case, target, labels)

    return attempt(write)


def _refuse_overwriting(cases: Sequence[Case], targets: Sequence[Path]) -> None:
    sources = {Path(file).resolve() for case in cases for file in case.files}
    clashes = sorted(str(target) for target in targets if target.resolve() in sources)
    if clashes:
        raise ConfigError(
            "label maps would overwrite their images", problems=clashes, hint="Choose another folder for --out."
        )


def _common_settings(models: Sequence[Model]) -> Configuration:
    """The configuration that all models share."""
    if not models:
        raise ModelError("there is no model to predict with")
    first = models[0].card
    for model in models[1:]:
        card = model.card
        same = (
            card.settings.preprocess == first.settings.preprocess
            and card.settings.network.patch_size == first.settings.network.patch_size
            and card.settings.inference == first.settings.inference
            and card.settings.sides == first.settings.sides
            and card.plan.labels == first.plan.labels
            and card.plan.channels == first.plan.channels
        )
        if not same:
            raise ModelError(
                f"{card.configuration} fold {card.fold} of plan {card.digest} and {first.configuration} fold "
                f"{first.fold} of plan {first.digest} differ in preprocessing, patch, inference or labels",
                hint="Average folds of one configuration and one plan.",
            )
    return first.settings


def _require_that_stages_fit(last: Predictor, first: Predictor | Mapping[str, Path] | None) -> None:
    stage = last.settings.previous_stage
    if (stage is None) != (first is None):
        raise ModelError(
            "a previous stage was given to a model that sees images alone"
            if stage is None
            else f"a cascade cannot predict alone: it needs {stage}, its previous stage"
        )
    if isinstance(first, Predictor) and (first.labels, first.num_channels) != (last.labels, last.num_channels):
        raise ModelError(
            "the models of the cascade and of its previous stage have other labels or channels",
            hint="Use two stages of one plan.",
        )


def _device_hint(device: torch.device) -> str:
    return MEMORY_HINT if device.type == "cpu" else "Close other programs on the device, or use --device cpu."


def default_tile_batch(patch_size: Sequence[int], device: torch.device) -> int:
    """Tiles that go through the network at a time unless somebody says otherwise."""
    budget = _BATCH_VOXELS.get(device.type, _BATCH_VOXELS_ELSEWHERE)
    return max(1, min(_MAX_TILE_BATCH, budget // prod(patch_size)))
