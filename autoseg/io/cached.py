"""What the caches of cases and of label maps share: one file a case, whose header names its sources.

The file is a safetensors file. Of each array NAME it holds the compressed chunks, NAME, and where each of them lies and
its checksum, NAME.chunks (see `chunks`); the layouts are in the metadata beside the header, and one checksum is over
all of that. So damage is found wherever it is, and a read costs what it reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import quote
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from pydantic import RootModel, ValidationError
from safetensors import SafetensorError, safe_open

from autoseg.domain.values import GrownValue, Value
from autoseg.errors import DatasetError
from autoseg.io.chunks import ChunkedArray, Damaged, Layout, pack
from autoseg.io.companions import content_digest, look
from autoseg.io.files import atomic_path

ENDING = ".safetensors"
_HEADER_KEY, _LAYOUTS_KEY, _CHECK_KEY = "autoseg", "arrays", "check"
_TABLE = ".chunks"
_DTYPES = {"uint8": "U8", "uint32": "U32"}
_LENGTH_BYTES, _ALIGNMENT = 8, 8
"""Of the header of a safetensors file. Source: the format's own page."""


class Source(Value):
    """A file with those that belong to it, or a DICOM series, that a cached case was made from, as it was then.

    Attributes:
        path: Where it lay.
        size: Its bytes.
        stamp: Modification and status-change times (ns) and inode: where these agree, the content was not touched.
        sha256: Of its content.
    """

    path: str
    size: int
    stamp: tuple[int, int, int]
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> Source:
        """The file as it is now.

        Raises:
            OSError: It cannot be read.
        """
        # Size and times are taken before the content: a file changed in between looks changed, never current.
        size, stamp = look(path)
        return cls(path=str(path), size=size, stamp=stamp, sha256=content_digest(path))

    def is_current(self, path: str | Path) -> bool:
        """Whether the file at `path` still has this content; it is hashed only where size and times do not tell."""
        try:
            size, stamp = look(path)
            if size != self.size:
                return False
            return (str(path) == self.path and stamp == self.stamp) or content_digest(path) == self.sha256
        except OSError:
            return False


