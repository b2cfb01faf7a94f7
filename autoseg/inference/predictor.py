"""Models of one configuration, resident in memory, that turn volumes into label maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.domain.geometry import Volume
from autoseg.domain.inference import Temperature, Tta
from autoseg.errors import ConfigError, DatasetError, ModelError
from autoseg.inference.calibration import NUM_TILES, seen_tiles
from autoseg.inference.columns import Column, make_columns
from autoseg.inference.deciding import Deciding
from autoseg.inference.empty import SkippingEmpty
from autoseg.inference.engines import WantedEngine, Way, pick_device_for
from autoseg.inference.engines.running import Running, in_one_thread
from autoseg.inference.export import LabelMap, labels_from_stream
from autoseg.inference.fitting import common_settings, default_tile_batch, device_hint, sums_dtype
from autoseg.inference.gather import Gathering
from autoseg.inference.inputs import require_channels
from autoseg.inference.interleaved import Interleaving, interleaved
from autoseg.inference.ladder import AtATime, Ladder
from autoseg.inference.members import WithProbabilities
from autoseg.inference.outcome import MEMORY_HINT
from autoseg.inference.sliding_window import (
    Forward,
    PlacedForward,
    Slab,
    TileGrid,
    make_grid,
    middle_tiles,
    stream_slabs,
)
from autoseg.inference.tta import mirror_combinations, mirrors_of, with_mirroring
from autoseg.io.maps import IndexMap
from autoseg.io.model import Model
from autoseg.preprocessing.previous import previous_map
from autoseg.preprocessing.transform import Prepared, apply
from autoseg.runtime import device_memory_errors

_MOST_TILES_ASKED = 100


class Predictor:
    """Models of one configuration (its folds, as a rule) in memory, ready to segment volumes.

    Args:
        models: At least one; their logits are averaged.
        device: See `runtime.pick_device`.
        precision: See `runtime.pick_precision`; "auto" is what the plan says, where it says anything.
        tta: "none"; "interleaved": each tile under another combination of the plan's mirror axes, see `interleaved`;
            or "full": the average over every combination for every tile.
        overlap: Of neighbouring tiles as a fraction of the patch; None takes the plan's.
        tile_batch: Tiles a forward pass; None chooses by patch and device. It becomes less where memory runs out.
        skip_empty: Whether the network sees only one of the tiles that show nothing, see `SkippingEmpty`.
        most_sums_bytes: Memory for sums of logits; None chooses, see `make_columns`.
        uncertainty: Whether mean probabilities over models and mirror images are known too, see `WithProbabilities`;
            takes twice the sums where there are several.
        temperature: Divides logits where they become probabilities.
        engine: What runs the networks; "auto" is found out with the first volume where that pays, see `Choosing`;
            int8 is calibrated with it, see `seen_tiles`.
        num_volumes: About how many will be segmented: for more of them more time is spent on finding the engine.

    Attributes:
        num_passes: Tiles that went through the networks so far.
        has_means: Whether mean probabilities come after the logits, in `logits` and `each_column` too.

    Raises:
        ConfigError: Device, engine, precision, overlap or tile_batch are not possible.
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
        skip_empty: bool = False,
        most_sums_bytes: int | None = None,
        uncertainty: bool = False,
        temperature: Temperature = 1.0,
        engine: WantedEngine = "auto",
        num_volumes: int = 1,
    ) -> None:
        self.settings = common_settings(models)
        self.labels = models[0].card.plan.labels
        self.channels = models[0].card.plan.channels
        self.device = pick_device_for(engine, device)
        self.tta = tta
        self.skip_empty = skip_empty
        self.most_sums_bytes = most_sums_bytes
        self.num_volumes = num_volumes
        self.num_passes = 0
        self.overlap = self.settings.inference.overlap if overlap is None else overlap
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"the overlap must be at least 0 and less than 1, got {self.overlap}")
        network = self.settings.network
        self.tile_batch = default_tile_batch(network.patch_size, self.device) if tile_batch is None else tile_batch
        if self.tile_batch < 1:
            raise ConfigError(f"at least one tile goes through the network at a time, got {self.tile_batch}")
        self.temperature = temperature
        self.has_means = uncertainty and (len(models) > 1 or (tta != "none" and bool(mirrors_of(self.settings).axes)))
        wrap = self._with_probabilities if self.has_means else None
        with device_memory_errors(f"{self.device} has too little memory for the networks", device_hint(self.device)):
            self._running = Running(models, engine, precision, self.device, self.tile_batch, wrap)
        self._at_a_time = AtATime(self.tile_batch)
        self._forward = self._complete(self._running, self._at_a_time)

    def _with_probabilities(self, network: Forward) -> Forward:
        return WithProbabilities(network, is_regions=self.labels.has_regions, temperature=self.temperature)

    @property
    def way(self) -> Way:
        """Engine and precision in which the networks run."""
        return self._running.way

    @property
    def precision(self) -> str:
        """In which the networks run."""
        return self.way.precision

    def _complete(self, networks: Forward, at_a_time: AtATime) -> Forward:
        """The networks as one function with all that does not depend on where a tile lies."""

        def counted(tiles: Tensor) -> Tensor:
            self.num_passes += len(tiles)
            return networks(tiles)

        forward = SkippingEmpty(counted) if self.skip_empty else counted
        if self.tta != "full":
            return forward
        return with_mirroring(forward, self.settings, self._copies, at_a_time)

    def _settle(self, grid: TileGrid, prepared: Prepared, previous: IndexMap | None) -> None:
        """Find the engine with the first volume."""
        self._running.settle(
            prepared,
            previous,
            grid,
            self._num_passes(grid) * self.num_volumes,
            partial(self._seen_tiles, prepared, grid),
        )

    def _seen_tiles(self, prepared: Prepared, grid: TileGrid, model: Model) -> list[Tensor]:
        """For int8: of images that a model was trained with; of this one where there are none."""
        tiles = seen_tiles(model, self.num_channels, self.prepare, self._grid)
        return tiles or list(torch.split(middle_tiles(torch.from_numpy(prepared.image), grid, NUM_TILES), 1))

    def _num_passes(self, grid: TileGrid) -> int:
        """About how many tiles of an image go through the networks."""
        axes = mirrors_of(self.settings).axes
        if self.tta == "full":
            return grid.num_tiles * len(mirror_combinations(axes))
        # Of many tiles few are predicted more than once, and asking each takes time.
        if self.tta == "interleaved" and axes and grid.num_tiles <= _MOST_TILES_ASKED:
            return Interleaving(grid, axes).num_passes()
        return grid.num_tiles

    @property
    def _copies(self) -> int:
        """How many times classes stand among the networks' outputs."""
        return 2 if self.has_means else 1

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
        """Logits on the prepared grid: the streaming axis, and slabs along it as `stream_slabs` gives them.

        The slabs are as wide as the image, however large that is; `segment` takes large images in columns.

        Args:
            prepared: See `prepare`.
            previous: Of a cascade: what the previous stage found, see `previous_map`.

        Raises:
            ModelError: It is a cascade and there is no map, or the other way round.
        """
        self._require_previous(previous)
        grid = self._grid(prepared)
        self._settle(grid, prepared, previous)
        return grid.stream_axis, self._stream(self._ladder(grid), grid, prepared, previous)

    def _require_previous(self, previous: IndexMap | None) -> None:
        stage = self.settings.previous_stage
        if (previous is None) != (stage is None):
            raise ModelError(
                "this model sees images alone, but got the label map of a previous stage"
                if stage is None
                else f"this model is a cascade: besides the image it needs the label map of {stage}"
            )

    def _grid(self, prepared: Prepared) -> TileGrid:
        return make_grid(prepared.image.shape[1:], self.settings.network.patch_size, self.overlap)

    def _ladder(self, grid: TileGrid) -> Ladder:
        """The network for the tiles of one image, and what is done when memory runs out."""

        def on_cpu() -> PlacedForward:
            # The device was too small for one tile: here no more at a time either.
            alone = AtATime()
            return self._placed(self._complete(self._running.on_cpu(), alone), grid, alone)

        is_on_cpu = self.device.type == "cpu"
        return Ladder(
            self._placed(self._forward, grid, self._at_a_time), self.tile_batch, None if is_on_cpu else on_cpu
        )

    def _placed(self, forward: Forward, grid: TileGrid, at_a_time: AtATime) -> PlacedForward:
        mirrors = mirrors_of(self.settings, self._copies)
        if self.tta == "interleaved" and mirrors.axes:
            labels = self.labels
            return interleaved(
                forward,
                mirrors,
                grid,
                is_regions=labels.has_regions,
                num_logits=labels.num_outputs,
                at_a_time=at_a_time,
            )
        return lambda tiles, _: list(forward(tiles))

    def _stream(
        self,
        ladder: Ladder,
        grid: TileGrid,
        prepared: Prepared,
        previous: IndexMap | None,
        column: Column | None = None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        stream = stream_slabs(
            ladder,
            torch.from_numpy(prepared.image),
            grid,
            sigma_fraction=self.settings.inference.gaussian_sigma_fraction,
            previous=None if previous is None else torch.from_numpy(previous),
            box=None if column is None else column.rows,
            sums_dtype=sums_dtype(self.precision),
        )
        return in_one_thread(stream) if self._running.has_own_threads else stream

    def previous_map(self, values: NDArray[np.integer], prepared: Prepared) -> IndexMap:
        """Bring the label map of the previous stage, on the file's grid, to that of the prepared image.

        Raises:
            DatasetError: It holds values that the labels do not have.
        """
        try:
            return previous_map(values, prepared.trail, self.settings.preprocess, self.labels)
        except ValueError as problem:
            raise DatasetError(f"the label map of {self.settings.previous_stage}: {problem}") from None

    def segment(
        self,
        prepared: Prepared,
        previous: IndexMap | None = None,
        gathering: Gathering | None = None,
        deciding: Deciding | None = None,
    ) -> LabelMap:
        """The second half of a prediction; see `__call__` and `logits`.

        Args:
            prepared: See `prepare`.
            previous: See `logits`.
            gathering: Filled in, see `Gathering`.
            deciding: Decides by probabilities, see `Deciding`; None: the logits decide.
        """
        trail, plan, schema = prepared.trail, self.settings.preprocess, self.labels
        labels: LabelMap | None = None
        collector = None
        if gathering is not None:
            collector = gathering.of_stream(trail, has_means=self.has_means, temperature=self.temperature)

        judge = None if deciding is None else deciding.of_stream(trail, self.temperature)

        def decide(column: Column, axis: int, stream: Iterator[Slab]) -> None:
            nonlocal labels
            labels = labels_from_stream(
                stream, axis, trail, plan, schema, column=column, into=labels, collector=collector, judge=judge
            )

        self.each_column(prepared, decide, previous)
        assert labels is not None
        return labels

    def each_column(
        self,
        prepared: Prepared,
        use: Callable[[Column, int, Iterator[Slab]], None],
        previous: IndexMap | None = None,
    ) -> None:
        """Give the logits of a prepared image, in columns if it is large, to whoever decides about labels.

        Args:
            prepared: See `prepare`.
            use: Gets the part of the image, the streaming axis and the stream, which it uses up, see `stream_slabs`.
            previous: See `logits`.

        Raises:
            ModelError: See `logits`.
            DeviceMemoryError: The device has too little memory.
        """
        self._require_previous(previous)
        patch = self.settings.network.patch_size
        what = f"{self.device} ran out of memory with {self.tile_batch} tiles of {patch} voxels at a time"
        with device_memory_errors(what, device_hint(self.device)), torch.inference_mode():
            grid, change = self._grid(prepared), prepared.trail.change_back(self.settings.preprocess)
            self._settle(grid, prepared, previous)
            value_bytes = sums_dtype(self.precision).itemsize
            num_outputs = self.labels.num_outputs * self._copies
            columns = make_columns(grid, change, num_outputs, value_bytes, self.most_sums_bytes)
            ladder = self._ladder(grid)
            for column in columns:
                use(column, grid.stream_axis, self._stream(ladder, grid, prepared, previous, column))
            # What was too much for this image is so for the next.
            self.tile_batch = ladder.tile_batch
