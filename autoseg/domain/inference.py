"""What `predict RUN` uses (`inference.json`): models with their weights, and what is done to the label map afterwards.

Chosen by cross-validation, or written by people; read by prediction and carried along by an exported model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.values import GrownValue, Value

SCHEMA_VERSION = 1

# Smaller volumes are told in mm³.
_LEAST_ML_IN_WORDS = 0.1

FoldName = int | Literal["all"]

Connectivity = Literal["faces", "edges", "corners"]
"""Which neighbours belong together: in 3D 6, 18 or 26 of them. Along an axis of one voxel there are none."""

Temperature = float | tuple[float, ...]
"""What logits are divided by: one number, or one for each output of a network.

Of regions each logit has its own. Classes that exclude each other are divided together, by the temperature of the class
that has the largest logit (of equal ones the first): so which class wins never depends on temperatures.
Source: docs/decisions/0043.
"""

Tta = Literal["none", "interleaved", "full"]
"""Test-time mirroring: one pass a tile; one pass a tile, each under another mirror combination; every combination for
every tile."""

DEFAULT_TTA: Tta = "interleaved"
"""Of what is predicted for people, validation cases of a training included. Source: docs/decisions/0052."""

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Member(GrownValue):
    """The models of one configuration.

    Attributes:
        configuration: Its name in the plan. Of a cascade the previous stage goes first, with all of its folds that are
            there.
        folds: Their logits are averaged on the prepared grid; () stands for every finished fold.
        weight: Of its probabilities in the mean over the members, relative to the others.
        temperature: Its logits are divided by this before they become probabilities; see `Temperature`.
        class_temperatures: The same for the classes or regions that are named; `temperature` is that of all others, and
            of the background. None names none.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("class_temperatures",)

    configuration: str
    folds: tuple[FoldName, ...] = ()
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    class_temperatures: dict[str, _Positive] | None = None

    @model_validator(mode="after")
    def _folds_differ(self) -> Self:
        if len(set(self.folds)) != len(self.folds):
            raise ValueError(f"{self.configuration}: a fold counts once, got {self.folds}")
        return self

    def temperatures(self, labels: LabelSchema) -> Temperature:
        """One number where all are equal, else one for each output of the networks.

        Args:
            labels: Of the models.
        """
        named = self.class_temperatures or {}
        own = tuple(named.get(name, self.temperature) for name in labels.names)
        of_each = own if labels.has_regions else (self.temperature, *own)
        return of_each[0] if len(set(of_each)) == 1 else of_each


Thresholds = tuple[float | None, ...]
"""Of each foreground class or region; None: none. See `Threshold`."""


class Threshold(Value):
    """A class is given to voxels where its probability is at least a threshold.

    Where there are such rules, labels are decided by probabilities (those that are written on request). Of classes that
    exclude each other a voxel gets the most probable of those that reach their thresholds, of equal ones the first, and
    is background where none does; a class without a rule reaches its threshold where it is more probable than the
    background. So without rules the most probable class wins, and a voxel that a class may not have goes to the next
    one, or to the background. A region is predicted where it reaches its threshold; without a rule above one half.

    Attributes:
        classes: Names of classes or regions, at least one, each with this threshold.
        min_probability: The threshold, above 0 and below 1.
    """

    kind: Literal["threshold"] = "threshold"
    classes: tuple[str, ...]
    min_probability: float = Field(gt=0, lt=1)

    @property
    def in_short(self) -> str:
        """For tables, without the classes."""
        return f"threshold of {self.min_probability:g}"

    @model_validator(mode="after")
    def _has_classes(self) -> Self:
        _require_classes(self.classes)
        return self


class ComponentRule(Value):
    """A rule about connected components of classes, on the label map as it is written.

    Attributes:
        classes: Names of classes or regions, at least one. A voxel belongs to a region if its label value is one of the
            region's.
        joined: Whether components are those of all these classes together; else those of each class, one class after
            the other.
        connectivity: Of the components.
    """

    classes: tuple[str, ...]
    joined: bool = False
    connectivity: Connectivity = "corners"

    @model_validator(mode="after")
    def _has_classes(self) -> Self:
        _require_classes(self.classes)
        return self


class KeepLargest(ComponentRule):
    """Keep the largest components by voxels; of equal ones that which comes first in the array. The others go.

    Attributes:
        count: How many are kept.
        becomes: Label value of the voxels that go; 0 is background.
    """

    kind: Literal["keep_largest"] = "keep_largest"
    count: int = Field(default=1, ge=1)
    becomes: int = Field(default=0, ge=0)

    @property
    def in_short(self) -> str:
        """For tables, without the classes."""
        return "keep largest" if self.count == 1 else f"keep {self.count} largest"


class DropSmall(ComponentRule):
    """Components of less than a volume go.

    Attributes:
        min_ml: The volume in millilitres; a component of exactly this volume stays.
        becomes: Label value of the voxels that go; 0 is background.
    """

    kind: Literal["drop_small"] = "drop_small"
    min_ml: float = Field(gt=0, allow_inf_nan=False)
    becomes: int = Field(default=0, ge=0)

    @property
    def in_short(self) -> str:
        """For tables, without the classes."""
        small = self.min_ml < _LEAST_ML_IN_WORDS
        return f"drop below {self.min_ml * 1000:.3g} mm³" if small else f"drop below {self.min_ml:g} ml"


