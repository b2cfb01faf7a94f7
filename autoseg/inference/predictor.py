"""Models resident in memory that turn volumes into label maps, and the same for many files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from autoseg.domain.dataset import Case
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.plan import Configuration
from autoseg.errors import AutosegError, ConfigError, DatasetError, DeviceMemoryError, ModelError
from autoseg.inference.export import LabelMap, labels_from_stream
from autoseg.inference.inputs import output_ending
from autoseg.inference.sliding_window import Forward, make_grid, stream_logits
from autoseg.inference.tta import Tta, mirrored
from autoseg.io.images import read_case, write_labels
from autoseg.io.model import Model
from autoseg.network.blocks import InstanceNorm
from autoseg.network.unet import restore
from autoseg.preprocessing.transform import Prepared, apply
from autoseg.runtime import (
    NoProgress,
    Progress,
    autocast,
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

# What may be wrong with one case while the next can still be fine.
_CASE_ERRORS = (AutosegError, OSError)

_MEMORY_HINT = "Close other programs, or use a machine with more memory."

T = TypeVar("T")


class Predictor:
    """Models of one configuration (its folds, as a rule) in memory, ready to segment volumes.

    Args:
        models: At least one; their logits are averaged.
        device: See `runtime.pick_device`.
        precision: See `runtime.pick_precision`.
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
        self.device = pick_device(device)
        self.precision = pick_precision(precision, self.device)
        self.overlap = self.settings.inference.overlap if overlap is None else overlap
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"the overlap must be at least 0 and less than 1, got {self.overlap}")
        network = self.settings.network
        self.tile_batch = _default_tile_batch(network.patch_size, self.device) if tile_batch is None else tile_batch
        if self.tile_batch < 1:
            raise ConfigError(f"at least one tile goes through the network at a time, got {self.tile_batch}")
        with device_memory_errors(f"{self.device} has too little memory for the networks", _device_hint(self.device)):
            networks = [_resident(model, self.device, self.precision) for model in models]
        mirror_axes = self.settings.inference.mirror_axes if tta == "full" else ()
        self._forward = mirrored(
            _averaged(networks, network.dims, self.device, self.precision), _tile_axes(mirror_axes, network.dims)
        )

    @property
    def num_channels(self) -> int:
        """Channels of the input."""
        return self.settings.network.in_channels

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
        """The first half of a prediction, without the network: may run in another thread."""
        with device_memory_errors("memory ran out while preparing an image", _MEMORY_HINT):
            return apply(volume, self.settings.preprocess)

    def logits(self, prepared: Prepared) -> tuple[int, Iterator[tuple[int, int, Tensor]]]:
        """Logits on the prepared grid: the streaming axis, and slabs along it as `stream_logits` gives them."""
        grid = make_grid(prepared.image.shape[1:], self.settings.network.patch_size, self.overlap)
        stream = stream_logits(
            self._forward,
            torch.from_numpy(prepared.image),
            grid,
            sigma_fraction=self.settings.inference.gaussian_sigma_fraction,
            tile_batch=self.tile_batch,
        )
        return grid.stream_axis, stream

    def segment(self, prepared: Prepared) -> LabelMap:
        """The second half of a prediction; see `__call__`."""
        patch = self.settings.network.patch_size
        what = f"{self.device} ran out of memory with {self.tile_batch} tiles of {patch} voxels at a time"
        with device_memory_errors(what, _device_hint(self.device)), torch.inference_mode():
            axis, stream = self.logits(prepared)
            return labels_from_stream(stream, axis, prepared.trail, self.settings.preprocess, self.labels)


