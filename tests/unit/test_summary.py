"""The summary counts what the layers really do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from network_family import conditions, image, member
from synthetic_run import make_run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autoseg.cli.app import main
from autoseg.network import summary
from autoseg.network.summary import summarise
from autoseg.network.unet import build

# Multiplications of attention on paper, which PyTorch's counter leaves out on the CPU: for each of five places with
# 4 x 8 voxels and 8 channels, and with 4 x 4 voxels and 16 channels, two products of all pairs; with a condition of
# 3 tokens two more, and two layers a place in the coarser stage and the middle.
ADM = 5 * 2 * 32 * 32 * 8 + 2 * 16 * 16 * 16
LATENT = 5 * 2 * 32 * (32 + 3) * 8 + 4 * 2 * 2 * 16 * (16 + 3) * 16
ATTENTION = {"nnunet": 0, "resenc": 0, "vnet": 0, "attention gates": 0, "adm": ADM, "latent diffusion": LATENT}


@pytest.mark.parametrize("name", ATTENTION)
def test_equals_what_a_real_pass_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "_CONTEXT_LENGTH", 3)  # as many tokens as the conditions below have
    network = build(member(name, 2), seed=1).train()
    told = conditions(network.plan)
    told.pop("context_mask", None)
    weights = {weight.data_ptr() for weight in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        network(image(network.plan), **told)
    counted = summarise(network.plan)
    assert counted.parameters == sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    assert 2 * (counted.macs - ATTENTION[name]) == counter.get_total_flops()
    assert counted.activation_bytes == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_parts_are_in_the_order_of_the_data_flow() -> None:
    parts = {part.name: part for part in summarise(member("latent diffusion", 3)).parts}
    assert list(parts) == [
        "conditions",
        "stem",
        *(f"encoder {stage}" for stage in range(3)),
        "middle",
        *(f"decoder {level}" for level in (2, 1, 0)),
        "heads",
    ]
    assert parts["encoder 2"].size == (4, 4, 2)
    assert parts["encoder 2"].channels == 16
    assert parts["heads"].channels == 1


def test_a_convolution_is_counted_as_on_paper() -> None:
    plan = member("2015", 2, features_per_stage=(4, 4, 4), blocks_per_stage_encoder=(1, 1, 1))
    first = summarise(plan).parts[0]
    # 3 x 3 kernel, 1 to 4 channels, with bias, on 8 x 16 voxels.
    assert (first.parameters, first.macs) == (4 * 9 + 4, 4 * 9 * 8 * 16)


def test_nothing_is_allocated_for_a_network_of_many_gigabytes() -> None:
    huge = member("resenc", 3, features_per_stage=(2048, 4096, 8192), patch_size=(128, 128, 128))
    counted = summarise(huge)
    assert 4 * counted.parameters > 20e9
    assert counted.activation_bytes > 100e9


def test_info_shows_the_network_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    planned_run = str(make_run(tmp_path, num_cases=2, configurations=("2d",)).root)
    capsys.readouterr()
    assert main(["info", planned_run]) == 0
    text = capsys.readouterr().out
    assert "GMAC" in text
    assert "encoder 0" in text
    assert main(["info", planned_run, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for configuration in facts["configurations"].values():
        network = configuration["network"]
        assert network["parameters"] == sum(part["parameters"] for part in network["parts"]) > 0
