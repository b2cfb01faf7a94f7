"""Our U-Net against outputs of nnU-Net's network (dynamic-network-architectures 0.4.4; scripts/unet_oracle.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from autoseg.domain.network_plan import NetworkPlan
from autoseg.network.unet import restore

PLANS = {
    "unet_2d": NetworkPlan(
        in_channels=2,
        num_classes=3,
        patch_size=(16, 12),
        features_per_stage=(4, 6, 8),
        strides=((1, 1), (2, 2), (2, 1)),
        kernel_sizes=((3, 3), (3, 3), (3, 1)),
        blocks_per_stage_encoder=(2, 1, 2),
        blocks_per_stage_decoder=(1, 2),  # nnU-Net lists the coarsest first
    ),
    "unet_3d": NetworkPlan(
        in_channels=1,
        num_classes=2,
        patch_size=(6, 16, 16),
        features_per_stage=(4, 6, 8),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        blocks_per_stage_encoder=(2, 2, 2),
        blocks_per_stage_decoder=(2, 2),
    ),
}


@pytest.mark.parametrize("name", sorted(PLANS))
def test_every_output_equals_that_of_nnunets_network(name: str) -> None:
    with np.load(Path(__file__).parent / f"{name}.npz", allow_pickle=False) as archive:
        stored = {key: torch.from_numpy(archive[key]) for key in archive.files}
    image = stored.pop("input")
    expected = [stored.pop(key) for key in sorted(stored) if key.startswith("output.")]
    network = restore(PLANS[name], stored).train()
    with torch.inference_mode():
        outputs = network(image)
        finest = network.eval()(image)
    assert len(outputs) == len(expected) == 2
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    assert torch.equal(finest, outputs[0])
