"""The rules by which gradients change weights: SGD as nnU-Net uses it, AdamW, Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from autoseg.domain.plan import TrainingPlan

ADAM_EPS = 1e-8
"""Added to the root of the second moment. Source: Kingma & Ba 2015, "Adam", algorithm 1."""

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Iterations and coefficients of the odd polynomial that takes all singular values to about 1.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

MOST_ROWS = 128
"""Kernels with more output channels are orthogonalised in blocks of about equal size, none with more rows than this.

The work grows with the square of the rows: a step of a 2D network with 512 channels took 4.2 s instead of 2.5.
Blocks of 64 rows reached the same Dice as whole kernels in 64 steps (0.843, 0.846). Source: decision 29.
"""

MATCHED_RMS = 0.2
"""Root mean square of an update whose learning rate is 1, so that learning rates and weight decays of AdamW fit.

Source: Liu et al. 2025, "Muon is scalable for LLM training", section 2.2.
"""

_SMALLEST_NORM = 1e-7

# Prefixes of the optimiser's tensors in checkpoints, by torch's names of them.
_PREFIXES = {
    "momentum_buffer": "momentum.",
    "exp_avg": "first_moment.",
    "exp_avg_sq": "second_moment.",
    "step": "optimiser_step.",
}


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are about 1 (0.7 to 1.2), by Newton-Schulz iteration.

    Every iterate is a polynomial of X X^T times X. So the iterations run on the small matrix X X^T, in float32, and X
    itself is multiplied twice instead of ten times.

    Args:
        matrix: (rows, columns), any float dtype.

    Returns:
        (rows, columns) float32; of a matrix of zeros, zeros.

    Source: see `NEWTON_SCHULZ`.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).float()
    x = x / x.norm().clamp_min(_SMALLEST_NORM)
    gram = x @ x.T
    factor = torch.eye(len(x), device=x.device)
    for _ in range(NEWTON_SCHULZ_STEPS):
        polynomial = b * gram + c * gram @ gram
        polynomial.diagonal().add_(a)
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    result: Tensor = (factor.bfloat16() @ x.bfloat16()).float()
    return result.T if is_tall else result


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised, for the kernels of convolutions; AdamW for everything else.

    A kernel (out, in, *kernel) counts as a matrix of (out, in x kernel). An orthogonalised update moves every direction
    that the gradient has by the same amount, the rare ones too. Norms, biases and 1x1 heads have no such directions.

    Args:
        kernels: Weights that are matrices, or more.
        others: All other weights.
        lr: Of both.
        momentum: Of the kernels (Nesterov).
        betas: Of AdamW.
        weight_decay: Decoupled, of the kernels alone.

    Source: see `NEWTON_SCHULZ` and `MATCHED_RMS`.
    """

    def __init__(
        self,
        kernels: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(kernels), "is_matrix": True},
            {"params": list(others), "is_matrix": False},
        ]
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients."""
        assert closure is None, "losses are computed once a step"
        for group in self.param_groups:
            change = self._change_matrix if group["is_matrix"] else self._change_vector
            for weight in group["params"]:
                if weight.grad is not None:
                    change(weight, weight.grad, group)

    def _change_matrix(self, weight: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = group["momentum"]
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(state["momentum_buffer"], momentum).flatten(1)
        blocks = direction.tensor_split(-(-len(direction) // MOST_ROWS))
        update = torch.cat([orthogonalised(block) for block in blocks]).reshape(weight.shape)
        rate = group["lr"]
        weight.mul_(1 - rate * group["weight_decay"])
        weight.add_(update, alpha=-rate * MATCHED_RMS * sqrt(max(direction.shape)))

    def _change_vector(self, weight: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            state["step"] = torch.zeros(())
        first, second = group["betas"]
        state["step"] += 1
        number = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
        size = (state["exp_avg_sq"] / (1 - second**number)).sqrt_().add_(ADAM_EPS)
        weight.addcdiv_(state["exp_avg"], size, value=-group["lr"] / (1 - first**number))


def make(network: nn.Module, training: TrainingPlan, *, can_fuse: bool) -> torch.optim.Optimizer:
    """The optimiser of a plan.

    Args:
        network: Whose weights learn.
        training: Which optimiser, with which settings.
        can_fuse: Whether the device has fused kernels and no gradient scaler leaves steps out.
    """
    parameters = list(network.parameters())
    if training.optimiser == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=training.learning_rate,
            momentum=training.momentum,
            nesterov=training.momentum > 0,
            weight_decay=training.weight_decay,
            # Fused SGD leaves the momentum of a first step that the gradient scaler skips as uninitialised memory.
            fused=can_fuse,
        )
    is_kernel = [weight.ndim > 1 and max(weight.shape[2:], default=1) > 1 for weight in parameters]
    kernels = [weight for weight, is_one in zip(parameters, is_kernel, strict=True) if is_one]
    others = [weight for weight, is_one in zip(parameters, is_kernel, strict=True) if not is_one]
    if training.optimiser == "muon":
        return Muon(
            kernels,
            others,
            lr=training.learning_rate,
            momentum=training.momentum,
            betas=training.betas,
            weight_decay=training.weight_decay,
        )
    groups: list[dict[str, Any]] = [{"params": kernels}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=training.betas,
        eps=ADAM_EPS,
        weight_decay=training.weight_decay,
        fused=can_fuse,
    )


def state_of(optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Everything that the optimiser remembers, by prefix and weight.

    Args:
        optimiser: Whose state.
        parameters: Its weights by name.
    """
    return {
        prefix + name: optimiser.state[weight][key]
        for name, weight in parameters.items()
        if weight in optimiser.state
        for key, prefix in _PREFIXES.items()
        if optimiser.state[weight].get(key) is not None
    }


def restore(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Remember again what `state_of` gave; what is not among the tensors stays forgotten.

    Args:
        optimiser: As `make` gave it.
        parameters: Its weights by name.
        tensors: Of a checkpoint.
    """
    for name, weight in parameters.items():
        # Steps are counted on the CPU, whatever the device, unless the optimiser is fused; torch moves them itself.
        found = {key: tensors[prefix + name] for key, prefix in _PREFIXES.items() if prefix + name in tensors}
        if found:
            optimiser.state[weight] = {
                key: value if key == "step" else value.to(weight) for key, value in found.items()
            }
