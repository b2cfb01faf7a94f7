"""The cache of label maps that a cascade's network sees: one safetensors file a case, on the grid of its cached image.

A file holds `labels` (D, H, W), class indices, and, as JSON in its header, the files it was made from and the weights
that predicted it. Each model of the previous stage has a folder of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from autoseg.domain.values import Value
from autoseg.errors import DatasetError
from autoseg.io.files import atomic_path
from autoseg.io.store import Source, case_file

MAP_VERSION = 1
"""Part of every header: a file of another version is never read, but made anew."""

_HEADER_KEY = "autoseg"
_LABELS = "labels"

IndexMap = NDArray[np.uint8] | NDArray[np.int16]
"""Class indices of a prediction: never the ignore index."""


class MapHeader(Value):
    """What a cached label map says of itself.

    Attributes:
        weights_sha256: Of the model that predicted it.
        sources: The files it was made from: images, then the predicted label map.
    """

    version: int = MAP_VERSION
    id: str
    weights_sha256: str
    sources: tuple[Source, ...]


class StoredMap:
    """A cached label map, open for reading; reads touch only the pages asked for.

    Attributes:
        id: Of the case.
        shape: (D, H, W).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, self.header = _open(path)
        self.id = self.header.id
        try:
            self._labels = self._file.get_slice(_LABELS)
        except SafetensorError as problem:
            raise _unreadable(path, problem) from None
        depth, height, width = self._labels.get_shape()
        self.shape = (int(depth), int(height), int(width))

    def read(self, start: Sequence[int], stop: Sequence[int]) -> IndexMap:
        """A copy of one box (d, h, w).

        Args:
            start: First voxel along each axis.
            stop: One past the last; the box must lie inside the map.

        Raises:
            ValueError: The box is empty or reaches outside.
            DatasetError: The file is damaged.
        """
        if not all(0 <= low < high <= size for low, high, size in zip(start, stop, self.shape, strict=True)):
            raise ValueError(f"box {tuple(start)} to {tuple(stop)} is not inside the map of {self.id!r}, {self.shape}")
        box = tuple(slice(int(low), int(high)) for low, high in zip(start, stop, strict=True))
        try:
            labels: IndexMap = self._labels[box]
        except SafetensorError as problem:
            raise _unreadable(self._path, problem) from None
        return labels


class MapStore:
    """A folder of label maps that one model predicted.

    Args:
        folder: Made when missing.
        weights_sha256: Of the model; maps of other weights count as missing.
    """

    def __init__(self, folder: Path, weights_sha256: str) -> None:
        self.folder = Path(folder)
        self.weights_sha256 = weights_sha256

    def path(self, case_id: str) -> Path:
        """The file of a case."""
        return case_file(self.folder, case_id)

    def write(self, case_id: str, labels: IndexMap, sources: Sequence[Source]) -> None:
        """Write a map whole or not at all; the same input gives the same bytes.

        Args:
            case_id: Names the file.
            labels: (D, H, W) class indices.
            sources: What it was made from.

        Raises:
            OSError: The folder cannot be written.
        """
        header = MapHeader(id=case_id, weights_sha256=self.weights_sha256, sources=tuple(sources))
        tensors: dict[str, NDArray[Any]] = {_LABELS: np.ascontiguousarray(labels)}
        with atomic_path(self.path(case_id)) as temporary:
            save_file(tensors, temporary, metadata={_HEADER_KEY: header.model_dump_json()})

    def is_current(self, case_id: str, files: Sequence[str | Path]) -> bool:
        """Whether the map is there, by these weights, and made from these very files as they are now.

        Args:
            case_id: Of the case.
            files: Images and the predicted label map, in the order they were written with.
        """
        try:
            _, header = _open(self.path(case_id))
        except DatasetError:
            return False
        if (header.id, header.weights_sha256, len(header.sources)) != (case_id, self.weights_sha256, len(files)):
            return False
        return all(source.is_current(file) for source, file in zip(header.sources, files, strict=True))

    def open(self, case_id: str) -> StoredMap:
        """The map of a case, for reading.

        Raises:
            DatasetError: It is not there, is damaged, or other weights predicted it.
        """
        path = self.path(case_id)
        found = StoredMap(path)
        if found.header.weights_sha256 != self.weights_sha256:
            raise DatasetError(
                f"the label map {path} was predicted by the weights {found.header.weights_sha256[:12]}, expected "
                f"{self.weights_sha256[:12]}: the previous stage has been trained anew",
                hint="Run `autoseg train` again.",
            )
        return found


@dataclass(frozen=True, slots=True)
class OutOfFoldMaps:
    """For each case the map that was predicted by a model which never saw the case.

    Attributes:
        stores: By case id.
    """

    stores: Mapping[str, MapStore]

    def open(self, case_id: str) -> StoredMap:
        """The map of a case, for reading.

        Raises:
            DatasetError: See `MapStore.open`.
        """
        return self.stores[case_id].open(case_id)


def _unreadable(path: Path, problem: Exception) -> DatasetError:
    return DatasetError(
        f"the cached label map {path} cannot be read: {problem}",
        hint="Delete this file from the cache and run `autoseg train` again: it is made anew.",
    )


def _open(path: Path) -> tuple[Any, MapHeader]:
    """The mapped file and its header."""
    try:
        # safetensors refuses a file that is shorter or longer than its header says.
        file: Any = safe_open(path, framework="numpy")
        text = (file.metadata() or {}).get(_HEADER_KEY, "")
    except (OSError, SafetensorError) as problem:
        raise _unreadable(path, problem) from None
    header = MapHeader.from_json(text, path, DatasetError)
    if header.version != MAP_VERSION:
        raise DatasetError(f"the cached label map {path} has version {header.version}, this is version {MAP_VERSION}")
    return file, header
