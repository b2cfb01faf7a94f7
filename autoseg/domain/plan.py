"""The plan: everything that preprocessing, network, training and prediction need, and nothing of any machine.

Every tuple over axes is in the one array-axis order of the plan (see `PreprocessPlan.axis_order`).
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from autoseg.domain.dataset import Channel, LabelSchema
from autoseg.domain.network_plan import Floats, Ints, NetworkPlan
from autoseg.domain.preprocess_plan import ChannelNormalization, NormalizationScheme, PreprocessPlan
from autoseg.domain.sides import Sides
from autoseg.domain.values import GrownValue, Value, digest_of

__all__ = [
    "CASCADE",
    "FLAT",
    "FULLRES",
    "LOWRES",
    "PLANNED_NAMES",
    "AugmentationPlan",
    "ChannelNormalization",
    "Configuration",
    "Decision",
    "InferencePlan",
    "NetworkPlan",
    "NormalizationScheme",
    "Optimiser",
    "Override",
    "Plan",
    "PreprocessPlan",
    "TrainingPlan",
]

SCHEMA_VERSION = 2

FLAT, FULLRES, LOWRES, CASCADE = "2d", "3d_fullres", "3d_lowres", "3d_cascade"
PLANNED_NAMES = (FULLRES, LOWRES, CASCADE, FLAT)
"""The configurations that planning makes; those of other names were added by people, and planning keeps them."""

_CONFIGURATION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Configurations name folders."""

Optimiser = Literal["sgd", "adamw", "muon"]


class AugmentationPlan(GrownValue):
    """Probabilities and ranges of the augmentations, applied in the order of the fields.

    What begins with `cascade_` changes the label map of the previous stage, and nothing where there is none: errors as
    a network makes them, so that the cascade does not learn to copy the map.

    Attributes:
        mirror_axes: Axes that patches may be mirrored along; for that from left to right see `Configuration.sides`.
        channel_dropout: For each channel the probability that a patch is shown without it, so that the network learns
            to do without; empty where no channel may be missing. One channel always stays.
        warm_up_steps: Over so many steps the probabilities of turning, scaling and of every change of intensity rise
            linearly from 0 to what they are here; 0: they are so from the first step. Mirroring, dropped channels and
            what begins with `cascade_` are not concerned.
        cascade_morphology_probability: That the map's classes are dilated, eroded, opened or closed, each class with
            `cascade_morphology_label_probability` and by a ball of a radius (whole voxels) in
            `cascade_morphology_radius`.
        cascade_drop_probability: That connected components are removed, of each class one with
            `cascade_drop_label_probability`, of at most `cascade_drop_fraction` of the patch's voxels.

    Source of the defaults: nnU-Net v2 (Isensee et al. 2021, supplement 4; ranges as in version 2.8).
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("channel_dropout", "warm_up_steps")

    rotation_probability: float = 0.2
    rotation_degrees: Floats = (30.0, 30.0, 30.0)
    scaling_probability: float = 0.2
    scaling_range: tuple[float, float] = (0.7, 1.4)
    noise_probability: float = 0.1
    noise_variance: tuple[float, float] = (0.0, 0.1)
    blur_probability: float = 0.2
    blur_channel_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    brightness_probability: float = 0.15
    brightness_range: tuple[float, float] = (0.75, 1.25)
    contrast_probability: float = 0.15
    contrast_range: tuple[float, float] = (0.75, 1.25)
    low_resolution_probability: float = 0.25
    low_resolution_channel_probability: float = 0.5
    low_resolution_scale: tuple[float, float] = (0.5, 1.0)
    gamma_inverted_probability: float = 0.1
    gamma_probability: float = 0.3
    gamma_range: tuple[float, float] = (0.7, 1.5)
    mirror_axes: Ints = (0, 1, 2)
    dummy_2d: bool = False
    cascade_morphology_probability: float = 0.4
    cascade_morphology_label_probability: float = 0.5
    cascade_morphology_radius: tuple[int, int] = (1, 8)
    cascade_drop_probability: float = 0.2
    cascade_drop_label_probability: float = 0.5
    cascade_drop_fraction: float = 0.15
    channel_dropout: Floats = ()
    warm_up_steps: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _radii_are_possible(self) -> Self:
        low, high = self.cascade_morphology_radius
        if not 1 <= low <= high:
            raise ValueError(f"cascade_morphology_radius needs two numbers, 1 <= low <= high, got {low}, {high}")
        if any(not 0 <= probability < 1 for probability in self.channel_dropout):
            raise ValueError(f"channel_dropout needs probabilities from 0 to below 1, got {self.channel_dropout}")
        return self


EarlyEnd = Literal["never", "epochs", "always"]
"""Whether a training whose validation measure has stopped rising ends before its length."""


class TrainingPlan(GrownValue):
    """How the network learns.

    Attributes:
        batch_size: Patches a step.
        batch_dice: Whether Dice is pooled over the batch instead of averaged over samples.
        foreground_fraction: Part of each batch that is centred on foreground.
        adapts_momentum: Whether the first steps get less momentum, and as much more learning rate.
        ema_decay: Decay of the running mean of the weights a step; 0 switches it off.
        num_epochs: Default length of a training on a GPU.
        steps_per_epoch: Steps of one epoch.
        cpu_time_budget_s: Recommended budget of a fold on a CPU, in seconds.
        early_end: Whether a training whose pseudo-Dice has stopped rising lets the learning rate fall and ends sooner:
            "never"; "epochs": where its length is counted in epochs; "always": under a time budget too.
        optimiser: "sgd": with Nesterov momentum; "adamw"; "muon": orthogonalised momentum for the kernels of
            convolutions, AdamW for the rest.
        betas: Of AdamW: decay of its two moments a step.
        warm_up_steps: The learning rate rises linearly over so many steps.
        hard_voxel_fraction: Cross-entropy is averaged over this part of each sample's voxels, the hardest ones.
        supervision_weights: Of the outputs of deep supervision, finest first, sum 1; empty: halved at every level, the
            coarsest 0.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = (
        "early_end",
        "optimiser",
        "betas",
        "warm_up_steps",
        "hard_voxel_fraction",
        "supervision_weights",
    )

    batch_size: int = Field(ge=1)
    batch_dice: bool = False
    foreground_fraction: float = Field(default=1 / 3, ge=0, le=1)
    learning_rate: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    adapts_momentum: bool = False
    weight_decay: float = 3e-5
    decay_power: float = 0.9
    gradient_clip: float = 12.0
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    num_epochs: int = Field(default=1000, ge=1)
    steps_per_epoch: int = Field(default=250, ge=1)
    validation_steps_per_epoch: int = Field(default=50, ge=0)
    cpu_time_budget_s: float = 3600.0
    early_end: EarlyEnd = "never"
    augmentation: AugmentationPlan = AugmentationPlan()
    optimiser: Optimiser = "sgd"
    betas: tuple[float, float] = (0.9, 0.99)
    warm_up_steps: int = Field(default=0, ge=0)
    hard_voxel_fraction: float = Field(default=1.0, gt=0, le=1)
    supervision_weights: Floats = ()


