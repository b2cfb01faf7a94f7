"""What a network takes in memory, in bytes: in a training step and in prediction. Closed form, without torch.

What a training step keeps for its backward pass is counted exactly (`kept`). Around that stand weights and what the
optimiser holds, which is arithmetic too, and overheads of the device, which are constants fitted to measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import TrainingPlan
from autoseg.domain.values import Value
from autoseg.planning.kept import FLOAT32_BYTES, HALF_BYTES, Ledger, loss_bytes

LABEL_BYTES = 2
"""Labels of a batch are 16-bit integers."""

BATCHES_AHEAD = 4
"""Batches that wait in the memory of the host: three read ahead and one being read."""

PREDICTED_MAPS = 5.0
"""Feature maps of the finest stage that exist at once where the decoder joins a skip: the skip, what came up, both of
them joined, and one for what is left between them. Source: docs/benchmarks/memory.md (five networks on a CPU)."""

CASES_AT_ONCE = 3
"""Images in memory during prediction: one that is read, one that is segmented, one that is written."""


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a device takes beyond the tensors that are counted.

    Attributes:
        base_bytes: Whatever the network: code that is loaded or compiled with the first step, small tensors.
        finest_maps: Feature maps of the finest stage that are made and dropped at the start of the backward pass.
        scatter: What the allocator cannot use again between tensors in use, as part of what the step takes on top of
            weights and momentum.
    """

    base_bytes: float
    finest_maps: float
    scatter: float


# Source: docs/benchmarks/memory.md, fitted on six plans and checked on twelve others. Elsewhere nothing was measured
# yet: CUDA's allocator gives out what tensors take, so nothing is scattered, and as much is dropped as on the CPU.
_OVERHEADS = {
    ("cpu", "fp32"): Overheads(base_bytes=95e6, finest_maps=2.5, scatter=0.43),
    ("cpu", "bf16"): Overheads(base_bytes=95e6, finest_maps=4.0, scatter=0.281),
}
_OVERHEADS_ELSEWHERE = Overheads(base_bytes=0.0, finest_maps=4.0, scatter=0.0)


class TrainingMemory(Value):
    """Bytes of a training step at its peak.

    Attributes:
        weights: In float32.
        optimiser: What it remembers: one or two numbers a weight.
        running_mean: Of the weights, where the plan has one.
        gradients: A number a weight. They come while activations go, so the peak has one or the other.
        batch: Images and labels, those read ahead included where they share the memory.
        activations: Kept for the backward pass, with copies of weights in 16 bit.
        workspace: What is made and dropped on the way, and what the allocator cannot use.
        total: The peak.
    """

    weights: int
    optimiser: int
    running_mean: int
    gradients: int
    batch: int
    activations: int
    workspace: int
    total: int


class PredictionMemory(Value):
    """Bytes of predicting one image, with one model and without mirroring.

    Attributes:
        weights: Of the network.
        features: Of the tiles that go through it at a time.
        logits: Sums of the tiles' outputs, one patch deep, of as much of the cross-section as is summed at a time.
        images: Prepared images and label maps, of the case in work and of those before and after it.
        total: All of it, with what the allocator cannot use.
    """

    weights: int
    features: int
    logits: int
    images: int
    total: int


def overheads(device_type: str, precision: str) -> Overheads:
    """The constants of a kind of device ("cpu", "cuda", "mps") and a precision."""
    return _OVERHEADS.get((device_type, precision), _OVERHEADS_ELSEWHERE)


def kept_bytes(
    network: NetworkPlan, batch_size: int, precision: str, *, batch_dice: bool, device_type: str = "cpu"
) -> int:
    """What a training step keeps for its backward pass: features, loss, copies of weights in 16 bit.

    Args:
        network: One that `kept.is_known`.
        batch_size: Samples.
        precision: "fp32", "bf16" or "fp16".
        batch_dice: As in `TrainingPlan`.
        device_type: "cpu", "cuda" or "mps".
    """
    ledger = Ledger(network, batch_size, is_half=precision != "fp32", pools_in_float32=device_type == "cpu")
    return ledger.kept_bytes + loss_bytes(network, batch_size, batch_dice=batch_dice)


def count_weights(network: NetworkPlan) -> int:
    """Numbers that learn in a network that `kept.is_known`."""
    return Ledger(network, 1).num_weights


def batch_bytes(network: NetworkPlan, batch_size: int) -> int:
    """Images in float32 and labels of one batch."""
    return batch_size * prod(network.patch_size) * (network.in_channels * FLOAT32_BYTES + LABEL_BYTES)


