"""Beginning with the weights of another model: which of them fit, and what becomes of the rest.

Tensors are told by their names, and the names count stages from the finest: networks of another depth are aligned at
full resolution. Two kinds of tensor are put together by meaning instead of place: rows of the heads by the names of
the classes, columns of the first convolution by the names of the channels.

Source: decision 28.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Self

import torch
from torch import Tensor

from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import Configuration, Plan
from autoseg.errors import ConfigError
from autoseg.io.model import Model
from autoseg.training.pretrained import MOST_NAMED, Leftover, Pretrained

Shape = tuple[int, ...]

INPUTS = ("stem.conv.weight", "encoder.0.0.conv.weight", "encoder.0.shortcut.conv.weight")
"""Convolutions that see the image; the last two only where there is no stem."""

HEADS = "heads."
MIDDLE = "middle."

_BACKGROUND = "background"
_PREVIOUS = "previous stage: "


@dataclass(frozen=True, slots=True)
class Match:
    """What becomes of one tensor of the network.

    Attributes:
        name: Of the tensor, here and in the model.
        shape: Of the tensor.
        is_taken: Whether any of it comes from the model.
        axis: Along which it is put together by meaning; None: it comes as it is.
        places: For each index along that axis the one in the model; None where the model has none.
        zeroes: Whether the rest starts at zero instead of freshly.
        reason: Why it does not come whole; empty where it does.
    """

    name: str
    shape: Shape
    is_taken: bool
    axis: int | None = None
    places: tuple[int | None, ...] = ()
    zeroes: bool = False
    reason: str = ""

    @property
    def num_taken(self) -> int:
        """Parameters that come from the model."""
        if not self.is_taken:
            return 0
        if self.axis is None:
            return prod(self.shape)
        return prod(self.shape) // self.shape[self.axis] * sum(place is not None for place in self.places)

    def combine(self, fresh: Tensor, theirs: Tensor) -> Tensor:
        """The tensor to begin with, of the kind of the fresh one."""
        theirs = theirs.to(fresh)
        if self.axis is None:
            return theirs
        rest = torch.zeros_like(fresh) if self.zeroes else fresh
        rows = [
            rest.select(self.axis, index) if place is None else theirs.select(self.axis, place)
            for index, place in enumerate(self.places)
        ]
        return torch.stack(rows, self.axis)


@dataclass(frozen=True, slots=True)
class Fit:
    """What of a model a network begins with.

    Attributes:
        matches: One for each tensor of the network.
        record: The same in words, to be kept.
    """

    matches: tuple[Match, ...]
    record: Pretrained

    def start(self, fresh: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
        """The weights to begin with.

        Args:
            fresh: Those of the network as it was built, by name; not changed.
            model: Whose weights are taken.
        """
        return {
            match.name: match.combine(fresh[match.name], model.weights[match.name])
            if match.is_taken
            else fresh[match.name]
            for match in self.matches
        }


def fit(shapes: Mapping[str, Shape], plan: Plan, configuration: str, model: Model) -> Fit:
    """Find out what of a model fits a network.

    Args:
        shapes: Of the network's tensors, by name.
        plan: What is to be trained.
        configuration: Which of its configurations.
        model: Whose weights are offered.

    Raises:
        ConfigError: No kernel of the model fits.
    """
    card, part = model.card, plan.configurations[configuration]
    comparison = _Comparison.of(plan, part, model)
    found: dict[str, Match] = {}
    for name, shape in shapes.items():
        match = comparison.match(name, shape)
        weight = found.get(name.removesuffix("bias") + "weight")
        if match.is_taken and name.endswith(".bias") and weight is not None and not weight.is_taken:
            match = Match(name, shape, is_taken=False, reason="it goes with its weight")
        found[name] = match
    matches = tuple(found.values())
    _require_some(matches, part.network, model)
    record = Pretrained(
        weights_sha256=card.weights_sha256,
        plan_digest=card.digest,
        dataset=card.plan.dataset,
        configuration=card.configuration,
        fold=card.fold,
        num_tensors=len(matches),
        num_whole=sum(match.is_taken and not match.reason for match in matches),
        parameters=sum(prod(match.shape) for match in matches),
        parameters_taken=sum(match.num_taken for match in matches),
        leftovers=tuple(Leftover(name=match.name, reason=match.reason) for match in matches if match.reason),
        unused=tuple(name for name in model.weights if name not in found),
        remarks=comparison.remarks,
    )
    return Fit(matches, record)


@dataclass(frozen=True, slots=True)
class _Meaning:
    """How rows or columns of the two networks belong together.

    Attributes:
        places: For each of ours the model's; None where it has none.
        names: Of ours.
        kind: What they are, in the plural.
        start: How those without a counterpart begin.
        num_known: How many the model has.
        problem: Why none can be taken; empty where some can.
    """

    places: tuple[int | None, ...]
    names: tuple[str, ...]
    num_known: int
    kind: str
    start: Literal["zero", "fresh"]
    problem: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name, place in zip(self.names, self.places, strict=True) if place is None)

    def match(self, name: str, shape: Shape, theirs: Shape, axis: int) -> Match:
        """A tensor that has an entry for each along the axis."""
        if theirs != (*shape[:axis], self.num_known, *shape[axis + 1 :]):
            return Match(name, shape, is_taken=False, reason=_other_shape(shape, theirs))
        if self.problem:
            return Match(name, shape, is_taken=False, reason=self.problem)
        reason = ""
        if self.missing:
            start = "begin at zero" if self.start == "zero" else "begin freshly"
            reason = f"{self.kind} that the model does not know {start}: {', '.join(self.missing)}"
        return Match(name, shape, True, axis, self.places, self.start == "zero", reason)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Two networks side by side.

    Attributes:
        network: That is to be trained.
        theirs: Shapes of the model's tensors, by name.
        inputs: Its channels and ours.
        outputs: Its classes and ours.
        is_as_deep: Whether both have as many stages.
        remarks: What a person should know besides.
    """

    network: NetworkPlan
    theirs: Mapping[str, Shape]
    inputs: _Meaning
    outputs: _Meaning
    is_as_deep: bool
    remarks: tuple[str, ...]

    @classmethod
    def of(cls, plan: Plan, part: Configuration, model: Model) -> Self:
        other, theirs = model.card.plan, model.card.settings
        inputs, remarks = _match_inputs(plan, part, other, theirs)
        return cls(
            part.network,
            {name: tuple(tensor.shape) for name, tensor in model.weights.items()},
            inputs,
            _match_outputs(plan, part, other, theirs),
            part.network.num_stages == theirs.network.num_stages,
            (*remarks, *_differences(part, theirs)),
        )

    def match(self, name: str, shape: Shape) -> Match:
        """What becomes of a tensor."""
        theirs = self.theirs.get(name)
        if theirs is None:
            return Match(name, shape, is_taken=False, reason="not in the model")
        if name.startswith(MIDDLE) and not self.is_as_deep:
            reason = "it works on the coarsest stage, which is another one"
            return Match(name, shape, is_taken=False, reason=reason)
        if name in (INPUTS[:1] if self.network.has_stem else INPUTS):
            return self.inputs.match(name, shape, theirs, 1)
        # The norm in front of a head's convolution has no row for each output.
        if name.startswith(HEADS) and (self.network.head == "conv" or ".conv." in name):
            return self.outputs.match(name, shape, theirs, 0)
        reason = "" if shape == theirs else _other_shape(shape, theirs)
        return Match(name, shape, is_taken=not reason, reason=reason)


