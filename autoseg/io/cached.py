"""What the caches of cases and of label maps share: one safetensors file a case, whose header names its sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from autoseg.domain.values import GrownValue, Value
from autoseg.errors import DatasetError
from autoseg.io.companions import content_digest, look
from autoseg.io.files import atomic_path

ENDING = ".safetensors"
_HEADER_KEY = "autoseg"


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


def save_cached(path: Path, tensors: Mapping[str, NDArray[Any]], header: Header) -> None:
    """Write a file whole or not at all; the same input gives the same bytes.

    Raises:
        OSError: The folder cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={_HEADER_KEY: header.model_dump_json()})


def open_cached(path: Path, header_type: type[AnyHeader]) -> tuple[Any, AnyHeader]:
    """The mapped file and its header.

    Raises:
        DatasetError: It is not there, is damaged, or of another version.
    """
    try:
        # safetensors refuses a file that is shorter or longer than its header says.
        file: Any = safe_open(path, framework="numpy")
        text = (file.metadata() or {}).get(_HEADER_KEY, "")
    except (OSError, SafetensorError) as problem:
        raise unreadable(path, header_type, problem) from None
    header = header_type.from_json(text, path, DatasetError)
    if header.version != header_type.VERSION:
        raise DatasetError(
            f"the {header_type.KIND} {path} has version {header.version}, this is version {header_type.VERSION}"
        )
    return file, header


def unreadable(path: Path, header_type: type[Header], problem: Exception) -> DatasetError:
    """The error that says a cached file is damaged, and what to do."""
    return DatasetError(
        f"the {header_type.KIND} {path} cannot be read: {problem}",
        hint="Delete this file from the cache and run `autoseg train` again: it is made anew.",
    )
