"""Averages of the probabilities of two configurations, from what was stored of them: a few slices at a time.

Where both agree on a voxel, so does every weighted mean of their probabilities. So means are computed only where they
differ, which is a small part of an image.

Source: docs/decisions/0042.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import Temperature
from autoseg.evaluation.counts import Counts, LabelTable
from autoseg.io.probabilities import LAST_CODE, VALUE_OF_CODE, Codes, StoredProbabilities, ranges

MOST_VALUES = 2**24
"""Codes of both configurations that are in memory at a time: 16 MiB each."""

WEIGHTS = (0.5, 0.35, 0.65, 0.2, 0.8)
"""Shares of the first configuration that are tried; of equal scores the earlier one counts. Source: decision 41."""

_HALF = (LAST_CODE + 1) // 2
"""The first code above one half."""

Indices = NDArray[np.int16]
Shares = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one configuration says of a case.

    Attributes:
        stored: Its out-of-fold probabilities.
        temperature: Its logits are divided by it, see `domain.inference.Temperature`.
    """

    stored: StoredProbabilities
    temperature: Temperature = 1.0


def shares_of(codes: Codes, temperature: Temperature, *, is_regions: bool) -> Shares:
    """Probabilities after dividing the logits by temperatures.

    Args:
        codes: (K, ...).
        temperature: Above 0, one for all outputs or one for each; 1 leaves them as they are.
        is_regions: Whether each output is on its own.

    Returns:
        float32 (K, ...).
    """
    values: Shares = VALUE_OF_CODE[codes]
    if temperature == 1:
        return values
    # The softmax of logits / T is proportional to the softmax of the logits to the power of 1 / T.
    exponent = _exponent(codes, temperature, is_regions=is_regions)
    powers = values**exponent
    total = powers + (1 - values) ** exponent if is_regions else powers.sum(axis=0)
    shares: Shares = (powers / total).astype(np.float32, copy=False)
    return shares


def _exponent(codes: Codes, temperature: Temperature, *, is_regions: bool) -> np.float32 | Shares:
    """One over the temperature: a number, or in a shape that fits the codes."""
    if not isinstance(temperature, tuple):
        return np.float32(1 / temperature)
    of_each: Shares = np.reciprocal(np.array(temperature, np.float32))
    exponent: Shares = (
        of_each.reshape(-1, *(1 for _ in codes.shape[1:])) if is_regions else of_each[codes.argmax(axis=0)]
    )
    return exponent


class Decoder:
    """From probabilities to value indices, as prediction decides.

    Args:
        schema: The labels.
    """

    def __init__(self, schema: LabelSchema) -> None:
        self.schema = schema
        self.table = LabelTable(schema)

    def outcome_of_codes(self, codes: Codes) -> NDArray[np.int64]:
        """What codes (K, ...) of one configuration say: the winning class (of equals the first), or bits of regions."""
        if self.schema.has_regions:
            return bits_of(codes >= _HALF)
        winners: NDArray[np.int64] = codes.argmax(axis=0)
        return winners

    def values_of(self, outcomes: NDArray[np.int64]) -> Indices:
        """Value indices of outcomes."""
        if self.schema.has_regions:
            return self.table.encode(self.schema.decode_regions(outcomes))
        return outcomes.astype(np.int16)

    def of_shares(self, shares: Shares) -> Indices:
        """Value indices (...) of probabilities (K, ...)."""
        if self.schema.has_regions:
            return self.values_of(bits_of(shares > 0.5))
        return self.values_of(shares.argmax(axis=0))


def bits_of(memberships: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Combinations of regions, one bit a region, of (K, ...)."""
    bits = np.zeros(memberships.shape[1:], np.int64)
    for number, inside in enumerate(memberships):
        bits |= inside.astype(np.int64) << number
    return bits


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some slices of a case, by two configurations.

    Attributes:
        rows: The slices along Z.
        agreed: (z, Y, X) value indices by the first; right for every weight where both agree.
        disputed: (z, Y, X) whether they differ.
        shares: Probabilities (K, n) of either, at the disputed voxels.
    """

    rows: slice
    agreed: Indices
    disputed: NDArray[np.bool_]
    shares: tuple[Shares, Shares]

    def mixed(self, weight: float, decoder: Decoder) -> Indices:
        """Value indices (n,) of the disputed voxels, with that share of the first."""
        first, second = self.shares
        return decoder.of_shares(np.float32(weight) * first + np.float32(1 - weight) * second)


def blocks(first: Part, second: Part, decoder: Decoder) -> Iterator[Block]:
    """Go through a case."""
    is_regions = decoder.schema.has_regions
    for start, stop in ranges(first.stored.shape, MOST_VALUES):
        codes = (first.stored.slices(start, stop), second.stored.slices(start, stop))
        outcome, other = (decoder.outcome_of_codes(item) for item in codes)
        disputed = outcome != other
        shares = tuple(
            shares_of(item[:, disputed], part.temperature, is_regions=is_regions)
            for item, part in zip(codes, (first, second), strict=True)
        )
        yield Block(slice(start, stop), decoder.values_of(outcome), disputed, (shares[0], shares[1]))


def pair_counts(
    first: Part, second: Part, weights: Sequence[float], reference: Indices, decoder: Decoder
) -> list[Counts]:
    """Counts of a case for several weights at once.

    Args:
        first: A configuration.
        second: Another.
        weights: Shares of the first, 0 ... 1.
        reference: (Z, Y, X), see `LabelTable.encode_reference`.
        decoder: Of the labels.
    """
    totals = [np.zeros((decoder.table.num_values,) * 2, np.int64) for _ in weights]
    for block in blocks(first, second, decoder):
        actual, agrees = reference[block.rows], ~block.disputed
        same = decoder.table.count(actual[agrees], block.agreed[agrees])
        disputed = actual[block.disputed]
        for total, weight in zip(totals, weights, strict=True):
            np.add(total, same + decoder.table.count(disputed, block.mixed(weight, decoder)), out=total)
    return totals


def pair_labels(first: Part, second: Part, weight: float, decoder: Decoder) -> NDArray[np.unsignedinteger]:
    """The label map (I, J, K) of a mean, on the file's grid, as label values in Fortran order.

    Args:
        first: A configuration.
        second: Another.
        weight: Share of the first, 0 ... 1.
        decoder: Of the labels.
    """
    table = decoder.schema.decode_table()
    labels = np.zeros(first.stored.shape[1:], table.dtype)
    for block in blocks(first, second, decoder):
        indices = block.agreed
        indices[block.disputed] = block.mixed(weight, decoder)
        labels[block.rows] = table[indices]
    return labels.T
