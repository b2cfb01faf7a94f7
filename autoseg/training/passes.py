"""Forward passes of a network in training, and the loss of what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autoseg import runtime
from autoseg.compute import Compute
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import TrainingPlan
from autoseg.network import channels_last
from autoseg.training.batches import Batch
from autoseg.training.compiling import Forward
from autoseg.training.losses import supervised_loss
from autoseg.training.records import Layout
from autoseg.training.shares import Measured, Share

SEED_BOUND = 2**63 - 1
"""Below the largest seed that torch takes."""

Outputs = Tensor | Sequence[Tensor]


class Passes:
    """Runs a network on parts of batches.

    Args:
        network: In training mode, on the device.
        plan: What it was built from.
        training: With which loss.
        regions: (K, values) bool on the device, which value indices each region holds; None of ordinary classes.
        compute: Where and how precisely.
        seed: Of dropout.

    Attributes:
        forward: The network as it is run.
        layout: Of the images that go into it.
        weights: The network's, in its order.
        needs_outputs: Whether the loss of a part needs sums over the batch of what the network says, beside labels.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: NetworkPlan,
        training: TrainingPlan,
        regions: Tensor | None,
        compute: Compute,
        seed: int,
    ) -> None:
        self.forward = Forward(network)
        self.layout: Layout = "contiguous"
        self.weights = list(network.parameters())
        self.needs_outputs = training.batch_dice or training.hard_voxel_fraction < 1
        self._plan, self._training, self._regions = plan, training, regions
        self._compute, self._seed = compute, seed

    def outputs(self, part: Batch, key: tuple[int, ...]) -> Outputs:
        """Logits of every supervised level, finest first.

        Args:
            part: The samples.
            key: Of the random numbers of dropout.
        """
        is_last = self.layout == "channels_last"
        images = channels_last.to_channels_last(part.images) if is_last else part.images
        with self._compute.autocast(), self._dropout_of(key):
            return self.forward(images)

    def loss(self, outputs: Outputs, part: Batch, share: Share) -> Tensor:
        """The part's share of the loss of its batch."""
        training = self._training
        with self._compute.autocast():
            return supervised_loss(
                outputs,
                part.labels,
                batch_dice=training.batch_dice,
                regions=self._regions,
                annotated=part.annotated,
                hard_fraction=training.hard_voxel_fraction,
                weights=training.supervision_weights,
                share=share,
            )

    @torch.no_grad()
    def measured(self, outputs: Outputs, part: Batch) -> Measured:
        """The sums of a part that the loss of its batch needs."""
        measured = Measured(self._compute.sum_dtype)
        self.loss(outputs, part, measured)
        return measured

    def blank_outputs(self, part: Batch) -> Outputs:
        """Outputs that say nothing and take no memory, to count what is labelled."""
        plan, size = self._plan, part.labels.shape[1:]
        zero = torch.zeros((), device=part.labels.device)
        levels = range(max(plan.num_levels, 1) if plan.deep_supervision else 1)
        sizes = (
            [-(-length // step) for length, step in zip(size, plan.divisors_at(level), strict=True)] for level in levels
        )
        return [zero.expand(len(part.labels), plan.num_classes, *level) for level in sizes]

    def statistics(self) -> list[Tensor]:
        """Copies of the running statistics, weights without a gradient that follow each pass; mostly there are none."""
        return [weight.detach().clone() for weight in self.weights if not weight.requires_grad]

    @torch.no_grad()
    def set_statistics(self, values: Sequence[Tensor]) -> None:
        """Take running statistics back to what they were."""
        statistics = [weight for weight in self.weights if not weight.requires_grad]
        for weight, value in zip(statistics, values, strict=True):
            weight.copy_(value)

    @contextmanager
    def _dropout_of(self, key: tuple[int, ...]) -> Iterator[None]:
        """Draw dropout from the seed and a key: PyTorch's layers know only the global generator."""
        device, has_dropout = self._compute.device, self._plan.dropout > 0
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=has_dropout):
            if has_dropout:
                torch.manual_seed(int(runtime.rng(self._seed, runtime.STAGE_DROPOUT, *key).integers(SEED_BOUND)))
            yield
