"""Which models belong together, and how many tiles go through a network at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from autoseg.domain.plan import Configuration
from autoseg.errors import ModelError
from autoseg.inference.outcome import MEMORY_HINT
from autoseg.io.model import Model

# Voxels of the network's input in one forward pass. On the CPU more only costs memory; small 2D patches are 2 to 3
# times faster in batches. Source: docs/decisions/0006. The figure for other devices fills one with a 128^3 patch.
_BATCH_VOXELS = {"cpu": 2**18}
_BATCH_VOXELS_ELSEWHERE = 2**22
_MAX_TILE_BATCH = 32

_SUMS = {"fp32": torch.float32, "bf16": torch.float16, "fp16": torch.float16, "int8": torch.float16}


def default_tile_batch(patch_size: Sequence[int], device: torch.device) -> int:
    """Tiles that go through the network at a time unless somebody says otherwise."""
    budget = _BATCH_VOXELS.get(device.type, _BATCH_VOXELS_ELSEWHERE)
    return max(1, min(_MAX_TILE_BATCH, budget // prod(patch_size)))


def sums_dtype(precision: str) -> torch.dtype:
    """What logits are summed in: in 16 bit where the network computes in 16 bit.

    Args:
        precision: "fp32", "bf16", "fp16" or "int8".

    Source: docs/decisions/0032.
    """
    return _SUMS[precision]


def common_settings(models: Sequence[Model]) -> Configuration:
    """The configuration that all models share.

    Raises:
        ModelError: There is no model, or the models do not belong together.
    """
    if not models:
        raise ModelError("there is no model to predict with")
    first = models[0].card
    for model in models[1:]:
        card = model.card
        same = (
            card.settings.preprocess == first.settings.preprocess
            and card.settings.network.patch_size == first.settings.network.patch_size
            and card.settings.inference == first.settings.inference
            and card.settings.sides == first.settings.sides
            and card.plan.labels == first.plan.labels
            and card.plan.channels == first.plan.channels
        )
        if not same:
            raise ModelError(
                f"{card.configuration} fold {card.fold} of plan {card.digest} and {first.configuration} fold "
                f"{first.fold} of plan {first.digest} differ in preprocessing, patch, inference or labels",
                hint="Average folds of one configuration and one plan.",
            )
    return first.settings


def device_hint(device: torch.device) -> str:
    """What to do where a device has too little memory."""
    return MEMORY_HINT if device.type == "cpu" else "Close other programs on the device, or use --device cpu."
