"""Cases whose size, voxel size or intensities lie far from the rest; where many do, that is told of the set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import log, log10

import numpy as np
from numpy.typing import NDArray

from autoseg.checking.facts import HIGH, LOW, MEDIAN, CaseFacts, ChannelFacts
from autoseg.checking.modalities import is_fixed_scale
from autoseg.checking.wording import by, num
from autoseg.domain.dataset import Channel
from autoseg.domain.findings import Findings, Severity

MIN_CASES = 8
"""Of fewer, nobody can tell the usual from the odd."""

Z_LIMIT = 6.0
"""Robust standard deviations from the median; of normally distributed values 2 in a billion lie further off."""

POPULATION_FRACTION = 0.1
"""Where more cases than this lie off, they are not odd but a second kind of case, and are told together."""

SPACING_FLOOR, SIZE_FLOOR = log(1.1), log(1.15)
"""Least standard deviation of log spacing and log size: factors below 1.8 and 2.3 are never told."""

SCALE_FLOOR, POSITION_FLOOR = 0.1, 0.06
"""The same of the logarithm (base 10) of an image's spread, and of where its median lies between dark (0) and bright
(1): factors below 4 and differences below 0.36 are never told."""

FORGOTTEN_FACTOR = 30.0
"""From such a factor on, an image is on another scale than the others, and not only brighter."""

TIGHT_DECADES = 0.3
"""Images whose spread varies by no more than this (a factor of 2) are on one scale."""

WIDE_FACTOR = 100.0
"""Images whose spreads differ by more were scaled by different programs or scanners."""

DEVIATIONS_OF_MAD = 1.4826
"""Standard deviations of a normal distribution in a median absolute deviation, inverted."""


def deviations(values: NDArray[np.float64], floor: float) -> NDArray[np.float64]:
    """How far each value lies from the median, in robust standard deviations.

    Args:
        values: (n,) or (n, features).
        floor: Least standard deviation.
    """
    away = np.abs(values - np.median(values, axis=0))
    return away / np.maximum(DEVIATIONS_OF_MAD * np.median(away, axis=0), floor)


def find_outliers(facts: Sequence[CaseFacts], channels: Sequence[Channel], found: Findings) -> None:
    """Add cases that lie far from the rest, and what divides the set.

    Args:
        facts: Of the cases that are learnt from.
        channels: Of the data set.
        found: Takes the findings.
    """
    placed = [item for item in facts if item.geometry is not None]
    solid = [item for item in placed if item.geometry is not None and not item.geometry.is_2d]
    _find_lengths(solid, "spacing", SPACING_FLOOR, found)
    _find_lengths(placed, "size", SIZE_FLOOR, found)
    odd: dict[str, list[str]] = defaultdict(list)
    for channel, item in enumerate(channels):
        both = [(one.case, read) for one in facts if (read := one.channel(channel)) is not None and read.spread > 0]
        _find_scales(both, item, len(channels), found)
        _find_types(both, item, len(channels), found)
        for case, message in _odd_brightness(both).items():
            odd[case].append(f"{item.name}: {message}" if len(channels) > 1 else message)
    _add_odd_brightness(odd, len(facts), found)


def _find_lengths(facts: Sequence[CaseFacts], what: str, floor: float, found: Findings) -> None:
    if len(facts) < MIN_CASES:
        return
    is_2d = any(item.geometry is not None and item.geometry.is_2d for item in facts)
    unit = "pixels" if is_2d else "mm"
    rows = np.array([item.spacing_mm if what == "spacing" or not is_2d else (1.0, 1.0, 1.0) for item in facts])
    if what == "size":
        rows = rows * np.array([item.shape for item in facts])
    used = rows[:, :2] if is_2d else rows
    off = deviations(np.log(used), floor).max(axis=1) > Z_LIMIT
    names = [item.case for item, is_off in zip(facts, off, strict=True) if is_off]
    usual = by([float(value) for value in np.median(used, axis=0)])
    if len(names) > POPULATION_FRACTION * len(facts):
        low, high = (by([float(value) for value in edge]) for edge in (used.min(axis=0), used.max(axis=0)))
        found.add(
            f"{what}-varies",
            f"the {what} varies from {low} to {high} {unit}; {len(names)} of {len(facts)} cases lie far from the "
            f"median, {usual}",
            severity="note",
            cases=names,
            hint=""
            if what == "size"
            else "All cases are resampled to one spacing; those far from it lose most detail.",
        )
        return
    for item, row, is_off in zip(facts, used, off, strict=True):
        if is_off:
            found.add(
                f"{what}-outlier",
                f"its {what} is {by([float(value) for value in row])} {unit}, in the middle case {usual}",
                case=item.case,
                severity="note",
                hint="Look at it: another protocol, a wrong header, a crop?",
            )


def _find_scales(
    both: Sequence[tuple[str, ChannelFacts]], channel: Channel, num_channels: int, found: Findings
) -> None:
    """Single images on another scale than the rest, or sets without a common one."""
    if len(both) < MIN_CASES:
        return
    decades = np.array([log10(item.spread) for _, item in both])
    off = decades - float(np.median(decades))
    usual = DEVIATIONS_OF_MAD * float(np.median(np.abs(off)))
    far = np.abs(off) >= log10(FORGOTTEN_FACTOR)
    severity: Severity = "warning" if is_fixed_scale(channel) else "note"
    of_channel = f" of {channel.name}" if num_channels > 1 else ""
    if usual > TIGHT_DECADES or far.sum() > POPULATION_FRACTION * len(both):
        _add_no_common_scale(both, off, severity, of_channel, found)
        return
    for place in np.flatnonzero(far).tolist():
        case, item = both[place]
        found.add(
            "other-scale",
            f"the values{of_channel} are about {10 ** abs(off[place]):,.0f} times "
            f"{'larger' if off[place] > 0 else 'smaller'} than in the other cases ({item.quantiles[LOW]:.4g} to "
            f"{item.quantiles[HIGH]:.4g}), as if a scale factor (scl_slope, rescale) was left out or applied twice",
            case=case,
            file=item.file,
            severity=severity,
            hint="Export it again with the same settings as the others.",
        )


def _add_no_common_scale(
    both: Sequence[tuple[str, ChannelFacts]],
    off: NDArray[np.float64],
    severity: Severity,
    of_channel: str,
    found: Findings,
) -> None:
    factor = 10 ** float(off.max() - off.min())
    if factor < WIDE_FACTOR:
        return
    low, high = (both[int(place)] for place in (off.argmin(), off.argmax()))
    is_harmless = severity == "note"
    found.add(
        "no-common-scale",
        f"intensities{of_channel} have no common scale: they spread over {low[1].spread:.4g} in {low[0]} and over "
        f"{high[1].spread:,.4g} in {high[0]}, a factor of {factor:,.0f}",
        severity=severity,
        cases=[both[place][0] for place in np.flatnonzero(np.abs(off) >= log10(FORGOTTEN_FACTOR)).tolist()],
        hint="" if is_harmless else "Export them on one scale, or give the channel a name that is normalised by image.",
        cost="nothing: each image is normalised by its own mean and deviation"
        if is_harmless
        else "images that look too dark or too bright to the network, which are normalised alike",
    )


def _find_types(both: Sequence[tuple[str, ChannelFacts]], channel: Channel, num_channels: int, found: Findings) -> None:
    """Images of 8 bits among others: their finer differences are gone."""
    types = Counter(item.dtype for _, item in both)
    coarse = [(case, item) for case, item in both if item.dtype in ("uint8", "int8")]
    if len(types) < 2 or not coarse or len(coarse) == len(both):
        return
    counted = " and ".join(f"{name} in {num(count, 'case')}" for name, count in types.most_common())
    of_channel = f"{channel.name} is" if num_channels > 1 else "images are"
    brightest = [
        max(item.quantiles[-1] for case, item in group)
        for group in (coarse, [one for one in both if one not in coarse])
    ]
    found.add(
        "mixed-types",
        f"{of_channel} stored as {counted}; those of 8 bits reach {brightest[0]:.4g}, the others {brightest[1]:,.4g}",
        severity="note",
        cases=[case for case, _ in coarse],
        hint="Where the originals are at hand, export all of them in one way.",
        cost=f"{len(coarse)} of {len(both)} cases have 256 grey levels at most",
    )


def _odd_brightness(both: Sequence[tuple[str, ChannelFacts]]) -> Mapping[str, str]:
    """Cases whose median lies elsewhere between dark and bright than in the rest, as after an inversion."""
    if len(both) < MIN_CASES:
        return {}
    places = np.array([(item.quantiles[MEDIAN] - item.quantiles[LOW]) / item.spread for _, item in both])
    usual = float(np.median(places))
    return {
        case: f"half of its voxels are darker than {place:.0%} of its range, in the middle case than {usual:.0%}"
        for (case, _), place, off in zip(both, places, deviations(places, POSITION_FLOOR), strict=True)
        if off > Z_LIMIT
    }


def _add_odd_brightness(odd: Mapping[str, Sequence[str]], num_cases: int, found: Findings) -> None:
    if len(odd) > POPULATION_FRACTION * num_cases:
        found.add(
            "two-kinds-of-images",
            f"{len(odd)} of {num_cases} cases are of another brightness than the rest ({next(iter(odd))}: "
            f"{next(iter(odd.values()))[0]})",
            cases=list(odd),
            severity="note",
            hint="Bright and dark backgrounds, or two protocols? Both should be in every fold.",
        )
        return
    for case, messages in odd.items():
        found.add(
            "brightness-outlier",
            "; ".join(messages),
            case=case,
            severity="note",
            hint="Look at it: inverted, another sequence, or much background?",
        )
