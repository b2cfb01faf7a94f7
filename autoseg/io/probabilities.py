"""Out-of-fold probabilities of a case on its image's own grid, in 8 bit: one compressed file a case.

A probability p is stored as the nearest of 256 levels of 2/pi * arcsin(sqrt(p)): evenly spaced where a voxel is
undecided (at most 0.003 off), and finer near 0 and 1, where calibration looks (the first level above 0 is 0.00004).

The file holds `probabilities` (K, Z, Y, X): every output of the network (background and classes, or regions), on the
reversed axes of the file's grid, as NIfTI lies on disk.

Source: docs/decisions/0042; Anscombe 1948, Biometrika 35:246, for the arcsine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import Case
from autoseg.domain.inference import Tta
from autoseg.errors import DatasetError
from autoseg.io.cached import CachedFile, Header, Source, case_file, save_cached
from autoseg.io.chunks import chunk_shape

VERSION = 1
"""Part of every header: a file of another version is never read, but made anew."""

LAST_CODE = 255
"""Stands for 1; 0 stands for 0."""

Codes = NDArray[np.uint8]

_NAME = "probabilities"


def _values() -> NDArray[np.float32]:
    values: NDArray[np.float32] = (np.sin(np.arange(LAST_CODE + 1) * (np.pi / 2 / LAST_CODE)) ** 2).astype(np.float32)
    return values


VALUE_OF_CODE = _values()
"""The probability that each code stands for: float32, as a table to index with."""


class ProbabilityHeader(Header):
    """What a file says of itself; its sources are the images.

    Attributes:
        weights_sha256: Of the model that predicted.
        tta: Test-time mirroring.
    """

    KIND: ClassVar[str] = "file of out-of-fold probabilities"
    VERSION: ClassVar[int] = VERSION

    version: int = VERSION
    weights_sha256: str
    tta: Tta = "none"


class ProbabilityStore:
    """The probabilities that one model gave its validation cases.

    Args:
        folder: Made when missing.
        weights_sha256: Of the model; files of other weights count as missing.
        tta: Test-time mirroring; files of another one count as missing.
    """

    def __init__(self, folder: Path, weights_sha256: str, tta: Tta = "none") -> None:
        self.folder = Path(folder)
        self.weights_sha256 = weights_sha256
        self.tta = tta

    def path(self, case_id: str) -> Path:
        """The file of a case."""
        return case_file(self.folder, case_id)

    def is_current(self, case: Case) -> bool:
        """Whether the file is there, by these weights and of these very images."""
        try:
            header = CachedFile(self.path(case.id), ProbabilityHeader).header
        except DatasetError:
            return False
        is_ours = (header.weights_sha256, header.tta) == (self.weights_sha256, self.tta)
        return is_ours and header.is_current(case.id, case.images, case.missing)

    def write(self, case: Case, codes: Codes) -> None:
        """Write a file whole or not at all.

        Args:
            case: Whose images were predicted.
            codes: (K, Z, Y, X).

        Raises:
            OSError: The folder cannot be written.
        """
        header = ProbabilityHeader(
            id=case.id,
            weights_sha256=self.weights_sha256,
            tta=self.tta,
            sources=tuple(Source.of(file) for file in case.images),
            missing=case.missing,
        )
        chunks = {_NAME: (1, *chunk_shape(codes.shape[1:], in_slices=False))}
        save_cached(self.path(case.id), {_NAME: codes}, chunks, header)

    def open(self, case_id: str) -> StoredProbabilities:
        """The probabilities of a case, for reading.

        Raises:
            DatasetError: They are not there, or damaged.
        """
        return StoredProbabilities(self.path(case_id))


class StoredProbabilities:
    """Probabilities of a case, open for reading.

    Attributes:
        shape: (K, Z, Y, X).
    """

    def __init__(self, path: Path) -> None:
        self._file = CachedFile(path, ProbabilityHeader)
        self.shape = self._file.shape(_NAME, 4, np.uint8)

    def slices(self, start: int, stop: int) -> Codes:
        """Codes (K, stop - start, Y, X) of some slices along Z.

        Raises:
            DatasetError: The file is damaged there; it is deleted, so that it is made anew.
        """
        outputs, _, height, width = self.shape
        codes: Codes = self._file.read(_NAME, (0, start, 0, 0), (outputs, stop, height, width))
        return codes


def ranges(shape: Sequence[int], most_values: int) -> tuple[tuple[int, int], ...]:
    """Slices along Z, a few at a time.

    Args:
        shape: (K, Z, Y, X).
        most_values: At a time, unless a single slice holds more.
    """
    step = max(1, most_values // max(1, shape[0] * shape[2] * shape[3]))
    return tuple((start, min(start + step, shape[1])) for start in range(0, shape[1], step))
