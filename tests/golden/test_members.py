"""The published networks have the published numbers of parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import VNet

from autoseg.config import configs_folder
from autoseg.domain.network_plan import NetworkPlan
from autoseg.errors import ConfigError
from autoseg.network.members import load_member, member_names, num_parameters
from autoseg.network.unet import build
from scripts.bench_members import table

COUNTS = {
    "ddpm-256": 113_673_219,
    "ddpm-cifar10": 35_746_307,
    "nnunet": 31_195_594,
    "nnunet-resenc-l": 102_349_770,
    "nnunet-resenc-m": 102_349_770,
    "nnunet-resenc-xl": 141_480_012,
    "stable-diffusion-1.5": 859_520_964,
    "stable-diffusion-xl": 2_567_463_684,
    "unet-2015": 31_030_658,
    "unet-3d-2016": 19_069_955,
    "vnet-2016": 45_595_026,
}
LARGEST_DEVIATION = 0.01
FOLDER = configs_folder() / "members"


def oracle_counts() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "member_counts.json").read_text())


def test_every_shipped_file_is_a_member() -> None:
    assert member_names() == tuple(sorted(COUNTS))
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in COUNTS}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_the_published_ones(name: str) -> None:
    member = load_member(name)
    count = num_parameters(member.network, member.published.without_norms)
    assert count == COUNTS[name]
    assert count == pytest.approx(member.published.parameters, rel=LARGEST_DEVIATION)


def test_only_where_the_paper_leaves_norms_out_are_they_left_out() -> None:
    without = {name for name in COUNTS if load_member(name).published.without_norms}
    assert without == {"unet-3d-2016"}
    plan = load_member("unet-3d-2016").network
    convolved = sum(sum(row) for row in plan.conv_channels) + 2 * sum(plan.decoder_features)
    assert num_parameters(plan) == COUNTS["unet-3d-2016"] + 2 * convolved


@pytest.mark.parametrize("name", oracle_counts())
def test_nnunets_members_are_those_of_its_planner_and_its_library(name: str) -> None:
    golden = oracle_counts()[name]
    plan = load_member(name).network.model_dump(mode="json")
    ours = {
        "patch": plan["patch_size"],
        "strides": plan["strides"],
        "kernels": plan["kernel_sizes"],
        "features": plan["features_per_stage"],
        "encoder": plan["blocks_per_stage_encoder"],
        "decoder": plan["blocks_per_stage_decoder"][::-1],
        "in_channels": plan["in_channels"],
        "classes": plan["num_classes"],
        "parameters": COUNTS[name],
    }
    assert ours == golden


def test_the_figure_of_the_vnet_is_that_of_monais() -> None:
    with torch.device("meta"):
        oracle = VNet(spatial_dims=3, in_channels=1, out_channels=2, act="prelu")
    count = sum(parameter.numel() for parameter in oracle.parameters())
    assert count == pytest.approx(load_member("vnet-2016").published.parameters, rel=1e-3)
    # Its head is a 5x5x5 convolution with norm and activation, then a 1x1x1; ours, the paper's, is the 1x1x1.
    assert 0 < count - COUNTS["vnet-2016"] < 9_000


@pytest.mark.parametrize("name", ["unet-2015", "unet-3d-2016", "vnet-2016"])
def test_the_classics_run_and_every_voxel_of_the_patch_matters(name: str) -> None:
    plan = load_member(name).network.model_dump()
    for field in ("features_per_stage", "decoder_features_per_stage"):
        plan[field] = [width // 8 for width in plan[field]]
    plan["conv_channels"] = [[width // 8 for width in row] for row in plan["conv_channels"]]
    plan["patch_size"] = [2 ** (len(plan["features_per_stage"]) - 1)] * len(plan["patch_size"])
    network = build(NetworkPlan.model_validate(plan), seed=1).eval()
    image = torch.randn(1, plan["in_channels"], *plan["patch_size"]).requires_grad_()
    output = network(image)
    assert output.shape == (1, plan["num_classes"], *plan["patch_size"])
    (gradient,) = torch.autograd.grad(output.flatten(2)[..., 0].sum(), image)
    assert (gradient.abs() > 0).float().mean() > 0.9


def narrow(name: str) -> NetworkPlan:
    """A diffusion member with the same layers, but thin enough to compute."""
    plan = load_member(name).network.model_dump()
    widths = sorted(set(plan["features_per_stage"]))
    plan["features_per_stage"] = [8 * (1 + widths.index(width)) for width in plan["features_per_stage"]]
    plan["patch_size"] = [2 ** len(plan["features_per_stage"])] * 2
    plan["num_norm_groups"] = plan["attention"]["num_norm_groups"] = 4
    if plan["attention"]["resolutions"]:
        plan["attention"]["resolutions"] = [plan["patch_size"][0] // 2]
    if plan["attention"]["context_channels"]:
        plan["attention"] |= {"context_channels": 6, "num_heads": (2,), "head_channels": ()}
    plan["condition"] |= {"time_channels": 8, "embedding_channels": 16}
    plan["condition"]["vector_channels"] = [5] * len(plan["condition"]["vector_channels"])
    return NetworkPlan.model_validate(plan)


@pytest.mark.parametrize(
    ("name", "num_conditions"),
    [("ddpm-256", 1), ("ddpm-cifar10", 1), ("stable-diffusion-1.5", 2), ("stable-diffusion-xl", 3)],
)
def test_diffusion_members_see_each_of_their_conditions(name: str, num_conditions: int) -> None:
    plan = narrow(name)
    generator = torch.Generator().manual_seed(5)
    network = build(plan, seed=1).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    image = torch.randn(1, plan.in_channels, *plan.patch_size, generator=generator)
    conditions: dict[str, Any] = {"time": torch.tensor([3.0])}
    if plan.context_channels is not None:
        conditions["context"] = torch.randn(1, 4, plan.context_channels, generator=generator)
    if plan.condition is not None and plan.condition.vector_channels:
        conditions["vectors"] = (torch.randn(1, 5, generator=generator),)
    assert len(conditions) == num_conditions
    with torch.inference_mode():
        expected = network(image, **conditions)
        assert expected.shape == image.shape
        for changed, value in conditions.items():
            shifted = (value[0] + 1,) if changed == "vectors" else value + 1
            other = network(image, **conditions | {changed: shifted})
            assert (other - expected).abs().max() > 1e-3 * expected.abs().max(), changed


@pytest.mark.parametrize("name", COUNTS)
def test_every_key_has_a_comment(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    sections = {"published:", "network:", "attention:", "condition:"}
    keys = [line for line in lines if re.match(r"\s*\w+:", line) and line.strip() not in sections]
    assert len(keys) > 15
    assert [line for line in keys if " # " not in line] == []


def test_the_page_of_counts_is_up_to_date() -> None:
    folder = Path(__file__).parents[2] / "docs" / "benchmarks"
    result = json.loads((folder / "parameter-counts.json").read_text(encoding="utf-8"))
    assert {row["member"]: row["parameters"] for row in result["members"]} == COUNTS
    assert (folder / "parameter-counts.md").read_text(encoding="utf-8") == table(result)


def test_an_unknown_member_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigError, match=r"there is no network called 'unet'(?s:.*)unet-2015, unet-3d-2016"):
        load_member("unet")
