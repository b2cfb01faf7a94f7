"""Left and right in a network's terms: the axis between them, and what a mirror image does to labels and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from autoseg.domain.dataset import IGNORE_INDEX, LabelSchema
from autoseg.domain.laterality import named_by_form, without_partner
from autoseg.domain.values import Value

Ints = tuple[int, ...]
MirrorPairs = Literal["leave_out", "swap", "naive"]


class Sides(Value):
    """Which axis runs from left to right where classes come in left/right pairs, and what mirroring along it does.

    Attributes:
        axis: Of the network.
        mirror_pairs: "leave_out": nothing is mirrored along it; "swap": where it is, the labels of each pair change
            places; "naive": it is mirrored like the others, and the labels stay.
        labels: What each value index becomes when left and right change places, from 0 (the background) on; empty
            where they cannot.
        outputs: The same for the network's outputs.
    """

    axis: int = Field(ge=0)
    mirror_pairs: MirrorPairs
    labels: Ints = ()
    outputs: Ints = ()

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.mirror_pairs == "swap" and not self.labels:
            raise ValueError(
                "mirror_pairs cannot be 'swap': it is not known which labels change places (see the reasons of the "
                'plan, --why); declare "pairs" in the description of the data set'
            )
        if self.labels[:1] not in ((), (0,)) or any(not 0 <= index < len(self.labels) for index in self.labels):
            raise ValueError(f"labels must hold value indices, and begin with 0 for the background, got {self.labels}")
        if any(
            not 0 <= other < len(self.outputs) or self.outputs[other] != index
            for index, other in enumerate(self.outputs)
        ):
            raise ValueError(f"outputs must change places in pairs, got {self.outputs}")
        if bool(self.labels) != bool(self.outputs):
            raise ValueError("labels and outputs change places together")
        return self

    def mirrored(self, axes: Ints) -> Ints:
        """Those of the axes along which images are mirrored."""
        return tuple(axis for axis in axes if axis != self.axis or self.mirror_pairs != "leave_out")

    def swaps(self, flips: Sequence[int]) -> bool:
        """Whether labels change places when these axes are reversed."""
        return self.mirror_pairs == "swap" and self.axis in flips

    def swapped(self, labels: NDArray[Any]) -> NDArray[Any]:
        """The labels with left and right changed; ignored voxels stay ignored.

        Args:
            labels: Any shape, integer: value indices or IGNORE_INDEX.

        Returns:
            The same dtype.
        """
        # The ignore index is -1, and so finds the last entry.
        table = np.array((*self.labels, IGNORE_INDEX)).astype(labels.dtype)
        out: NDArray[Any] = table[labels]
        return out

    def swapped_classes(self, row: tuple[bool, ...]) -> tuple[bool, ...]:
        """One entry a foreground class (or region), with left and right changed."""
        background = len(self.outputs) - len(row)  # an output of classes, none of regions
        return tuple(row[other - background] for other in self.outputs[background:])


@dataclass(frozen=True, slots=True)
class Swap:
    """What becomes of labels and outputs when left and right change places.

    Attributes:
        labels: See `Sides`.
        outputs: See `Sides`.
        problem: Why they cannot, in words; empty where they can.
        alone: Classes whose name holds a side and that have no partner: they stay what they are.
    """

    labels: Ints = ()
    outputs: Ints = ()
    problem: str = ""
    alone: tuple[str, ...] = ()


def swap_of(schema: LabelSchema) -> Swap:
    """What becomes of the labels of a data set in a mirror image.

    Classes without a partner stay what they are. Of regions, each label value becomes one that lies in the partners of
    its own regions.

    Args:
        schema: With pairs.
    """
    pairs = schema.sided_pairs
    doubtful = [pair for pair in pairs if schema.pairs is None and named_by_form(pair)]
    if doubtful:
        left, right = doubtful[0]
        return Swap(
            problem=f"{left} and {right} may be named by what they are, such as the chambers of the heart, and then "
            "are no mirror images of each other"
        )
    alone = without_partner(schema.names, pairs)
    partner = {name: other for pair in pairs for name, other in (pair, pair[::-1])}
    classes = [schema.names.index(partner.get(name, name)) for name in schema.names]
    if not schema.has_regions:
        table = (0, *(index + 1 for index in classes))
        return Swap(labels=table, outputs=table, alone=alone)
    membership = schema.region_table()
    columns = [tuple(column) for column in membership.T.tolist()]
    labels = []
    for value, column in zip(schema.label_values, columns, strict=True):
        wanted = tuple(column[index] for index in classes)
        if wanted not in columns:
            regions = " and ".join(name for name, inside in zip(schema.names, column, strict=True) if inside)
            return Swap(problem=f"no label value lies in the partners of the regions of value {value} ({regions})")
        # A value that keeps its regions keeps its number too.
        labels.append(columns.index(wanted) if wanted != column else schema.label_values.index(value))
    return Swap(labels=tuple(labels), outputs=tuple(classes), alone=alone)
