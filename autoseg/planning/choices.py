"""What the planner chose on its way, kept until the reasons are written down."""

from __future__ import annotations

from dataclasses import dataclass

from autoseg.domain.dataset import Channel
from autoseg.domain.fingerprint import Fingerprint
from autoseg.domain.plan import AugmentationPlan, ChannelNormalization
from autoseg.domain.sides import Sides, Swap
from autoseg.planning.batch import BatchChoice
from autoseg.planning.lowres import LowresSearch
from autoseg.planning.patch import Limits, PatchSearch
from autoseg.planning.presets import PlannerRules
from autoseg.planning.spacing import SpacingChoice

Floats = tuple[float, ...]
Ints = tuple[int, ...]

AXIS_NAMES = ("Z", "Y", "X")


@dataclass(frozen=True, slots=True)
class DatasetChoices:
    """Choices that every configuration shares.

    Attributes:
        limits: What the networks have to fit.
        num_values: Label values, background included: as many as classes, where there are no regions.
        spacing: In the order Z, Y, X.
        order: Z, Y, X (0, 1, 2) in network order.
        target: Target spacing in network order.
        median_shape: Median image after resampling, network order.
        swap: What becomes of the labels when left and right change places.
        sided_pairs: Classes (left, right) that come in pairs.
        lowres: None where no 3D configuration is planned.
    """

    fingerprint: Fingerprint
    rules: PlannerRules
    limits: Limits
    channels: tuple[Channel, ...]
    num_values: int
    spacing: SpacingChoice
    order: Ints
    target: Floats
    median_shape: Floats
    normalization: tuple[ChannelNormalization, ...]
    swap: Swap
    sided_pairs: tuple[tuple[str, str], ...] = ()
    lowres: LowresSearch | None = None

    @property
    def left_right_axis(self) -> int:
        """The network axis that runs from left to right."""
        return self.order.index(AXIS_NAMES.index("X"))

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the network axes."""
        return tuple(AXIS_NAMES[axis] for axis in self.order)


@dataclass(frozen=True, slots=True)
class ConfigurationChoices:
    """Choices of one configuration, in network order.

    Attributes:
        previous_stage: See `Configuration`.
        sides: See `Configuration`.
    """

    name: str
    search: PatchSearch
    batch: BatchChoice
    batch_dice: bool
    augmentation: AugmentationPlan
    previous_stage: str | None = None
    sides: Sides | None = None
