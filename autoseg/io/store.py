"""The cache of preprocessed cases: one safetensors file a case, written atomically, read box by box.

A file holds `image` (C, D, H, W) float32, `labels` (D, H, W) int16 and `foreground.N` (n, 3) int32, the positions at
which a patch may be centred on class N, and, as JSON in its header, the source files it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from autoseg.domain.values import Value
from autoseg.errors import DatasetError
from autoseg.io.files import atomic_path, file_digest

STORE_VERSION = 1
"""Part of every header: a file of another version is never read, but made anew."""

MIN_LOCATIONS = 10_000
"""Positions kept of each class at least, where it has as many. Source: nnU-Net v2, class locations."""

LOCATIONS_FRACTION = 0.01
"""Part of a class's voxels kept at least. Source: nnU-Net v2, class locations."""

_ENDING = ".safetensors"
_HEADER_KEY = "autoseg"
_FOREGROUND = "foreground."


class Source(Value):
    """A file that a cached case was made from, as it was then.

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
        size, stamp = _look(path)
        return cls(path=str(path), size=size, stamp=stamp, sha256=file_digest(Path(path)))

    def is_current(self, path: str | Path) -> bool:
        """Whether the file at `path` still has this content; it is hashed only where size and times do not tell."""
        try:
            size, stamp = _look(path)
            if size != self.size:
                return False
            return (str(path) == self.path and stamp == self.stamp) or file_digest(Path(path)) == self.sha256
        except OSError:
            return False


def _look(path: str | Path) -> tuple[int, tuple[int, int, int]]:
    status = Path(path).stat()
    return status.st_size, (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class CaseHeader(Value):
    """What a cached case says of itself.

    Attributes:
        spacing_mm: Voxel size in network axis order.
        sources: The files it was made from, images first.
    """

    version: int = STORE_VERSION
    id: str
    spacing_mm: tuple[float, float, float]
    sources: tuple[Source, ...]


class StoredCase:
    """A cached case, open for reading; reads map the file and touch only the pages asked for.

    Attributes:
        id: Of the case.
        shape: (D, H, W).
        channels: C of the image.
        spacing_mm: Voxel size in network axis order.
        foreground: For each class present, (n, 3) int32 positions.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, header = _open(path)
        self.id = header.id
        self.spacing_mm = header.spacing_mm
        names = [name for name in self._file.keys() if name.startswith(_FOREGROUND)]  # noqa: SIM118
        classes = sorted(int(name.removeprefix(_FOREGROUND)) for name in names)
        try:
            self._image = self._file.get_slice("image")
            self._labels = self._file.get_slice("labels")
            self.foreground: Mapping[int, NDArray[np.int32]] = {
                index: self._file.get_tensor(f"{_FOREGROUND}{index}") for index in classes
            }
        except SafetensorError as problem:
            raise _unreadable(path, problem) from None
        channels, depth, height, width = self._image.get_shape()
        self.channels = int(channels)
        self.shape = (int(depth), int(height), int(width))

    def read(self, start: Sequence[int], stop: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Copies of one box of image (C, d, h, w) and labels (d, h, w).

        Args:
            start: First voxel along each axis.
            stop: One past the last; the box must lie inside the case.

        Raises:
            ValueError: The box is empty or reaches outside.
            DatasetError: The file is damaged.
        """
        if not all(0 <= low < high <= size for low, high, size in zip(start, stop, self.shape, strict=True)):
            raise ValueError(f"box {tuple(start)} to {tuple(stop)} is not inside case {self.id!r} of {self.shape}")
        box = tuple(slice(int(low), int(high)) for low, high in zip(start, stop, strict=True))
        try:
            return self._image[(slice(None), *box)], self._labels[box]
        except SafetensorError as problem:
            raise _unreadable(self._path, problem) from None


class CaseStore:
    """A folder of cached cases.

    Args:
        folder: Named by what was done to the cases (configuration and digest), so that two preprocessings never mix.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, case_id: str) -> Path:
        """The file of a case."""
        return case_file(self.folder, case_id)

    def ids(self) -> tuple[str, ...]:
        """Ids of all whole cases, sorted."""
        paths = self.folder.glob(f"*{_ENDING}")
        return tuple(sorted(unquote(path.name.removesuffix(_ENDING)) for path in paths if path.name[0] != "."))

    def write(
        self,
        case_id: str,
        image: NDArray[np.float32],
        labels: NDArray[np.int16],
        foreground: Mapping[int, NDArray[np.int32]],
        *,
        spacing_mm: tuple[float, float, float],
        sources: Sequence[Source],
    ) -> None:
        """Write a case whole or not at all; the same input gives the same bytes.

        Args:
            case_id: Names the file.
            image: (C, D, H, W).
            labels: (D, H, W) class indices.
            foreground: For each class present, (n, 3) positions.
            spacing_mm: Voxel size in network axis order.
            sources: What it was made from.

        Raises:
            ValueError: Shapes do not agree.
            OSError: The folder cannot be written.
        """
        if image.ndim != 4 or image.shape[1:] != labels.shape:
            raise ValueError(f"image {image.shape} and labels {labels.shape} of case {case_id!r} do not agree")
        tensors: dict[str, NDArray[Any]] = {
            "image": np.ascontiguousarray(image, np.float32),
            "labels": np.ascontiguousarray(labels, np.int16),
        }
        for index, positions in foreground.items():
            tensors[f"{_FOREGROUND}{index}"] = np.ascontiguousarray(positions, np.int32)
        header = CaseHeader(id=case_id, spacing_mm=spacing_mm, sources=tuple(sources))
        with atomic_path(self.path(case_id)) as temporary:
            save_file(tensors, temporary, metadata={_HEADER_KEY: header.model_dump_json()})

    def is_current(self, case_id: str, files: Sequence[str | Path]) -> bool:
        """Whether the case is there and was made from these very files as they are now.

        Args:
            case_id: Of the case.
            files: Images and labels, in the order they were written with.
        """
        try:
            _, header = _open(self.path(case_id))
        except DatasetError:
            return False
        if header.id != case_id or len(header.sources) != len(files):
            return False
        return all(source.is_current(file) for source, file in zip(header.sources, files, strict=True))

    def open(self, case_id: str) -> StoredCase:
        """The case, for reading.

        Raises:
            DatasetError: It is not there, or is not a cached case of this version.
        """
        return StoredCase(self.path(case_id))