class InferencePlan(GrownValue):
    """How predictions are put together.

    Attributes:
        overlap: Overlap of neighbouring tiles as a fraction of the patch.
        gaussian_sigma_fraction: Sigma of the tile weight as a fraction of the patch.
        mirror_axes: Axes that test-time mirroring may flip; for that from left to right see `Configuration.sides`.
        precision: What "auto" stands for: "auto" what the device does well, or a precision. Models of other programs
            predict in fp32, so that they predict as they did there.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("precision",)

    overlap: float = Field(default=0.5, ge=0, lt=1)
    gaussian_sigma_fraction: float = 0.125
    mirror_axes: Ints = (0, 1, 2)
    precision: Literal["auto", "fp32"] = "auto"


class Configuration(GrownValue):
    """One member of a plan: preprocessing, network, training and prediction that fit each other.

    Attributes:
        previous_stage: The configuration whose label map is a further input of this one, one channel a foreground
            class (of regions: a label value), a cascade; None for a network that sees the image alone.
        sides: What mirroring from left to right does; None where no classes come in left/right pairs, where that axis
            is none of the network's, and in plans of older versions: then it is mirrored like any other.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("sides",)

    preprocess: PreprocessPlan
    network: NetworkPlan
    training: TrainingPlan
    inference: InferencePlan
    previous_stage: str | None = None
    sides: Sides | None = None

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if len(self.preprocess.target_spacing) != self.network.dims:
            raise ValueError(
                f"target_spacing has {len(self.preprocess.target_spacing)} entries for a {self.network.dims}D network"
            )
        expected = len(self.preprocess.normalization) + self.num_previous_channels
        if expected != self.network.in_channels:
            raise ValueError(
                f"network.in_channels is {self.network.in_channels}, expected {expected}: "
                f"{len(self.preprocess.normalization)} image channels and {self.num_previous_channels} of the "
                "previous stage"
            )
        for name, axes in (
            ("training.augmentation.mirror_axes", self.training.augmentation.mirror_axes),
            ("inference.mirror_axes", self.inference.mirror_axes),
        ):
            if any(not 0 <= axis < self.network.dims for axis in axes) or len(set(axes)) != len(axes):
                raise ValueError(f"{name} must be different axes below {self.network.dims}, got {axes}")
        dropout = self.training.augmentation.channel_dropout
        if len(dropout) not in (0, len(self.preprocess.normalization)):
            raise ValueError(f"channel_dropout needs one number for each image channel, got {dropout}")
        self._check_sides()
        return self

    def _check_sides(self) -> None:
        if self.sides is None:
            return
        if self.sides.axis >= self.network.dims:
            raise ValueError(f"sides.axis must be an axis below {self.network.dims}, got {self.sides.axis}")
        if self.preprocess.orientation == "native" and self.sides.mirror_pairs != "naive":
            raise ValueError(
                "with preprocess.orientation 'native' nobody knows which axis runs from left to right: set "
                "sides.mirror_pairs to 'naive', and mirror_axes to those that may be mirrored"
            )

    def mirrored(self, axes: Ints) -> Ints:
        """Those of the axes along which this configuration mirrors."""
        return axes if self.sides is None else self.sides.mirrored(axes)

    @property
    def num_previous_channels(self) -> int:
        """Input channels that hold the previous stage's label map: one a foreground class or value, or none."""
        if self.previous_stage is None:
            return 0
        if self.network.output == "regions":
            # Label values are not as many as regions; the plan, which knows the labels, checks this number.
            return max(1, self.network.in_channels - len(self.preprocess.normalization))
        return self.network.num_classes - 1


