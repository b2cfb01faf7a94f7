"""The plan: everything that preprocessing, network, training and prediction need, and nothing of any machine.

Every tuple over axes is in the one array-axis order of the plan (see `PreprocessPlan.axis_order`).
"""

from __future__ import annotations

from math import prod
from typing import Literal, Self

from pydantic import Field, model_validator

from autoseg.domain.dataset import Channel, LabelSchema
from autoseg.domain.values import Value, digest_of

SCHEMA_VERSION = 1

Ints = tuple[int, ...]
Floats = tuple[float, ...]
NormalizationScheme = Literal["zscore", "ct", "none", "rescale", "rgb"]


class ChannelNormalization(Value):
    """How one channel's intensities are scaled.

    Attributes:
        scheme: "zscore" per image; "ct": clip to [lower, upper], subtract mean, divide by std (all of the data set's
            foreground); "none"; "rescale": per image to 0 ... 1; "rgb": divide by 255.
        use_mask: z-score over the non-zero mask only, the rest stays 0.
    """

    scheme: NormalizationScheme
    use_mask: bool = False
    mean: float | None = None
    std: float | None = None
    lower: float | None = None
    upper: float | None = None

    @model_validator(mode="after")
    def _ct_has_numbers(self) -> Self:
        if self.scheme == "ct" and None in (self.mean, self.std, self.lower, self.upper):
            raise ValueError("scheme 'ct' needs mean, std, lower and upper")
        return self


class PreprocessPlan(Value):
    """How an image becomes the network's input.

    Attributes:
        orientation: "RAS": reorient to closest canonical first; "native": keep the file's axes (imported models).
        axis_order: Network axis a is canonical axis ``axis_order[a]``; (2, 1, 0) is Z, Y, X.
        target_spacing: Millimetres in network axis order; two entries (in-plane) where slices are not resampled (2D).
        normalization: One per channel.
        crop_to_nonzero: Whether the box around non-zero voxels is cut out first.
        image_order: Spline order for images.
        label_order: Spline order for labels, per class.
        logits_order: Spline order on the way back.
        separate_axis_ratio: Above this spacing ratio the coarse axis is resampled on its own with order 0.
    """

    orientation: Literal["RAS", "native"] = "RAS"
    axis_order: tuple[int, int, int] = (2, 1, 0)
    target_spacing: Floats
    normalization: tuple[ChannelNormalization, ...]
    crop_to_nonzero: bool = True
    image_order: int = 3
    label_order: int = 1
    logits_order: int = 1
    separate_axis_ratio: float = 3.0

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if sorted(self.axis_order) != [0, 1, 2]:
            raise ValueError(f"axis_order must be a permutation of 0, 1, 2, got {self.axis_order}")
        if len(self.target_spacing) not in (2, 3) or any(not value > 0 for value in self.target_spacing):
            raise ValueError(f"target_spacing needs 2 or 3 positive entries, got {self.target_spacing}")
        return self

    def digest(self) -> str:
        """Name of this preprocessing."""
        return digest_of(self.model_dump(mode="json"))


class NetworkPlan(Value):
    """A U-Net.

    Attributes:
        in_channels: Channels of the input.
        num_classes: Channels of the output, background included.
        patch_size: Two or three entries; the number of entries is the dimension of the network.
        features_per_stage: Channels of each resolution stage, finest first.
        strides: Per stage, the step *into* it; the first is all ones.
        kernel_sizes: Per stage.
        convs_per_stage_encoder: Convolutions in each encoder stage.
        convs_per_stage_decoder: Convolutions in each decoder stage (one stage fewer), finest first.
        norm: Normalisation layer.
        activation: Nonlinearity.
        downsampling: Strided convolution or max pooling in front of a stage.
        upsampling: Transposed convolution (kernel = stride) or linear interpolation + 1x1 convolution.
        deep_supervision: Whether training sees an output at every decoder stage.
    """

    in_channels: int = Field(ge=1)
    num_classes: int = Field(ge=2)
    patch_size: Ints
    features_per_stage: Ints
    strides: tuple[Ints, ...]
    kernel_sizes: tuple[Ints, ...]
    convs_per_stage_encoder: Ints
    convs_per_stage_decoder: Ints
    norm: Literal["instance"] = "instance"
    activation: Literal["leaky_relu"] = "leaky_relu"
    downsampling: Literal["strided", "max_pool"] = "strided"
    upsampling: Literal["transposed", "interpolation"] = "transposed"
    deep_supervision: bool = True

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        dims, stages = self.dims, self.num_stages
        if dims not in (2, 3) or any(size < 1 for size in self.patch_size):
            raise ValueError(f"patch_size needs 2 or 3 positive entries, got {self.patch_size}")
        if stages < 1 or any(features < 1 for features in self.features_per_stage):
            raise ValueError(f"features_per_stage needs positive entries, got {self.features_per_stage}")
        for name in ("strides", "kernel_sizes"):
            rows: tuple[Ints, ...] = getattr(self, name)
            if len(rows) != stages or any(len(row) != dims or min(row) < 1 for row in rows):
                raise ValueError(f"{name} needs {stages} rows of {dims} positive entries, got {rows}")
        if any(size % 2 == 0 for kernel in self.kernel_sizes for size in kernel):
            raise ValueError(f"kernel sizes must be odd, got {self.kernel_sizes}")
        if set(self.strides[0]) != {1}:
            raise ValueError(f"the first stage cannot have a stride, got {self.strides[0]}")
        if len(self.convs_per_stage_encoder) != stages or len(self.convs_per_stage_decoder) != stages - 1:
            raise ValueError(
                f"{stages} stages need {stages} encoder and {stages - 1} decoder entries, got "
                f"{self.convs_per_stage_encoder} and {self.convs_per_stage_decoder}"
            )
        for axis, (size, divisor) in enumerate(zip(self.patch_size, self.divisors, strict=True)):
            if size % divisor:
                raise ValueError(
                    f"patch_size[{axis}] = {size} must be divisible by {divisor}, the product of the strides; "
                    f"{size // divisor * divisor} or {(size // divisor + 1) * divisor} would be"
                )
        return self

    @property
    def dims(self) -> int:
        """2 or 3."""
        return len(self.patch_size)

    @property
    def num_stages(self) -> int:
        """Resolution stages, the bottleneck included."""
        return len(self.features_per_stage)

    @property
    def divisors(self) -> Ints:
        """Product of the strides along each axis: inputs must be divisible by it."""
        return tuple(prod(stride[axis] for stride in self.strides) for axis in range(self.dims))


