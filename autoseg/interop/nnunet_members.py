"""One trained nnU-Net configuration as it lies on disk, read and checked: description, plans, checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from torch import Tensor

from autoseg.domain.dataset import Channel, LabelSchema
from autoseg.domain.descriptions import DescriptionProblem, parse_channels, parse_labels
from autoseg.errors import ModelError
from autoseg.interop.checkpoints import read_checkpoint, require_plain_tensors
from autoseg.interop.nnunet_folders import DATASET, PLANS, VALIDATION_SUMMARY, FoldName, ModelFolder
from autoseg.interop.nnunet_plans import ForeignPlans, read_plans
from autoseg.io.files import read_json, read_text

_WRAPPERS = re.compile(r"(module\.|_orig_mod\.)+")
"""What torch's wrappers for several devices and for compiling put in front of the names of weights."""

_RUNNING_STATISTICS = ".running_mean"
"""Only a batch norm has them."""

_MOST_LICENCE_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a fold's checkpoint says.

    Attributes:
        path: The file; the weights are read from it when they are used.
        weights: By nnU-Net's names.
        configuration: Name in the plans.
        trainer: Name of the class that trained.
        mirror_axes: That predictions may be mirrored along.
        facts: What else is worth keeping.
    """

    path: Path
    weights: dict[str, Tensor]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]
    facts: dict[str, JsonValue]

    @property
    def has_batch_norm(self) -> bool:
        """Whether its network normalises over batches."""
        return any(name.endswith(_RUNNING_STATISTICS) for name in self.weights)


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A trained configuration.

    Attributes:
        folder: Where it lies.
        plans: Of its data set.
        description: Its dataset.json.
        channels: Of the data set.
        labels: Of the data set.
        folds: In order.
        problems: What cannot be represented, each in words.
    """

    folder: ModelFolder
    plans: ForeignPlans
    description: Mapping[str, Any]
    channels: tuple[Channel, ...]
    labels: LabelSchema
    folds: Mapping[FoldName, Checkpoint]
    problems: tuple[str, ...]

    @property
    def configuration(self) -> str:
        """Name in the plans."""
        return self._first.configuration

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """That predictions may be mirrored along."""
        return self._first.mirror_axes

    @property
    def has_batch_norm(self) -> bool:
        """Whether its networks normalise over batches."""
        return self._first.has_batch_norm

    @property
    def _first(self) -> Checkpoint:
        return next(iter(self.folds.values()))

    def licence(self) -> str:
        """What is said about the use of the weights, in the description or in files of their own; "" if nothing is."""
        stated = self.description.get("licence", self.description.get("license"))
        texts = [str(stated)] if stated else []
        texts += [read_text(file, ModelError)[:_MOST_LICENCE_CHARACTERS] for file in self.folder.licence_files()]
        return "\n\n".join(texts)


def read_member(folder: ModelFolder) -> Member:
    """Read a trained configuration; the values of its weights are not looked at.

    Raises:
        ModelError: A file is missing or not what it should be.
    """
    plans = read_plans(folder.path / PLANS)
    description = read_json(folder.path / DATASET, ModelError)
    if not isinstance(description, dict):
        raise ModelError(f"{folder.path / DATASET} must hold keys and values, got {type(description).__name__}")
    try:
        channels, labels = parse_channels(description), parse_labels(description)
    except DescriptionProblem as problem:
        raise ModelError(
            f"{folder.path / DATASET} cannot be understood", problems=problem.messages, hint=problem.hint
        ) from None
    folds = {name: _read_fold(path, folder) for name, path in folder.checkpoints.items()}
    problems = (*_disagreements(folds), *_label_problems(labels))
    return Member(folder, plans, description, channels, labels, folds, problems)


def _label_problems(labels: LabelSchema) -> list[str]:
    if labels.has_regions:
        return [] if labels.regions_class_order else [f"{DATASET} has regions, but no regions_class_order"]
    if labels.label_values == tuple(range(labels.num_values)):
        return []
    return [
        "label values must be 0, 1, 2, ... without gaps, because nnU-Net writes the numbers of its outputs; "
        f"{DATASET} has {', '.join(map(str, labels.label_values))}"
    ]


def _disagreements(folds: Mapping[FoldName, Checkpoint]) -> list[str]:
    """What the folds of one configuration must have in common, and have not."""
    problems = []
    for what in ("configuration", "mirror_axes", "has_batch_norm"):
        values = {name: getattr(checkpoint, what) for name, checkpoint in folds.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"fold_{name}: {value}" for name, value in values.items())
            problems.append(f"the folds differ in {what} ({listed})")
    return problems


def _read_fold(path: Path, folder: ModelFolder) -> Checkpoint:
    data = read_checkpoint(path)
    weights = data.get("network_weights")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights):
        is_older = "state_dict" in data
        raise ModelError(
            f"{path} is no checkpoint of nnU-Net v2: it has no network_weights, but {', '.join(sorted(data)[:8])}",
            hint="It looks like one of nnU-Net v1, whose models cannot be imported." if is_older else "",
        )
    plain = {_WRAPPERS.sub("", name, count=1): tensor for name, tensor in weights.items()}
    arguments = data.get("init_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    name_parts = folder.path.name.split("__")
    configuration = arguments.get("configuration", name_parts[2] if len(name_parts) == 3 else None)
    if not isinstance(configuration, str):
        raise ModelError(f"{path} does not say of which configuration it is (init_args.configuration)")
    axes = data.get("inference_allowed_mirroring_axes") or ()  # without the key, or None: nothing is mirrored
    if not isinstance(axes, tuple | list) or not all(isinstance(axis, int) for axis in axes):
        raise ModelError(f"{path}: inference_allowed_mirroring_axes must be whole numbers, got {axes!r}")
    floating = {name: tensor for name, tensor in plain.items() if not name.endswith(".num_batches_tracked")}
    require_plain_tensors(floating, path)
    return Checkpoint(path, floating, configuration, str(data.get("trainer_name", "")), tuple(axes), _facts(data, path))


def _facts(data: Mapping[str, Any], path: Path) -> dict[str, JsonValue]:
    """Epochs, and how well the validation cases were predicted, as far as files say it."""
    facts: dict[str, JsonValue] = {}
    if isinstance(data.get("current_epoch"), int):
        facts["epochs"] = data["current_epoch"]
    summary = path.parent / VALIDATION_SUMMARY
    if summary.is_file():
        content = read_json(summary, ModelError)
        mean = content.get("foreground_mean", {}).get("Dice") if isinstance(content, dict) else None
        if isinstance(mean, int | float) and isfinite(mean):  # NaN where no case has any class
            facts["validation_mean_dice"] = mean
    return facts
