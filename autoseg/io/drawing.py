"""Slices of volumes as pictures on a page: planes as radiologists hang them, data addresses, outlines as SVG paths."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import find_contours

from autoseg.domain.geometry import Geometry, closest_orientation

_RGB = 3

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Plane:
    """How one plane of a canonical (right, anterior, superior) array is shown.

    Attributes:
        normal: The axis that is sliced.
        across: The axis from left to right of the picture.
        down: The axis from top to bottom.
        flip_across: Show the axis from its end to its start.
        flip_down: The same for the other.
        letters: What lies at the left, right, top and bottom.
    """

    name: str
    normal: int
    across: int
    down: int
    flip_across: bool
    flip_down: bool
    letters: str


# As radiologists hang images: the patient's right at the picture's left.
PLANES = (
    Plane("axial", 2, 0, 1, True, True, "RLAP"),
    Plane("coronal", 1, 0, 2, True, True, "RLSI"),
    Plane("sagittal", 0, 1, 2, True, True, "APSI"),
)
PICTURE = Plane("picture", 2, 0, 1, False, False, "")


def to_canonical(array: NDArray[T], geometry: Geometry) -> NDArray[T]:
    """(I, J, K) to (right, anterior, superior); a picture stays as it is."""
    if geometry.is_2d:
        return array
    orientation = closest_orientation(geometry.affine)
    flips = tuple(axis for axis, flip in enumerate(orientation.flips) if flip)
    return np.flip(array.transpose(orientation.axes), flips)


def cut_slice(array: NDArray[T], plane: Plane, index: int, step: int) -> NDArray[T]:
    """One slice as rows and columns of the picture, both a multiple of `step` where they are longer than that."""
    taken: NDArray[T] = np.moveaxis(array, plane.normal, 0)[index]
    # Every plane has `across` before `down`, so what is left of the axes is (across, down).
    out: NDArray[T] = taken.T[:: -1 if plane.flip_down else 1, :: -1 if plane.flip_across else 1]
    rows, columns = (max(step, size // step * step) for size in out.shape)
    return out[:rows, :columns]


def grey_levels(picture: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Values as 0 ... 255 between two limits; what is not a number is dark."""
    with np.errstate(over="ignore"):
        scaled = np.clip((np.nan_to_num(picture.astype(np.float64)) - low) / max(high - low, 1e-12), 0.0, 1.0)
    return np.round(scaled * 255).astype(np.uint8)


def data_address(levels: NDArray[np.uint8], step: int, *, quality: int | None = None) -> str:
    """A picture as a data address, `step` by `step` pixels averaged to one.

    Args:
        levels: (rows, columns, 1 or 3).
        step: At least 1.
        quality: Of JPEG, 1 ... 95; None writes PNG.
    """
    drawn = Image.fromarray(levels if levels.shape[-1] == _RGB else levels[..., 0]).reduce(step)
    buffer = io.BytesIO()
    if quality is None:
        drawn.save(buffer, "PNG", optimize=True)
    else:
        drawn.save(buffer, "JPEG", quality=quality, optimize=True)
    kind = "png" if quality is None else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def outline(mask: NDArray[np.bool_]) -> str:
    """The outline of a mask as an SVG path in half pixels; pixel (0, 0) reaches from 0 to 2.

    Outlines run through the middles of pixel edges, so half pixels are whole numbers; with steps instead of places, and
    straight runs as one step, the text of a dense picture is a fifth as long.
    """
    if not mask.any():
        return ""
    padded = np.pad(mask, 1).astype(np.float64)
    rings: Sequence[NDArray[np.float64]] = find_contours(padded, 0.5)  # type: ignore[no-untyped-call]
    parts = []
    for ring in rings:
        # Rows and columns of the padded mask to x and y: minus one for the padding, plus half to a pixel's middle.
        points = np.round(ring[:, ::-1] * 2 - 1).astype(int)
        steps = np.diff(points, axis=0)
        turns = np.flatnonzero((steps[1:] != steps[:-1]).any(axis=1)) + 1
        corners = points[[0, *turns]]
        moves = " ".join(f"{x} {y}" for x, y in np.diff(corners, axis=0).tolist())
        parts.append(f"M{corners[0][0]} {corners[0][1]}l{moves}z")
    return "".join(parts)
