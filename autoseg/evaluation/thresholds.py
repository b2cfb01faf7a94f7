"""What thresholds of probability by class make of out-of-fold predictions, and how probable what they say is.

`domain.inference.Threshold` says what a threshold means; `inference.deciding` does the same while it predicts. Looked
at are only voxels at which a foreground class can reach the lowest threshold; all others are background.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import Temperature, Thresholds
from autoseg.evaluation.counts import Counts
from autoseg.evaluation.ensemble import MOST_VALUES, Decoder, Indices, Part, Shares, bits_of, shares_of
from autoseg.evaluation.postprocess import Likelihoods
from autoseg.io.fractions import LEVELS
from autoseg.io.probabilities import VALUE_OF_CODE, Codes, ranges

THRESHOLDS = (0.4, 0.6, 0.3, 0.7, 0.2, 0.8)
"""Those that are tried; of equal ones the first is taken, which is nearest to where labels are decided without any.
Few, because the best of many would be good by chance. Source: docs/decisions/0043."""

LABELLED = 0.5
"""Regions without a threshold are predicted above this."""

Mixture = Sequence[tuple[Part, float]]
"""What the members of a candidate say of a case, with their weights, which sum to 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What another threshold would change in a case: for each triple of value indices so many voxels.

    Attributes:
        actual: Of the reference.
        before: Of the prediction.
        after: Of the prediction with the other threshold.
        voxels: How many.
    """

    actual: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    voxels: NDArray[np.int64]

    def applied(self, counts: Counts) -> Counts:
        """The counts of the case after the changes."""
        out = counts.copy()
        np.subtract.at(out, (self.actual, self.before), self.voxels)
        np.add.at(out, (self.actual, self.after), self.voxels)
        return out


def reaches(shares: Shares, number: int, threshold: float | None, schema: LabelSchema) -> NDArray[np.bool_]:
    """Where a foreground class or region may be.

    Args:
        shares: Probabilities (K, n).
        number: Of the class, from 0.
        threshold: Its own; None: it has none.
        schema: The labels.
    """
    own: Shares = shares[number if schema.has_regions else number + 1]
    if threshold is not None:
        return own >= np.float32(threshold)
    return own > np.float32(LABELLED) if schema.has_regions else own > shares[0]


def outcomes(shares: Shares, thresholds: Thresholds, schema: LabelSchema) -> NDArray[np.int64]:
    """The winning class of each voxel, 0 for background; of regions one bit each; see `Decoder.values_of`.

    Args:
        shares: Probabilities (K, n).
        thresholds: Of each foreground class.
        schema: The labels.
    """
    allowed = (reaches(shares, number, value, schema) for number, value in enumerate(thresholds))
    if schema.has_regions:
        return bits_of(np.stack(list(allowed)))
    winners = np.zeros(shares.shape[1:], np.int64)
    best = np.zeros(shares.shape[1:], np.float32)
    for number, may_be in enumerate(allowed, start=1):
        wins = may_be & (shares[number] > best)
        winners[wins] = number
        best[wins] = shares[number][wins]
    return winners


def with_thresholds(
    labels: NDArray[np.integer], mixture: Mixture, thresholds: Thresholds, decoder: Decoder
) -> NDArray[np.integer]:
    """A label map that was decided without thresholds, as it is with them.

    Args:
        labels: (I, J, K) label values.
        mixture: What the members say of the case.
        thresholds: Of each foreground class.
        decoder: Of the labels.

    Returns:
        A new map; it differs only where the stored probabilities say something else with thresholds than without.
    """
    out = labels.copy(order="K")
    table, schema = decoder.schema.decode_table(), decoder.schema
    none: Thresholds = (None,) * len(thresholds)
    lowest = min((value for value in thresholds if value is not None), default=LABELLED)
    for rows, chosen, shares in _blocks(mixture, lowest, schema):
        before, after = (outcomes(shares, item, schema) for item in (none, thresholds))
        changed = before != after
        places = tuple(place[changed] for place in np.nonzero(chosen))
        out.T[rows][places] = table[decoder.values_of(after[changed])]
    return out


def likelihoods_of(labels: NDArray[np.integer], mixture: Mixture, decoder: Decoder) -> Likelihoods:
    """How probable what a label map says is, for `apply_rules`.

    Args:
        labels: (I, J, K) label values, as they were decided.
        mixture: What the members say of the case.
        decoder: Of the labels.
    """
    schema = decoder.schema
    num_maps = len(schema.classes) if schema.has_regions else 1
    maps = np.zeros((num_maps, *labels.shape[::-1]), np.uint8)
    for start, stop in ranges(mixture[0][0].stored.shape, MOST_VALUES):
        found = decoder.table.encode(labels.T[start:stop])
        chosen = found > 0
        codes = [part.stored.slices(start, stop) for part, _ in mixture]
        shares = _shares_at(chosen, codes, mixture, schema)
        own = shares if schema.has_regions else np.take_along_axis(shares, found[chosen][None].astype(np.intp), 0)
        maps[:, start:stop][:, chosen] = np.rint(own * np.float32(LEVELS)).clip(0, LEVELS).astype(np.uint8)
    return {name: maps[number if schema.has_regions else 0].T for number, name in enumerate(schema.names)}


def changes_of(
    labels: Indices,
    actual: Indices,
    mixture: Mixture,
    kept: Thresholds,
    tried: Mapping[int, Sequence[float]],
    decoder: Decoder,
) -> dict[tuple[int, float], Changes]:
    """What thresholds would change, each alone on top of those that are kept.

    Args:
        labels: (Z, Y, X) value indices of the label map that was decided without thresholds.
        actual: (Z, Y, X) value indices of the reference, -1 where nobody annotated.
        mixture: What the members say of the case.
        kept: Of each foreground class.
        tried: By the number of a class, from 0.
        decoder: Of the labels.

    Returns:
        By class and threshold.
    """
    schema, num = decoder.schema, decoder.table.num_values
    none: Thresholds = (None,) * len(kept)
    variants = {(number, value): _replaced(kept, number, value) for number, some in tried.items() for value in some}
    found: dict[tuple[int, float], list[NDArray[np.int64]]] = {key: [] for key in variants}
    lowest = min(value for item in variants.values() for value in item if value is not None)
    for rows, chosen, shares in _blocks(mixture, lowest, schema):
        as_it_lies, truth = labels[rows][chosen], actual[rows][chosen]
        plain, present = (outcomes(shares, item, schema) for item in (none, kept))
        now = np.where(present == plain, as_it_lies, decoder.values_of(present))
        for (number, value), thresholds in variants.items():
            differs = reaches(shares, number, value, schema) != reaches(shares, number, kept[number], schema)
            differs &= truth >= 0
            new = outcomes(shares[:, differs], thresholds, schema)
            then = np.where(new == plain[differs], as_it_lies[differs], decoder.values_of(new))
            triples = (truth[differs].astype(np.int64) * num + now[differs]) * num + then
            found[number, value].append(triples[now[differs] != then])
    return {key: _changes(parts, num) for key, parts in found.items()}


def _changes(triples: Sequence[NDArray[np.int64]], num: int) -> Changes:
    values, voxels = np.unique(np.concatenate([np.zeros(0, np.int64), *triples]), return_counts=True)
    return Changes(values // (num * num), values // num % num, values % num, voxels.astype(np.int64))


def _replaced(thresholds: Thresholds, number: int, value: float) -> Thresholds:
    return (*thresholds[:number], value, *thresholds[number + 1 :])


def _blocks(mixture: Mixture, lowest: float, schema: LabelSchema) -> Iterator[tuple[slice, NDArray[np.bool_], Shares]]:
    """Slices along Z, which of their voxels thresholds can change, and the probabilities (K, n) of those.

    Args:
        mixture: What the members say of a case.
        lowest: No threshold is below this.
        schema: The labels.
    """
    first = 0 if schema.has_regions else 1
    # A class that wins without a threshold, and may lose by one, has at least its even share.
    least = min(lowest, LABELLED if schema.has_regions else 1 / schema.num_outputs)
    codes_from = [_first_code(part.temperature, least, schema) for part, _ in mixture]
    for start, stop in ranges(mixture[0][0].stored.shape, MOST_VALUES):
        codes = [part.stored.slices(start, stop) for part, _ in mixture]
        chosen = np.zeros(codes[0].shape[1:], np.bool_)
        for item, code in zip(codes, codes_from, strict=True):
            chosen |= item[first:].max(axis=0) >= code
        yield slice(start, stop), chosen, _shares_at(chosen, codes, mixture, schema)


def _shares_at(chosen: NDArray[np.bool_], codes: Sequence[Codes], mixture: Mixture, schema: LabelSchema) -> Shares:
    """Mean probabilities (K, n) of some voxels."""
    shares = np.zeros((codes[0].shape[0], int(np.count_nonzero(chosen))), np.float32)
    for item, (part, weight) in zip(codes, mixture, strict=True):
        shares += np.float32(weight) * shares_of(item[:, chosen], part.temperature, is_regions=schema.has_regions)
    return shares


def _first_code(temperature: Temperature, least: float, schema: LabelSchema) -> int:
    """A stored probability below this code is below `least` with any of the temperatures.

    A temperature T above 1 makes p at most q / (q + r), q = p^(1/T) and r = (1 - p)^(1/T), as of two classes: of more,
    the others together are at least r. One below 1 multiplies p by less than the number of classes.
    """
    of_each = temperature if isinstance(temperature, tuple) else (temperature,)
    warmest = max(1.0, *of_each)
    bound = least**warmest / (least**warmest + (1 - least) ** warmest)
    if min(of_each) < 1 and not schema.has_regions:
        bound = min(bound, least / schema.num_outputs)
    # One less, for rounding.
    return max(1, int(np.searchsorted(VALUE_OF_CODE, bound)) - 1)