class Decision(Value):
    """Why the plan is as it is: one decision in words and numbers.

    Attributes:
        configuration: Its name, or "" for all of them.
        topic: What was decided, in the field's words.
        rule: The rule in a sentence.
        inputs: The numbers that went in.
        result: What came out.
        would_change: What would change it.
    """

    configuration: str
    topic: str
    rule: str
    inputs: str
    result: str
    would_change: str


class Override(Value):
    """A value set by hand: its key, what the planner had, what it is now (as JSON text)."""

    key: str
    planned: str
    value: str


class Plan(Value):
    """A whole plan: travels with the weights, names no host.

    Attributes:
        preset: The rules it was made by.
        vram_gb: The budget it was made for.
        fingerprint_digest: What it was made from.
        configurations: By name ("2d", "3d_fullres", "3d_lowres", "3d_cascade", and whatever people add).
        decisions: The reasons; not part of the digest.
        overrides: What was set by hand.
    """

    schema_version: int = SCHEMA_VERSION
    dataset: str
    preset: str
    vram_gb: float
    fingerprint_digest: str
    channels: tuple[Channel, ...]
    labels: LabelSchema
    configurations: dict[str, Configuration]
    decisions: tuple[Decision, ...] = ()
    overrides: tuple[Override, ...] = ()

    @field_validator("schema_version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version != SCHEMA_VERSION:
            raise ValueError(f"the plan has version {version}, this autoseg reads {SCHEMA_VERSION}: plan again")
        return version

    @model_validator(mode="after")
    def _configurations_fit(self) -> Self:
        if not self.configurations:
            raise ValueError("a plan needs at least one configuration")
        for name, configuration in self.configurations.items():
            if not _CONFIGURATION_NAME.fullmatch(name):
                raise ValueError(f"a configuration's name has letters, digits, '_', '-' and '.' only, got {name!r}")
            num_channels = len(configuration.preprocess.normalization)
            if num_channels != len(self.channels):
                raise ValueError(f"{name} takes {num_channels} channels, the data set has {len(self.channels)}")
            previous = configuration.previous_stage
            if previous is not None and (previous == name or previous not in self.configurations):
                raise ValueError(f"{name} needs the configuration {previous!r} as its previous stage")
            if previous is not None and self.configurations[previous].previous_stage is not None:
                raise ValueError(f"{name} cannot come after {previous}, a cascade itself: a cascade has two stages")
            self._require_outputs_of_labels(name, configuration)
        return self

    def _require_outputs_of_labels(self, name: str, configuration: Configuration) -> None:
        network, labels = configuration.network, self.labels
        if (network.output == "regions") != labels.has_regions:
            kind = "regions" if labels.has_regions else "classes"
            raise ValueError(f"{name} has an output of {network.output}, the labels are {kind}")
        if network.num_classes != labels.num_outputs:
            raise ValueError(f"{name} has {network.num_classes} outputs, the labels need {labels.num_outputs}")
        if configuration.previous_stage is not None and configuration.num_previous_channels != labels.num_values - 1:
            raise ValueError(
                f"{name} takes {configuration.num_previous_channels} channels of its previous stage, the labels need "
                f"{labels.num_values - 1}"
            )
        sides = configuration.sides
        if sides is not None and (len(sides.labels), len(sides.outputs)) not in (
            (0, 0),
            (labels.num_values, labels.num_outputs),
        ):
            raise ValueError(f"{name}.sides is of other labels: {len(labels.names)} classes are named")

    @property
    def default_configuration(self) -> str:
        """The name of 3d_fullres where planned, else of 2d, else of the first."""
        for name in (FULLRES, FLAT):
            if name in self.configurations:
                return name
        return next(iter(self.configurations))

    @property
    def added_names(self) -> tuple[str, ...]:
        """The configurations that people added by hand."""
        return tuple(name for name in self.configurations if name not in PLANNED_NAMES)

    def digest(self, configuration: str = "") -> str:
        """Name of what this plan does; words about it (decisions, overrides) do not count.

        What people add does not rename what was planned: a configuration of theirs counts only for its own models.

        Args:
            configuration: Whose models are named; "" for the planned ones.
        """
        added = set(self.added_names) - set(self._with_previous(configuration))
        data = self.model_dump(mode="json", exclude={"decisions", "overrides"})
        data["configurations"] = {name: item for name, item in data["configurations"].items() if name not in added}
        return digest_of(data)

    def _with_previous(self, name: str) -> tuple[str, ...]:
        """A configuration and the stages before it."""
        chain: list[str] = []
        while name in self.configurations and name not in chain:
            chain.append(name)
            name = self.configurations[name].previous_stage or ""
        return tuple(chain)
