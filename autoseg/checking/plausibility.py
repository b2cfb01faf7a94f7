"""Intensities that cannot be what the channel's name says: CT, PET, channels in each other's place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from autoseg.checking.facts import HIGH, LOW, QUANTILES, CaseFacts, ChannelFacts
from autoseg.checking.modalities import is_ct, is_pet
from autoseg.checking.outliers import DEVIATIONS_OF_MAD
from autoseg.domain.dataset import Channel
from autoseg.domain.findings import Findings

CT_MAX_HU = 3071.0
"""The largest value of 12 bits with the usual intercept of -1024. Source: DICOM scanners' storage; metal reaches it."""

CT_MIN_HU = -1100.0
"""Air is -1000 by definition; noise and reconstruction go a little below, padding far below."""

EIGHT_BITS = 255.0
UNSHIFTED_HU = 500.0
"""Of an image without negative values: where 5 % are brighter than this, soft tissue lies near 1,024 instead of 0."""

SMALL_RANGE_HU = 20.0
"""Air and tissue are 1,000 apart, fat and muscle 150; no CT is this flat."""

PET_MAX_SUV = 100.0
"""Uptake in bladder and tumours reaches 20 to 50; activity in Bq/ml is in the thousands."""

MIN_CASES_SWAPPED = 4
SWAPPED_PLACE = 0.5
"""On the line from the usual image of one channel (1) to that of another (-1), both images of a case must lie so far on
the other's side to be told as swapped.

In `sarcoma` (MR, CT, PET) images in their place lie beyond 0.7 on their own side, swapped ones beyond 0.9 on the other.
"""

MIN_CHANNELS_APART = 4.0
"""Robust standard deviations between the usual images of two channels; nearer ones cannot be told apart.

MR and PET in `sarcoma` are 9 apart, the colours in `nuclei` 0.4.
"""

_LEAST_DEVIATION = 0.3
"""Of the entries of a profile: a few even images must not make any other look odd."""

_95 = QUANTILES.index(0.95)


def find_implausible(facts: Sequence[CaseFacts], channels: Sequence[Channel], found: Findings) -> None:
    """Add what is not plausible for the channels' names.

    Args:
        facts: Of the cases that are learnt from.
        channels: Of the data set.
        found: Takes the findings.
    """
    for number, channel in enumerate(channels):
        for item in facts:
            read = item.channel(number)
            if read is None or read.quantiles[0] == read.quantiles[-1]:
                continue
            if is_ct(channel):
                _check_ct(item.case, read, found)
            elif is_pet(channel):
                _check_pet(item.case, read, found)
    if len(channels) > 1:
        _find_swapped(facts, channels, found)


def _check_ct(case: str, item: ChannelFacts, found: Findings) -> None:
    low, high = float(item.quantiles[0]), float(item.quantiles[-1])
    told = f"the values go from {low:g} to {high:g}"
    if item.spread < SMALL_RANGE_HU or (low >= 0 and high <= EIGHT_BITS):
        how = "8-bit grey levels" if item.dtype == "uint8" else "another unit, or normalised"
        found.add(
            "ct-not-hu",
            f"{told}: {how}, not Hounsfield units (air -1000, water 0)",
            case=case,
            file=item.file,
            severity="warning",
            hint="Convert it from the DICOM files again; where all cases are like this, do not name the channel CT.",
        )
    elif low >= 0 and item.quantiles[_95] > UNSHIFTED_HU:
        found.add(
            "ct-no-intercept",
            f"{told}, none is negative: the rescale intercept (-1024 or -1000) seems to be missing",
            case=case,
            file=item.file,
            severity="warning",
            hint="Convert it from the DICOM files with the rescale applied.",
        )
    elif low >= 0:
        found.add(
            "ct-cut-off",
            f"{told}, none is negative: air, lung and fat seem to be cut off",
            case=case,
            file=item.file,
            severity="note",
        )
    elif low < CT_MIN_HU:
        found.add(
            "ct-padding",
            f"the lowest value is {low:g}, below air (-1000): padding around the scan, or a wrong intercept",
            case=case,
            file=item.file,
            severity="note",
        )
    if high > CT_MAX_HU and item.spread >= SMALL_RANGE_HU:
        found.add(
            "ct-very-bright",
            f"the highest value is {high:g}, beyond the {CT_MAX_HU:g} of 12 bits: metal on an extended scale, or a "
            "wrong slope",
            case=case,
            file=item.file,
            severity="note",
            hint="Intensities are clipped to the foreground's 0.5 and 99.5 %, so a few such voxels do no harm.",
        )


def _check_pet(case: str, item: ChannelFacts, found: Findings) -> None:
    if item.quantiles[HIGH] > PET_MAX_SUV:
        found.add(
            "pet-scale",
            f"0.5 % of the voxels are above {item.quantiles[HIGH]:,.4g}: uptake values (SUV) hardly exceed 50, so this "
            "is activity (Bq/ml), or a scale factor (scl_slope) was left out",
            case=case,
            file=item.file,
            severity="warning",
            hint="Convert to SUV, for every case alike.",
        )


def _profile(item: ChannelFacts) -> NDArray[np.float64]:
    """An image as a few numbers that tell modalities apart, and depend on scale only by its logarithm."""
    inner = item.quantiles[LOW : HIGH + 1]
    places = (inner[1:-1] - inner[0]) / max(item.spread, np.finfo(np.float64).tiny)
    return np.array([np.arcsinh(inner[0]), np.arcsinh(inner[-1]), *places * 10, item.lowest_fraction * 10])


def _find_swapped(facts: Sequence[CaseFacts], channels: Sequence[Channel], found: Findings) -> None:
    """Cases in which two channels look like each other's in the rest of the set."""
    whole = [item for item in facts if all(item.channel(number) for number in range(len(channels)))]
    if len(whole) < MIN_CASES_SWAPPED:
        return
    profiles = np.array([[_profile(channel) for channel in _in_order(item)] for item in whole])
    usual = np.median(profiles, axis=0)
    spread = DEVIATIONS_OF_MAD * np.median(np.abs(profiles - usual), axis=0)
    for one, other in combinations(range(len(channels)), 2):
        scale = np.maximum(np.maximum(spread[one], spread[other]), _LEAST_DEVIATION)
        line = (usual[one] - usual[other]) / scale
        apart = float(np.linalg.norm(line))
        if apart < MIN_CHANNELS_APART:
            continue
        middle = (usual[one] + usual[other]) / 2
        places = ((profiles[:, [one, other]] - middle) / scale) @ line / (apart**2 / 2)
        for item, (first, second) in zip(whole, places.tolist(), strict=True):
            if first < -SWAPPED_PLACE and second > SWAPPED_PLACE:
                found.add(
                    "channels-swapped",
                    f"{channels[one].name} looks like {channels[other].name} of the other cases, and the other "
                    "way round",
                    case=item.case,
                    file=_in_order(item)[one].file,
                    severity="warning",
                    hint="Look at both files; swap their channel numbers if they are in each other's place.",
                )


def _in_order(item: CaseFacts) -> list[ChannelFacts]:
    return sorted(item.channels, key=lambda channel: channel.number)
