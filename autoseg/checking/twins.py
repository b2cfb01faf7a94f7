"""Images that occur twice: copies, near copies, one file under two channels, one label map for several images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from autoseg.checking.facts import HIGH, LOW, CaseFacts, ChannelFacts
from autoseg.checking.outliers import DEVIATIONS_OF_MAD
from autoseg.checking.prints import correlations
from autoseg.checking.wording import listed, num
from autoseg.domain.dataset import Channel, Splits
from autoseg.domain.findings import Findings

NEAR_CORRELATION = 0.92
"""Prints that agree so far are of one image.

Source: different cases of eight real sets agree to at most 0.84, copies with 10 % noise, another gamma or smoothed to
0.93 and more (docs/reference/findings.md).
"""

CONTRAST_CORRELATION, CONTRAST_DEVIATIONS = 0.7, 8.0
"""Prints that agree less are of one image too where that is far from what pairs of the set do, in robust deviations.

Source: copies resampled by 1.25 or 0.8 agree to 0.71 to 0.88 in `sarcoma` and `hippocampus`, whose images have few
voxels along an axis and whose pairs agree to at most 0.12 and 0.36.
"""

MIN_PAIRS = 28
"""Pairs from which the usual agreement is told: those of 8 cases."""

NEAR_PROFILE = 0.25
"""Near copies also have like histograms: their quantiles, on a scale of each image's own, differ by at most this."""

_BINS = 400
"""Of the histogram of all pairs' agreement."""

_ROWS = 256
"""Prints compared at a time: 14 MB as floats."""


def find_twins(facts: Sequence[CaseFacts], channels: Sequence[Channel], splits: Splits | None, found: Findings) -> None:
    """Add everything that is there twice.

    Args:
        facts: Of all cases, test cases included.
        channels: Of the data set.
        splits: The folds, for what copies cost; None where there are none.
        found: Takes the findings.
    """
    patients = _Shared(splits)
    copies = _copies(facts)
    for cases, numbers in copies.items():
        _add_copies(cases, numbers, facts, channels, patients, found)
    exact = {pair for cases in copies for pair in combinations(cases, 2)}
    for cases, agreement in _near_copies(facts, exact):
        found.add(
            "near-duplicates",
            f"the images of {listed(cases)} show the same: their fine patterns agree to {agreement:.2f} (1 is a copy)",
            cases=cases,
            severity="warning",
            hint="Keep one of them, or give them one patient in a manifest: then folds keep them together.",
            cost=patients.cost(cases, facts),
        )
    _add_equal_channels(facts, channels, found)
    _add_equal_labels(facts, copies, found)


class _Shared:
    """Says on which sides of the folds cases lie."""

    def __init__(self, splits: Splits | None) -> None:
        self._folds = [] if splits is None else [(set(fold.train), set(fold.validation)) for fold in splits.folds]

    def cost(self, cases: Sequence[str], facts: Sequence[CaseFacts]) -> str:
        tests = {item.case for item in facts if item.is_test} & set(cases)
        if tests:
            return f"scores on test cases ({listed(sorted(tests))}) are too good"
        split = sum(1 for train, held in self._folds if train & set(cases) and held & set(cases))
        if not split:
            return f"nothing new to learn from {num(len(cases) - 1, 'case')}"
        return (
            f"scores of {split} of {len(self._folds)} folds are too good: copies are learnt from and held out at once"
        )


def _copies(facts: Sequence[CaseFacts]) -> dict[tuple[str, ...], set[int]]:
    """Groups of cases with an equal image, and in which channels."""
    by_digest: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for item in facts:
        for channel in item.channels:
            if channel.quantiles[0] < channel.quantiles[-1]:  # images of one value are told as such
                by_digest[channel.number, channel.digest].append(item.case)
    groups: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for (number, _), cases in by_digest.items():
        if len(cases) > 1:
            groups[tuple(cases)].add(number)
    return groups


def _add_copies(
    cases: tuple[str, ...],
    numbers: set[int],
    facts: Sequence[CaseFacts],
    channels: Sequence[Channel],
    shared: _Shared,
    found: Findings,
) -> None:
    labels = [item.labels.digest for item in facts if item.case in cases and item.labels is not None]
    maps = "their label maps are equal too" if len(set(labels)) == 1 else "their label maps differ"
    which = (
        "" if len(numbers) == len(channels) else " in " + listed([channels[number].name for number in sorted(numbers)])
    )
    found.add(
        "duplicates",
        f"{listed(cases)} have the same image{which}, voxel by voxel" + (f"; {maps}" if len(labels) > 1 else ""),
        cases=cases,
        severity="warning",
        hint="Keep one of them; if the image is right twice, give the cases one patient in a manifest.",
        cost=shared.cost(cases, facts),
    )


def _near_copies(facts: Sequence[CaseFacts], exact: set[tuple[str, str]]) -> Iterator[tuple[tuple[str, ...], float]]:
    """Groups of cases of which each is a near copy of another one of the group, and the least agreement found."""
    links: dict[tuple[str, str], float] = {}
    for number in sorted({channel.number for item in facts for channel in item.channels}):
        both = [(item.case, channel) for item in facts if (channel := item.channel(number)) is not None]
        for kind in (True, False):  # pictures have prints of another length than volumes
            flat = {item.case for item in facts if item.geometry is not None and item.geometry.is_2d}
            for pair, agreement in _close_pairs([one for one in both if (one[0] in flat) == kind]):
                if pair not in exact:
                    links[pair] = max(agreement, links.get(pair, 0.0))
    groups: list[set[str]] = []
    for first, second in links:
        joined = [group for group in groups if first in group or second in group]
        groups = [group for group in groups if group not in joined] + [set().union(*joined, {first, second})]
    for group in groups:
        agreement = min(value for pair, value in links.items() if set(pair) <= group)
        yield tuple(sorted(group)), agreement


