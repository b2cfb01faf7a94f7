"""Engines: what runs the networks of a prediction.

`ENGINES` names them, `Loaded` holds models in one; which one is quickest is found out in `choice`.

Source: docs/decisions/0035.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch

from autoseg.domain.plan import Configuration
from autoseg.errors import ConfigError
from autoseg.inference.engines.base import (
    Engine,
    EngineName,
    KeptNetwork,
    Network,
    Precision,
    Tiles,
    WantedEngine,
    Way,
    missing,
    require,
)
from autoseg.inference.engines.onnxruntime import OnnxRuntime
from autoseg.inference.engines.openvino import OpenVino
from autoseg.inference.engines.pytorch import Compiled, Eager
from autoseg.inference.resident import averaged
from autoseg.inference.tiles import Forward
from autoseg.io.model import Model
from autoseg.runtime import pick_device, pick_precision

__all__ = ["ENGINES", "Loaded", "WantedEngine", "Way", "installed", "pick_device_for", "pick_way"]

ENGINES: dict[EngineName, Engine] = {
    "torch": Eager(),
    "compile": Compiled(),
    "openvino": OpenVino(),
    "onnx": OnnxRuntime(),
}


INT8 = "int8"


class Loaded:
    """Models in an engine.

    Args:
        models: Their logits are averaged.
        settings: Of the models.
        way: Engine and precision.
        device: Where they run.
        batch: How many tiles they mostly get at a time.
        tiles: For int8: what ranges of numbers are measured with.

    Attributes:
        way: Engine and precision.
        has_own_threads: See `Engine`.
        forward: Mean logits; see `resident.averaged`.

    Raises:
        ModelError: The engine cannot take a network.
    """

    def __init__(
        self,
        models: Sequence[Model],
        settings: Configuration,
        way: Way,
        device: torch.device,
        batch: int,
        tiles: Tiles | None = None,
    ) -> None:
        engine = ENGINES[way.engine]
        if way.precision == INT8:
            assert isinstance(engine, OpenVino) and tiles is not None  # noqa: PT018
            self._networks: list[Network] = [engine.quantised(model, batch, tiles) for model in models]
        else:
            self._networks = [engine.network(model, device, way.precision, batch) for model in models]
        self.way = way
        self.has_own_threads = engine.has_own_threads
        self._settings, self._device = settings, device
        self._inner = way.precision if engine.takes_autocast else "fp32"
        self.forward = self.wrapped(lambda network: network)

    def wrapped(self, wrap: Callable[[Network], Network]) -> Forward:
        """As `forward`, with something around each network."""
        return averaged([wrap(network) for network in self._networks], self._settings, self._device, self._inner)

    @property
    def set_up_again_s(self) -> float | None:
        """Seconds of setting it up where its forms were kept; None where there is nothing to keep."""
        kept = [network.set_up_again_s for network in self._networks if isinstance(network, KeptNetwork)]
        return sum(kept) if kept else None

    def keep(self) -> None:
        """Keep what took long to make, beside the models, where that is possible."""
        for network in self._networks:
            if isinstance(network, KeptNetwork):
                network.keep()


def installed() -> tuple[EngineName, ...]:
    """Engines whose packages are there."""
    return tuple(name for name, engine in ENGINES.items() if not missing(engine))


def pick_device_for(engine: WantedEngine, name: str) -> torch.device:
    """The device of that name; "auto" is one that the engine runs on.

    Raises:
        ConfigError: This machine does not have it, the engine does not run on it, or a package is missing.
    """
    if engine == "auto":
        return pick_device(name)
    chosen = ENGINES[engine]
    require(chosen)
    device = pick_device(name)
    if not chosen.runs_on(device) and name == "auto":
        device = torch.device("cpu")
    if not chosen.runs_on(device):
        raise ConfigError(
            f"the engine {engine} does not run on {device.type}", hint="Use --device cpu, or --engine torch."
        )
    return device


def pick_way(engine: WantedEngine, precision: str, planned: str, device: torch.device) -> Way:
    """Engine and precision as they are asked for; of "auto" what is used where no other was found to be quicker.

    Args:
        engine: Asked for.
        precision: Asked for; "auto" is what the plan says.
        planned: What the plan says; "auto" is what the device does well.
        device: From `pick_device_for`.

    Raises:
        ConfigError: The device or the engine does not have the precision.
    """
    name: EngineName = "torch" if engine == "auto" else engine
    offered = ENGINES[name].precisions
    if precision == INT8:
        if INT8 not in offered:
            raise ConfigError(
                f"the engine {name} does not compute in int8: use {' or '.join(offered)}",
                hint="Use --engine openvino for int8.",
            )
        return Way(name, INT8)
    if precision == "auto":
        found = cast(Precision, pick_precision(planned, device))
        return Way(name, found if found in offered else "fp32")
    found = cast(Precision, pick_precision(precision, device))
    if found not in offered:
        raise ConfigError(f"the engine {name} does not compute in {found}: use {' or '.join(offered)}")
    return Way(name, found)
