"""Networks as they are resident for prediction: every member that takes images alone, in the precision of the CPU."""

from __future__ import annotations

import pytest
import torch
from network_family import FAMILY, awake, image, member

from autoseg.inference.resident import for_cpu_in_bf16
from autoseg.network.unet import build


def is_told_nothing(name: str) -> bool:
    plan = member(name)
    return plan.condition is None and plan.context_channels is None


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", [name for name in FAMILY if is_told_nothing(name)])
def test_a_network_in_bf16_predicts_what_it_does_in_float32(name: str, dims: int) -> None:
    """PyTorch has no 3D average of bfloat16 on the CPU: the residual encoder could be trained, but not used."""
    plan = member(name, dims)
    exact = awake(build(plan, 0)).eval()
    quick = awake(build(plan, 0)).eval()
    for_cpu_in_bf16(quick)
    x = image(plan)
    with torch.inference_mode():
        expected, found = exact(x), quick(x.to(torch.bfloat16)).float()
    assert (found - expected).norm() < 0.1 * expected.norm()
