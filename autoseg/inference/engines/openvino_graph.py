"""An OpenVINO graph made straight from the operations of a network, in a fifth of a second.

The network computes a tiny image, every operation is noted, and each becomes a node of the graph. That serves networks
of convolutions, instance and group norms, activations, sums and concatenations: all that the presets plan, and nnU-Net.
Others go the long way, by PyTorch's own export, which takes seconds.

Source: docs/decisions/0035.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from autoseg.domain.network_plan import NetworkPlan

# Give a tensor of the same values where they give one of the same size.
_UNCHANGED = (Tensor.contiguous, Tensor.narrow)


@cache
def load_openvino() -> Any:
    """The package, which is not let tell its makers that it was imported."""
    # It would, over the network, by this package: it does without where there is none.
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


class UntranslatableError(Exception):
    """The network has an operation that is not known here."""


def translated(network: nn.Module, plan: NetworkPlan) -> Any:
    """The graph of a network: (n, C, *patch) float32 to (n, K, *patch), any n.

    Args:
        network: In evaluation mode, float32, on the CPU.
        plan: Its plan.

    Raises:
        UntranslatableError: See there.
    """
    if any(size % step for size, step in zip(plan.patch_size, plan.divisors, strict=True)):
        raise UntranslatableError("the network pads the patch")
    # Nothing of what is noted depends on the size, as long as the strides divide it.
    image = torch.zeros(1, plan.in_channels, *plan.divisors)
    openvino = load_openvino()
    from openvino import opset12

    shape = openvino.PartialShape([-1, plan.in_channels, *plan.patch_size])
    parameter = opset12.parameter(shape, openvino.Type.f32, "image")
    translation = _Translation(opset12, image, parameter.output(0))
    with torch.no_grad(), translation:
        logits = network(image)
    return openvino.Model([translation.node(logits)], [parameter], "network")


class _Translation(TorchFunctionMode):
    """Notes a node for every tensor that is computed while it is entered.

    Args:
        opset: OpenVINO's operations.
        image: What the network is given.
        node: Of it.
    """

    def __init__(self, opset: Any, image: Tensor, node: Any) -> None:
        super().__init__()
        self._opset = opset
        self._nodes = {id(image): node}
        # An id names a tensor only as long as it lives.
        self._alive = [image]
        self._known: dict[Any, Callable[..., Any]] = {
            torch.conv2d: self._convolution,
            torch.conv3d: self._convolution,
            torch.conv_transpose2d: self._transposed,
            torch.conv_transpose3d: self._transposed,
            torch.group_norm: self._norm,
            functional.leaky_relu: self._leaky_relu,
            functional.relu: self._relu,
            functional.avg_pool2d: self._mean,
            functional.avg_pool3d: self._mean,
            torch.cat: self._cat,
            Tensor.add: self._add,
            Tensor.add_: self._add,
        }

    def node(self, tensor: Tensor) -> Any:
        """Of a tensor that was computed.

        Raises:
            UntranslatableError: By something that is not known here.
        """
        if id(tensor) not in self._nodes:
            raise UntranslatableError("an operation takes what another one gives that is not known here")
        return self._nodes[id(tensor)]

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        """Compute, and note the node."""
        del types
        options = options or {}
        result = function(*arguments, **options)
        if not isinstance(result, Tensor):
            return result
        if function in self._known:
            node = self._known[function](*arguments, **options).output(0)
        elif function in _UNCHANGED and result.shape == arguments[0].shape:
            node = self.node(arguments[0])
        elif id(result) in self._nodes:
            raise UntranslatableError(f"it is changed in place by {function}")
        else:
            # What has no node matters only where it is used.
            return result
        self._nodes[id(result)] = node
        self._alive.append(result)
        return result

    def _convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        num_groups: int,
    ) -> Any:
        if num_groups != 1:
            raise UntranslatableError("a convolution is in groups")
        made = self._opset.convolution(self.node(x), _array(weight), stride, padding, padding, dilation)
        return self._shifted(made, bias)

    def _transposed(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        output_padding: Sequence[int],
        num_groups: int,
        dilation: Sequence[int],
    ) -> Any:
        if num_groups != 1 or any(output_padding):
            raise UntranslatableError("a transposed convolution is in groups, or pads its output")
        made = self._opset.convolution_backprop_data(
            self.node(x), _array(weight), stride, None, padding, padding, dilation
        )
        return self._shifted(made, bias)

    def _shifted(self, made: Any, bias: Tensor | None) -> Any:
        if bias is None:
            return made
        num_axes = len(made.output(0).get_partial_shape())
        return self._opset.add(made, _array(bias).reshape(1, -1, *(1,) * (num_axes - 2)))

    def _norm(self, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *_: Any) -> Any:
        return self._opset.group_normalization(self.node(x), _array(weight), _array(bias), num_groups, eps)

    def _leaky_relu(self, x: Tensor, negative_slope: float = 0.01, **_: Any) -> Any:
        return self._opset.prelu(self.node(x), np.array([negative_slope], np.float32))

    def _relu(self, x: Tensor, **_: Any) -> Any:
        return self._opset.relu(self.node(x))

    def _mean(
        self,
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: int,
        is_rounded_up: bool,
        counts_padding: bool,
        divisor: int | None,
    ) -> Any:
        if padding or is_rounded_up or divisor is not None:
            raise UntranslatableError("a mean that is padded, rounded up or divided otherwise")
        nothing = [0] * len(kernel)
        return self._opset.avg_pool(self.node(x), stride, nothing, nothing, kernel, not counts_padding)

    def _cat(self, tensors: Sequence[Tensor], dim: int) -> Any:
        return self._opset.concat([self.node(tensor) for tensor in tensors], dim)

    def _add(self, x: Tensor, y: Tensor) -> Any:
        return self._opset.add(self.node(x), self.node(y))


def _array(weight: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = weight.detach().numpy()
    return array
