"""What was measured of a data set. The planner sees this and a budget, nothing else.

Every tuple of three is in the order Z, Y, X of the canonical (RAS+) axes, as NIfTI arrays lie in memory.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator

from autoseg.domain.values import GrownValue, Value, digest_of

SCHEMA_VERSION = 1

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]


class IntensityStats(Value):
    """Foreground intensities of one channel of one case: exact moments and a quantile sketch.

    Attributes:
        count: Foreground voxels measured.
        quantiles: Values at the levels `QUANTILE_LEVELS` of `preprocessing.measure`.
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    quantiles: tuple[float, ...]


LOOK_LEVELS = (0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995)
"""Levels of the quantiles of `ChannelLook`."""


class ChannelLook(Value):
    """Intensities of one channel all over an image, without its labels; from some of its voxels.

    Attributes:
        mean: Of the voxels in the box around the non-zero region.
        std: The same.
        minimum: The same.
        maximum: The same.
        quantiles: At `LOOK_LEVELS`.
    """

    mean: float
    std: float
    minimum: float
    maximum: float
    quantiles: tuple[float, ...]


class Look(Value):
    """What an image looks like without its labels.

    Attributes:
        orientation: Where the axes of its file point, such as "RAS".
        oblique_degrees: The largest angle between an axis and the world's.
        channels: One per channel, None for a channel that the case lacks or that is not finite.
    """

    orientation: str
    oblique_degrees: float
    channels: tuple[ChannelLook | None, ...]


class CaseStats(GrownValue):
    """Measurements of one case.

    Attributes:
        case: Its id.
        spacing_mm: Voxel size (Z, Y, X).
        shape_original: Voxels (Z, Y, X) before cropping.
        shape: Voxels (Z, Y, X) of the box around the non-zero region.
        relative_size_fraction: Voxels of the box / voxels of the image.
        class_voxels: Voxels of each foreground class, in the order of the label schema.
        intensities: One per channel, None for a channel that the case lacks; empty when the case has no foreground.
        is_2d: Whether the case is a picture without a third axis.
        look: What its image looks like; None where an older version measured it.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("look",)

    case: str
    spacing_mm: Triple
    shape_original: Shape
    shape: Shape
    relative_size_fraction: float
    class_voxels: tuple[int, ...]
    intensities: tuple[IntensityStats | None, ...]
    is_2d: bool = False
    look: Look | None = None


class ChannelIntensity(Value):
    """Pooled foreground intensities of one channel over the data set."""

    mean: float
    median: float
    std: float
    minimum: float
    maximum: float
    percentile_00_5: float
    percentile_99_5: float


class Fingerprint(Value):
    """What the planner needs to know of a data set.

    Attributes:
        channels: Channel names, in order (they choose the normalisation).
        num_classes: Background and foreground classes.
        num_training_cases: As counted by the data set.
        spacings_mm: Per case (Z, Y, X).
        shapes: Per case after cropping (Z, Y, X).
        median_relative_size_fraction: Median over cases of cropped / original voxels.
        intensities: One per channel; None where an imported fingerprint does not tell.
        cases: The measurements of each case, when they were taken here; empty for an imported fingerprint.
    """

    schema_version: int = SCHEMA_VERSION
    channels: tuple[str, ...]
    num_classes: int
    num_training_cases: int
    spacings_mm: tuple[Triple, ...]
    shapes: tuple[Shape, ...]
    median_relative_size_fraction: float
    intensities: tuple[ChannelIntensity | None, ...]
    cases: tuple[CaseStats, ...] = ()

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if not self.spacings_mm or len(self.spacings_mm) != len(self.shapes):
            raise ValueError(
                f"spacings ({len(self.spacings_mm)}) and shapes ({len(self.shapes)}) need one entry a case"
            )
        if len(self.intensities) != len(self.channels):
            raise ValueError(f"{len(self.intensities)} intensity entries for {len(self.channels)} channels")
        return self

    def digest(self) -> str:
        """Name of these measurements, as far as plans are made from them: what images look like does not count."""
        return digest_of(self.model_dump(mode="json", exclude={"cases": {"__all__": {"look"}}}))


class Budget(Value):
    """What a plan may use. Measured speeds of a machine come in here as numbers, so that the planner stays pure.

    Attributes:
        vram_gb: Memory for one training step in GB (10^9 bytes); None means the preset's own.
        step_seconds: Longest training step, for presets that plan for time; None means the preset's own.
        flops_per_second: Speed of the device in such a step, as measured: operations of its convolutions a second,
            counted as in `planning.flops`; None means the preset's own.
    """

    vram_gb: float | None = None
    step_seconds: float | None = None
    flops_per_second: float | None = None
