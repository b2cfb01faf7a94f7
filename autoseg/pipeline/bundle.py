"""The parts of a MONAI bundle: what its configs/inference.json names, and MONAI's tools make and run.

Names and arguments of what is public here stand in bundles that lie elsewhere: they stay as they are.

Source: docs/decisions/0047.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import Inferer
from torch import Tensor, nn
from torch.utils.data import Dataset

from autoseg.domain.dataset import Case
from autoseg.domain.inference import DEFAULT_TTA, Tta
from autoseg.errors import ConfigError
from autoseg.inference.engines.base import WantedEngine
from autoseg.inference.fitting import common_settings
from autoseg.inference.inputs import find_cases
from autoseg.inference.outcome import PredictionOutcome
from autoseg.io.images import read_case
from autoseg.io.model import load_model
from autoseg.network.export import MeanOf
from autoseg.network.unet import restore
from autoseg.pipeline.api import Predictor
from autoseg.pipeline.members import choose
from autoseg.pipeline.prediction import predict
from autoseg.runtime import NoProgress

log = logging.getLogger("autoseg")

IMAGE = "image"
"""Key of an item's image, as MONAI's bundles name it."""

_BATCH_AXES = 5
"""(B, C, I, J, K)."""

_AFFINES_OF_A_BATCH = 3
"""(B, 4, 4), as MONAI's loaders stack affines; (4, 4) is one for all."""


def bundle_network(bundle_root: str | Path) -> nn.Module:
    """The network of a bundle's first member, which metadata.json describes: the mean of its folds.

    Args:
        bundle_root: The bundle.

    Returns:
        (n, channels, *patch) to logits (n, outputs, *patch), float32, in evaluation mode, on the CPU.

    Raises:
        ModelError: The bundle is damaged.
    """
    models = [load_model(model.folder) for model in choose(Path(bundle_root)).members[0].models]
    plan = common_settings(models).network
    return MeanOf([restore(plan, model.weights) for model in models]).eval()


class BundleDataset(Dataset[dict[str, Any]]):
    """The images of a folder, each case once, on its own grid.

    An item has `image`, (C, I, J, K) float32 as it was read, with its affine (RAS+) and the name of its file; and
    `case`, its name.

    Args:
        data: A folder or files; see `find_cases`. Looked at when it is asked for.
        bundle_root: The bundle: it says how many channels a case has.
    """

    def __init__(self, data: str | Path | Sequence[str | Path], bundle_root: str | Path) -> None:
        paths = (data,) if isinstance(data, str | Path) else data
        self.inputs = tuple(map(Path, paths))
        self._bundle_root = Path(bundle_root)

    @cached_property
    def _channels(self) -> tuple[bool, ...]:
        """Which channels may be missing."""
        return tuple(channel.may_be_missing for channel in choose(self._bundle_root).channels)

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """Which files are which case.

        Raises:
            ConfigError: See `find_cases`.
        """
        optional = [number for number, may_be_missing in enumerate(self._channels) if may_be_missing]
        return find_cases(self.inputs, len(self._channels), optional)

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a case.

        Raises:
            DatasetError: It cannot be read.
            ConfigError: A channel is missing.
        """
        case = self.cases[index]
        if case.missing:
            raise ConfigError(
                f"{case.id} lacks the channels {', '.join(map(str, case.missing))}, which a tensor cannot say",
                hint="The evaluator of the bundle, and `autoseg predict`, segment it.",
            )
        volume = read_case(case, len(self._channels))
        image = MetaTensor(
            torch.from_numpy(np.array(volume.array, np.float32)),
            affine=torch.from_numpy(np.array(volume.geometry.affine)),
            meta={"filename_or_obj": case.images[0]},
        )
        return {IMAGE: image, "case": case.id}


class BundleInferer(Inferer):
    """From images to label maps by everything that the bundle holds: members, previous stages, rules.

    Args:
        bundle_root: The bundle.
        device: A name, see `runtime.pick_device`, or torch's device.
        precision: See `Predictor`.
        tta: See `Predictor`.
        overlap: See `Predictor`.
        skip_empty: See `Predictor`.
        engine: See `Predictor`.
    """

    def __init__(
        self,
        bundle_root: str | Path,
        device: str | torch.device = "auto",
        precision: str = "auto",
        tta: Tta = DEFAULT_TTA,
        overlap: float | None = None,
        skip_empty: bool = False,
        engine: WantedEngine = "auto",
    ) -> None:
        super().__init__()
        self.bundle_root = Path(bundle_root)
        self.settings: dict[str, Any] = {
            "device": str(device),
            "precision": precision,
            "tta": tta,
            "overlap": overlap,
            "skip_empty": skip_empty,
            "engine": engine,
        }

    @cached_property
    def predictor(self) -> Predictor:
        """The models, loaded when they are asked for."""
        return Predictor(self.bundle_root, **self.settings)

    def __call__(self, inputs: Tensor, network: object = None, *_: object, **__: object) -> MetaTensor:
        """Segment images.

        Args:
            inputs: (B, C, I, J, K) as read from their files, with affines (RAS+): a `MetaTensor`.
            network: Not used: the members bring theirs. MONAI gives one to every inferer.

        Returns:
            (B, 1, I, J, K) label values, int32, on the CPU, with the affine of the images.

        Raises:
            ConfigError: It is no `MetaTensor` of five axes.
            DatasetError: An image does not fit the model.
            DeviceMemoryError: There is too little memory.
        """
        if not isinstance(inputs, MetaTensor) or inputs.ndim != _BATCH_AXES:
            raise ConfigError(
                f"the inferer of this bundle segments MetaTensors of the shape (B, C, I, J, K), "
                f"got {type(inputs).__name__} of {tuple(inputs.shape)}",
                hint="Give images as they lie in their files, with their affine; not resampled, not normalised.",
            )
        affines = inputs.affine.numpy(force=True)
        label_maps = [
            self.predictor(image, affine=affines[number] if affines.ndim == _AFFINES_OF_A_BATCH else affines).labels
            for number, image in enumerate(inputs.numpy(force=True))
        ]
        found = np.stack(label_maps).astype(np.int32)[:, None]
        return MetaTensor(torch.from_numpy(found), affine=inputs.affine)


class BundleEvaluator:
    """Segments every case of a data set and writes label maps: exactly as `autoseg predict` does.

    Args:
        dataset: Says which cases.
        inferer: Says by what and how.
        output_dir: Folder for the label maps.
        restart: Whether cases that are finished there are done again.
    """

    def __init__(
        self, dataset: BundleDataset, inferer: BundleInferer, output_dir: str | Path, restart: bool = False
    ) -> None:
        self.dataset = dataset
        self.inferer = inferer
        self.output_dir = Path(output_dir)
        self.restart = restart

    def run(self) -> PredictionOutcome:
        """Segment what is not finished.

        Raises:
            AutosegError: See `predict`, and `PredictionOutcome.raise_failures`: when all others are written.
        """
        outcome = predict(
            self.inferer.bundle_root,
            self.dataset.inputs,
            self.output_dir,
            restart=self.restart,
            progress=_Lines(),
            **self.inferer.settings,
        )
        outcome.raise_failures()
        return outcome


class _Lines(NoProgress):
    """A line of the log for every case."""

    def start(self, description: str, total: int | None) -> None:
        """Say how many."""
        log.info("%s: %s cases", description, total)

    def advance(self, step: int = 1, note: str = "") -> None:
        """Say which one is done."""
        log.info("%s is done", note)

    def finish(self, note: str = "") -> None:
        """Say what was written."""
        log.info("%s", note)
