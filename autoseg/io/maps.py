"""The cache of label maps that a cascade's network sees: one compressed file a case, on the grid of its cached image.

A file holds `labels` (D, H, W), class indices, and, as JSON in its header, the files it was made from and the weights
that predicted it. Each model of the previous stage has a folder of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError
from autoseg.io.cached import CachedFile, Header, Source, case_file, save_cached
from autoseg.io.chunks import chunk_shape

MAP_VERSION = 2
"""Part of every header: a file of another version is never read, but made anew."""

_LABELS = "labels"

IndexMap = NDArray[np.uint8] | NDArray[np.int16]
"""Class indices of a prediction: never the ignore index."""


class MapHeader(Header):
    """What a cached label map says of itself; its sources are images, then the predicted label map.

    Attributes:
        weights_sha256: Of the model that predicted it.
    """

    KIND: ClassVar[str] = "cached label map"
    VERSION: ClassVar[int] = MAP_VERSION

    version: int = MAP_VERSION
    weights_sha256: str


class StoredMap:
    """A cached label map, open for reading; reads touch only the pages asked for.

    Attributes:
        id: Of the case.
        shape: (D, H, W).
    """

    def __init__(self, path: Path) -> None:
        self._file = CachedFile(path, MapHeader)
        self.header = self._file.header
        self.id = self.header.id
        depth, height, width = self._file.shape(_LABELS, 3, np.uint8, np.int16)
        self.shape = (depth, height, width)

    def read(self, start: Sequence[int], stop: Sequence[int]) -> IndexMap:
        """A copy of one box (d, h, w).

        Args:
            start: First voxel along each axis.
            stop: One past the last; the box must lie inside the map.

        Raises:
            ValueError: The box is empty or reaches outside.
            DatasetError: The file is damaged there; it is deleted, so that it is made anew.
        """
        if not all(0 <= low < high <= size for low, high, size in zip(start, stop, self.shape, strict=True)):
            raise ValueError(f"box {tuple(start)} to {tuple(stop)} is not inside the map of {self.id!r}, {self.shape}")
        labels: IndexMap = self._file.read(_LABELS, start, stop)
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

    def write(self, case_id: str, labels: IndexMap, sources: Sequence[Source], *, in_slices: bool = False) -> None:
        """Write a map whole or not at all; the same input gives the same bytes.

        Args:
            case_id: Names the file.
            labels: (D, H, W) class indices.
            sources: What it was made from.
            in_slices: Whether slices across the first axis will be read; else boxes.

        Raises:
            OSError: The folder cannot be written.
        """
        header = MapHeader(id=case_id, weights_sha256=self.weights_sha256, sources=tuple(sources))
        chunk = chunk_shape(labels.shape, in_slices=in_slices)
        save_cached(self.path(case_id), {_LABELS: labels}, {_LABELS: chunk}, header)

    def is_current(self, case_id: str, files: Sequence[str | Path]) -> bool:
        """Whether the map is there, by these weights, and made from these very files as they are now.

        Args:
            case_id: Of the case.
            files: Images and the predicted label map, in the order they were written with.
        """
        try:
            header = CachedFile(self.path(case_id), MapHeader).header
        except DatasetError:
            return False
        return header.weights_sha256 == self.weights_sha256 and header.is_current(case_id, files)

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