class Header(GrownValue):
    """What a cached file says of itself, as JSON in its header.

    Attributes:
        KIND: What the file is, in messages.
        VERSION: Of what is written now; a file of another version is never read, but made anew.
        version: Of the file.
        id: Of the case.
        sources: The files it was made from, images first.
        missing: Channels that the case lacked: the same files can stand for others.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("missing",)

    KIND: ClassVar[str]
    VERSION: ClassVar[int]

    version: int
    id: str
    sources: tuple[Source, ...]
    missing: tuple[int, ...] = ()

    def is_current(self, case_id: str, files: Sequence[str | Path], missing: tuple[int, ...] = ()) -> bool:
        """Whether it is of this case and made from these very files as they are now."""
        if self.id != case_id or len(self.sources) != len(files) or self.missing != missing:
            return False
        return all(source.is_current(file) for source, file in zip(self.sources, files, strict=True))


def case_file(folder: Path, case_id: str) -> Path:
    """The file of a case in a folder of cached ones; characters that no file name may have are quoted."""
    name = quote(case_id, safe=" ")
    # Names that begin with a dot are those of files being written.
    return folder / (name.replace(".", "%2E", 1) + ENDING if name.startswith(".") else name + ENDING)


AnyHeader = TypeVar("AnyHeader", bound=Header)


def save_cached(
    path: Path, arrays: Mapping[str, NDArray[Any]], chunks: Mapping[str, Sequence[int]], header: Header
) -> None:
    """Write a file whole or not at all; the same input gives the same bytes.

    Args:
        path: Of the file.
        arrays: By name; empty ones are left out.
        chunks: Shape of the chunks of each; an array without is one chunk.
        header: What the file says of itself.

    Raises:
        OSError: The folder cannot be written.
    """
    layouts: dict[str, Any] = {}
    tensors: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if not array.size:
            continue
        layout, tensors[name], tensors[f"{name}{_TABLE}"] = pack(array, chunks.get(name, array.shape))
        layouts[name] = layout.model_dump(mode="json")
    texts = {_HEADER_KEY: header.model_dump_json(), _LAYOUTS_KEY: json.dumps(layouts)}
    tables = [tensors[f"{name}{_TABLE}"] for name in layouts]
    # A cached case can be made again, and what a power failure leaves of it is found out: there is no need to wait for
    # the disk.
    with atomic_path(path, is_durable=False) as temporary:
        _write(temporary, tensors, texts | {_CHECK_KEY: _checksum(texts, tables)})


def _checksum(texts: Mapping[str, str], tables: Iterable[NDArray[np.uint32]]) -> str:
    """Of everything but the chunks, which have their own."""
    found = 0
    for part in (texts[_HEADER_KEY].encode(), texts[_LAYOUTS_KEY].encode(), *(table.tobytes() for table in tables)):
        found = crc32(part, found)
    return f"{found:08x}"


def _write(path: Path, tensors: Mapping[str, NDArray[Any]], texts: Mapping[str, str]) -> None:
    """Write a safetensors file; the library's own writer holds everything a second time in memory."""
    header: dict[str, Any] = {"__metadata__": dict(texts)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        handle.write(text)
        for tensor in tensors.values():
            handle.write(tensor.data)


class CachedFile(Generic[AnyHeader]):
    """A cached file, open for reading: mapped into memory, so that only the pages asked for are touched.

    Args:
        path: Of the file.
        header_type: What it should be.

    Attributes:
        header: What it says of itself.
        names: Of its arrays.

    Raises:
        DatasetError: It is not there, is damaged, or of another version.
    """

    def __init__(self, path: Path, header_type: type[AnyHeader]) -> None:
        self.path = path
        self._type = header_type
        try:
            self._inode = path.stat().st_ino
            # safetensors refuses a file that is shorter or longer than its header says.
            self._file: Any = safe_open(path, framework="numpy")
            texts: dict[str, str] = self._file.metadata() or {}  # type: ignore[no-untyped-call]
            self.header = header_type.from_json(texts.get(_HEADER_KEY, ""), path, DatasetError)
            self._require_version()
            self._arrays = self._open(texts)
        except (OSError, SafetensorError, Damaged, KeyError, ValidationError) as problem:
            raise self.unreadable(problem) from None

    @property
    def names(self) -> tuple[str, ...]:
        """Of its arrays."""
        return tuple(self._arrays)

    def shape(self, name: str, dims: int, *dtypes: type[np.generic]) -> tuple[int, ...]:
        """Shape of an array.

        Raises:
            DatasetError: The file does not have it, or with another number of axes, or of none of these types.
        """
        array = self._arrays.get(name)
        if array is None or len(array.shape) != dims or array.dtype not in map(np.dtype, dtypes):
            raise self.unreadable(f"it has no array {name!r} of {dims} axes of the right type")
        return array.shape

    def read(self, name: str, start: Sequence[int], stop: Sequence[int]) -> NDArray[Any]:
        """A copy of a box that lies inside an array.

        Raises:
            DatasetError: The file is damaged there. It is deleted, so that it is made anew.
        """
        try:
            return self._arrays[name].read(start, stop)
        except (OSError, SafetensorError, Damaged, ValueError, RuntimeError) as problem:
            raise self._discarded(problem) from None

    def whole(self, name: str) -> NDArray[Any]:
        """A copy of an array; see `read`."""
        shape = self._arrays[name].shape
        return self.read(name, [0] * len(shape), shape)

    def _require_version(self) -> None:
        if self.header.version != self._type.VERSION:
            raise DatasetError(
                f"the {self._type.KIND} {self.path} has version {self.header.version}, this is version "
                f"{self._type.VERSION}"
            )

    def _open(self, texts: Mapping[str, str]) -> dict[str, ChunkedArray]:
        layouts = _Layouts.model_validate_json(texts[_LAYOUTS_KEY]).root
        tables = {name: self._file.get_tensor(f"{name}{_TABLE}") for name in layouts}
        if _checksum(texts, tables.values()) != texts[_CHECK_KEY]:
            raise Damaged("what it says of itself is not what was written")
        arrays = {name: ChunkedArray(layouts[name], tables[name], self._fetcher(name)) for name in layouts}
        for name, array in arrays.items():
            if self._file.get_slice(name).get_shape() != [array.num_bytes]:
                raise Damaged(f"the array {name!r} is not as long as its chunks")
        return arrays

    def _fetcher(self, name: str) -> Callable[[int, int], NDArray[np.uint8]]:
        part = self._file.get_slice(name)

        def fetch(start: int, stop: int) -> NDArray[np.uint8]:
            found: NDArray[np.uint8] = part[start:stop]
            return found

        return fetch

    def unreadable(self, problem: Exception | str) -> DatasetError:
        """The error that says what is wrong with the file, and what to do."""
        return DatasetError(
            f"the {self._type.KIND} {self.path} cannot be read: {problem}",
            hint="Delete this file from the cache and run `autoseg train` again: it is made anew.",
        )

    def _discarded(self, problem: Exception) -> DatasetError:
        """Take the file away, unless another process has made it anew already or it cannot be."""
        try:
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
        except FileNotFoundError:
            pass
        except OSError:
            return self.unreadable(problem)
        return DatasetError(
            f"the {self._type.KIND} {self.path} is damaged and was deleted: {problem}",
            hint="Run `autoseg train` again: it is made anew, and the training goes on. If this comes again, the disk "
            "or the memory of this computer is failing.",
        )


class _Layouts(RootModel[dict[str, Layout]]):
    """How each array of a file lies in it."""
