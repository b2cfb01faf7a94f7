"""What an engine is: something that runs a network for prediction, in one precision or another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor

from autoseg.errors import ConfigError
from autoseg.io.model import Model

EngineName = Literal["torch", "compile", "openvino", "onnx"]
"""PyTorch as it stands, PyTorch compiled, OpenVINO, ONNX Runtime."""

Precision = Literal["fp32", "bf16", "fp16", "int8"]

Tiles = Callable[[Model], Sequence[Tensor]]
"""Gives tiles (1, C, *patch) for a model, as its network sees them: only where they are needed."""

WantedEngine = Literal["auto", "torch", "compile", "openvino", "onnx"]
"""What may be asked for: an engine, or the quickest that says what PyTorch says in float32."""

Network = Callable[[Tensor], Tensor]
"""A network in an engine: (n, C, *patch) to (n, K, *patch), any n; two spatial axes where it has two."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a network is run.

    Attributes:
        engine: By what.
        precision: "fp32", "bf16", "fp16" or "int8".
    """

    engine: EngineName
    precision: Precision

    def __str__(self) -> str:
        return f"{self.engine} in {self.precision}"


class KeptNetwork(ABC):
    """A network whose form for the engine takes long to make: it can be kept beside the model for the next time.

    Attributes:
        set_up_again_s: Seconds that it takes to set it up where its form was kept.
    """

    set_up_again_s: float

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """See `Network`."""

    @abstractmethod
    def keep(self) -> None:
        """Keep the form. Where that is not possible, as in a folder that is read only, nothing happens."""


class Engine(Protocol):
    """What runs networks. One object of each kind lives in `ENGINES`.

    Attributes:
        name: By which it is asked for.
        packages: Optional ones that it needs; also the names by which `metadata` knows their versions.
        extra: Of autoseg, that installs them.
        takes_autocast: Whether networks get tiles in the type of the precision and run inside `runtime.autocast`;
            others get float32 and keep their precision to themselves.
        has_own_threads: Whether it computes in threads of its own, on the cores that PyTorch's threads also want.
        set_up_s: Seconds that setting up one network takes about on one core, the first time.
        precisions: In which it computes, where the device does.
    """

    name: EngineName
    packages: tuple[str, ...]
    extra: str
    takes_autocast: bool
    has_own_threads: bool
    set_up_s: float
    precisions: tuple[Precision, ...]

    def runs_on(self, device: torch.device) -> bool:
        """Whether it runs networks on that device."""

    def network(self, model: Model, device: torch.device, precision: Precision, batch: int) -> Network:
        """The network, ready to run.

        Args:
            model: Its weights are not needed any more afterwards.
            device: Where it runs.
            precision: One of `precisions`.
            batch: How many tiles it mostly gets at a time.

        Raises:
            ModelError: The engine cannot take this network.
        """


def missing(engine: Engine) -> tuple[str, ...]:
    """Packages that the engine needs and that are not installed."""
    return tuple(name for name in engine.packages if find_spec(name) is None)


def require(engine: Engine) -> None:
    """Say what to install.

    Raises:
        ConfigError: A package is missing.
    """
    lacking = missing(engine)
    if lacking:
        raise ConfigError(
            f"the engine {engine.name} needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not "
            "installed",
            hint=f"Install what it needs with: pip install 'autoseg-unet[{engine.extra}]'",
        )


def package_versions(engines: Sequence[Engine]) -> dict[str, str]:
    """Versions of the packages that engines need, those that are installed."""
    found = {}
    for name in {package for engine in engines for package in engine.packages}:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
