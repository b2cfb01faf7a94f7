"""Arrays in compressed chunks: what one read costs follows the box that is read, not the array.

A chunk is a Blosc2 chunk (LZ4 after byte shuffling) and is checked against its checksum before anything is unpacked, so
that damaged bytes never reach the library's C code. Nothing of Blosc2 but its codec is used: its own array files can
hold code, and its reader believes what a file says.

Source: docs/decisions/0022 (codec, chunks and level by measurement).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from autoseg.domain.values import Value

CHUNK_EDGE = 32
"""Voxels along each edge of a chunk, about: 128 kB of float32. Source: docs/decisions/0022."""

_LEVEL = 5
_THREADS = 1
"""Reading and writing are done by one thread a case; threads of the codec would only get in their way."""

Table = NDArray[np.uint32]
Bytes = NDArray[np.uint8]


class Layout(Value):
    """How an array lies in its chunks, which follow each other in C order.

    Attributes:
        dtype: Of its values.
        shape: Of the array.
        chunk: Of a chunk; those at the far ends are smaller.
    """

    dtype: Literal["float32", "int32", "int16", "uint8"]
    shape: tuple[PositiveInt, ...]
    chunk: tuple[PositiveInt, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-size // edge) for size, edge in zip(self.shape, self.chunk, strict=True))

    @property
    def num_chunks(self) -> int:
        """How many there are."""
        return math.prod(self.grid)


class Damaged(Exception):
    """A chunk is not what was written. Callers turn it into an error that names the file."""


def chunk_shape(shape: Sequence[int], *, in_slices: bool) -> tuple[int, int, int]:
    """The chunks of an image or label map.

    Args:
        shape: (D, H, W).
        in_slices: Whether slices across the first axis are read, as 2D networks do; else boxes.

    Returns:
        Nearly a cube of `CHUNK_EDGE`, of about equal parts of each axis; as many voxels in a slice where slices are
        read or there is one only.
    """
    if in_slices or shape[0] == 1:
        edge = math.isqrt(CHUNK_EDGE**3)
        return (1, _part(shape[1], edge), _part(shape[2], edge))
    return (_part(shape[0], CHUNK_EDGE), _part(shape[1], CHUNK_EDGE), _part(shape[2], CHUNK_EDGE))


def _part(size: int, edge: int) -> int:
    return -(-size // max(1, round(size / edge)))


@cache
def _blosc2() -> ModuleType:
    """The library, which takes 0.2 s to import and is needed only where voxels of a cache are."""
    blosc2 = import_module("blosc2")
    # Without this a thread that reads ahead would stop the others while it unpacks.
    blosc2.set_releasegil(True)
    return blosc2


def pack(array: NDArray[Any], chunk: Sequence[int]) -> tuple[Layout, Bytes, Table]:
    """Compress an array; the same array gives the same bytes on every machine.

    Args:
        array: At least one value.
        chunk: Shape of a chunk.

    Returns:
        The layout; all compressed chunks, one after the other; and a row for each: its bytes and their CRC-32.
    """
    blosc2 = _blosc2()
    layout = Layout.model_validate({"dtype": array.dtype.name, "shape": array.shape, "chunk": tuple(chunk)})
    packed, rows = bytearray(), []
    for place in itertools.product(*(range(number) for number in layout.grid)):
        box = tuple(slice(at * edge, (at + 1) * edge) for at, edge in zip(place, layout.chunk, strict=True))
        values = np.ascontiguousarray(array[box])
        one = blosc2.compress2(
            values,
            codec=blosc2.Codec.LZ4,
            clevel=_LEVEL,
            filters=[blosc2.Filter.SHUFFLE],
            filters_meta=[0],
            typesize=values.itemsize,
            # One block a chunk: by default it follows the processor's caches.
            blocksize=values.nbytes,
            nthreads=_THREADS,
        )
        packed += one
        rows.append((len(one), crc32(one)))
    return layout, np.frombuffer(packed, np.uint8), np.array(rows, np.uint32)


class ChunkedArray:
    """An array in chunks, open for reading.

    Args:
        layout: How it lies.
        table: (n, 2) bytes and checksum of each chunk.
        fetch: Gives the bytes from one place to another of all compressed chunks.

    Raises:
        Damaged: The table does not fit the layout.
    """

    def __init__(self, layout: Layout, table: Table, fetch: Callable[[int, int], Bytes]) -> None:
        if table.shape != (layout.num_chunks, 2):
            raise Damaged(f"the table has shape {table.shape}, expected {(layout.num_chunks, 2)}")
        self.shape = layout.shape
        self.dtype = np.dtype(layout.dtype)
        self._layout = layout
        self._checksums = table[:, 1]
        self._ends = np.cumsum(table[:, 0], dtype=np.int64)
        self._fetch = fetch

    @property
    def num_bytes(self) -> int:
        """Of all compressed chunks."""
        return int(self._ends[-1])

    def read(self, start: Sequence[int], stop: Sequence[int]) -> NDArray[Any]:
        """A copy of one box, which must lie inside the array.

        Raises:
            Damaged: A chunk that it needs.
            OSError: The file cannot be read.
        """
        out = np.empty([high - low for low, high in zip(start, stop, strict=True)], self.dtype)
        edges = self._layout.chunk
        ranges = [range(low // edge, -(-high // edge)) for low, high, edge in zip(start, stop, edges, strict=True)]
        for place in itertools.product(*ranges):
            first = [at * edge for at, edge in zip(place, edges, strict=True)]
            chunk = self._chunk(place, first)
            source, target = [], []
            for low, high, begin, size in zip(start, stop, first, chunk.shape, strict=True):
                inner_low, inner_high = max(low, begin), min(high, begin + size)
                source.append(slice(inner_low - begin, inner_high - begin))
                target.append(slice(inner_low - low, inner_high - low))
            out[tuple(target)] = chunk[tuple(source)]
        return out

    def whole(self) -> NDArray[Any]:
        """A copy of all of it; see `read`."""
        return self.read([0] * len(self.shape), self.shape)

    def _chunk(self, place: tuple[int, ...], first: Sequence[int]) -> NDArray[Any]:
        blosc2 = _blosc2()
        number = 0
        for at, count in zip(place, self._layout.grid, strict=True):
            number = number * count + at
        sizes = [
            min(edge, size - begin) for begin, edge, size in zip(first, self._layout.chunk, self.shape, strict=True)
        ]
        values = np.empty(sizes, self.dtype)
        packed = self._fetch(int(self._ends[number - 1]) if number else 0, int(self._ends[number]))
        if crc32(packed.data) != self._checksums[number]:
            raise Damaged(f"chunk {number} of {len(self._ends)} is not what was written")
        # The codec writes as much as the chunk says, whatever room there is.
        if blosc2.get_cbuffer_sizes(packed)[:2] != (values.nbytes, len(packed)):
            raise Damaged(f"chunk {number} of {len(self._ends)} has another size than expected")
        blosc2.decompress2(packed, dst=values, nthreads=_THREADS)
        return values
