"""Small pictures of a case: a slice in each plane through the middle of what is labelled, with the outlines."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.checking.facts import Picture
from autoseg.domain.dataset import LabelSchema
from autoseg.domain.geometry import Geometry, closest_orientation
from autoseg.io.drawing import PICTURE, PLANES, cut_slice, data_address, grey_levels, outline, to_canonical

MAX_SIDE_PX, MAX_SIDE_2D_PX = 112, 224
"""Longest side of a picture: three planes of 200 cases, outlines included, stay under 5 MB."""

_JPEG_QUALITY = 70
_MAX_OUTLINE_CHARACTERS = 6_000
"""Of one picture; dense label maps (hundreds of nuclei) are outlined at half the detail, and again."""


def draw_pictures(
    image: NDArray[Any],
    limits: list[tuple[float, float]],
    labels: NDArray[np.integer[Any]] | None,
    geometry: Geometry,
    schema: LabelSchema,
) -> tuple[Picture, ...]:
    """The three planes of a volume, or a picture as it is; none of a line of voxels.

    Args:
        image: (1 or 3, I, J, K); three are shown as colours.
        limits: For each channel the values shown black and white.
        labels: (I, J, K) on the same grid; None where there are none.
        geometry: The grid.
        schema: The classes that are outlined.
    """
    channels = [to_canonical(channel, geometry) for channel in image]
    turned = None if labels is None else to_canonical(labels, geometry)
    middle = _middle(turned, channels[0].shape)
    axes = (0, 1, 2) if geometry.is_2d else closest_orientation(geometry.affine).axes
    spacing = [geometry.spacing_mm[axis] for axis in axes]
    out = []
    for plane in (PICTURE,) if geometry.is_2d else PLANES:
        rows, columns = channels[0].shape[plane.down], channels[0].shape[plane.across]
        if min(rows, columns) < 2:
            continue
        step = max(1, -(-max(rows, columns) // (MAX_SIDE_2D_PX if geometry.is_2d else MAX_SIDE_PX)))
        index = middle[plane.normal]
        shown = [
            grey_levels(cut_slice(channel, plane, index, step), *limit)
            for channel, limit in zip(channels, limits, strict=True)
        ]
        height, width = shown[0].shape
        out.append(
            Picture(
                plane=plane.name,
                letters=plane.letters,
                width_px=max(1, width // step),
                height_px=max(1, height // step),
                aspect=spacing[plane.down] / spacing[plane.across],
                image=data_address(np.stack(shown, axis=-1), step, quality=_JPEG_QUALITY),
                contours=() if turned is None else _contours(cut_slice(turned, plane, index, step), step, schema),
            )
        )
    return tuple(out)


def _middle(labels: NDArray[np.integer[Any]] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The voxel at the centre of mass of all labels, or of the volume."""
    middle = []
    mask = None if labels is None else labels > 0
    for axis, size in enumerate(shape):
        counts = np.zeros(size, np.int64)
        if mask is not None:
            counts = np.count_nonzero(mask, axis=tuple(other for other in range(3) if other != axis))
        total = int(counts.sum())
        middle.append(round(float(counts @ np.arange(size)) / total) if total else size // 2)
    return tuple(middle)


def _contours(labels: NDArray[np.integer[Any]], step: int, schema: LabelSchema) -> tuple[tuple[int, str], ...]:
    """Outlines in pixels of the picture, which has one pixel for `step` of the label map."""
    small = labels[step // 2 :: step, step // 2 :: step]
    coarser = 1
    while True:
        cells = small[coarser // 2 :: coarser, coarser // 2 :: coarser].repeat(coarser, 0).repeat(coarser, 1)
        cells = cells[: small.shape[0], : small.shape[1]]
        paths = [(number, outline(np.isin(cells, item.values))) for number, item in enumerate(schema.classes)]
        if sum(len(path) for _, path in paths) <= _MAX_OUTLINE_CHARACTERS or 2 * coarser >= min(small.shape):
            return tuple((number, path) for number, path in paths if path)
        coarser *= 2
