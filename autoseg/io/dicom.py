"""DICOM series: found by their headers, sorted by position, read as one volume or refused with the reason.

A folder stands for the one series that it and its subfolders hold; a file stands for its series in its folder, and of
a series that holds several volumes (b-values, echoes, time points) for the volume it belongs to.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import AutosegError, DatasetError
from autoseg.io.content import broken
from autoseg.io.dicom_files import DICOM_ENDINGS, is_dicom, list_files, look
from autoseg.io.dicom_frames import DICOM_PROBLEMS, Frame, read_frames
from autoseg.io.dicom_pixels import read_values, require_pixels, value_type
from autoseg.io.dicom_stack import Series, Stack, group_series, make_stack, parts_in_words, parts_of, series_in_words
from autoseg.io.header import ImageHeader

__all__ = ["DICOM_ENDINGS", "Found", "find_series", "is_dicom", "read_dicom", "read_dicom_header", "stack_of"]

log = logging.getLogger("autoseg")

_REMEMBERED_FOLDERS = 8
"""Headers of the last folders are kept: a case is looked at when it is found, read and written."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a folder holds.

    Attributes:
        series: By series number, then UID.
        set_apart: Objects that are no images to segment, with what they are.
        unreadable: Broken files with the reason.
        num_others: Files that are not DICOM, and tables of contents.
    """

    series: tuple[Series, ...]
    set_apart: tuple[tuple[Path, str], ...]
    unreadable: tuple[tuple[Path, str], ...]
    num_others: int

    @property
    def set_apart_in_words(self) -> str:
        """What was not taken for images, such as "2 localizer, 1 segmentation, 3 other files"; "" when nothing."""
        counts = Counter(kind for _, kind in self.set_apart)
        words = [f"{count} {kind}" for kind, count in sorted(counts.items())]
        if self.num_others:
            words.append(f"{self.num_others} other file{'s' if self.num_others > 1 else ''}")
        return ", ".join(words)


def find_series(path: str | Path) -> Found:
    """The series of a folder and its subfolders; of a file, those of its folder. Only headers are read.

    Raises:
        OSError: The path is not there.
    """
    path = Path(path).absolute()
    return _find(path if path.is_dir() else path.parent, path.is_dir(), look(path))


@lru_cache(_REMEMBERED_FOLDERS)
def _find(folder: Path, is_deep: bool, stamp: tuple[int, tuple[int, int, int]]) -> Found:
    """See `find_series`; the stamp makes a folder that changed another one."""
    listing = list_files(folder if is_deep else folder / "any")
    frames: list[Frame] = []
    set_apart: list[tuple[Path, str]] = []
    unreadable = [(file, "it has no DICOM mark") for file in listing.unmarked]
    for file in listing.dicom:
        try:
            content = read_frames(file)
        except DICOM_PROBLEMS as problem:
            lines = str(problem).splitlines() or [type(problem).__name__]
            unreadable.append((file, f"its header is broken: {lines[0].rstrip('.')}"))
            continue
        if isinstance(content, str):
            set_apart.append((file, content))
        else:
            frames += content
    found = Found(group_series(frames), tuple(set_apart), tuple(unreadable), listing.num_others)
    if found.set_apart_in_words:
        log.info("%s: not taken for images: %s", folder, found.set_apart_in_words)
    return found


def read_dicom_header(path: Path, volume: str | None = None) -> ImageHeader:
    """Shape and grid of a series, without its pixels.

    Raises:
        DatasetError: See `stack_of`; or a file cannot hold what its header promises.
        GeometryError: See `stack_of`.
    """
    stack = stack_of(path, volume)
    require_pixels(stack.frames)
    return _header(stack)


def read_dicom(path: Path, volume: str | None = None) -> tuple[NDArray[Any], ImageHeader]:
    """A series as (1, I, J, K): columns, rows, slices along their normal; slope and intercept of each slice applied.

    Args:
        path: A folder that holds one series, or any file of a series.
        volume: Of a series that holds several, the name of one, such as "b = 800".

    Returns:
        Integers where every slope is 1 and every intercept whole, else float32; and the header.

    Raises:
        DatasetError: See `stack_of`; or a file is broken or truncated.
        GeometryError: See `stack_of`.
    """
    stack = stack_of(path, volume)
    return read_values(stack.frames)[np.newaxis], _header(stack)


def _header(stack: Stack) -> ImageHeader:
    return ImageHeader(stack.geometry, 1, str(value_type(stack.frames)))


def stack_of(path: str | Path, volume: str | None = None) -> Stack:
    """The slices that a path stands for, in order, with their grid.

    Args:
        path: See `read_dicom`.
        volume: See `read_dicom`.

    Raises:
        DatasetError: There is no series or there are several, a file is broken, slices are missing, or several lie at
            one position.
        GeometryError: The slices make no even grid.
    """
    path = Path(path)
    try:
        found = find_series(path)
    except OSError as problem:
        raise DatasetError(f"{path} cannot be read ({problem.strerror or problem})") from None
    series = _series_of_file(path, found) if path.is_file() else _only_series(path, found)
    frames = _volume_of(path, series, volume)
    if found.unreadable:
        raise _incomplete(path, found, frames)
    return make_stack(frames, path)


def _series_of_file(path: Path, found: Found) -> Series:
    file = path.absolute()
    for other, reason in found.unreadable:
        if other == file:
            raise broken(path, reason)
    for other, kind in found.set_apart:
        if other == file:
            hint = "Convert a DICOM segmentation to NIfTI first, for example with dcmqi's segimage2itkimage."
            raise DatasetError(
                f"{path}: it is a DICOM {kind}, not an image to segment", hint=hint if kind == "segmentation" else ""
            )
    return next(item for item in found.series if any(frame.path == file for frame in item.frames))


def _only_series(path: Path, found: Found) -> Series:
    if len(found.series) == 1:
        return found.series[0]
    if not found.series:
        words = found.set_apart_in_words
        problems = "; ".join(f"{file.name}: {reason}" for file, reason in found.unreadable[:3])
        raise DatasetError(
            f"{path} is a folder without DICOM images"
            + (f"; it holds {words}" if words else "")
            + (f"; not readable: {problems}" if problems else ""),
            hint="Name an image file, or a folder that holds the files of one series.",
        )
    raise DatasetError(
        f"{path} holds {len(found.series)} series: {series_in_words(found.series)}",
        hint="Name a folder that holds one series, or a file of the series to use.",
    )


def _volume_of(path: Path, series: Series, volume: str | None) -> tuple[Frame, ...]:
    """The slices of one volume of a series; all of them where nothing was chosen, so that the stack can say so."""
    parts = parts_of(series.frames)
    if volume is not None:
        chosen = [part for part in parts if part.name == volume]
        if not chosen:
            which = f"it holds {parts_in_words(parts)}" if parts else "it holds one"
            raise DatasetError(f"{path}: there is no volume {volume!r} in this series; {which}")
        return chosen[0].frames
    if path.is_file():
        file = path.absolute()
        holders = [part for part in parts if any(frame.path == file for frame in part.frames)]
        if len(holders) == 1:
            return holders[0].frames
    return series.frames


def _incomplete(path: Path, found: Found, frames: tuple[Frame, ...]) -> DatasetError:
    """The error for a folder with broken files, which may belong to the series."""
    names = "; ".join(f"{file.name}: {reason}" for file, reason in found.unreadable[:3])
    more = f" and {len(found.unreadable) - 3} more" if len(found.unreadable) > 3 else ""
    try:
        make_stack(frames, path)
        rest = f"the other {len(frames)} slices lie evenly, so the first or the last may be lost, or nothing"
    except AutosegError as problem:
        rest = "of the others " + problem.message.removeprefix(f"{path}: ")
    count = len(found.unreadable)
    return DatasetError(
        f"{path}: {count} file{'s' if count > 1 else ''} cannot be read ({names}{more}); {rest}",
        hint="Fetch the series again; or take a file away that does not belong to it.",
    )
