"""PyTorch as an engine: networks as they stand, and compiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autoseg.errors import ModelError
from autoseg.inference.engines.base import EngineName, Network, Precision
from autoseg.inference.resident import is_cast, resident
from autoseg.io.model import Model
from autoseg.runtime import autocast

_MOST_WORDS = 200
"""Letters of a compiler's message that are shown: the first line says what is missing."""


class Eager:
    """PyTorch as it stands: everywhere, and what all others are held against."""

    name: EngineName = "torch"
    packages: tuple[str, ...] = ()
    extra = ""
    takes_autocast = True
    has_own_threads = False
    set_up_s = 0.1
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16")

    def runs_on(self, device: torch.device) -> bool:
        """Always."""
        del device
        return True

    def network(self, model: Model, device: torch.device, precision: Precision, batch: int) -> Network:
        """See `resident`."""
        del batch
        return resident(model, device, precision)


class Compiled:
    """PyTorch with torch.compile, on CPU and CUDA; needs a C++ compiler on the machine, on CUDA Triton."""

    name: EngineName = "compile"
    packages: tuple[str, ...] = ()
    extra = ""
    takes_autocast = True
    has_own_threads = False
    set_up_s = 60.0  # 52 s for hippocampus's plan on one core. Source: docs/decisions/0025.
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "fp16")

    def runs_on(self, device: torch.device) -> bool:
        """On CPU and CUDA."""
        return device.type in ("cpu", "cuda")

    def network(self, model: Model, device: torch.device, precision: Precision, batch: int) -> Network:
        """The compiled network; compiles it for `batch` tiles.

        Raises:
            ModelError: The compiler fails, or there is none.
        """
        network = resident(model, device, precision)
        compiled = PowersOfTwo(network)
        plan = model.card.settings.network
        casts = is_cast(device, precision)
        dtype = torch.bfloat16 if casts else torch.float32
        example = torch.zeros(batch, plan.in_channels, *plan.patch_size, dtype=dtype, device=device)
        try:
            with torch.inference_mode(), autocast(device, "fp32" if casts else precision):
                compiled(example)
        except RuntimeError as problem:
            if not _is_of_compiler(problem):
                raise
            lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
            reason = lines[0][:_MOST_WORDS] if lines else type(problem).__name__
            raise ModelError(
                f"the network cannot be compiled: {reason}", hint="Use --engine torch, or another one."
            ) from None
        return compiled


class PowersOfTwo:
    """A compiled network that only ever sees 1, 2, 4, 8, ... images at a time: each number is compiled once.

    Args:
        network: In evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        # Sizes are few and fixed: code for exactly these is the quickest.
        self._run = torch.compile(network, dynamic=False)

    def __call__(self, x: Tensor) -> Tensor:
        """Run (n, C, *patch); the last image is repeated until a power of two is full."""
        number = len(x)
        missing = (1 << (number - 1).bit_length()) - number
        if missing:
            x = torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])
        out: Tensor = self._run(x)
        return out[:number] if missing else out


def _is_of_compiler(problem: RuntimeError) -> bool:
    # Loaded with the first compiled pass, and slow to load before.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return isinstance(problem, TorchDynamoException | CppCompileError | InvalidCxxCompiler)
