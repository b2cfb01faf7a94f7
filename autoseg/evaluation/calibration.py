"""Temperatures: by how much a network is too sure of each class, fitted on cases that it had not seen.

Looked at are voxels at which a class is likely or true: any class or region has a probability of at least
`LIKELY`, or the reference has one. All others are background beyond doubt, and would drown what matters. Of each case
so many are drawn, evenly, that all cases together are at most `MOST_VOXELS`.

A temperature minimises the negative log-likelihood (of regions, the mean binary one). A region's is fitted on its own
probabilities; that of a class among others which exclude each other on the voxels where it is the most probable, whose
logits it divides (see `domain.inference.Temperature`). So each is found alone, and together they minimise the
likelihood of all. The expected calibration error of a class is the mean, over those voxels, of the difference between
its probability and its frequency in bins of equal width.

Source: Guo et al. 2017, ICML, sections 2 and 4.2 (temperature scaling, expected calibration error, 15 bins); Kull et
al. 2019, NeurIPS (errors by class); Frenkel and Goldberger 2021, EUSIPCO (a temperature for each class);
docs/decisions/0043.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from autoseg.domain.dataset import LabelSchema
from autoseg.evaluation.ensemble import MOST_VALUES
from autoseg.evaluation.selection import Calibration, ClassCalibration, ReliabilityBin
from autoseg.io.probabilities import VALUE_OF_CODE, Codes, StoredProbabilities, ranges
from autoseg.runtime import STAGE_CALIBRATION, rng

LIKELY = 0.01
"""A class of at least this probability makes a voxel worth looking at."""

MOST_VOXELS = 2_000_000
"""Of all cases together."""

MOST_VOXELS_PER_CASE = 20_000
"""So that large images do not outvote small ones."""

NUM_BINS = 15
"""Source: Guo et al. 2017, section 5."""

LOWEST, HIGHEST = 0.2, 5.0
"""Bounds of a temperature."""

LEAST_VOXELS = 1000
"""A class that is the most probable, or a region that is likely or true, at fewer voxels has the temperature of all
together: of a few voxels, and so of one or two objects, its own would say little. Source: docs/decisions/0043."""

SEED = 0

# Stands for a stored probability of 0 where a logarithm is taken: below the first level above 0, which is 4e-5.
_FLOOR = 1e-5

_FIRST_LIKELY = int(np.searchsorted(VALUE_OF_CODE, LIKELY))

_Divisor = float | NDArray[np.float64]
"""One temperature, or temperatures in a shape that fits (K, n) logits."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Voxels of one or several cases.

    Attributes:
        codes: (K, n) of every output.
        truth: bool (K, n): whether the reference is of that class or region.
    """

    codes: Codes
    truth: NDArray[np.bool_]


def num_voxels_per_case(num_cases: int) -> int:
    """How many are drawn of each case, at most."""
    return max(1, min(MOST_VOXELS_PER_CASE, MOST_VOXELS // max(1, num_cases)))


def draw(
    stored: StoredProbabilities,
    reference: NDArray[np.int16],
    schema: LabelSchema,
    case_number: int,
    most: int,
) -> Sample:
    """Draw voxels of a case.

    Args:
        stored: Its probabilities.
        reference: (Z, Y, X) value indices, -1 where nobody annotated.
        schema: The labels.
        case_number: Of the case: other cases get other draws.
        most: How many.
    """
    random = rng(SEED, STAGE_CALIBRATION, case_number)
    keys = np.zeros(0)
    codes = np.zeros((stored.shape[0], 0), np.uint8)
    values = np.zeros(0, np.int16)
    first = 0 if schema.has_regions else 1
    for start, stop in ranges(stored.shape, MOST_VALUES):
        part, actual = stored.slices(start, stop), reference[start:stop]
        chosen = (part[first:].max(axis=0) >= _FIRST_LIKELY) | (actual > 0)
        chosen &= actual >= 0
        # Those with the smallest of random keys are a fair draw, however the image is cut.
        keys = np.concatenate([keys, random.random(int(np.count_nonzero(chosen)))])
        codes = np.concatenate([codes, part[:, chosen]], axis=1)
        values = np.concatenate([values, actual[chosen]])
        if len(keys) > most:
            kept = np.sort(np.argpartition(keys, most)[:most])
            keys, codes, values = keys[kept], codes[:, kept], values[kept]
    return Sample(codes, _truth(values, schema))


def _truth(values: NDArray[np.int16], schema: LabelSchema) -> NDArray[np.bool_]:
    if schema.has_regions:
        inside: NDArray[np.bool_] = schema.region_table()[:, values]
        return inside
    is_class: NDArray[np.bool_] = np.arange(schema.num_outputs)[:, None] == values
    return is_class


def join(samples: Sequence[Sample]) -> Sample:
    """Those of several cases together; at least one."""
    return Sample(
        np.concatenate([item.codes for item in samples], axis=1),
        np.concatenate([item.truth for item in samples], axis=1),
    )


def calibrate(sample: Sample, schema: LabelSchema, configuration: str) -> Calibration:
    """Fit temperatures; 1 where there is nothing to fit them on.

    Args:
        sample: Voxels of all cases.
        schema: The labels.
        configuration: Its name.
    """
    is_regions, num = schema.has_regions, sample.codes.shape[1]
    values = np.clip(VALUE_OF_CODE[sample.codes].astype(np.float64), _FLOOR, 1 - _FLOOR)
    logits = np.log(values) - (np.log1p(-values) if is_regions else 0.0)
    common = _best_temperature(logits, sample.truth, is_regions=is_regions) if num else 1.0
    of_each = _temperatures(logits, sample, common, is_regions=is_regions)
    divisors: tuple[_Divisor, ...] = (1.0, common, of_each[:, None] if is_regions else of_each[sample.codes.argmax(0)])
    before, with_common, with_each = (_shares(logits, one, is_regions=is_regions) for one in divisors)
    losses = [_loss(logits, sample.truth, one, is_regions=is_regions) if num else 0.0 for one in divisors]
    first = 0 if is_regions else 1
    error_common, error_each = (
        float(
            np.mean([calibration_error(reliability(*pair)) for pair in zip(shares, sample.truth[first:], strict=True)])
        )
        for shares in (with_common[first:], with_each[first:])
    )
    # The likelihood alone would always take the temperature of each class: it has more to fit with.
    takes_each = error_each < error_common
    if not takes_each:
        of_each[:] = common
    after, loss_after = (with_each, losses[2]) if takes_each else (with_common, losses[1])
    classes = tuple(
        _class(name, before[index], after[index], sample.truth[index], float(of_each[index]))
        for index, name in enumerate(schema.names, start=first)
    )
    return Calibration(
        configuration=configuration,
        temperature=common,
        num_voxels=num,
        loss_before=losses[0],
        loss_after=loss_after,
        error_before=float(np.mean([item.error_before for item in classes])),
        error_after=float(np.mean([item.error_after for item in classes])),
        classes=classes,
        background_temperature=None if is_regions else float(of_each[0]),
        loss_common=losses[1],
        error_common=error_common,
        error_each=error_each,
    )


def _temperatures(
    logits: NDArray[np.float64], sample: Sample, common: float, *, is_regions: bool
) -> NDArray[np.float64]:
    """One for each output; `common` where there is little to fit it on."""
    found = np.full(len(logits), common)
    winners = sample.codes.argmax(axis=0)
    for index in range(len(found)):
        outputs = slice(index, index + 1) if is_regions else slice(None)
        concerned = (sample.codes[index] >= _FIRST_LIKELY) | sample.truth[index] if is_regions else winners == index
        if np.count_nonzero(concerned) < LEAST_VOXELS:
            continue
        # A region's errors are looked at wherever those of any are; another class has a temperature of its own.
        voxels = slice(None) if is_regions else concerned
        found[index] = _best_temperature(logits[outputs, voxels], sample.truth[outputs, voxels], is_regions=is_regions)
    return found


def _best_temperature(logits: NDArray[np.float64], truth: NDArray[np.bool_], *, is_regions: bool) -> float:
    found = minimize_scalar(
        lambda log_t: _loss(logits, truth, float(np.exp(log_t)), is_regions=is_regions),
        bounds=(np.log(LOWEST), np.log(HIGHEST)),
        method="bounded",
    )
    # Three digits: more would be noise, and people read it.
    return round(float(np.exp(found.x)), 3)


def _shares(logits: NDArray[np.float64], divisor: _Divisor, *, is_regions: bool) -> NDArray[np.float64]:
    scaled = logits / divisor
    powers = np.exp(-scaled) if is_regions else np.exp(scaled - scaled.max(axis=0, initial=-np.inf))
    shares: NDArray[np.float64] = 1 / (1 + powers) if is_regions else powers / powers.sum(axis=0)
    return shares


def _loss(logits: NDArray[np.float64], truth: NDArray[np.bool_], divisor: _Divisor, *, is_regions: bool) -> float:
    """Mean negative log-likelihood."""
    shares = _shares(logits, divisor, is_regions=is_regions)
    likelihood = np.where(truth, shares, 1 - shares) if is_regions else shares[truth]
    return float(-np.log(np.maximum(likelihood, np.finfo(np.float64).tiny)).mean())


def _class(
    name: str,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    truth: NDArray[np.bool_],
    temperature: float,
) -> ClassCalibration:
    bins_before, bins_after = reliability(before, truth), reliability(after, truth)
    return ClassCalibration(
        name=name,
        error_before=calibration_error(bins_before),
        error_after=calibration_error(bins_after),
        bins_before=bins_before,
        bins_after=bins_after,
        temperature=temperature,
    )


def reliability(shares: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[ReliabilityBin, ...]:
    """Voxels in bins of equal width by the probability of a class; empty bins are left out.

    Args:
        shares: (n,) probabilities.
        truth: (n,) whether the class is there.
    """
    places = np.minimum((shares * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    counts = np.bincount(places, minlength=NUM_BINS)
    sums, hits = (np.bincount(places, weights, minlength=NUM_BINS) for weights in (shares, truth.astype(np.float64)))
    return tuple(
        ReliabilityBin(
            confidence=float(sums[place] / counts[place]),
            frequency=float(hits[place] / counts[place]),
            voxels=int(counts[place]),
        )
        for place in np.flatnonzero(counts)
    )


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """The expected calibration error, 0 ... 1; 0 without voxels."""
    total = sum(item.voxels for item in bins)
    return sum(item.voxels * abs(item.confidence - item.frequency) for item in bins) / total if total else 0.0