def remembered_numbers(training: TrainingPlan) -> int:
    """Numbers that the optimiser remembers for each weight: its momentum, or two moments.

    Muon has two for norms, biases and heads, which are too few to count.
    """
    if training.optimiser == "adamw":
        return 2
    return 1 if training.optimiser == "muon" or training.momentum > 0 else 0


def training_memory(
    network: NetworkPlan,
    training: TrainingPlan,
    precision: str,
    device_type: str,
    known: tuple[int, int] | None = None,
    constants: Overheads | None = None,
) -> TrainingMemory:
    """The peak of a training step.

    Args:
        network: The network.
        training: Batch size, running mean of the weights, and so on.
        precision: "fp32", "bf16" or "fp16".
        device_type: "cpu", "cuda" or "mps".
        known: Number of weights, and bytes kept for the backward pass in this precision, of a network that is not
            `kept.is_known`; None counts them.
        constants: Other overheads than those of the device; for fitting them.
    """
    batch_size, is_cpu = training.batch_size, device_type == "cpu"
    num_weights, kept = known or (
        count_weights(network),
        kept_bytes(network, batch_size, precision, batch_dice=training.batch_dice, device_type=device_type),
    )
    extra = constants or overheads(device_type, precision)
    weights = num_weights * FLOAT32_BYTES
    running_mean = weights if training.ema_decay > 0 else 0
    optimiser = weights * remembered_numbers(training)
    one_batch = batch_bytes(network, batch_size)
    # In float32 the images of the batch are themselves what the first convolution keeps.
    images = batch_size * prod(network.patch_size) * network.in_channels * FLOAT32_BYTES
    batch = one_batch * (1 + BATCHES_AHEAD if is_cpu else 1) - (images if precision == "fp32" else 0)
    dropped = extra.finest_maps * finest_map_bytes(network, batch_size, precision)
    peak = max(kept + dropped, weights + dropped)
    workspace = round(peak - kept + extra.scatter * peak + extra.base_bytes)
    return TrainingMemory(
        weights=weights,
        optimiser=optimiser,
        running_mean=running_mean,
        gradients=weights,
        batch=batch,
        activations=kept,
        workspace=workspace,
        total=weights + optimiser + running_mean + batch + kept + workspace,
    )


def finest_map_bytes(network: NetworkPlan, batch_size: int, precision: str) -> int:
    """One feature map of the finest decoder stage, of the whole batch."""
    features = (network.decoder_features or network.features_per_stage)[0]
    return batch_size * features * prod(network.patch_size) * _value_bytes(precision)


def _value_bytes(precision: str) -> int:
    return FLOAT32_BYTES if precision == "fp32" else HALF_BYTES


def prediction_memory(
    network: NetworkPlan,
    num_weights: int,
    grid_shape: Sequence[int],
    slab_voxels: int,
    *,
    tile_batch: int,
    precision: str,
    device_type: str,
) -> PredictionMemory:
    """What predicting one image takes, with one model.

    Args:
        network: The network.
        num_weights: Numbers that learn in it.
        grid_shape: Voxels of the prepared image, three axes, at least a patch along each.
        slab_voxels: Of the part of it whose outputs are summed at a time.
        tile_batch: Tiles that go through the network at a time.
        precision: "fp32", "bf16" or "fp16".
        device_type: "cpu", "cuda" or "mps".

    Returns:
        On a GPU the total leaves out the images, which are in the memory of the host.
    """
    is_cpu, value_bytes = device_type == "cpu", _value_bytes(precision)
    # On the CPU in 16 bit the weights themselves are; elsewhere they are cast as they are needed.
    weights = num_weights * (value_bytes if is_cpu else FLOAT32_BYTES)
    patch_voxels = prod(network.patch_size)
    waiting = sum(
        features * prod(network.size_at(stage)) for stage, features in enumerate(network.features_per_stage) if stage
    )
    finest = (network.decoder_features or network.features_per_stage)[0] * patch_voxels
    numbers = PREDICTED_MAPS * finest + waiting
    # Tiles come in float32; outputs are taken as the network makes them.
    ends = patch_voxels * (network.in_channels * (FLOAT32_BYTES + value_bytes) + network.num_classes * value_bytes)
    features = round(tile_batch * (numbers * value_bytes + ends))
    # In 16 bit the sums are too; see docs/decisions/0032.
    logits = slab_voxels * network.num_classes * value_bytes
    images = CASES_AT_ONCE * prod(grid_shape) * (network.in_channels * FLOAT32_BYTES + 1)
    on_device = weights + round((features + logits) * (1 + overheads(device_type, precision).scatter))
    return PredictionMemory(
        weights=weights,
        features=features,
        logits=logits,
        images=images,
        total=on_device + (images + round(overheads(device_type, precision).base_bytes) if is_cpu else 0),
    )