def case_file(folder: Path, case_id: str) -> Path:
    """The file of a case in a folder of cached ones; characters that no file name may have are quoted."""
    name = quote(case_id, safe=" ")
    # Names that begin with a dot are those of files being written.
    return folder / (name.replace(".", "%2E", 1) + _ENDING if name.startswith(".") else name + _ENDING)


def _unreadable(path: Path, problem: Exception) -> DatasetError:
    return DatasetError(
        f"the cached case {path} cannot be read: {problem}",
        hint="Delete this file from the cache and run `autoseg train` again: it is made anew.",
    )


def _open(path: Path) -> tuple[Any, CaseHeader]:
    """The mapped file and its header."""
    try:
        # safetensors refuses a file that is shorter or longer than its header says.
        file: Any = safe_open(path, framework="numpy")
        text = (file.metadata() or {}).get(_HEADER_KEY, "")
    except (OSError, SafetensorError) as problem:
        raise _unreadable(path, problem) from None
    header = CaseHeader.from_json(text, path, DatasetError)
    if header.version != STORE_VERSION:
        raise DatasetError(f"the cached case {path} has version {header.version}, this is version {STORE_VERSION}")
    return file, header


def foreground_locations(
    labels: NDArray[np.int16], num_classes: int, rng: np.random.Generator
) -> dict[int, NDArray[np.int32]]:
    """Positions of each foreground class, enough of them to centre patches on.

    Args:
        labels: (D, H, W) class indices.
        num_classes: Background included.
        rng: Draws the positions of large classes, without replacement.

    Returns:
        For each class present, in ascending order, (n, 3) int32: all its voxels where it has at most `MIN_LOCATIONS`,
        else the larger of that many and `LOCATIONS_FRACTION` of them.
    """
    found: dict[int, NDArray[np.int32]] = {}
    flat = np.ascontiguousarray(labels).reshape(-1)
    for index in range(1, num_classes):
        positions = np.flatnonzero(flat == index)
        if not len(positions):
            continue
        wanted = max(MIN_LOCATIONS, ceil(LOCATIONS_FRACTION * len(positions)))
        if wanted < len(positions):
            positions = np.sort(rng.choice(positions, wanted, replace=False, shuffle=False))
        found[index] = np.stack(np.unravel_index(positions, labels.shape), axis=1).astype(np.int32)
    return found
