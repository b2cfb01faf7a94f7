"""What other programs call: models resident in memory that segment one image after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import Case, LabelSchema
from autoseg.domain.endings import split_ending
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.inference import DEFAULT_TTA, Tta
from autoseg.errors import ConfigError
from autoseg.inference.engines.base import WantedEngine
from autoseg.inference.export import LabelMap
from autoseg.inference.segmenter import Segmenter, WeightedStages
from autoseg.inference.settings import PredictionSettings
from autoseg.inference.stages import load_stages
from autoseg.io.images import read_case, write_labels
from autoseg.io.model import Model
from autoseg.io.nibabel_images import from_nibabel, is_nibabel, to_nibabel
from autoseg.pipeline.cascade import load_previous
from autoseg.pipeline.exporting import opened
from autoseg.pipeline.members import choose

Image = Volume | str | Path | Sequence[str | Path] | NDArray[Any]
"""A volume, a file, one file a channel, or an array; besides these an image of nibabel's."""

_SPATIAL_AXES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """A label map with its place in the world.

    Attributes:
        labels: (I, J, K) label values in the image's own voxel order; uint8 or uint16.
        geometry: The image's grid.
        schema: What the values mean.
    """

    labels: LabelMap
    geometry: Geometry
    schema: LabelSchema

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all; the ending chooses the format.

        Raises:
            DatasetError: The format is not written.
            OSError: The file cannot be written.
        """
        write_labels(path, self.labels, self.geometry)
        return Path(path)

    def to_nibabel(self) -> Any:
        """As a NIfTI image of nibabel's, without a copy of the voxels."""
        return to_nibabel(self.labels, self.geometry)


class Predictor:
    """Models in memory, ready to segment images: as `autoseg predict` does, cascades, ensembles and rules included.

    Networks stay on their device until the object goes. Of an image nothing is kept once its label map is returned. Not
    for several threads at a time.

    Args:
        model: A run folder, an exported model (folder or .zip), a fold folder; or models that are loaded, of one
            configuration.
        configuration: Of a run; None chooses as `autoseg predict` does.
        folds: Numbers separated by commas, or "all"; None takes every finished one.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: "auto", "fp32", "bf16", "fp16", or "int8" with the engine "openvino".
        tta: Test-time mirroring: "none", "interleaved", "full".
        overlap: Of tiles, as a fraction of the patch; None is the plan's.
        skip_empty: Whether tiles that show nothing are skipped.
        engine: What runs the networks: "torch", "compile", "openvino", "onnx"; "auto" is found with the first image
            where finding out pays.
        num_volumes: About how many images will come: for more of them more time is spent on finding the engine.
        scratch: Folder for what several members vote where memory would be too small; None is the system's.

    Raises:
        ModelError: There is no such model, or it is damaged.
        ConfigError: A setting is not possible.
        DeviceMemoryError: The device has too little memory for the networks.
    """

    def __init__(
        self,
        model: str | Path | Model | Sequence[Model],
        *,
        configuration: str | None = None,
        folds: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        tta: Tta = DEFAULT_TTA,
        overlap: float | None = None,
        skip_empty: bool = False,
        engine: WantedEngine = "auto",
        num_volumes: int = 1,
        scratch: str | Path | None = None,
    ) -> None:
        settings = PredictionSettings(
            precision=precision, tta=tta, overlap=overlap, skip_empty=skip_empty, engine=engine
        )
        if isinstance(model, str | Path):
            with opened(Path(model)) as folder:
                chosen = choose(folder, configuration, folds)
                self._segmenter = chosen.load(
                    settings, device, None if scratch is None else Path(scratch), num_volumes=num_volumes
                )
        else:
            if configuration is not None or folds is not None:
                raise ConfigError("configuration and folds choose among the models of a run, not among loaded ones")
            models = (model,) if isinstance(model, Model) else tuple(model)
            previous = load_previous(models) if models else None
            stages = load_stages(models, previous, settings, device, num_volumes=num_volumes)
            self._segmenter = Segmenter([WeightedStages(stages)])

    @property
    def labels(self) -> LabelSchema:
        """Classes and their label values."""
        return self._segmenter.labels

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, in the order in which images must have them."""
        return tuple(channel.name for channel in self._segmenter.channels)

    def __call__(
        self,
        image: Image | Any,
        *,
        affine: NDArray[Any] | None = None,
        spacing_mm: Sequence[float] | None = None,
    ) -> Segmentation:
        """Segment an image.

        Args:
            image: A `Volume`; the path of a file or a DICOM series; several paths, one a channel; an image of
                nibabel's, channels last; or an array, (I, J, K) or (C, I, J, K), with `affine` or `spacing_mm`.
            affine: Of an array: (4, 4), voxel index to world millimetres, RAS+.
            spacing_mm: Of an array without an affine, along I, J, K: its axes then run to the right, to the front and
                up.

        Returns:
            The label map on the image's own grid.

        Raises:
            ConfigError: An array has no affine and no spacing, or something else has one too.
            DatasetError: The image cannot be read, or does not fit the model.
            DeviceMemoryError: There is too little memory.
        """
        volume = self._volume(image, affine, spacing_mm)
        segmenter, geometry = self._segmenter, volume.geometry
        deciding = segmenter.deciding(geometry)
        labels = segmenter.segment(segmenter.prepare(volume), deciding=deciding)
        labels = segmenter.finish(labels, geometry, deciding)
        return Segmentation(labels, geometry, self.labels)

    def _volume(self, image: Image | Any, affine: NDArray[Any] | None, spacing_mm: Sequence[float] | None) -> Volume:
        if isinstance(image, np.ndarray):
            return _volume_of_array(image, affine, spacing_mm)
        if affine is not None or spacing_mm is not None:
            raise ConfigError("affine and spacing_mm are for arrays; everything else says where it lies")
        if isinstance(image, Volume):
            return image
        if is_nibabel(image):
            return from_nibabel(image)
        paths = (image,) if isinstance(image, str | Path) else tuple(image)
        case = Case(id=split_ending(paths[0])[0], images=tuple(map(str, paths)))
        return read_case(case, len(self.channels))


def _volume_of_array(array: NDArray[Any], affine: NDArray[Any] | None, spacing_mm: Sequence[float] | None) -> Volume:
    if (affine is None) == (spacing_mm is None):
        raise ConfigError(
            "an array needs either affine or spacing_mm: the model must know how large a voxel is",
            hint="As in predictor(array, spacing_mm=(1.0, 1.0, 3.0)).",
        )
    if array.ndim not in (_SPATIAL_AXES, _SPATIAL_AXES + 1):
        raise ConfigError(f"an array needs the axes (I, J, K) or (C, I, J, K), got the shape {array.shape}")
    volume = array if array.ndim > _SPATIAL_AXES else array[None]
    if affine is None:
        assert spacing_mm is not None
        if len(spacing_mm) != _SPATIAL_AXES:
            raise ConfigError(f"spacing_mm needs three numbers, along I, J and K, got {tuple(spacing_mm)}")
        affine = np.diag([*spacing_mm, 1.0])
    return Volume(volume, Geometry((volume.shape[1], volume.shape[2], volume.shape[3]), np.asarray(affine)))
