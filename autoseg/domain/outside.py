"""Whether an image is unlike all that a model has learned from, and in what.

Each measurement is compared with the range that it had in training. Its distance is how far it lies beyond that range,
in spreads of the training images (see `TrainedOn`); beyond `LIMIT` it is told.

Source of rule and limit: docs/decisions/0038, on eight real sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Literal

from autoseg.domain.fingerprint import LOOK_LEVELS, CaseStats
from autoseg.domain.preprocess_plan import PreprocessPlan
from autoseg.domain.trained_on import TrainedOn, Usual, extent_of, scaled_quantiles
from autoseg.domain.values import Value

LIMIT = 2.0
"""Spreads beyond the range of the training images. Source: docs/decisions/0038."""

OBLIQUE_SPREAD_DEGREES = 7.5
"""Training rotates images by up to 30 degrees, so that 15 beyond the most oblique one are no surprise."""

_WAYS = ("from foot to head", "from back to front", "from left to right")
_PICTURE_WAYS = ("from top to bottom", "from left to right")

Property = Literal["kind", "spacing", "size", "intensity", "orientation"]


class Outside(Value):
    """One property in which an image is unlike those of the training.

    Attributes:
        what: The property.
        message: In words, with the numbers.
        distance: Spreads beyond the range of the training; None where it cannot be counted.
    """

    what: Property
    message: str
    distance: float | None = None


def outside(
    trained_on: TrainedOn, case: CaseStats, plan: PreprocessPlan, channels: Sequence[str]
) -> tuple[Outside, ...]:
    """In which properties an image lies outside of the training; none where it is like it.

    Args:
        trained_on: Summary of the training.
        case: Measurements of the image; see `measure_image`.
        plan: How images are prepared.
        channels: Names.
    """
    found: list[Outside] = []
    is_flat = case.shape_original[0] == 1
    if trained_on.is_2d and not is_flat:
        found.append(Outside(what="kind", message="it is a volume, and training images were pictures"))
        return tuple(found)
    if case.is_2d and not trained_on.is_2d:
        found.append(Outside(what="kind", message="it is a picture, and training images were volumes"))
        return tuple(found)
    if not trained_on.is_2d:
        found += _lengths("spacing", "its voxels are {} mm long {}", case.spacing_mm, trained_on.spacing_mm, _WAYS)
        found += _lengths("size", "it measures {} mm {}", extent_of(case), trained_on.extent_mm, _WAYS)
    else:
        sizes = [float(size) for size in case.shape[1:]]
        found += _lengths("size", "it measures {} pixels {}", sizes, trained_on.extent_mm, _PICTURE_WAYS)
    found += _intensities(trained_on, case, plan, channels)
    found += _orientation(trained_on, case, plan)
    return tuple(found)


def _beyond(value: float, usual: Usual, *, is_length: bool = False) -> float:
    """Spreads beyond the range of the training; 0 within it."""
    if is_length:
        value, low, high = log(value), log(usual.low), log(usual.high)
    else:
        low, high = usual.low, usual.high
    return max(low - value, value - high, 0.0) / usual.spread


def _lengths(
    what: Property, words: str, values: Sequence[float], usual: Sequence[Usual], ways: Sequence[str]
) -> list[Outside]:
    """The axis that lies furthest off, if it does."""
    rows = [
        (_beyond(value, item, is_length=True), value, item, way)
        for value, item, way in zip(values, usual, ways, strict=True)
    ]
    distance, value, item, way = max(rows, key=lambda row: row[0])
    if distance <= LIMIT:
        return []
    text = f"{words.format(f'{value:.3g}', way)}, in training {_range(item)}"
    return [Outside(what=what, message=text, distance=round(distance, 1))]


def _intensities(
    trained_on: TrainedOn, case: CaseStats, plan: PreprocessPlan, channels: Sequence[str]
) -> list[Outside]:
    """The quantile of each channel that lies furthest off, if it does."""
    if case.look is None:
        return []
    found = []
    rows = zip(channels, case.look.channels, trained_on.intensities, plan.normalization, trained_on.units, strict=True)
    for name, look, usual, rule, unit in rows:
        if look is None or not usual:
            continue
        values = scaled_quantiles(look, rule, unit)
        distances = [_beyond(value, item) for value, item in zip(values, usual, strict=True)]
        worst = max(range(len(distances)), key=distances.__getitem__)
        if distances[worst] <= LIMIT:
            continue
        share = f"{100 * LOOK_LEVELS[worst]:.3g}"
        message = (
            f"its intensities of {name} are distributed otherwise: {share} % of them lie below {values[worst]:.3g} "
            f"after scaling, in training below {_range(usual[worst])}"
        )
        found.append(Outside(what="intensity", message=message, distance=round(distances[worst], 1)))
    return found


def _orientation(trained_on: TrainedOn, case: CaseStats, plan: PreprocessPlan) -> list[Outside]:
    if case.look is None or not trained_on.orientations or case.is_2d:
        return []
    code, known = case.look.orientation, trained_on.orientations
    if plan.orientation == "native" and code not in known:
        message = f"its axes point to {code}, in training to {', '.join(known)}, and this model does not reorient"
        return [Outside(what="orientation", message=message)]
    degrees = case.look.oblique_degrees
    distance = max(0.0, degrees - trained_on.oblique_degrees) / OBLIQUE_SPREAD_DEGREES
    if distance <= LIMIT:
        return []
    message = f"its axes are turned by {degrees:.0f} degrees, in training by at most {trained_on.oblique_degrees:.0f}"
    return [Outside(what="orientation", message=message, distance=round(distance, 1))]


def _range(usual: Usual) -> str:
    low, high = f"{usual.low:.3g}", f"{usual.high:.3g}"
    return low if low == high else f"{low} to {high}"
