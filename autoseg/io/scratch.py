"""Large arrays that are filled piece by piece: in memory while they are small, else in a file without a name.

The file vanishes with the process, however it ends. Pages that were written are handed to the system now and then, so
that the process holds little of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MOST_IN_MEMORY_BYTES = 2**26
"""64 MiB: three classes of a 256 x 256 x 300 image stay in memory."""

_RELEASED_BYTES = 2**26
"""Written between two times that pages are handed to the system."""


class Scratch:
    """An array of bytes, zero at first.

    Args:
        shape: Of the array, in C order.
        folder: Where the file goes if there is one; must exist.
        most_bytes: Up to so many stay in memory; None: `MOST_IN_MEMORY_BYTES`.

    Attributes:
        array: uint8 of that shape.
        is_in_file: Whether it lies in a file.

    Raises:
        OSError: The disk has no room for it.
    """

    def __init__(self, shape: Sequence[int], folder: Path, most_bytes: int | None = None) -> None:
        size = prod(shape)
        self.is_in_file = size > (MOST_IN_MEMORY_BYTES if most_bytes is None else most_bytes)
        self._map: mmap.mmap | None = None
        self._written = 0
        if not self.is_in_file:
            self.array: NDArray[np.uint8] = np.zeros(shape, np.uint8)
            return
        with tempfile.TemporaryFile(prefix=".tmp-", dir=folder) as file:
            # Room that is only found missing on writing would end the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self.array = np.frombuffer(self._map, np.uint8).reshape(shape)

    def written(self, num_bytes: int) -> None:
        """Tell how much was written or read, so that memory can be given back."""
        self._written += num_bytes
        if self._map is None or self._written < _RELEASED_BYTES:
            return
        self._written = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            # Of a shared file the system keeps what was written; only this process's view of it goes.
            self._map.madvise(mmap.MADV_DONTNEED)
