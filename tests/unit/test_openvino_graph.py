"""Graphs that are made of the operations of a network say what the network says; networks are known or refused."""

import importlib.util

import numpy as np
import pytest
import torch
from network_family import FAMILY, awake, member
from torch import Tensor, nn

from autoseg.inference.engines.openvino import _core, _use_mean_variance
from autoseg.inference.engines.openvino_graph import UntranslatableError, translated
from autoseg.network.unet import UNet

if importlib.util.find_spec("openvino") is None:
    pytest.skip("the extra [openvino] is not installed", allow_module_level=True)

# What the presets plan, nnU-Net's networks, and their relatives.
KNOWN = {"nnunet", "resenc", "widths"}


def run(graph: object, x: Tensor) -> Tensor:
    compiled = _core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(np.array(compiled.create_infer_request().infer([x.numpy()])[0]))


def network_of(name: str, dims: int) -> UNet:
    network = UNet(member(name, dims))
    awake(network)
    return network.eval()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", [name for name in FAMILY if member(name).condition is None])
def test_a_member_of_the_family_is_known_and_equal_or_refused(name: str, dims: int) -> None:
    network = network_of(name, dims)
    plan = network.plan
    try:
        graph = translated(network, plan)
    except UntranslatableError:
        assert name not in KNOWN
        return
    x = torch.randn(3, plan.in_channels, *plan.patch_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(run(graph, x), expected, atol=1e-4, rtol=1e-4)
    _use_mean_variance(graph, plan)
    torch.testing.assert_close(run(graph, x), expected, atol=1e-3, rtol=1e-3)


class Odd(nn.Module):
    """Does something to its image that is not known, at one of three places."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 1)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        if self.place == "in the middle":
            return self.conv(self.conv(x).sigmoid())
        out = self.conv(x)
        if self.place == "in place":
            out.mul_(2)
        return out.sin() if self.place == "at the end" else out


@pytest.mark.parametrize("place", ["in the middle", "in place", "at the end"])
def test_what_is_not_known_is_refused(place: str) -> None:
    plan = member("nnunet").model_copy(update={"in_channels": 1})
    translated(Odd("nowhere"), plan)
    with pytest.raises(UntranslatableError):
        translated(Odd(place), plan)


def test_a_patch_that_the_network_pads_is_refused() -> None:
    plan = member("nnunet")
    odd = tuple(size + (step > 1) for size, step in zip(plan.patch_size, plan.divisors, strict=True))
    with pytest.raises(UntranslatableError, match="pads"):
        translated(UNet(plan).eval(), plan.model_copy(update={"patch_size": odd}))
