"""Memory in bytes: the closed form against what autograd saves, and laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from autoseg import runtime
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import TrainingPlan
from autoseg.network import channels_last, unet
from autoseg.planning import kept, memory
from autoseg.training.losses import supervised_loss
from autoseg.training.records import PREFETCH_STEPS

CPU = torch.device("cpu")


def network_of(dims: int = 3, **changes: object) -> NetworkPlan:
    """Three stages, anisotropic at first, two channels in, three classes out."""
    fields = {
        "in_channels": 2,
        "num_classes": 3,
        "patch_size": (8, 16, 12)[-dims:],
        "features_per_stage": (4, 8, 8),
        "strides": ((1,) * dims, (1, 2, 2)[-dims:], (2,) * dims),
        "kernel_sizes": ((1, 3, 3)[-dims:], (3,) * dims, (3,) * dims),
        "blocks_per_stage_encoder": (2, 1, 2),
        "blocks_per_stage_decoder": (2, 1),
        "num_norm_groups": 2,
        **changes,
    }
    return NetworkPlan.model_validate(fields)


def bytes_saved(network: NetworkPlan, batch_size: int, precision: str, batch_dice: bool) -> int:
    """What autograd saves in the forward pass of a training step, weights left out, each piece of memory once."""
    model = unet.build(network, 0).train()
    images = torch.randn(batch_size, network.in_channels, *network.patch_size)
    labels = torch.randint(0, network.num_classes, (batch_size, *network.patch_size), dtype=torch.int16)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            seen.setdefault(address, tensor)
        return tensor

    if precision == "bf16":
        images = channels_last.to_channels_last(images)
    with saved_tensors_hooks(keep, lambda tensor: tensor), runtime.autocast(CPU, precision):
        regions = torch.eye(network.num_classes).bool() if network.output == "regions" else None
        supervised_loss(model(images), labels, batch_dice=batch_dice, regions=regions)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


KNOWN = {
    "plain 3D": network_of(),
    "plain 2D": network_of(2),
    "residual 3D": network_of(encoder_block="residual"),
    "residual 2D, equal widths": network_of(2, encoder_block="residual", features_per_stage=(4, 4, 8)),
    "residual 3D, equal widths": network_of(encoder_block="residual", features_per_stage=(4, 4, 8)),
    "without deep supervision": network_of(deep_supervision=False),
    "one stage": network_of(
        features_per_stage=(4,),
        strides=((1, 1, 1),),
        kernel_sizes=((3, 3, 3),),
        blocks_per_stage_encoder=(2,),
        blocks_per_stage_decoder=(),
    ),
    "max pooling": network_of(downsampling="max_pool"),
    "max pooling, residual": network_of(downsampling="max_pool", encoder_block="residual"),
    "average pooling, residual": network_of(downsampling="average_pool", encoder_block="residual"),
    "strided layer": network_of(downsampling="strided_layer"),
    "without norm": network_of(norm="none"),
    "group norm": network_of(norm="group"),
    "batch norm": network_of(norm="batch"),
    "ReLU": network_of(activation="relu"),
    "regions": network_of(output="regions"),
    "one region, 2D": network_of(2, output="regions", num_classes=1),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KNOWN)
def test_activations_are_what_autograd_saves(name: str, precision: str) -> None:
    network = KNOWN[name]
    assert kept.is_known(network)
    for batch_size, batch_dice in ((2, False), (3, True)):
        counted = memory.kept_bytes(network, batch_size, precision, batch_dice=batch_dice)
        assert counted == bytes_saved(network, batch_size, precision, batch_dice)


@pytest.mark.parametrize("name", KNOWN)
def test_weights_are_counted(name: str) -> None:
    model = unet.build(KNOWN[name])
    assert memory.count_weights(KNOWN[name]) == sum(w.numel() for w in model.parameters() if w.requires_grad)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": {"stages": (2,), "num_norm_groups": 2}},
        {"squeezes": True, "encoder_block": "residual"},
        {"skip_join": "add"},
        {"activation": "prelu"},
        {"checkpointed_stages": (0,)},
        {"dropout": 0.1},
    ],
)
def test_networks_with_other_layers_are_not_said_to_be_known(changes: dict[str, object]) -> None:
    assert not kept.is_known(network_of(**changes))


def total(network: NetworkPlan, batch_size: int, precision: str = "fp32", device: str = "cpu", ema: float = 0.0) -> int:
    training = TrainingPlan(batch_size=batch_size, ema_decay=ema)
    return memory.training_memory(network, training, precision, device).total


def large(patch_size: tuple[int, ...] = (48, 48, 48), block: str = "conv") -> NetworkPlan:
    dims = len(patch_size)
    return NetworkPlan.model_validate(
        {
            "in_channels": 1,
            "num_classes": 3,
            "patch_size": patch_size,
            "features_per_stage": (32, 64, 128),
            "strides": ((1,) * dims, (2,) * dims, (2,) * dims),
            "kernel_sizes": ((3,) * dims,) * 3,
            "encoder_block": block,
            "blocks_per_stage_encoder": (2,) * 3,
            "blocks_per_stage_decoder": (2,) * 2,
        }
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_takes_more(device: str) -> None:
    network = large()
    for precision in ("fp32", "bf16"):
        by_batch = [total(network, size, precision, device) for size in (1, 2, 3, 8)]
        assert by_batch == sorted(set(by_batch))
        by_patch = [total(large((edge, 48, 48)), 2, precision, device) for edge in (32, 40, 48, 64)]
        assert by_patch == sorted(set(by_patch))
        assert total(large(block="residual"), 2, precision, device) > total(network, 2, precision, device)
        assert total(network, 2, precision, device, ema=0.999) - total(network, 2, precision, device) == (
            4 * memory.count_weights(network)
        )
    assert total(network, 2, "bf16", device) < 0.7 * total(network, 2, "fp32", device)
    assert total(network, 2, "bf16", "cuda") == total(network, 2, "fp16", "cuda")


def test_the_parts_add_up_to_the_peak() -> None:
    training = TrainingPlan(batch_size=2)
    found = memory.training_memory(large(), training, "bf16", "cpu")
    parts = (found.weights, found.optimiser, found.running_mean, found.batch, found.activations, found.workspace)
    assert sum(parts) == found.total
    assert found.gradients == found.weights
    # On a GPU the batches read ahead wait in the memory of the host.
    assert memory.training_memory(large(), training, "bf16", "cuda").batch * 5 == found.batch


def test_as_many_batches_wait_as_training_reads_ahead() -> None:
    assert memory.BATCHES_AHEAD == PREFETCH_STEPS + 1


def test_prediction_takes_more_for_more_tiles_and_longer_rows_of_them() -> None:
    network = large()

    def predicted(tiles: int = 1, depth: int = 48, precision: str = "fp32") -> memory.PredictionMemory:
        return memory.prediction_memory(
            network, 10**6, (depth, 64, 64), 48 * 64 * 64, tile_batch=tiles, precision=precision, device_type="cpu"
        )

    assert predicted(2).features == 2 * predicted(1).features
    assert predicted(1, 96).images == 2 * predicted(1, 48).images
    assert predicted(1, 96).logits == predicted(1, 48).logits
    assert predicted(precision="bf16").total < predicted().total < total(network, 1)