def counterparts(wanted: Sequence[str], known: Sequence[str]) -> tuple[int | None, ...]:
    """For each wanted name the place of the same one among the known, each used once; None where there is none.

    Names that are equal go first, then those that differ only in upper and lower case.

    Args:
        wanted: Names; may repeat.
        known: Names; may repeat.
    """
    found: list[int | None] = [None] * len(wanted)
    free = list(range(len(known)))
    keys: tuple[Callable[[str], str], ...] = (str, str.casefold)
    for key in keys:
        for index, name in enumerate(wanted):
            place = next((place for place in free if key(known[place]) == key(name)), None)
            if found[index] is None and place is not None:
                found[index] = place
                free.remove(place)
    return tuple(found)


def _match_inputs(plan: Plan, part: Configuration, other: Plan, theirs: Configuration) -> tuple[_Meaning, list[str]]:
    """Input channels by name; image channels by their place where no name is known and there are as many."""
    ours, known = ([channel.name for channel in one.channels] for one in (plan, other))
    places, remarks = counterparts(ours, known), []
    if not any(place is not None for place in places) and len(ours) == len(known):
        places = tuple(range(len(known)))
        pairs = ", ".join(f"{name} as {known[index]}" for index, name in enumerate(ours))
        remarks.append(f"no channel is named like one of the model's, so they are taken by their place: {pairs}")
    before, before_theirs = _previous_names(plan, part), _previous_names(other, theirs)
    behind = counterparts(before, before_theirs)
    places += tuple(None if place is None else len(known) + place for place in behind)
    remarks += _normalisations(ours, part, theirs, places)
    problem = "" if any(place is not None for place in places[: len(ours)]) else "the model knows none of the channels"
    num_known = len(known) + len(before_theirs)
    return _Meaning(places, (*ours, *before), num_known, "channels", "zero", problem), remarks