class DropUnlikely(ComponentRule):
    """Components go whose mean probability is below a limit: the class' own, over the voxels that it was given.

    The mean is over the component's voxels whose label is still the one that was decided; what an earlier rule has
    added does not count, and a component of nothing else stays. Probabilities are those that are written on request,
    in 8 bit.

    Attributes:
        min_mean: The limit; a component with exactly this mean stays.
        becomes: Label value of the voxels that go; 0 is background.
    """

    kind: Literal["drop_unlikely"] = "drop_unlikely"
    min_mean: float = Field(gt=0, le=1)
    becomes: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _is_of_single_classes(self) -> Self:
        if self.joined:
            raise ValueError("drop_unlikely is not for classes that are joined: each has a probability of its own")
        return self

    @property
    def in_short(self) -> str:
        """For tables, without the classes."""
        return f"drop below a mean probability of {self.min_mean:g}"


class FillHoles(ComponentRule):
    """Background that is enclosed by a class becomes that class; voxels of other classes stay what they are.

    A hole is a connected part of what is not the class that touches no side of the image. Only its voxels with label
    value 0 change: to the value of the class, of a region to the value it is written with; where classes are joined to
    that of the first.

    Attributes:
        max_ml: Larger holes stay, in millilitres; None fills all.
        connectivity: Of the holes.
    """

    kind: Literal["fill_holes"] = "fill_holes"
    max_ml: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    connectivity: Connectivity = "faces"

    @property
    def in_short(self) -> str:
        """For tables, without the classes."""
        return "fill holes" if self.max_ml is None else f"fill holes up to {self.max_ml:g} ml"


Rule = Annotated[Threshold | KeepLargest | DropSmall | DropUnlikely | FillHoles, Field(discriminator="kind")]


def _require_classes(names: tuple[str, ...]) -> None:
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a rule needs different classes, at least one, got {names}")


def thresholds_of(rules: Sequence[Rule], labels: LabelSchema) -> Thresholds | None:
    """What rules say about probabilities, for each foreground class or region; None where there is no `Threshold`.

    Args:
        rules: Of an `InferenceRecipe`.
        labels: Of the models.
    """
    named = {name: rule.min_probability for rule in rules if isinstance(rule, Threshold) for name in rule.classes}
    return tuple(named.get(name) for name in labels.names) if named else None


class InferenceRecipe(Value):
    """What `inference.json` holds.

    Each member's logits, averaged over its folds, are resampled to the image's own grid, divided by temperatures and
    made probabilities; the weighted mean over the members decides, with the thresholds if there are any. Then the rules
    about components are applied, in order.

    Attributes:
        members: At least one; each configuration at most once.
        postprocessing: In the order in which they are applied: thresholds, which decide labels, come first, at most one
            for each class.
        provenance: How it was chosen, for people; nothing depends on it.
    """

    schema_version: int = SCHEMA_VERSION
    members: tuple[Member, ...]
    postprocessing: tuple[Rule, ...] = ()
    provenance: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("schema_version")
    @classmethod
    def _is_known(cls, version: int) -> int:
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"this autoseg reads version {SCHEMA_VERSION}, not {version}: use the version that wrote it"
            )
        return version

    @model_validator(mode="after")
    def _members_differ(self) -> Self:
        names = [member.configuration for member in self.members]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"at least one member is needed, each configuration once, got {names}")
        return self

    @model_validator(mode="after")
    def _thresholds_come_first(self) -> Self:
        is_threshold = [isinstance(rule, Threshold) for rule in self.postprocessing]
        if is_threshold != sorted(is_threshold, reverse=True):
            raise ValueError("thresholds decide labels, so they come before the rules about components")
        named = [name for rule in self.postprocessing if isinstance(rule, Threshold) for name in rule.classes]
        if len(set(named)) != len(named):
            raise ValueError(f"a class has at most one threshold, got thresholds of {named}")
        return self


def members_problems(members: Sequence[Member], labels: LabelSchema) -> tuple[str, ...]:
    """Why members do not fit the labels, in words; nothing when they do.

    Args:
        members: Of an `InferenceRecipe`.
        labels: Of the models.
    """
    return tuple(
        f"members.{number}.class_temperatures: there is no class {name!r}"
        for number, member in enumerate(members)
        for name in member.class_temperatures or {}
        if name not in labels.names
    )


def rules_problems(rules: Sequence[Rule], labels: LabelSchema) -> tuple[str, ...]:
    """Why rules do not fit the labels, in words; nothing when they do.

    Args:
        rules: Of an `InferenceRecipe`.
        labels: Of the models.
    """
    problems = []
    for number, rule in enumerate(rules):
        where = f"postprocessing.{number} ({rule.kind})"
        problems += [f"{where}: there is no class {name!r}" for name in rule.classes if name not in labels.names]
        if isinstance(rule, KeepLargest | DropSmall | DropUnlikely) and rule.becomes not in labels.label_values:
            problems.append(f"{where}: becomes is {rule.becomes}, which is none of {list(labels.label_values)}")
    return tuple(problems)
