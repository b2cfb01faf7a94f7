"""A network as it is run: as it stands, or compiled, and then back to as it stands where the compiler fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autoseg import runtime

log = logging.getLogger("autoseg")

_MOST_WORDS = 200
"""Letters of a compiler's message that are shown: the first line says what is missing."""


class Forward:
    """Runs a network.

    The network itself stays as it is: its weights keep their names, and whoever has it may go on using it.

    Args:
        network: What is run.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._run: Callable[[Tensor], Tensor | Sequence[Tensor]] = network

    @property
    def is_compiled(self) -> bool:
        """Whether it runs compiled."""
        return self._run is not self._network

    def use(self, *, is_compiled: bool) -> None:
        """Run compiled from now on, or as it stands. The first pass of a compiled network takes long."""
        if is_compiled != self.is_compiled:
            # Sizes are few and fixed: code for exactly these is the quickest.
            self._run = torch.compile(self._network, dynamic=False) if is_compiled else self._network

    def __call__(self, images: Tensor) -> Tensor | Sequence[Tensor]:
        """The network's outputs."""
        return self._run(images)

    def guarded(self, work: Callable[[], None]) -> MemoryError | RuntimeError | None:
        """Do work that runs the network and that may be done again.

        Where the compiler fails, a warning names the reason, and the work is done again with the network as it stands.

        Returns:
            What was raised where memory ran out; None where all went well. Other errors pass.
        """
        try:
            work()
            return None
        except (MemoryError, RuntimeError) as problem:
            if self.is_compiled and _is_of_compiler(problem):
                _tell(problem)
            elif runtime.is_out_of_memory(problem):
                # Its frames hold the tensors that took the memory.
                return problem.with_traceback(None)
            else:
                raise
        self.use(is_compiled=False)
        return self.guarded(work)


def _is_of_compiler(problem: MemoryError | RuntimeError) -> bool:
    # Loaded with the first compiled pass, and slow to load before.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return isinstance(problem, TorchDynamoException | CppCompileError | InvalidCxxCompiler)


def _tell(problem: MemoryError | RuntimeError) -> None:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    reason = lines[0][:_MOST_WORDS] if lines else type(problem).__name__
    log.warning("the network cannot be compiled and runs as it stands: %s", reason)
