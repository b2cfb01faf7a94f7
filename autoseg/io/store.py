"""The cache of preprocessed cases: one safetensors file a case, written atomically, read box by box.

A file holds `image` (C, D, H, W) float32, `labels` (D, H, W) int16 and `foreground.N` (n, 3) int32, the positions at
which a patch may be centred on class or region N (0: on any annotated voxel of a case that has others), and, as JSON in
its header, the source files it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.errors import DatasetError
from autoseg.io.cached import ENDING, Header, Source, case_file, open_cached, save_cached, unreadable

STORE_VERSION = 2
"""Part of every header: a file of another version is never read, but made anew."""

MIN_LOCATIONS = 10_000
"""Positions kept of each class at least, where it has as many. Source: nnU-Net v2, class locations."""

LOCATIONS_FRACTION = 0.01
"""Part of a class's voxels kept at least. Source: nnU-Net v2, class locations."""

_FOREGROUND = "foreground."


class CaseHeader(Header):
    """What a cached case says of itself.

    Attributes:
        spacing_mm: Voxel size in network axis order.
    """

    KIND: ClassVar[str] = "cached case"
    VERSION: ClassVar[int] = STORE_VERSION

    version: int = STORE_VERSION
    spacing_mm: tuple[float, float, float]


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
        self._file, header = open_cached(path, CaseHeader)
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
            raise unreadable(path, CaseHeader, problem) from None
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
            raise unreadable(self._path, CaseHeader, problem) from None


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
        paths = self.folder.glob(f"*{ENDING}")
        return tuple(sorted(unquote(path.name.removesuffix(ENDING)) for path in paths if path.name[0] != "."))

    def write(
        self,
        case_id: str,
        image: NDArray[np.float32],
        labels: NDArray[np.int16],
        foreground: Mapping[int, NDArray[np.int32]],
        *,
        spacing_mm: tuple[float, float, float],
        sources: Sequence[Source],
        missing: tuple[int, ...] = (),
    ) -> None:
        """Write a case whole or not at all; the same input gives the same bytes.

        Args:
            case_id: Names the file.
            image: (C, D, H, W).
            labels: (D, H, W) value indices.
            foreground: For each class present, (n, 3) positions; see `foreground_locations`.
            spacing_mm: Voxel size in network axis order.
            sources: What it was made from.
            missing: Channels that the case lacks, which are 0 in the image.

        Raises:
            ValueError: Shapes do not agree.
            OSError: The folder cannot be written.
        """
        if image.ndim != 4 or image.shape[1:] != labels.shape:
            raise ValueError(f"image {image.shape} and labels {labels.shape} of case {case_id!r} do not agree")
        tensors: dict[str, NDArray[Any]] = {
            "image": np.asarray(image, np.float32),
            "labels": np.asarray(labels, np.int16),
        }
        for index, positions in foreground.items():
            tensors[f"{_FOREGROUND}{index}"] = np.asarray(positions, np.int32)
        header = CaseHeader(id=case_id, spacing_mm=spacing_mm, sources=tuple(sources), missing=missing)
        save_cached(self.path(case_id), tensors, header)

    def is_current(self, case_id: str, files: Sequence[str | Path], missing: tuple[int, ...] = ()) -> bool:
        """Whether the case is there and was made from these very files as they are now.

        Args:
            case_id: Of the case.
            files: Images and labels, in the order they were written with.
            missing: Channels that the case lacks.
        """
        try:
            _, header = open_cached(self.path(case_id), CaseHeader)
        except DatasetError:
            return False
        return header.is_current(case_id, files, missing)

    def open(self, case_id: str) -> StoredCase:
        """The case, for reading.

        Raises:
            DatasetError: It is not there, or is not a cached case of this version.
        """
        return StoredCase(self.path(case_id))


def foreground_locations(
    labels: NDArray[np.int16], num_values: int, rng: np.random.Generator, regions: NDArray[np.bool_] | None = None
) -> dict[int, NDArray[np.int32]]:
    """Positions of each foreground class or region, enough of them to centre patches on.

    Args:
        labels: (D, H, W) value indices.
        num_values: Background included.
        rng: Draws the positions of large classes, without replacement.
        regions: (K, num_values) bool, which value indices each region holds; None of ordinary classes.

    Returns:
        For each class present, counted from 1 and in ascending order, (n, 3) int32: all its voxels where it has at most
        `MIN_LOCATIONS`, else the larger of that many and `LOCATIONS_FRACTION` of them. Where some voxels have the
        ignore index, the same of all others together, under 0.
    """
    found: dict[int, NDArray[np.int32]] = {}
    flat = np.ascontiguousarray(labels).reshape(-1)

    def keep(index: int, places: NDArray[np.bool_]) -> None:
        positions = np.flatnonzero(places)
        if not len(positions):
            return
        wanted = max(MIN_LOCATIONS, ceil(LOCATIONS_FRACTION * len(positions)))
        if wanted < len(positions):
            positions = np.sort(rng.choice(positions, wanted, replace=False, shuffle=False))
        found[index] = np.stack(np.unravel_index(positions, labels.shape), axis=1).astype(np.int32)

    if regions is None:
        for index in range(1, num_values):
            keep(index, flat == index)
    else:
        for index, row in enumerate(regions, start=1):
            keep(index, np.isin(flat, np.flatnonzero(row)))
    if flat.size and int(flat.min()) == IGNORE_INDEX:
        keep(0, flat != IGNORE_INDEX)
    return dict(sorted(found.items()))
