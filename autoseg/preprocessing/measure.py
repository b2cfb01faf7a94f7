"""What the planner needs to know of the images: one small record a case, merged into a fingerprint.

A case is measured exactly and on its own, so cases can be measured in parallel and in any order; nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.fingerprint import (
    LOOK_LEVELS,
    CaseStats,
    ChannelIntensity,
    ChannelLook,
    Fingerprint,
    IntensityStats,
    Look,
    Shape,
    Triple,
)
from autoseg.domain.geometry import Volume, closest_orientation, degrees_off_axis, orientation_code
from autoseg.errors import DatasetError
from autoseg.preprocessing.crop import Box, any_nonzero, nonzero_box

PICTURE_DEPTH_MM = 999.0
"""Spacing of the missing third axis of a picture: large, so that this axis counts as the coarsest. Source: nnU-Net."""

_FAR_TAIL = (0.0, 0.0001, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.0085)
_TAIL = (
    *_FAR_TAIL,
    *(round(0.01 + 0.0025 * step, 4) for step in range(12)),
    *(round(0.04 + 0.005 * step, 3) for step in range(12)),
)
_MIDDLE = tuple(round(0.1 + 0.025 * step, 3) for step in range(33))
QUANTILE_LEVELS: tuple[float, ...] = (*_TAIL, *_MIDDLE, *(round(1.0 - level, 4) for level in reversed(_TAIL)))
"""Levels of the quantile sketch of a case.

Dense around 0.5 % and 99.5 %, which CT images are clipped to, and up to 10 %, because a tail of the whole data set can
be a larger part of a few cases.
"""

_LOW, _MEDIAN, _HIGH = 0.005, 0.5, 0.995
_QUANTILE_DIGITS = 8
"""Digits kept of a quantile; float32 has fewer."""

_LOOK_VOXELS = 48
"""Voxels along each axis from which the look of an image is taken: up to twice as many, a million in all."""

_BISECTIONS = 80
"""Halvings of the range of values in which a pooled quantile is sought: beyond the resolution of float64."""


def _intensity(values: NDArray[np.generic]) -> IntensityStats:
    """Exact moments and the quantile sketch of one channel's labelled voxels (at least one)."""
    exact = values.astype(np.float64)
    quantiles = np.quantile(exact, QUANTILE_LEVELS)
    return IntensityStats(
        count=exact.size,
        mean=float(exact.mean()),
        std=float(exact.std()),
        minimum=float(quantiles[0]),
        maximum=float(quantiles[-1]),
        quantiles=tuple(float(f"{value:.{_QUANTILE_DIGITS}g}") for value in quantiles),
    )


def measure_case(volume: Volume, labels: NDArray[np.integer], case_id: str, num_values: int) -> CaseStats:
    """Measure one case.

    Args:
        volume: (C, I, J, K) as in the file.
        labels: (I, J, K) value indices, as `LabelSchema.encode` gives them; negative where nobody annotated.
        case_id: For the record and for messages.
        num_values: Value indices, background included: of ordinary classes as many as classes.

    Returns:
        Shapes and spacing in the order Z, Y, X of canonical axes, voxels by value index. Intensities are those of
        voxels of any foreground value inside the box around the non-zero voxels; voxels that nobody annotated do not
        count (nnU-Net's do).

    Raises:
        DatasetError: The labels have another shape, or labelled voxels are NaN or infinite.

    Source: nnU-Net (Isensee et al. 2021, supplement 2.1).
    """
    if labels.shape != tuple(volume.geometry.shape):
        raise DatasetError(
            f"case {case_id}: labels have shape {labels.shape}, the image {tuple(volume.geometry.shape)}"
        )
    box = nonzero_box(any_nonzero(volume.array))
    foreground = labels[box] > 0
    measured: dict[int, IntensityStats] = {}
    for channel, array in zip(volume.channels, volume.array, strict=True):
        values = array[box][foreground]
        if not values.size:
            break
        if not np.isfinite(values).all():
            count = int((~np.isfinite(values)).sum())
            raise DatasetError(
                f"case {case_id}: channel {channel} is NaN or infinite in {count} of {values.size} labelled voxels",
                hint="Run `autoseg check` on the data set; it lists every such case.",
            )
        measured[channel] = _intensity(values)
    counts = np.bincount(labels[labels > 0].ravel(), minlength=num_values)[1:num_values]
    return _measure_image(volume, box, case_id).model_copy(
        update={
            "class_voxels": tuple(int(count) for count in counts),
            "intensities": tuple(measured.get(channel) for channel in range(volume.num_channels)) if measured else (),
        }
    )


def measure_image(volume: Volume, case_id: str) -> CaseStats:
    """Measure an image that has no labels: grid and look, no classes and no foreground intensities.

    Args:
        volume: (C, I, J, K) as in the file.
        case_id: For the record.
    """
    return _measure_image(volume, nonzero_box(any_nonzero(volume.array)), case_id)


def _measure_image(volume: Volume, box: Box, case_id: str) -> CaseStats:
    geometry = volume.geometry
    right, anterior, superior = closest_orientation(geometry.affine).axes
    zyx = (superior, anterior, right)
    edges = [part.stop - part.start for part in box]
    spacing = geometry.spacing_mm
    looks = {channel: _look(array[box]) for channel, array in zip(volume.channels, volume.array, strict=True)}
    return CaseStats(
        case=case_id,
        spacing_mm=(PICTURE_DEPTH_MM if geometry.is_2d else spacing[zyx[0]], spacing[zyx[1]], spacing[zyx[2]]),
        shape_original=(geometry.shape[zyx[0]], geometry.shape[zyx[1]], geometry.shape[zyx[2]]),
        shape=(edges[zyx[0]], edges[zyx[1]], edges[zyx[2]]),
        relative_size_fraction=float(np.prod(edges, dtype=np.float64) / np.prod(geometry.shape, dtype=np.float64)),
        class_voxels=(),
        intensities=(),
        is_2d=geometry.is_2d,
        look=Look(
            orientation=orientation_code(geometry.affine),
            oblique_degrees=round(degrees_off_axis(geometry.affine), 2),
            channels=tuple(looks.get(channel) for channel in range(volume.num_channels)),
        ),
    )