def _previous_names(plan: Plan, part: Configuration) -> tuple[str, ...]:
    """Names of the input channels that hold the previous stage's map: classes, or of regions label values."""
    if part.previous_stage is None:
        return ()
    labels = plan.labels
    names = [str(value) for value in labels.label_values[1:]] if labels.has_regions else labels.names
    return tuple(_PREVIOUS + name for name in names)


def _match_outputs(plan: Plan, part: Configuration, other: Plan, theirs: Configuration) -> _Meaning:
    """Outputs by the names of their classes; those of regions mean something else than those of classes."""
    kinds = part.network.output, theirs.network.output
    ours, known = (
        one.labels.names if kind == "regions" else (_BACKGROUND, *one.labels.names)
        for one, kind in zip((plan, other), kinds, strict=True)
    )
    problem = "" if kinds[0] == kinds[1] else f"its outputs are {kinds[0]}, the model's are {kinds[1]}"
    places = counterparts(ours, known)
    if not any(place is not None for place in places):
        problem = problem or "the model knows none of the classes"
    return _Meaning(places, tuple(ours), len(known), "classes", "fresh", problem)


def _other_shape(shape: Shape, theirs: Shape) -> str:
    return f"its shape is {_times(shape)}, in the model {_times(theirs)}"


def _require_some(matches: Sequence[Match], network: NetworkPlan, model: Model) -> None:
    """Refuse a model of which no kernel fits: norms, biases and heads alone, whose shapes say little, are no start."""
    other = model.card.settings.network
    has_kernels = any(match.is_taken and len(match.shape) > 1 and not match.name.startswith(HEADS) for match in matches)
    if network.dims == other.dims and has_kernels:
        return
    compared = [match for match in matches if match.reason and len(match.shape) > 1]
    raise ConfigError(
        f"nothing of the pretrained model fits: it is {_described(other)}, the plan's network is {_described(network)}",
        problems=[f"{match.name}: {match.reason}" for match in compared[:MOST_NAMED]],
        hint="Choose a model whose network is like the plan's, or plan a network like the model's (autoseg info MODEL "
        "shows it, autoseg plan --set ... changes the plan).",
    )


def _described(network: NetworkPlan) -> str:
    features = "-".join(map(str, network.features_per_stage))
    kernels = ", ".join(dict.fromkeys(map(_times, network.kernel_sizes)))
    return f"{network.dims}D with {network.encoder_block} blocks, {features} features and kernels of {kernels}"


def _normalisations(
    names: Sequence[str], part: Configuration, theirs: Configuration, places: Sequence[int | None]
) -> list[str]:
    """Image channels that the model saw with other numbers."""
    remarks = []
    for index, name in enumerate(names):
        place = places[index]
        if place is None:
            continue
        scheme, before = part.preprocess.normalization[index].scheme, theirs.preprocess.normalization[place].scheme
        if scheme != before:
            remarks.append(f"channel {name} is normalised as {scheme}, for the model it was {before}")
    return remarks


def _differences(part: Configuration, theirs: Configuration) -> list[str]:
    """What makes the same thing look different to the two networks."""
    ours, other = part.preprocess.target_spacing, theirs.preprocess.target_spacing
    return [] if ours == other else [f"target spacing is {_times(ours)} mm, for the model it was {_times(other)} mm"]


def _times(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)