@dataclass(frozen=True, slots=True)
class PredictionOutcome:
    """What came of predicting several cases.

    Attributes:
        written: Label maps, in the order of the cases.
        failures: One line a failed case, naming it.
        num_short_of_memory: How many of them failed for want of memory.
    """

    written: tuple[Path, ...]
    failures: tuple[str, ...]
    num_short_of_memory: int = 0

    def raise_failures(self) -> None:
        """Raise one error that lists the failed cases, if there are any.

        Raises:
            DeviceMemoryError: Every one failed for want of memory.
            DatasetError: Some failed otherwise.
        """
        if not self.failures:
            return
        kind = DeviceMemoryError if self.num_short_of_memory == len(self.failures) else DatasetError
        total = len(self.written) + len(self.failures)
        raise kind(f"{len(self.failures)} of {total} cases could not be segmented", problems=self.failures)


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
        overlap: See `Predictor`.
        progress: One step a case.

    Raises:
        ConfigError: An output would overwrite an input, or a setting is not possible.
        ModelError: See `Predictor`.
        DeviceMemoryError: See `Predictor`; where memory ran out for single cases the outcome says so.
    """
    targets = [Path(out) / f"{case.id}{ending or output_ending(case)}" for case in cases]
    _refuse_overwriting(cases, targets)
    configure_allocator()
    predictor = Predictor(models, device=device, precision=precision, tta=tta, overlap=overlap)
    return _run(predictor, cases, targets, progress or NoProgress())


@dataclass(frozen=True, slots=True)
class _Attempt(Generic[T]):
    """What a step gave, or why it failed."""

    value: T | None = None
    failure: str | None = None
    is_short_of_memory: bool = False


def _attempt(step: Callable[[], T]) -> _Attempt[T]:
    try:
        with device_memory_errors("memory ran out", _MEMORY_HINT):
            return _Attempt(value=step())
    except _CASE_ERRORS as problem:
        failure = str(problem) or type(problem).__name__
        return _Attempt(failure=failure, is_short_of_memory=isinstance(problem, DeviceMemoryError))


def _run(predictor: Predictor, cases: Sequence[Case], targets: Sequence[Path], progress: Progress) -> PredictionOutcome:
    """Read, segment and write in three threads, one case apart."""
    progress.start("Segmenting", len(cases))
    written: list[Path] = []
    failures: list[tuple[str, bool]] = []

    def read(case: Case) -> _Attempt[Prepared]:
        return _attempt(lambda: predictor.prepare(read_case(case, predictor.num_channels)))

    def note(case: Case, target: Path, outcome: _Attempt[Any]) -> None:
        if outcome.failure is None:
            written.append(target)
        else:
            failures.append((f"{case.id}: {outcome.failure}", outcome.is_short_of_memory))
        progress.advance(note=case.id)

    beside = one_core_each()
    with ThreadPoolExecutor(1, "read", beside) as reader, ThreadPoolExecutor(1, "write", beside) as writer:
        coming = [reader.submit(read, case) for case in cases[:1]]
        writing: list[tuple[Case, Path, Future[_Attempt[None]]]] = []
        for number, (case, target) in enumerate(zip(cases, targets, strict=True)):
            prepared = coming.pop().result()
            coming += [reader.submit(read, later) for later in cases[number + 1 : number + 2]]
            outcome = _segment(predictor, prepared)
            del prepared
            while writing:
                _note_written(writing.pop(), note)
            if outcome.value is None:
                note(case, target, outcome)
                continue
            labels, geometry = outcome.value
            writing.append((case, target, writer.submit(_write, target, labels, geometry)))
        while writing:
            _note_written(writing.pop(), note)
    progress.finish(f"{len(written)} label maps")
    num_short_of_memory = sum(is_short for _, is_short in failures)
    return PredictionOutcome(tuple(written), tuple(text for text, _ in failures), num_short_of_memory)


def _note_written(
    item: tuple[Case, Path, Future[_Attempt[None]]], note: Callable[[Case, Path, _Attempt[Any]], None]
) -> None:
    case, target, future = item
    note(case, target, future.result())


def _segment(predictor: Predictor, prepared: _Attempt[Prepared]) -> _Attempt[tuple[LabelMap, Geometry]]:
    image = prepared.value
    if image is None:
        return _Attempt(failure=prepared.failure, is_short_of_memory=prepared.is_short_of_memory)
    return _attempt(lambda: (predictor.segment(image), image.trail.geometry))


def _write(target: Path, labels: LabelMap, geometry: Geometry) -> _Attempt[None]:
    return _attempt(lambda: write_labels(target, labels, geometry))


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
            and card.plan.labels == first.plan.labels
        )
        if not same:
            raise ModelError(
                f"{card.configuration} fold {card.fold} of plan {card.digest} and {first.configuration} fold "
                f"{first.fold} of plan {first.digest} differ in preprocessing, patch, inference or labels",
                hint="Average folds of one configuration and one plan.",
            )
    return first.settings


def _device_hint(device: torch.device) -> str:
    return _MEMORY_HINT if device.type == "cpu" else "Close other programs on the device, or use --device cpu."


def _default_tile_batch(patch_size: Sequence[int], device: torch.device) -> int:
    budget = _BATCH_VOXELS.get(device.type, _BATCH_VOXELS_ELSEWHERE)
    return max(1, min(_MAX_TILE_BATCH, budget // prod(patch_size)))


def _tile_axes(axes: Sequence[int], dims: int) -> tuple[int, ...]:
    """Axes of the network as axes of a tile, which always has three."""
    return tuple(axis + 3 - dims for axis in axes)


def _resident(model: Model, device: torch.device, precision: str) -> nn.Module:
    """The network on its device, in the form that is fastest there."""
    plan = model.card.settings.network
    network = restore(plan, model.weights)
    if device.type == "cpu" and precision == "bf16":
        # Channels last saves the convolutions a change of layout before and after each: twice as fast as autocast.
        # Norms keep float32 parameters. Source: docs/decisions/0006.
        layout = torch.channels_last_3d if plan.dims == 3 else torch.channels_last
        for module in network.modules():
            if not isinstance(module, InstanceNorm) and not list(module.children()):
                module.to(torch.bfloat16, memory_format=layout)  # type: ignore[call-overload]
    return network.to(device)


def _averaged(networks: Sequence[nn.Module], dims: int, device: torch.device, precision: str) -> Forward:
    """The mean logits of the networks, for tiles with three spatial axes on any device."""
    is_cast = device.type == "cpu" and precision == "bf16"

    def forward(tiles: Tensor) -> Tensor:
        x = tiles.to(device, torch.bfloat16 if is_cast else torch.float32)
        if dims == 2:
            x = x.squeeze(2)
        with autocast(device, "fp32" if is_cast else precision):
            total: Tensor = networks[0](x).to(torch.float32)
            # Summed as they come: the outputs of two networks are in memory, however many there are.
            for network in networks[1:]:
                total = total.add_(network(x))
        mean = total if len(networks) == 1 else total.div_(len(networks))
        return mean.unsqueeze(2) if dims == 2 else mean

    return forward
