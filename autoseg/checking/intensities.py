"""Statistics of one channel of one image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.checking.facts import HIGH, LOW, QUANTILES, ChannelFacts
from autoseg.checking.prints import content_digest, detail_print
from autoseg.domain.geometry import Geometry

_SAMPLE = 200_000
"""Voxels from which quantiles are taken: the 0.5 % quantile then rests on a thousand of them."""


def measure_channel(
    array: NDArray[Any],
    geometry: Geometry,
    foreground: NDArray[np.bool_] | None,
    *,
    number: int,
    file: str,
) -> ChannelFacts | None:
    """Quantiles and fingerprints of a channel; None where no voxel is finite.

    Args:
        array: (I, J, K).
        geometry: Its grid.
        foreground: (I, J, K), the labelled voxels; None without a label map on this grid.
        number: Of the channel.
        file: Where it lies.
    """
    flat = array.ravel(order="F")
    sample = _finite(_strided(flat))
    if not sample.size:
        return None
    quantiles = np.quantile(sample, QUANTILES).astype(np.float64)
    low, high = flat.min(), flat.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        finite = flat[np.isfinite(flat)]
        low, high = finite.min(), finite.max()
    quantiles[0], quantiles[-1] = float(low), float(high)
    inside = None
    if foreground is not None:
        # Labels may be few: their voxels are looked up in the whole image, not in the sample.
        places = np.flatnonzero(foreground.ravel(order="F"))
        inside = _finite(flat[_strided(places)]) if places.size else None
    limits = (float(quantiles[LOW]), float(quantiles[HIGH]))
    if limits[0] == limits[1]:
        limits = (float(low), float(high))
    return ChannelFacts(
        number=number,
        file=file,
        dtype=str(array.dtype),
        digest=content_digest(array),
        detail=detail_print(array, geometry, limits),
        quantiles=quantiles,
        foreground=np.quantile(inside, QUANTILES).astype(np.float64) if inside is not None and inside.size else None,
        lowest_fraction=float(np.mean(sample == low)),
    )


def _strided(flat: NDArray[Any]) -> NDArray[Any]:
    """Every so-many-th entry, at most `_SAMPLE` of them; an odd step, so that even rows are not always hit alike."""
    return flat[:: -(-flat.size // _SAMPLE) | 1]


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.dtype.kind in "iub" else values[np.isfinite(values)]
