"""What the header of an image file says, whatever its format."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoseg.domain.geometry import Geometry


@dataclass(frozen=True, slots=True, eq=False)
class ImageHeader:
    """The header of an image file.

    Attributes:
        geometry: The grid.
        components: Numbers a voxel: 1, or volumes of a 4D file, or colours (alpha included).
        dtype: The type of the stored numbers, in NumPy's words.
    """

    geometry: Geometry
    components: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (I, J, K)."""
        return self.geometry.shape

    @property
    def num_voxels(self) -> int:
        """Voxels of one component."""
        return math.prod(self.geometry.shape)