class AugmentationPlan(Value):
    """Probabilities and ranges of the augmentations, applied in the order of the fields.

    Source of the defaults: nnU-Net v2 (Isensee et al. 2021, supplement 4; ranges as in version 2.8).
    """

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


class TrainingPlan(Value):
    """How the network learns.

    Attributes:
        batch_size: Patches a step.
        batch_dice: Whether Dice is pooled over the batch instead of averaged over samples.
        foreground_fraction: Part of each batch that is centred on foreground.
        adapts_momentum: Whether short trainings get less momentum, and as much more learning rate.
        ema_decay: Decay of the running mean of the weights a step; 0 switches it off.
        num_epochs: Default length of a training on a GPU.
        steps_per_epoch: Steps of one epoch.
        cpu_time_budget_s: Recommended budget of a fold on a CPU, in seconds.
    """

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
    augmentation: AugmentationPlan = AugmentationPlan()


class InferencePlan(Value):
    """How predictions are put together.

    Attributes:
        overlap: Overlap of neighbouring tiles as a fraction of the patch.
        gaussian_sigma_fraction: Sigma of the tile weight as a fraction of the patch.
        mirror_axes: Axes that test-time mirroring may flip (network axis order).
    """

    overlap: float = Field(default=0.5, ge=0, lt=1)
    gaussian_sigma_fraction: float = 0.125
    mirror_axes: Ints = (0, 1, 2)


class Configuration(Value):
    """One member of a plan: preprocessing, network, training and prediction that fit each other."""

    preprocess: PreprocessPlan
    network: NetworkPlan
    training: TrainingPlan
    inference: InferencePlan

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if len(self.preprocess.target_spacing) != self.network.dims:
            raise ValueError(
                f"target_spacing has {len(self.preprocess.target_spacing)} entries for a {self.network.dims}D network"
            )
        if len(self.preprocess.normalization) != self.network.in_channels:
            raise ValueError(
                f"{len(self.preprocess.normalization)} normalisations for {self.network.in_channels} input channels"
            )
        for name, axes in (
            ("training.augmentation.mirror_axes", self.training.augmentation.mirror_axes),
            ("inference.mirror_axes", self.inference.mirror_axes),
        ):
            if any(not 0 <= axis < self.network.dims for axis in axes) or len(set(axes)) != len(axes):
                raise ValueError(f"{name} must be different axes below {self.network.dims}, got {axes}")
        return self


class Decision(Value):
    """Why the plan is as it is: one decision in words and numbers.

    Attributes:
        configuration: "2d", "3d_fullres" or "" for both.
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
        configurations: By name ("2d", "3d_fullres").
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

    @model_validator(mode="after")
    def _configurations_fit(self) -> Self:
        if not self.configurations:
            raise ValueError("a plan needs at least one configuration")
        for name, configuration in self.configurations.items():
            if configuration.network.in_channels != len(self.channels):
                raise ValueError(
                    f"{name} takes {configuration.network.in_channels} channels, the data set has {len(self.channels)}"
                )
            if configuration.network.num_classes != self.labels.num_classes:
                raise ValueError(
                    f"{name} has {configuration.network.num_classes} outputs, the labels need {self.labels.num_classes}"
                )
        return self

    @property
    def default_configuration(self) -> str:
        """The name of 3d_fullres where planned, else of 2d, else of the first."""
        for name in ("3d_fullres", "2d"):
            if name in self.configurations:
                return name
        return next(iter(self.configurations))

    def digest(self) -> str:
        """Name of what this plan does; words about it (decisions, overrides) do not count."""
        return digest_of(self.model_dump(mode="json", exclude={"decisions", "overrides"}))
