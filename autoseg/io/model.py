"""Models on disk: the weights as safetensors, everything else as JSON beside them. Nothing is ever pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, JsonValue, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoseg.domain.plan import Configuration, Plan
from autoseg.domain.trained_on import TrainedOn
from autoseg.domain.values import GrownValue
from autoseg.errors import ModelError
from autoseg.io.files import atomic_path, file_digest, read_json, read_text, write_text

SCHEMA_VERSION = 1

WEIGHTS = "weights"
"""Stem of the final weights' files."""

BEST = "best"
"""Stem of the files of the best weights by validation during training."""


PREVIOUS_WEIGHTS = "previous_weights"
"""Provenance of a cascade: SHA-256 of the previous stage's weights, by fold, that predicted what it learned from."""


class ModelCard(GrownValue):
    """What a model is; with the weights all that prediction needs.

    Attributes:
        plan: The plan it was trained by, every configuration.
        configuration: Which configuration of the plan it is.
        fold: The fold it was trained on.
        digest: The plan's digest.
        weights_sha256: SHA-256 of the weight file; filled when saved.
        versions: Of autoseg, torch and so on.
        provenance: How it came about (epochs, seconds, seed, "imported from ...").
        trained_on: What the images were like; None for models of older versions and of other programs.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("trained_on",)

    schema_version: int = SCHEMA_VERSION
    plan: Plan
    configuration: str
    fold: int | Literal["all"]
    digest: str
    weights_sha256: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    trained_on: TrainedOn | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.configuration not in self.plan.configurations:
            raise ValueError(f"configuration {self.configuration!r} is not one of {sorted(self.plan.configurations)}")
        expected = self.plan.digest(self.configuration)
        if self.digest != expected:
            raise ValueError(f"the plan has digest {expected}, the card says {self.digest}")
        return self

    @property
    def settings(self) -> Configuration:
        """The configuration of the plan that this model is."""
        return self.plan.configurations[self.configuration]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """Weights with their card.

    Attributes:
        weights: Tensors by name, on the CPU.
        card: What they are.
        folder: Where they were read from; None when they never were on disk.
    """

    weights: Mapping[str, Tensor]
    card: ModelCard
    folder: Path | None = None


def save_model(folder: Path, weights: Mapping[str, Tensor], card: ModelCard, name: str = WEIGHTS) -> ModelCard:
    """Write NAME.safetensors, then NAME.json that names its checksum: a pair that does not match is never used.

    Args:
        folder: Made when missing.
        weights: Tensors by name, any device.
        card: What they are; its checksum is filled in.
        name: Stem of both files.

    Returns:
        The card as written.
    """
    folder = Path(folder)
    path = folder / f"{name}.safetensors"
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in weights.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        checksum = file_digest(temporary)
    written = card.model_copy(update={"weights_sha256": checksum})
    write_text(folder / f"{name}.json", written.to_json())
    return written


def read_card(folder: Path, name: str = WEIGHTS) -> ModelCard:
    """Read what a model is, without its weights.

    Raises:
        ModelError: There is no card, it is not valid, or its schema is newer than this version knows.
    """
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} holds no model: {path.name} is missing",
            hint="A model is a fold folder of a run (models/CONFIG/fold_K) whose training has finished.",
        )
    data = read_json(path, ModelError)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ModelError(
            f"{path} has schema version {version}, this autoseg reads version {SCHEMA_VERSION}",
            hint="Use the autoseg version that wrote it, or a newer one.",
        )
    return ModelCard.from_json(read_text(path, ModelError), path, ModelError)


def is_whole(folder: Path, name: str = WEIGHTS) -> bool:
    """Whether a model is there with its card and the weights that the card names; nothing else is checked."""
    try:
        checksum = read_card(folder, name).weights_sha256
    except ModelError:
        return False
    path = Path(folder) / f"{name}.safetensors"
    return path.is_file() and file_digest(path) == checksum


def load_model(folder: Path, name: str = WEIGHTS) -> Model:
    """Read a model and check that its files are whole and belong together.

    Raises:
        ModelError: A file is missing or corrupt, or the checksum on the card is not that of the weights.
    """
    card = read_card(folder, name)
    path = Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise ModelError(f"{folder} holds no weights: {path.name} is missing")
    checksum = file_digest(path)
    if checksum != card.weights_sha256:
        raise ModelError(
            f"{path} is corrupt or belongs to another {name}.json: its SHA-256 begins with {checksum[:12]}, "
            f"expected {card.weights_sha256[:12]}",
            hint="Copy the model again, or go on training so that it is written anew.",
        )
    try:
        weights = load_file(path)
    except SafetensorError as problem:
        raise ModelError(f"{path} cannot be read as safetensors: {problem}") from None
    broken = [key for key, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ModelError(f"{path} holds NaN or infinite weights in {broken[0]} and {len(broken) - 1} other tensors")
    return Model(weights, card, Path(folder))
