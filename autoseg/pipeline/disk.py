"""Room on the disk for preprocessed cases: how much they will take, whether it is there, what to say when it is not."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import ceil, prod
from pathlib import Path

from autoseg.domain.dataset import Case
from autoseg.domain.fingerprint import Fingerprint
from autoseg.domain.plan import PreprocessPlan
from autoseg.errors import ConfigError
from autoseg.io.files import FULL_DISK
from autoseg.io.store import LOCATIONS_FRACTION, MIN_LOCATIONS
from autoseg.planning.kept import FLOAT32_BYTES
from autoseg.planning.memory import LABEL_BYTES

_POSITION_BYTES = 12
"""A position in the tables of foreground voxels: three 32-bit integers."""

_HEADER_BYTES = 1500
"""Of a cached case: where its chunks lie, and the source files with their checksums."""

_LEAST_FRACTION = 0.03
"""Real cases are never smaller in the cache than this part of what they are in memory. Source: the smallest of seven
data sets was 0.07 (headneck_ct), docs/benchmarks/cache.md."""

_ENOUGH_CASES = 3
"""So many cases say how well the others can be compressed."""

_MARGIN = 0.8
"""Work stops early only when there is less than this part of the room that it looks like: the rest is uncertain."""

_INTERVAL_S = 1.0
"""Between two looks at the disk."""


def prepared_shapes(plan: PreprocessPlan, fingerprint: Fingerprint) -> list[tuple[int, int, int]]:
    """Voxels of every case after preprocessing, in network axis order."""
    # A fingerprint counts its axes Z, Y, X; the plan counts the canonical ones, of which X is the first.
    order = [2 - axis for axis in plan.axis_order]
    skipped = 3 - len(plan.target_spacing)
    shapes = fingerprint.shapes
    if not plan.crop_to_nonzero and fingerprint.cases:
        shapes = tuple(case.shape_original for case in fingerprint.cases)
    found = []
    for shape, spacing in zip(shapes, fingerprint.spacings_mm, strict=True):
        # Slices of 2D networks are not resampled across.
        targets = [spacing[order[axis]] for axis in range(skipped)] + list(plan.target_spacing)
        depth, height, width = (
            max(1, round(shape[axis] * spacing[axis] / wanted)) for axis, wanted in zip(order, targets, strict=True)
        )
        found.append((depth, height, width))
    return found


def cached_bytes(plan: PreprocessPlan, fingerprint: Fingerprint) -> list[float]:
    """The most disk that each preprocessed case can take: image, labels, and tables of where the classes are."""
    a_voxel = len(plan.normalization) * FLOAT32_BYTES + LABEL_BYTES
    return [
        prod(shape) * a_voxel + _HEADER_BYTES + _POSITION_BYTES * _num_locations(fingerprint, number, prod(shape))
        for number, shape in enumerate(prepared_shapes(plan, fingerprint))
    ]


def most_bytes(cases: Iterable[Case], plan: PreprocessPlan, fingerprint: Fingerprint) -> dict[str, float]:
    """The most disk that each of these cases can take; of those that the fingerprint does not know, their mean."""
    sizes = cached_bytes(plan, fingerprint)
    known = {case.case: size for case, size in zip(fingerprint.cases, sizes, strict=False)}
    mean = sum(sizes) / len(sizes)
    return {case.id: known.get(case.id, mean) for case in cases}


def _num_locations(fingerprint: Fingerprint, number: int, voxels: int) -> int:
    """Positions in the tables of a case; without counts of its classes each is taken to have enough voxels."""
    if not fingerprint.cases:
        return (fingerprint.num_classes - 1) * min(MIN_LOCATIONS, voxels)
    scale = voxels / prod(fingerprint.shapes[number])
    counts = (count * scale for count in fingerprint.cases[number].class_voxels)
    return sum(round(min(count, max(MIN_LOCATIONS, ceil(LOCATIONS_FRACTION * count)))) for count in counts)


class DiskGuard:
    """Sees to it that work which does not fit on the disk stops early, and says how much room it needs.

    Args:
        folder: What is being filled.
        files: For each case, where it will be, and the most that it can take.
    """

    def __init__(self, folder: Path, files: Iterable[tuple[Path, float]]) -> None:
        self._folder = folder
        self._files = tuple(files)
        self._next_look = 0.0

    def check(self) -> None:
        """Look, now and then, whether what is missing will fit.

        Raises:
            ConfigError: Surely not.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _INTERVAL_S
        needed, is_measured = self._needed()
        least = needed * (_MARGIN if is_measured else _LEAST_FRACTION)
        if self._free() < least:
            raise self._error(needed, is_measured=is_measured)

    @contextmanager
    def room(self) -> Iterator[None]:
        """Tell of a full disk in words.

        Raises:
            ConfigError: The disk is full; says how much room is needed.
        """
        try:
            yield
        except OSError as problem:
            if problem.errno not in FULL_DISK:
                raise
            needed, is_measured = self._needed()
            raise self._error(needed, is_measured=is_measured) from None

    def _needed(self) -> tuple[float, bool]:
        """Bytes that the cases which are not there yet will take, and whether those that are there tell."""
        there, missing, taken, count = 0.0, 0.0, 0, 0
        for path, most in self._files:
            size = 0
            with suppress(OSError):
                size = path.stat().st_size
            if size:
                there, taken, count = there + most, taken + size, count + 1
            else:
                missing += most
        if count < min(_ENOUGH_CASES, len(self._files)):
            return missing, False
        return missing * taken / there, True

    def _free(self) -> int:
        folder = next(path for path in (self._folder, *self._folder.absolute().parents) if path.exists())
        return shutil.disk_usage(folder).free

    def _error(self, needed: float, *, is_measured: bool) -> ConfigError:
        missing = sum(not path.is_file() for path, _ in self._files)
        return ConfigError(
            f"the disk of {self._folder} is too full: the {missing} cases that are not preprocessed yet need "
            f"{'about' if is_measured else 'at most'} {_megabytes(needed)}, {_megabytes(self._free())} are free",
            hint="Make room, or plan into a folder on another disk. Nothing is lost: the same command goes on with the "
            "cases that are missing.",
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
