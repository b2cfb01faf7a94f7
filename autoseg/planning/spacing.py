"""The voxel size to resample to, the order of the axes, and the size of the images afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.fingerprint import Fingerprint
from autoseg.errors import PlanError
from autoseg.planning.presets import PlannerRules

Floats = tuple[float, ...]
Ints = tuple[int, ...]

_NUDGE_MM = 1e-5
"""Keeps the coarse axis the coarsest when its percentile falls below the others. Source: nnU-Net 2.8."""


@dataclass(frozen=True, slots=True)
class SpacingChoice:
    """The target spacing and how it came about. Everything is in the fingerprint's order Z, Y, X.

    Attributes:
        median: Median spacing in millimetres.
        median_size: Median size in voxels at native spacing, after cropping.
        coarsest: The axis with the largest median spacing.
        is_coarse_and_short: Whether that axis is so coarse and has so few voxels that a percentile replaces its median.
        percentile: That percentile (of the coarsest axis), used or not.
        target: The result.
    """

    median: Floats
    median_size: Floats
    coarsest: int
    is_coarse_and_short: bool
    percentile: float
    target: Floats


def _floats(values: NDArray[np.float64]) -> Floats:
    return tuple(float(value) for value in values)


def require_possible(fingerprint: Fingerprint) -> None:
    """Refuse measurements that nothing can be planned from.

    Raises:
        PlanError: A spacing or a shape is not positive and finite; every such case is listed.
    """
    problems = []
    for number, (spacing, shape) in enumerate(zip(fingerprint.spacings_mm, fingerprint.shapes, strict=True)):
        name = fingerprint.cases[number].case if len(fingerprint.cases) > number else f"case {number}"
        if not all(isfinite(value) and value > 0 for value in spacing):
            problems.append(f"{name}: spacing {spacing} mm must be above 0")
        if min(shape) < 1:
            problems.append(f"{name}: shape {shape} must be at least 1 voxel an axis")
    if fingerprint.num_training_cases < 1:
        problems.append(f"number of training cases is {fingerprint.num_training_cases}, must be at least 1")
    if problems:
        raise PlanError("the fingerprint holds impossible measurements", problems=problems)


def choose_spacing(fingerprint: Fingerprint, rules: PlannerRules) -> SpacingChoice:
    """The voxel size to resample to.

    Source: nnU-Net (Isensee et al. 2021, supplement 2.2).
    """
    spacings = np.asarray(fingerprint.spacings_mm, np.float64)
    target = np.percentile(spacings, 50, axis=0)
    size = np.percentile(np.asarray(fingerprint.shapes), 50, axis=0)
    median = _floats(target)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    next_coarsest = max(median[axis] for axis in others)
    is_coarse = target[worst] > rules.anisotropy * next_coarsest
    is_short = size[worst] * rules.anisotropy < min(size[axis] for axis in others)
    percentile = float(np.percentile(spacings[:, worst], rules.coarse_axis_percentile))
    if is_coarse and is_short:
        target[worst] = percentile if percentile >= next_coarsest else next_coarsest + _NUDGE_MM
    return SpacingChoice(median, _floats(size), worst, bool(is_coarse and is_short), percentile, _floats(target))


def order_axes(fingerprint: Fingerprint, choice: SpacingChoice, rules: PlannerRules) -> Ints:
    """The axes Z, Y, X as 0, 1, 2 in network order: the coarsest first, the others as they were.

    Source: nnU-Net 2.8; ties and single slices: design, section 7, and decision 4.
    """
    target = choice.target
    coarsest = max(target)
    first = next(axis for axis in range(3) if target[axis] >= coarsest * (1 - rules.axis_tie_fraction))
    if choice.is_coarse_and_short and target[choice.coarsest] == coarsest and target.count(coarsest) == 1:
        # Its percentile may come close to the other axes, but most images are coarse along it.
        first = choice.coarsest
    if rules.single_slice_first:
        flat = [axis for axis in range(3) if all(shape[axis] == 1 for shape in fingerprint.shapes)]
        first = first if first in flat or not flat else flat[0]
    return (first, *(axis for axis in range(3) if axis != first))


def resampled_median_shape(fingerprint: Fingerprint, target: Floats) -> Floats:
    """Median over the cases of the size in voxels after resampling to `target`, per axis; may end in a half.

    Axes that shrink to nothing count as one voxel, as in preprocessing.
    """
    shapes = [
        [round(old / new * edge) for old, new, edge in zip(spacing, target, shape, strict=True)]
        for spacing, shape in zip(fingerprint.spacings_mm, fingerprint.shapes, strict=True)
    ]
    median = np.median(np.asarray(shapes), axis=0)
    return _floats(np.where(median == 0, 1.0, median))
