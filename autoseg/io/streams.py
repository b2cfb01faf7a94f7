"""Voxels from plain or gzip-compressed streams: memory grows with what a file really holds, never with its header."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from autoseg.io.content import broken

CHUNK_BYTES = 1 << 20
STREAM_PROBLEMS = (OSError, EOFError, zlib.error)
_GZIP_ENDINGS = (".gz", ".mgz")


def is_gzip_name(path: Path) -> bool:
    """Whether a file of this name is compressed by gzip as a whole."""
    return path.name.lower().endswith(_GZIP_ENDINGS)


def one_line(problem: BaseException) -> str:
    """The first line of what a library says went wrong, or the name of its error."""
    return (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(".")


def open_stream(path: Path) -> IO[bytes]:
    """Open a file to read what it holds, unpacked.

    Raises:
        OSError: It cannot be opened.
    """
    return cast(IO[bytes], (gzip.open if is_gzip_name(path) else open)(path, "rb"))


def gzip_damage(path: Path) -> str:
    """What is wrong with a compressed file as such, which other libraries report as they like; "" when nothing is."""
    if not is_gzip_name(path):
        return ""
    try:
        with gzip.open(path) as stream:
            stream.read(CHUNK_BYTES)
    except STREAM_PROBLEMS as problem:
        return f"it is damaged or truncated: {one_line(problem)}"
    return ""


def read_voxels(path: Path, offset: int, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The stored numbers, flat, in native byte order; gzip is read to its end so that its checksum is tested.

    Args:
        path: The file.
        offset: Bytes before the voxels, unpacked.
        count: Numbers.
        dtype: As stored.

    Raises:
        DatasetError: The file is damaged, or ends too early.
    """
    size = count * dtype.itemsize
    try:
        with open_stream(path) as stream:
            stream.seek(offset)
            data = _at_most(stream, size)
            while stream.read(CHUNK_BYTES):
                pass
    except STREAM_PROBLEMS as problem:
        raise broken(
            path, f"the voxels cannot be read, the file is damaged or truncated ({one_line(problem)})"
        ) from None
    if len(data) < size:
        raise broken(path, f"the file is truncated: it holds {len(data):,} of {size:,} bytes of voxels")
    flat: NDArray[Any] = np.frombuffer(data, dtype)
    return flat if dtype.isnative else flat.astype(dtype.newbyteorder("="))


def _at_most(stream: IO[bytes], size: int) -> bytearray:
    """Up to `size` bytes."""
    data = bytearray()
    while len(data) < size:
        chunk = stream.read(min(CHUNK_BYTES, size - len(data)))
        if not chunk:
            break
        data += chunk
    return data
