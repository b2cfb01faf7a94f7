"""What trials of engines found, remembered beside the model for this host and these versions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from autoseg import runtime
from autoseg.domain.values import Value, digest_of
from autoseg.errors import ModelError
from autoseg.inference.engines.base import EngineName, Precision, Way
from autoseg.io.files import read_json, read_text, write_text
from autoseg.io.model import Model

log = logging.getLogger("autoseg")

SCHEMA_VERSION = 2

FILE = "engines.json"
"""In the folder of the first of the models that predict together."""

_MOST_HOSTS = 32
"""Sets of trials that are remembered, the newest."""


class Circumstances(Value):
    """What a trial holds for.

    Attributes:
        weights_sha256: Of the models that predict together.
        network: Digest of their network with its patch.
        device: Name of the CPU or GPU.
        num_threads: With which the CPU computes.
        tile_batch: Tiles at a time.
        versions: Of autoseg, torch and the packages of all engines, as far as they are installed.
    """

    weights_sha256: tuple[str, ...]
    network: str
    device: str
    num_threads: int
    tile_batch: int
    versions: dict[str, str]


class Trial(Value):
    """What a trial found.

    Attributes:
        engine: Which engine.
        precision: In which precision.
        set_up_s: Seconds to bring the models into the engine, the next time; 0 for what is loaded in any case.
        seconds_per_tile: Of a tile through all models.
        same_labels: See `Parity`.
        largest_difference: See `Parity`.
        mean_difference: See `Parity`.
        is_met: Whether it says what PyTorch says in float32; see `Parity.is_met`.
        failure: Why the engine cannot run these models; empty where it can.
    """

    engine: EngineName
    precision: Precision
    set_up_s: float = Field(default=0.0, ge=0)
    seconds_per_tile: float = Field(default=0.0, ge=0)
    same_labels: float = 0.0
    largest_difference: float = 1.0
    mean_difference: float = 1.0
    is_met: bool = False
    failure: str = ""

    @property
    def way(self) -> Way:
        """Engine and precision."""
        return Way(self.engine, self.precision)

    def seconds(self, num_tiles: int) -> float:
        """Of setting it up and running so many tiles."""
        return self.set_up_s + num_tiles * self.seconds_per_tile


class Remembered(Value):
    """Trials under the same circumstances."""

    circumstances: Circumstances
    trials: tuple[Trial, ...]


class EnginesFile(Value):
    """Content of `FILE`: trials by circumstances, the newest last."""

    schema_version: int = SCHEMA_VERSION
    remembered: tuple[Remembered, ...] = ()


def circumstances(
    models: Sequence[Model], device: torch.device, tile_batch: int, versions: dict[str, str]
) -> Circumstances:
    """Those of models on this machine.

    Args:
        models: That predict together.
        device: Where they run.
        tile_batch: Tiles at a time.
        versions: Of the engines' packages.
    """
    own = {name: version for name, version in runtime.versions().items() if name in ("autoseg-unet", "torch")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {runtime.cpu_name()}"
    return Circumstances(
        weights_sha256=tuple(model.card.weights_sha256 for model in models),
        network=digest_of(models[0].card.settings.network.model_dump(mode="json")),
        device=name,
        num_threads=torch.get_num_threads(),
        tile_batch=tile_batch,
        versions=dict(sorted((own | versions).items())),
    )


def recall(folder: Path | None, here: Circumstances) -> tuple[Trial, ...]:
    """What was found under these circumstances; nothing where there is no such file, or none that can be read.

    Args:
        folder: Of the first model; None for one that never was on disk.
        here: The circumstances.
    """
    return next((item.trials for item in _read(folder).remembered if item.circumstances == here), ())


def remember(folder: Path | None, here: Circumstances, trials: Sequence[Trial]) -> None:
    """Keep what was found; where the folder is read only, nothing happens.

    Args:
        folder: Of the first model; None for one that never was on disk.
        here: The circumstances.
        trials: All that are to be remembered for them.
    """
    # A model that was unpacked for a moment has no folder any more.
    if folder is None or not folder.is_dir() or not all(here.weights_sha256):
        return
    others = tuple(item for item in _read(folder).remembered if item.circumstances != here)
    content = EnginesFile(remembered=(*others, Remembered(circumstances=here, trials=tuple(trials)))[-_MOST_HOSTS:])
    try:
        write_text(folder / FILE, content.to_json())
    except OSError as problem:
        log.info("which engine is quickest is not remembered: %s", problem.strerror or problem)


def _read(folder: Path | None) -> EnginesFile:
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        return EnginesFile()
    try:
        data = read_json(path, ModelError)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ModelError(f"it has schema version {version}")
        return EnginesFile.from_json(read_text(path, ModelError), path, ModelError)
    except ModelError as problem:
        log.info("%s is ignored and will be written anew: %s", path, problem.message)
        return EnginesFile()
