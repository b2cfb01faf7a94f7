"""The published members of the U-Net family: one file each in `configs/members`, and what they are held against."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import Field
from torch import nn

from autoseg.config import configs_folder, read_yaml
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.values import Value
from autoseg.errors import ConfigError
from autoseg.network.norms import Norm
from autoseg.network.unet import UNet


class PublishedCount(Value):
    """How many parameters a network is said to have.

    Attributes:
        parameters: The figure.
        source: Where it is from.
        without_norms: Whether it leaves the scales and shifts of norms out.
    """

    parameters: int = Field(gt=0)
    source: str
    without_norms: bool = False


class Member(Value):
    """A published network.

    Attributes:
        title: Its name in the field.
        source: Where its structure is from.
        published: Its published number of parameters.
        network: The network.
    """

    title: str
    source: str
    published: PublishedCount
    network: NetworkPlan


def member_names() -> tuple[str, ...]:
    """The shipped members, by name."""
    return tuple(sorted(path.name.removesuffix(".yaml") for path in _folder().glob("*.yaml")))


def load_member(name: str) -> Member:
    """A shipped member.

    Raises:
        ConfigError: There is no such member, or its file is not valid.
    """
    if name not in member_names():
        raise ConfigError(f"there is no network called {name!r}", hint=f"There are {', '.join(member_names())}.")
    path = _folder() / f"{name}.yaml"
    return Member.from_json(json.dumps(read_yaml(path)), path, ConfigError)


def num_parameters(plan: NetworkPlan, without_norms: bool = False) -> int:
    """Parameters of a network, counted without any memory for them.

    Args:
        plan: The network.
        without_norms: Whether the scales and shifts of norms are left out.
    """
    with torch.device("meta"):
        network = UNet(plan)
    skipped: set[int] = set()
    if without_norms:
        norms = (module for module in network.modules() if isinstance(module, (Norm, nn.LayerNorm)))
        skipped = {id(parameter) for norm in norms for parameter in norm.parameters()}
    # Running statistics of a batch norm are stored as parameters without gradient; nobody counts them.
    learned = (parameter for parameter in network.parameters() if parameter.requires_grad)
    return sum(parameter.numel() for parameter in learned if id(parameter) not in skipped)


def _folder() -> Path:
    return configs_folder() / "members"
