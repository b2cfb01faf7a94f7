"""A network, and what comes before it in a cascade."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.geometry import Volume
from autoseg.domain.inference import Temperature
from autoseg.errors import ModelError
from autoseg.inference.columns import Column
from autoseg.inference.deciding import Deciding
from autoseg.inference.export import LabelMap
from autoseg.inference.gather import Gathering
from autoseg.inference.predictor import Predictor
from autoseg.inference.settings import PredictionSettings
from autoseg.inference.sliding_window import Slab
from autoseg.io.images import read_labels
from autoseg.io.maps import IndexMap
from autoseg.io.model import Model
from autoseg.preprocessing.transform import Prepared


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

    Raises:
        ModelError: The stages do not fit each other.
    """

    last: Predictor
    first: Predictor | Mapping[str, Path] | None = None

    def __post_init__(self) -> None:
        stage = self.last.settings.previous_stage
        if (stage is None) != (self.first is None):
            raise ModelError(
                "a previous stage was given to a model that sees images alone"
                if stage is None
                else f"a cascade cannot predict alone: it needs {stage}, its previous stage"
            )
        first = self.first
        if isinstance(first, Predictor) and (
            (first.labels, first.num_channels) != (self.last.labels, self.last.num_channels)
        ):
            raise ModelError(
                "the models of the cascade and of its previous stage have other labels or channels",
                hint="Use two stages of one plan.",
            )

    def prepare(self, volume: Volume, case_id: str) -> Ready:
        """Prepare an image, without the networks: may run in another thread.

        Args:
            volume: (C, I, J, K) as read from its file.
            case_id: Whose earlier label map is read, if there are any.

        Raises:
            DatasetError: The image or its label map does not fit.
        """
        image = self.last.prepare(volume)
        if self.first is None:
            return Ready(image)
        if isinstance(self.first, Predictor):
            return Ready(image, self.first.prepare(volume))
        return Ready(image, read_labels(self.first[case_id], volume.geometry)[0])

    def segment(self, ready: Ready, gathering: Gathering | None = None, deciding: Deciding | None = None) -> LabelMap:
        """Label values on the file's grid, by one stage after the other.

        Args:
            ready: See `prepare`.
            gathering: Filled in by the last stage.
            deciding: Decides for the last stage, see `Predictor.segment`.
        """
        return self.last.segment(ready.image, self._previous(ready), gathering, deciding)

    def each_column(self, ready: Ready, use: Callable[[Column, int, Iterator[Slab]], None]) -> None:
        """The logits of the last stage; see `Predictor.each_column`."""
        self.last.each_column(ready.image, use, self._previous(ready))

    def _previous(self, ready: Ready) -> IndexMap | None:
        earlier = ready.earlier
        if earlier is None:
            return None
        if isinstance(earlier, Prepared):
            assert isinstance(self.first, Predictor)
            earlier = self.first.segment(earlier)
        return self.last.previous_map(earlier, ready.image)


def load_stages(
    models: Sequence[Model],
    previous: Sequence[Model] | Mapping[str, Path] | None,
    settings: PredictionSettings,
    device: str,
    *,
    uncertainty: bool = False,
    temperature: Temperature = 1.0,
    num_volumes: int = 1,
) -> Stages:
    """Put the networks of one configuration, and of its previous stage, on their device.

    Args:
        models: See `Predictor`.
        previous: Of a cascade: the models of its previous stage, or label maps that they made before, by case id.
        settings: Of both stages.
        device: See `runtime.pick_device`.
        uncertainty: See `Predictor`; of the last stage, as the next one.
        temperature: See `Predictor`.
        num_volumes: See `Predictor`.

    Raises:
        ConfigError: A setting is not possible.
        ModelError: The models do not belong together.
        DeviceMemoryError: The device has too little memory for the networks.
    """

    def load(members: Sequence[Model], uncertainty: bool = False, temperature: Temperature = 1.0) -> Predictor:
        return Predictor(
            members,
            device=device,
            precision=settings.precision,
            tta=settings.tta,
            overlap=settings.overlap,
            skip_empty=settings.skip_empty,
            uncertainty=uncertainty,
            temperature=temperature,
            engine=settings.engine,
            num_volumes=num_volumes,
        )

    last = load(models, uncertainty, temperature)
    return Stages(last, previous if previous is None or isinstance(previous, Mapping) else load(previous))
