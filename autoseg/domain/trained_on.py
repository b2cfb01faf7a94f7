"""What the images were like that a model has learned from: a summary that travels with the weights.

It holds ranges, no case: how long voxels are, how large the images, how intensities are distributed after the plan's
scaling, where axes point.

Source: docs/decisions/0038.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.fingerprint import CaseStats, ChannelLook, Fingerprint
from autoseg.domain.preprocess_plan import ChannelNormalization
from autoseg.domain.values import Value

DEVIATIONS_OF_MAD = 1.4826
"""Standard deviations of a normal distribution in a median absolute deviation, inverted."""

_DIGITS = 6
"""Kept of each number of the summary."""

_LEAST_STD = 1e-8
_RGB_MAXIMUM = 255.0


class Bounds(NamedTuple):
    """The least and the largest spread that a measurement is taken to have."""

    least: float
    most: float


SPACING_SPREAD = Bounds(log(1.1), log(1.25))
"""Of the logarithm of a voxel's length. Source: docs/decisions/0038, as the next ones."""

SIZE_SPREAD = Bounds(log(1.15), log(1.3))
"""Of the logarithm of a field of view."""

INTENSITY_SPREAD = Bounds(0.1, 0.5)
"""Of a quantile in standard deviations."""

FRACTION_SPREAD = Bounds(0.03, 0.15)
"""Of a quantile of values that are scaled to 0 ... 1."""


class Usual(Value):
    """Where a measurement of the training images lies.

    Attributes:
        low: The smallest.
        high: The largest.
        spread: A robust standard deviation, within bounds; of lengths that of their logarithm.
    """

    low: float
    high: float
    spread: float


class TrainedOn(Value):
    """The images that a model has learned from. Axes are Z, Y, X of canonical axes.

    Attributes:
        num_cases: How many.
        is_2d: Whether they are pictures: then there are no spacings, and extents are in pixels, (Y, X).
        spacing_mm: Length of a voxel.
        extent_mm: Length of the box around non-zero voxels.
        orientations: Where the axes of the files point, such as "RAS"; sorted.
        oblique_degrees: The largest angle between an axis and the world's.
        intensities: For each channel the quantiles at `LOOK_LEVELS` after the plan's scaling; () where no case tells.
        units: For each channel what its quantiles were divided by, where the plan scales nothing; else 1.
    """

    num_cases: int
    is_2d: bool
    spacing_mm: tuple[Usual, ...]
    extent_mm: tuple[Usual, ...]
    orientations: tuple[str, ...]
    oblique_degrees: float
    intensities: tuple[tuple[Usual, ...], ...]
    units: tuple[float, ...]


def extent_of(case: CaseStats) -> tuple[float, ...]:
    """Millimetres along Z, Y, X; of a picture pixels along Y, X."""
    if case.is_2d:
        return tuple(float(size) for size in case.shape[1:])
    return tuple(size * length for size, length in zip(case.shape, case.spacing_mm, strict=True))


def scaled_quantiles(look: ChannelLook, rule: ChannelNormalization, unit: float = 1.0) -> tuple[float, ...]:
    """Quantiles of a channel as the network sees them.

    Args:
        look: Of the channel.
        rule: How the plan scales it.
        unit: Divides them where the plan scales nothing.
    """
    values = np.asarray(look.quantiles)
    if rule.scheme == "ct":
        assert rule.lower is not None
        assert rule.upper is not None
        assert rule.mean is not None
        assert rule.std is not None
        values = (np.clip(values, rule.lower, rule.upper) - rule.mean) / max(rule.std, _LEAST_STD)
    elif rule.scheme == "zscore":
        values = (values - look.mean) / max(look.std, _LEAST_STD)
    elif rule.scheme == "rescale":
        values = (values - look.minimum) / max(look.maximum - look.minimum, _LEAST_STD)
    else:
        values = values / (_RGB_MAXIMUM if rule.scheme == "rgb" else unit)
    return tuple(float(value) for value in values)


def summarise(fingerprint: Fingerprint, rules: Sequence[ChannelNormalization]) -> TrainedOn | None:
    """What prediction needs of a fingerprint to tell images that are unlike; None where it holds no cases.

    Args:
        fingerprint: Of the data set.
        rules: How the plan scales each channel.
    """
    cases = fingerprint.cases
    if not cases:
        return None
    is_2d = all(case.is_2d for case in cases)
    placed = [case for case in cases if case.is_2d == is_2d]
    looks = [case.look for case in cases if case.look is not None]
    units, intensities = [], []
    for number, rule in enumerate(rules):
        of_channel = [look for item in looks if (look := item.channels[number]) is not None]
        unit = float(np.median([look.std for look in of_channel])) if of_channel and rule.scheme == "none" else 1.0
        units.append(_short(max(unit, _LEAST_STD)))
        rows = np.asarray([scaled_quantiles(look, rule, units[-1]) for look in of_channel])
        bounds = FRACTION_SPREAD if rule.scheme in ("rescale", "rgb") else INTENSITY_SPREAD
        intensities.append(tuple(_usual(column, bounds) for column in rows.T))
    return TrainedOn(
        num_cases=len(cases),
        is_2d=is_2d,
        spacing_mm=() if is_2d else _lengths([case.spacing_mm for case in placed], SPACING_SPREAD),
        extent_mm=_lengths([extent_of(case) for case in placed], SIZE_SPREAD),
        orientations=tuple(sorted({look.orientation for look in looks})),
        oblique_degrees=max((look.oblique_degrees for look in looks), default=0.0),
        intensities=tuple(intensities),
        units=tuple(units),
    )


def _lengths(rows: Sequence[Sequence[float]], bounds: Bounds) -> tuple[Usual, ...]:
    return tuple(_usual(column, bounds, is_length=True) for column in np.asarray(rows).T)


def _usual(values: NDArray[np.float64], bounds: Bounds, *, is_length: bool = False) -> Usual:
    measured = np.log(values) if is_length else values
    spread = DEVIATIONS_OF_MAD * float(np.median(np.abs(measured - np.median(measured))))
    return Usual(
        low=_short(float(values.min())),
        high=_short(float(values.max())),
        spread=_short(min(max(spread, bounds.least), bounds.most)),
    )


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
