"""What learns: the network, its optimiser, the running mean of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoseg import runtime
from autoseg.compute import ALONE, Compute, Processes
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import TrainingPlan
from autoseg.network import unet
from autoseg.training import optimisers, orders
from autoseg.training.batches import Batch
from autoseg.training.gradients import Gradients
from autoseg.training.passes import SEED_BOUND, Passes
from autoseg.training.records import Choices, known_choices

WARM_UP_STEPS = 10
"""The running mean of the weights starts short: after t steps its decay is at most (1 + t) / (WARM_UP_STEPS + t).

Source: TensorFlow's ExponentialMovingAverage.
"""

SMALLEST_LOSS_SCALE = 1.0
"""Below it the gradient overflows without any help of the scale, which is no reason any more to leave a step out.

Source: decision 27.
"""

# Prefixes of tensor names in checkpoints.
_WEIGHTS = "weights."
_MEAN = "mean."


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step gave.

    Attributes:
        loss: Its loss.
        gradient_norm: Before clipping.
        is_finite: Whether loss and gradient were finite numbers (with a gradient scaler: or the scale was too high); if
            not, nothing was changed.
    """

    loss: float
    gradient_norm: float
    is_finite: bool


class Learner:
    """Network, optimiser and running mean of the weights on one device.

    With several processes each has a learner and its share of every batch. That of the main process leads: it tells the
    others each step, and its state before the first one. The others do what they are told (`following`).

    Args:
        network: Its plan.
        training: How it learns.
        device: Where.
        precision: "fp32", "bf16" or "fp16".
        seed: Of the initial weights and of dropout.
        regions: (K, values) bool, which value indices each region holds; None of ordinary classes.
        processes: Those that share the batches.
        choices: How it computes; None: as is known to be quick without timing anything.
    """

    def __init__(
        self,
        network: NetworkPlan,
        training: TrainingPlan,
        *,
        device: torch.device,
        precision: str,
        seed: int,
        regions: NDArray[np.bool_] | None = None,
        processes: Processes = ALONE,
        choices: Choices | None = None,
    ) -> None:
        assert (network.output == "regions") == (regions is not None), "the loss must be that of the output"
        self._training = training
        self.compute = compute = Compute(device, precision, processes)
        self.regions = None if regions is None else torch.from_numpy(regions).to(device)
        init_seed = int(runtime.rng(seed, runtime.STAGE_INIT).integers(SEED_BOUND))
        self.network = unet.build(network, init_seed).to(device).train()
        self._parameters = dict(self.network.named_parameters())
        self._passes = Passes(self.network, network, training, self.regions, compute, seed)
        self.gradients = Gradients(self._passes, compute)
        self.use(choices or known_choices(device.type, precision))
        can_fuse = precision != "fp16" and device.type in ("cpu", "cuda")
        self._optimiser = optimisers.make(self.network, training, can_fuse=can_fuse)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._is_told = False
        self._mean: dict[str, Tensor] = {}
        if training.ema_decay > 0 and processes.is_main:
            self._mean = {name: weight.detach().clone() for name, weight in self._parameters.items()}

    @property
    def choices(self) -> Choices:
        """How it computes now."""
        return self._choices.model_copy(
            update={"is_compiled": self._passes.forward.is_compiled, "micro_batch": self.gradients.micro_batch}
        )

    def use(self, choices: Choices) -> None:
        """Compute like this from now on."""
        self._choices = choices
        self._passes.layout = choices.layout
        self._passes.forward.use(is_compiled=choices.is_compiled)
        self.gradients.micro_batch = choices.micro_batch

    def step(self, batch: Batch, learning_rate: float, number: int, momentum: float | None = None) -> StepOutcome:
        """Learn from a batch.

        Args:
            batch: What to learn from; with several processes this one's share of it.
            learning_rate: Of this step.
            number: Steps done before.
            momentum: Of this step; None leaves the plan's.

        Raises:
            ProcessLost: Another process has ended or failed.
        """
        processes = self.compute.processes
        if processes.world_size > 1 and processes.is_main:
            self._tell_step(learning_rate, number, momentum)
        # Running statistics follow the forward pass; a step that is skipped must not move them.
        statistics = self._passes.statistics()
        loss = self.gradients.of(batch, number, self._scaler.scale)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
            group["momentum"] = self._training.momentum if momentum is None else momentum
        self._scaler.unscale_(self._optimiser)
        gradients = [weight.grad for weight in self._parameters.values() if weight.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        is_finite = isfinite(loss_value) and (isfinite(norm_value) or self._scales_down())
        if is_finite:
            nn.utils.clip_grads_with_norm_(self._parameters.values(), self._training.gradient_clip, norm)
            self._scaler.step(self._optimiser)
            self._scaler.update()
            self._follow(number)
        else:
            self._skip(statistics)
        return StepOutcome(loss_value, norm_value, is_finite)

    def _scales_down(self) -> bool:
        """Whether an infinite gradient is ordinary: the scaler leaves the step out and lowers a scale that is high."""
        scale, _ = self.loss_scale
        return scale is not None and scale >= SMALLEST_LOSS_SCALE

    def _skip(self, statistics: Sequence[Tensor]) -> None:
        """Leave everything as it was before the step."""
        self._passes.set_statistics(statistics)
        # The scaler takes no further gradients before it has dealt with these.
        self._scaler.update()

    def rehearse(self, batch: Batch) -> None:
        """Do the part of a step that takes long, forward and backward, and learn nothing.

        Args:
            batch: Made up; other processes are left out.
        """
        statistics = self._passes.statistics()
        loss = self.gradients.of(batch, 0, lambda value: value, alone=True)
        self._passes.set_statistics(statistics)
        self.network.zero_grad(set_to_none=True)
        # Reading it waits for the device.
        loss.item()

    def _tell_step(self, learning_rate: float, number: int, momentum: float | None) -> None:
        """Tell the other processes of a step; before the first one, all that they need to be the same."""
        processes = self.compute.processes
        if not self._is_told:
            # The running mean is the main process's own.
            tensors = {name: tensor for name, tensor in self.state().items() if not name.startswith(_MEAN)}
            orders.tell_state(processes, tensors, self.loss_scale)
            self._is_told = True
        order = orders.Step(
            number=number, learning_rate=learning_rate, momentum=momentum, micro_batch=self.gradients.micro_batch
        )
        orders.tell(processes, order)

    def take_over(self, state: orders.State) -> None:
        """Become what the main process has just told to be."""
        tensors = orders.hear_state(self.compute.processes, state, self.compute.device)
        self.restore(tensors, (state.loss_scale, state.growth))

    @torch.no_grad()
    def _follow(self, number: int) -> None:
        """Move the running mean towards the weights."""
        if not self._mean:
            return
        decay = min(self._training.ema_decay, (1 + number) / (WARM_UP_STEPS + number))
        torch._foreach_lerp_(list(self._mean.values()), list(self._parameters.values()), 1 - decay)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights to predict with: the running mean where there is one."""
        if self._mean:
            return self._mean
        return {name: weight.detach() for name, weight in self._parameters.items()}

    @property
    def loss_scale(self) -> tuple[float | None, int]:
        """Of the gradient scaler: its scale and its good steps since the last change; None without one."""
        if not self._scaler.is_enabled():
            return None, 0
        state = self._scaler.state_dict()
        return float(state["scale"]), int(state["_growth_tracker"])

    def state(self) -> dict[str, Tensor]:
        """Every tensor needed to go on."""
        tensors = {_WEIGHTS + name: weight.detach() for name, weight in self._parameters.items()}
        tensors |= {_MEAN + name: weight for name, weight in self._mean.items()}
        tensors |= optimisers.state_of(self._optimiser, self._parameters)
        return tensors

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with these weights, by name, one for each parameter; the running mean begins there too."""
        self.restore({_WEIGHTS + name: weight for name, weight in weights.items()}, (None, 0))

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], loss_scale: tuple[float | None, int]) -> None:
        """Go on from what `state` gave; a running mean that was not kept starts at the weights.

        Raises:
            KeyError: A weight is missing.
        """
        self._is_told = False
        for name, weight in self._parameters.items():
            weight.copy_(tensors[_WEIGHTS + name])
            if name in self._mean:
                self._mean[name].copy_(tensors.get(_MEAN + name, weight))
        optimisers.restore(self._optimiser, self._parameters, tensors)
        scale, growth = loss_scale
        if scale is not None and self._scaler.is_enabled():
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": growth})
