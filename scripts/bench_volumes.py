"""Large volumes made of small real ones, for benchmarks of time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def make_volume(
    source: Path, shape: Sequence[int], path: Path, *, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0), finer: float = 1.0
) -> None:
    """Repeat an image in mirror images until it fills the shape.

    Args:
        source: A file of one channel.
        shape: Voxels wanted (I, J, K).
        path: Where; int16. No voxel is 0, so that nothing is cropped.
        spacing_mm: Of the volume.
        finer: The image is resampled first to so many times as many voxels along each axis.
    """
    import numpy as np

    from autoseg.domain.geometry import Geometry
    from autoseg.io.images import read_image, write_image
    from autoseg.preprocessing.resample import resample_image

    array = read_image(source).array
    if finer != 1:
        image = np.ascontiguousarray(array, np.float32)
        array = resample_image(image, [round(size * finer) for size in image.shape[1:]], (1.0, 1.0, 1.0))
    array = array[0]
    missing = [(0, max(0, size - old)) for size, old in zip(shape, array.shape, strict=True)]
    array = np.pad(array, missing, mode="symmetric")[tuple(slice(0, size) for size in shape)]
    if array.dtype.kind == "f":
        array = np.rint(array)
    array = np.where(array == 0, 1, array).astype(np.int16)
    write_image(path, array, Geometry(array.shape, np.diag([*spacing_mm, 1.0])))
