"""How sure a candidate was of a case, from its out-of-fold probabilities.

Looked at are voxels at which a class is likely or true, see `calibration`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.evaluation.calibration import LIKELY
from autoseg.evaluation.ensemble import MOST_VALUES, Decoder, Indices, Part, Shares, shares_of
from autoseg.evaluation.selection import CaseConfidence
from autoseg.io.probabilities import VALUE_OF_CODE, ranges

SURE = 0.9
"""A predicted class of at least this probability is a sure one."""

_FIRST_LIKELY = int(np.searchsorted(VALUE_OF_CODE, LIKELY))
_TINY = 1e-12


class _Sums:
    """What is added up over a case."""

    def __init__(self, num_classes: int) -> None:
        self.entropy = 0.0
        self.num_predicted = 0
        self.num_foreground = 0
        self.num_sure_errors = 0
        self.expected = np.zeros(num_classes)
        self.predicted = np.zeros(num_classes)
        self.hit = np.zeros(num_classes)


def confidence_of(
    case: str, parts: Sequence[tuple[Part, float]], reference: Indices, decoder: Decoder
) -> CaseConfidence:
    """Look at a case.

    Args:
        case: Its id.
        parts: Of every member, with its weight; weights sum to 1.
        reference: (Z, Y, X) value indices, -1 where nobody annotated.
        decoder: Of the labels.
    """
    schema = decoder.schema
    first = 0 if schema.has_regions else 1
    sums = _Sums(len(schema.classes))
    for start, stop in ranges(parts[0][0].stored.shape, MOST_VALUES):
        codes = [part.stored.slices(start, stop) for part, _ in parts]
        actual = reference[start:stop]
        chosen = actual > 0
        for item in codes:
            chosen |= item[first:].max(axis=0) >= _FIRST_LIKELY
        chosen &= actual >= 0
        shares = np.zeros((codes[0].shape[0], int(np.count_nonzero(chosen))), np.float32)
        for item, (part, weight) in zip(codes, parts, strict=True):
            shares += np.float32(weight) * shares_of(item[:, chosen], part.temperature, is_regions=schema.has_regions)
        _add(sums, shares, actual[chosen], decoder)
    denominators = sums.expected + sums.predicted
    return CaseConfidence(
        case=case,
        mean_entropy=sums.entropy / sums.num_predicted if sums.num_predicted else None,
        expected_dice={
            name: float(2 * sums.hit[index] / denominators[index]) if sums.predicted[index] else None
            for index, name in enumerate(schema.names)
        },
        sure_errors_fraction=sums.num_sure_errors / sums.num_foreground if sums.num_foreground else None,
    )


def _add(sums: _Sums, shares: Shares, actual: Indices, decoder: Decoder) -> None:
    schema = decoder.schema
    found = decoder.of_shares(shares)
    is_predicted = found > 0
    sums.num_predicted += int(np.count_nonzero(is_predicted))
    sums.num_foreground += int(np.count_nonzero(is_predicted | (actual > 0)))
    sums.entropy += float(_entropy(shares[:, is_predicted], is_regions=schema.has_regions).sum())
    sure = np.maximum(shares, 1 - shares).min(axis=0) >= SURE if schema.has_regions else shares.max(axis=0) >= SURE
    sums.num_sure_errors += int(np.count_nonzero(sure & (found != actual)))
    first = 0 if schema.has_regions else 1
    inside = schema.region_table()[:, found]
    sums.expected += shares[first:].sum(axis=1, dtype=np.float64)
    sums.predicted += inside.sum(axis=1)
    sums.hit += (shares[first:] * inside).sum(axis=1, dtype=np.float64)


def _entropy(shares: Shares, *, is_regions: bool) -> NDArray[np.float64]:
    """Of each voxel, in parts of the largest possible one; of regions the mean over them."""
    values = np.clip(shares.astype(np.float64), _TINY, 1.0)
    if is_regions:
        others = np.clip(1 - values, _TINY, 1.0)
        both: NDArray[np.float64] = -(values * np.log2(values) + others * np.log2(others)).mean(axis=0)
        return both
    of_classes: NDArray[np.float64] = -(values * np.log(values)).sum(axis=0) / np.log(max(2, len(values)))
    return of_classes
