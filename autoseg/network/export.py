"""A network as a graph that other programs run: a torch export, and ONNX.

Graphs take any number of images, of one size: that of the patch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from autoseg.domain.network_plan import NetworkPlan
from autoseg.errors import ModelError
from autoseg.runtime import is_out_of_memory

if TYPE_CHECKING:
    from torch.export import ExportedProgram

IMAGE = "image"
"""Name of an ONNX graph's input."""

LOGITS = "logits"
"""Name of its output."""

BATCH = "batch"
"""Name of the axis along which any number of images go in."""

ONNX_OPSET = 20
"""Version of ONNX's operators. Source: the newest that ONNX Runtime 1.17 (2024) runs."""

# The exporter takes the length 1 of an axis for fixed.
_EXAMPLE_BATCH = 2

# It says for each operator of torchvision, which is not needed, that there is no torchvision.
_TALKATIVE = "torch.onnx._internal.exporter._registration"


class MeanOf(nn.Module):
    """The mean of what several networks say of an image.

    Args:
        networks: At least one, with inputs and outputs of the same shapes.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to (N, K, *spatial)."""
        total: Tensor = self.networks[0](x)
        for network in self.networks[1:]:
            total = total + network(x)
        return total / len(self.networks)


def exported(network: nn.Module, plan: NetworkPlan) -> ExportedProgram:
    """The graph of a network for any number of patches.

    Args:
        network: In evaluation mode, float32, on the CPU.
        plan: Says channels and patch.

    Raises:
        ModelError: torch cannot make a graph of it.
    """
    with _exporting("a graph"):
        return torch.export.export(network, _example(plan), dynamic_shapes=_dynamic_shapes(), strict=False)


def onnx_of(network: nn.Module, plan: NetworkPlan) -> bytes:
    """The ONNX form of a network: input `IMAGE` (N, C, *patch), output `LOGITS` (N, K, *patch), any N, float32.

    Args:
        network: In evaluation mode, float32, on the CPU.
        plan: Says channels and patch.

    Raises:
        ModelError: It has no ONNX form.
        ImportError: The packages onnx and onnxscript are not installed.
    """
    with _exporting("ONNX"):
        program = torch.onnx.export(
            network,
            _example(plan),
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(),
            input_names=[IMAGE],
            output_names=[LOGITS],
            opset_version=ONNX_OPSET,
            verbose=False,
        )
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


def _example(plan: NetworkPlan) -> tuple[Tensor]:
    return (torch.zeros(_EXAMPLE_BATCH, plan.in_channels, *plan.patch_size),)


def _dynamic_shapes() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim(BATCH)},)


@contextmanager
def without_outdated_warnings() -> Iterator[None]:
    """Warnings of torch's exporters about torch's exporters are not shown: torch 2.13 uses what it calls outdated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def _exporting(what: str) -> Iterator[None]:
    """Without gradients and without the exporters' messages to their own authors; failures become a ModelError."""
    logger = logging.getLogger(_TALKATIVE)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with without_outdated_warnings(), torch.no_grad():
            yield
    except RuntimeError as problem:
        # Every failure of torch's exporters is one: no numbers are computed here.
        if is_out_of_memory(problem):
            raise
        reason = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise ModelError(f"the network cannot be brought into the form of {what}: {reason}") from None
    finally:
        logger.setLevel(level)
