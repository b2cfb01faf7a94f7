"""The loss of a part of a batch, as its share of the loss of the whole batch.

A batch may come in parts: micro-batches one after the other, samples of several processes. The loss is a function of
sums over the batch: of voxels that take part, and (Dice over the batch) of what is predicted and labelled. A part that
knows the sums over the whole batch computes its own share of the loss: the shares add up to the loss of the whole
batch, and their gradients to its gradient. Nothing but these sums needs to pass between the parts, because the others'
are constants to the gradient of one's own.

How: the loss runs once for each part with `Measured`, which takes down the part's sums; they are added up over the
parts; then it runs with `Known`, which has the sums of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Share(Protocol):
    """What a loss asks when it needs to know something of the whole batch."""

    def total(self, part: Tensor) -> Tensor:
        """The sum over the whole batch of something of which `part` is this part's; the gradient goes to `part`."""

    def mean(self, values: Tensor, counted: Tensor | None) -> Tensor:
        """This part's share of a mean over the whole batch.

        Args:
            values: One or more a sample.
            counted: Of the same shape, bool: which of them count; None: all.
        """

    def once(self, value: Tensor) -> Tensor:
        """A term that comes out the same for every part: it counts once, its gradient goes to every part."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The whole batch at once."""

    def total(self, part: Tensor) -> Tensor:
        """The part is all there is."""
        return part

    def mean(self, values: Tensor, counted: Tensor | None) -> Tensor:
        """Their mean."""
        return values.mean() if counted is None else _weighted(values, counted, self)

    def once(self, value: Tensor) -> Tensor:
        """There is one part."""
        return value


WHOLE = Whole()


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Takes down the sums of a part; the loss that comes out means nothing.

    Attributes:
        dtype: In which sums are held.
        sums: One for each call of `total`, in its order.
    """

    dtype: torch.dtype
    sums: list[Tensor] = field(default_factory=list)

    def total(self, part: Tensor) -> Tensor:
        """The part, taken down."""
        self.sums.append(part.detach().to(self.dtype))
        return part

    def mean(self, values: Tensor, counted: Tensor | None) -> Tensor:
        """Their mean; how many they are is taken down."""
        return _weighted(values, counted, self)

    def once(self, value: Tensor) -> Tensor:
        """The value."""
        return value

    def flat(self) -> Tensor:
        """All sums in one row."""
        return torch.cat([value.flatten() for value in self.sums])


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Knows the sums of the whole batch; serves one run of the loss.

    Attributes:
        totals: One for each call of `total`, in its order.
        is_first: Of one part in the batch, which counts what counts once.
    """

    totals: Iterator[Tensor]
    is_first: bool

    @classmethod
    def of(cls, flat: Tensor, like: Sequence[Tensor], *, is_first: bool) -> Known:
        """From all sums in one row.

        Args:
            flat: As `Measured.flat`, summed over all parts.
            like: Of the shapes that the sums have.
            is_first: See the class.
        """
        pieces = torch.split(flat, [value.numel() for value in like])
        return cls(iter([piece.view(value.shape) for piece, value in zip(pieces, like, strict=True)]), is_first)

    def total(self, part: Tensor) -> Tensor:
        """The sum over the whole batch."""
        whole = next(self.totals).to(part.dtype)
        # The value of the whole, to the bit in every part, with the gradient of the part.
        return whole + (part - part.detach()) if part.requires_grad else whole

    def mean(self, values: Tensor, counted: Tensor | None) -> Tensor:
        """Their sum over how many there are in the whole batch."""
        return _weighted(values, counted, self)

    def once(self, value: Tensor) -> Tensor:
        """The value in the first part; in the others zero with the value's gradient."""
        return value if self.is_first else value - value.detach()


def _weighted(values: Tensor, counted: Tensor | None, share: Share) -> Tensor:
    counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
    return (values * counted).sum() / share.total(counted.sum()).clamp_min(1)