def _look(values: NDArray[np.generic]) -> ChannelLook | None:
    """Intensities of a channel, from at most `_LOOK_VOXELS` along each axis; None where they are not finite."""
    steps = tuple(slice(None, None, max(1, size // _LOOK_VOXELS)) for size in values.shape)
    some = values[steps].astype(np.float64)
    if not np.isfinite(some).all():
        return None
    numbers = (some.mean(), some.std(), some.min(), some.max())
    mean, std, low, high = (_rounded(float(value)) for value in numbers)
    quantiles = tuple(_rounded(float(value)) for value in np.quantile(some, LOOK_LEVELS))
    return ChannelLook(mean=mean, std=std, minimum=low, maximum=high, quantiles=quantiles)


def _rounded(value: float) -> float:
    return float(f"{value:.{_QUANTILE_DIGITS}g}")


def _share_below(sketches: NDArray[np.float64], levels: NDArray[np.float64], value: float) -> float:
    """The share of the pooled voxels that are at most `value`, every case counting the same.

    Args:
        sketches: (cases, levels) ascending along the second axis.
        levels: (levels,).
        value: Intensity.
    """
    last = levels.size - 1
    below = (sketches <= value).sum(axis=1) - 1  # the last level at or below the value; -1 where there is none
    left = np.clip(below, 0, last - 1)
    rows = np.arange(len(sketches))
    low, high = sketches[rows, left], sketches[rows, left + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(high > low, (value - low) / (high - low), 0.0)
    share = levels[left] + np.clip(part, 0.0, 1.0) * (levels[left + 1] - levels[left])
    return float(np.where(below < 0, 0.0, np.where(below >= last, 1.0, share)).mean())


def _pooled_quantile(sketches: NDArray[np.float64], level: float) -> float:
    """The smallest value that at least `level` of the pooled voxels do not exceed."""
    levels = np.asarray(QUANTILE_LEVELS)
    low, high = float(sketches.min()), float(sketches.max())
    if _share_below(sketches, levels, low) >= level:
        return low
    for _ in range(_BISECTIONS):
        middle = low + (high - low) / 2
        if _share_below(sketches, levels, middle) >= level:
            high = middle
        else:
            low = middle
    return float(f"{high:.{_QUANTILE_DIGITS}g}")


def _pool(entries: Sequence[IntensityStats]) -> ChannelIntensity:
    """One channel over the cases that have foreground; each case counts the same, whatever its size."""
    means = np.asarray([entry.mean for entry in entries])
    squares = np.asarray([entry.std for entry in entries]) ** 2
    mean = float(means.mean())
    sketches = np.asarray([entry.quantiles for entry in entries], np.float64)
    return ChannelIntensity(
        mean=mean,
        median=_pooled_quantile(sketches, _MEDIAN),
        std=float(np.sqrt((squares + (means - mean) ** 2).mean())),
        minimum=min(entry.minimum for entry in entries),
        maximum=max(entry.maximum for entry in entries),
        percentile_00_5=_pooled_quantile(sketches, _LOW),
        percentile_99_5=_pooled_quantile(sketches, _HIGH),
    )


def _pool_present(cases: Sequence[CaseStats], number: int, name: str) -> ChannelIntensity:
    """One channel over the cases that have it."""
    entries = [entry for case in cases if (entry := case.intensities[number]) is not None]
    if not entries:
        raise DatasetError(
            f"no case with labelled voxels has the channel {number} ({name})",
            hint="Take the channel out of the description of the data set, or give it to some of the cases.",
        )
    return _pool(entries)


def merge(stats: Sequence[CaseStats], channels: Sequence[str], num_classes: int) -> Fingerprint:
    """The fingerprint of a data set from the measurements of its cases.

    Args:
        stats: In any order; the fingerprint has them sorted by case, so it does not depend on who was measured first.
        channels: Names, in order.
        num_classes: Background and foreground classes.

    Raises:
        DatasetError: No case, a case with another number of channels, or no labelled voxel anywhere.

    Source: nnU-Net draws the same number of foreground voxels from every case; this is its limit for many draws.
    """
    cases = sorted(stats, key=lambda item: item.case)
    if not cases:
        raise DatasetError("there is no case to plan from")
    labelled = [case for case in cases if case.intensities]
    if not labelled:
        raise DatasetError(
            f"none of the {len(cases)} cases has a labelled voxel inside its image",
            hint="Check that the label files hold the values that the data set declares.",
        )
    odd = [f"{case.case}: {len(case.intensities)}" for case in labelled if len(case.intensities) != len(channels)]
    if odd:
        raise DatasetError(f"cases do not have {len(channels)} channels ({', '.join(channels)})", problems=odd)
    spacings: tuple[Triple, ...] = tuple(case.spacing_mm for case in cases)
    shapes: tuple[Shape, ...] = tuple(case.shape for case in cases)
    return Fingerprint(
        channels=tuple(channels),
        num_classes=num_classes,
        num_training_cases=len(cases),
        spacings_mm=spacings,
        shapes=shapes,
        median_relative_size_fraction=float(np.median([case.relative_size_fraction for case in cases])),
        intensities=tuple(_pool_present(labelled, number, name) for number, name in enumerate(channels)),
        cases=tuple(cases),
    )
