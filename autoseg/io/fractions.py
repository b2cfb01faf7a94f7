"""Maps of numbers from 0 to 1 in 8 bits: NIfTI whose scaling (scl_slope = 1/255) gives the numbers back."""

# nibabel's functions carry no types.
# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from autoseg.domain.geometry import Geometry
from autoseg.io.files import atomic_path
from autoseg.io.label_names import json_extension
from autoseg.io.nifti import set_grid
from autoseg.io.streams import is_gzip_name

LEVELS = 255
"""The level that stands for 1."""

LARGEST_ERROR = 0.5 / LEVELS
"""Of a number that was rounded to the nearest level: 0.002."""

_COMPRESSION = 1
"""Of gzip, as nibabel's: higher ones take several times longer for a tenth less."""


def write_fractions(
    path: Path,
    levels: NDArray[np.uint8],
    geometry: Geometry,
    name: str,
    content: Mapping[str, Any],
    on_read: Callable[[int], None] | None = None,
) -> None:
    """Write levels slice by slice; atomic, and nothing is copied as a whole.

    Args:
        path: ".nii.gz" or ".nii".
        levels: (I, J, K), or (C, I, J, K), which becomes (I, J, K, C) in the file.
        geometry: The grid, kept as in `write_labels`. Pictures become volumes of one slice.
        name: Of the numbers, up to 15 letters (NIfTI's intent name; the intent is "estimate").
        content: JSON for the header's comment.
        on_read: Told the bytes of each slice that was written.
    """
    volumes = levels if levels.ndim == 4 else levels[np.newaxis]
    shape = (*geometry.shape, len(levels)) if levels.ndim == 4 else geometry.shape
    too_long = max(shape) > np.iinfo(np.int16).max
    header = (nib.Nifti2Header if too_long else nib.Nifti1Header)()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    set_grid(header, geometry, len(shape))
    header.set_slope_inter(1 / LEVELS, 0)
    header.set_intent("estimate", (), name=name)
    header.extensions.append(json_extension(content))
    with atomic_path(path) as temporary, _stream(temporary) as stream:
        header.write_to(stream)
        for volume in volumes:
            for plane in volume.transpose(2, 1, 0):
                stream.write(np.ascontiguousarray(plane).data)
                if on_read is not None:
                    on_read(plane.size)


@contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; compressed without name and time, so that equal content gives equal files."""
    with path.open("wb") as file:
        if not is_gzip_name(path):
            yield file
            return
        with gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as packed:
            yield packed  # type: ignore[misc]