def _close_pairs(channels: Sequence[tuple[str, ChannelFacts]]) -> Iterator[tuple[tuple[str, str], float]]:
    if len(channels) < 2:
        return
    prints = np.stack([channel.detail for _, channel in channels])
    usual = np.zeros(_BINS, np.int64)
    close: list[tuple[int, int, float]] = []
    for start in range(0, len(prints), _ROWS):
        for other in range(start, len(prints), _ROWS):
            agreement = correlations(prints[start : start + _ROWS], prints[other : other + _ROWS])
            rows, columns = np.divmod(np.arange(agreement.size), agreement.shape[1])
            once = start + rows < other + columns  # of two cases of one block only one order counts
            rows, columns, found = rows[once], columns[once], agreement.ravel()[once]
            usual += np.histogram(found, _BINS, (-1, 1))[0]
            for place in np.flatnonzero(found >= CONTRAST_CORRELATION).tolist():
                close.append((start + int(rows[place]), other + int(columns[place]), float(found[place])))
    least = _least_agreement(usual)
    for row, column, value in close:
        first, second = channels[row], channels[column]
        if value >= least and _profiles_apart(first[1], second[1]) <= NEAR_PROFILE:
            yield (first[0], second[0]), value


def _least_agreement(usual: NDArray[np.int64]) -> float:
    """From where on prints are of one image, by a histogram (-1 to 1) of all pairs."""
    if usual.sum() < MIN_PAIRS:
        return NEAR_CORRELATION
    levels = (np.arange(_BINS) + 0.5) * 2 / _BINS - 1
    middle = _median(levels, usual)
    deviation = max(DEVIATIONS_OF_MAD * _median(np.abs(levels - middle), usual), 2 / _BINS)
    return min(NEAR_CORRELATION, max(CONTRAST_CORRELATION, middle + CONTRAST_DEVIATIONS * deviation))


def _median(values: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """The median of values that occur so many times."""
    order = np.argsort(values)
    below = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(below, below[-1] / 2)])


def _profiles_apart(first: ChannelFacts, second: ChannelFacts) -> float:
    """The largest difference between the quantiles of two images, each on its own scale from 0 to 1."""
    profiles = []
    for item in (first, second):
        inner = item.quantiles[LOW : HIGH + 1]
        profiles.append((inner - inner[0]) / max(item.spread, np.finfo(np.float64).tiny))
    return float(np.abs(profiles[0] - profiles[1]).max())


def _add_equal_channels(facts: Sequence[CaseFacts], channels: Sequence[Channel], found: Findings) -> None:
    """Cases in which two channels hold the same image."""
    files: dict[tuple[int, int], list[str]] = defaultdict(list)
    grey = []
    for item in facts:
        pairs = [pair for pair in combinations(item.channels, 2) if pair[0].digest == pair[1].digest]
        if len({channel.file for channel in item.channels}) == 1:
            if len(item.channels) > 1 and len({channel.digest for channel in item.channels}) == 1:
                grey.append(item.case)
            continue
        for first, second in pairs:
            files[first.number, second.number].append(item.case)
    for (one, other), cases in files.items():
        found.add(
            "equal-channels",
            f"{channels[one].name} and {channels[other].name} are the same image in {listed(cases)}",
            cases=cases,
            severity="warning",
            hint="One of the files was put under the wrong channel number.",
            cost=f"one channel taught wrongly in {len(cases)} of {len(facts)} cases",
        )
    if grey:
        found.add(
            "grey-as-colour",
            f"all {len(channels)} channels are equal in {len(grey)} of {len(facts)} cases: grey pictures stored as "
            "colour",
            cases=grey,
            severity="note",
            cost=f"{len(channels)} channels are read where one would do" if len(grey) == len(facts) else "nothing",
        )


def _add_equal_labels(facts: Sequence[CaseFacts], copies: Mapping[tuple[str, ...], set[int]], found: Findings) -> None:
    """Different images with one and the same label map, voxel by voxel."""
    by_digest: dict[bytes, list[str]] = defaultdict(list)
    for item in facts:
        if item.labels is not None and item.labels.foreground_voxels:
            by_digest[item.labels.digest].append(item.case)
    known = [set(cases) for cases in copies]
    total = sum(item.labels is not None for item in facts)
    for cases in by_digest.values():
        if len(cases) < 2 or any(set(cases) <= group for group in known):
            continue
        everywhere = len(cases) == total
        found.add(
            "equal-labels",
            f"{f'all {total} cases' if everywhere else listed(cases)} have the same label map, voxel by voxel, and "
            "different images",
            cases=cases,
            severity="warning",
            hint="A template, or a file saved under several names? Labels that were drawn differ from case to case.",
            cost=f"{len(cases) if everywhere else len(cases) - 1} of {total} cases teach a place and not what is there",
        )
