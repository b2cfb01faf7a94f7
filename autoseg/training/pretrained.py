"""What a training began with where it began with another model's weights: kept in its checkpoints and in run.json."""

from __future__ import annotations

from itertools import groupby
from typing import Literal

from autoseg.domain.values import Value

MOST_NAMED = 8
"""So many names stand in one line of a message."""


class Leftover(Value):
    """A tensor of the network that did not come from the model, or not all of it.

    Attributes:
        name: Of the tensor.
        reason: Why, in words.
    """

    name: str
    reason: str


class Pretrained(Value):
    """What a training began with.

    Attributes:
        weights_sha256: Of the model's weights; tells models apart.
        plan_digest: Of its plan.
        dataset: That it learned from, by name.
        configuration: Of its plan.
        fold: Of its data set.
        num_tensors: Of the network that is trained.
        num_whole: Of them, those that came from the model whole.
        parameters: Of the network that is trained.
        parameters_taken: Of them, those that came from the model.
        leftovers: Tensors that came in part or not at all.
        unused: Tensors of the model for which there was no place.
        remarks: What else is worth knowing.
    """

    weights_sha256: str
    plan_digest: str
    dataset: str
    configuration: str
    fold: int | Literal["all"]
    num_tensors: int
    num_whole: int
    parameters: int
    parameters_taken: int
    leftovers: tuple[Leftover, ...] = ()
    unused: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The model, for a person."""
        return f"{self.dataset}, {self.configuration} fold {self.fold} ({self.weights_sha256[:12]})"

    def lines(self) -> tuple[str, ...]:
        """What was taken and what was not, for a person; what the model lacks is summed up stage by stage."""
        head = (
            f"{self.num_whole} of {self.num_tensors} tensors came whole, "
            f"{100 * self.parameters_taken / self.parameters:.1f} % of the parameters"
        )
        lines = [head]
        for (part, reason), group in groupby(self.leftovers, lambda item: (_part(item.name), item.reason)):
            names = [item.name for item in group]
            what = names[0] if len(names) == 1 else f"{part} ({len(names)} tensors)"
            lines.append(f"  {what}: {reason}")
        if self.unused:
            parts = list(dict.fromkeys(map(_part, self.unused)))
            named = ", ".join(parts[:MOST_NAMED]) + (", ..." if len(parts) > MOST_NAMED else "")
            lines.append(f"  no place for {len(self.unused)} tensors of the model: {named}")
        return (*lines, *(f"  {remark}" for remark in self.remarks))


def _part(name: str) -> str:
    """The stage, level or head that a tensor belongs to."""
    return ".".join(name.split(".")[:2])
