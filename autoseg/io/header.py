"""What the header of an image file says, whatever its format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from autoseg.domain.geometry import Geometry
from autoseg.errors import GeometryError


@dataclass(frozen=True, slots=True, eq=False)
class ImageHeader:
    """The header of an image file.

    Attributes:
        geometry: The grid.
        components: Numbers a voxel: 1, or volumes of a 4D file, or colours (alpha included).
        dtype: The type of the stored numbers, in NumPy's words.
        is_colour: Whether several components are the colours of a picture, the last perhaps an alpha.
    """

    geometry: Geometry
    components: int
    dtype: str
    is_colour: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (I, J, K)."""
        return self.geometry.shape

    @property
    def num_voxels(self) -> int:
        """Voxels of one component."""
        return math.prod(self.geometry.shape)


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Name the file in an error about its grid.

    Raises:
        GeometryError: As raised in the block, with the path before its message.
    """
    try:
        yield
    except GeometryError as problem:
        raise GeometryError(f"{path}: {problem.message}", hint=problem.hint) from None
