"""DICOM series as cases: which path stands for each series of a folder, and what its case is called."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from autoseg.io.dicom import Found, find_series
from autoseg.io.dicom_stack import Series, parts_in_words, parts_of

log = logging.getLogger("autoseg")

_NOT_IN_NAMES = re.compile(r"[^\w.+-]+")


def name_series(path: Path) -> dict[Path, str]:
    """The paths of the series below a folder, each with the name of its case.

    A folder that holds one series is named by itself. Of a folder that holds several, a series that is alone in a
    subfolder is that subfolder, named by the way to it; one that shares its folder is its first file, named by its
    description. There a series of several volumes is left out with a warning: its first file would stand for one.

    Args:
        path: A folder.

    Returns:
        Nothing when there are no series.

    Raises:
        OSError: The folder is not there.
    """
    path = path.absolute()
    found = find_series(path)
    if len(found.series) == 1:
        return {path: path.resolve().name}
    named: dict[Path, str] = {}
    for series in found.series:
        home = series.first.path.parent
        if home != path and _is_alone_below(home, series, found):
            named[home] = "_".join(home.relative_to(path).parts)
            continue
        parts = parts_of(series.frames)
        if parts:
            log.warning(
                "%s: left out the series %r of %d volumes: %s. Name a file of the one to segment.",
                home,
                series.name,
                len(parts),
                parts_in_words(parts),
            )
            continue
        named[series.first.path] = _plain(series.name)
    return _told_apart(named)


def _is_alone_below(home: Path, series: Series, found: Found) -> bool:
    """Whether reading the folder gives this series and no other."""
    if any(not frame.path.is_relative_to(home) for frame in series.frames):
        return False
    return not any(
        frame.path.is_relative_to(home) for other in found.series if other is not series for frame in other.frames
    )


def name_files(files: Sequence[Path]) -> dict[Path, str]:
    """The first files of the volumes that files of one folder stand for, each with the name of its case.

    All files of a volume stand for one case, named by the folder when its series is alone there, else by the series;
    of several volumes of a series, the name ends in what tells them apart.

    Raises:
        OSError: A file is not there.
    """
    found = find_series(files[0])
    home = files[0].resolve().parent.name
    name_of: dict[Path, tuple[Path, str]] = {}
    for series in found.series:
        name = home if len(found.series) == 1 else _plain(series.name)
        parts = parts_of(series.frames)
        volumes = [(part.frames, f"{name}_{_plain(part.name)}") for part in parts]
        num_files = sum(len({frame.path for frame in part.frames}) for part in parts)
        if not parts or num_files > len({frame.path for frame in series.frames}):
            volumes = [(series.frames, name)]  # a file with the frames of several volumes names none of them
        for frames, full_name in volumes:
            first = min(frame.path for frame in frames)
            name_of |= {frame.path: (first, full_name) for frame in frames}
    # A file of no series fails when it is read, with the reason.
    return dict(name_of.get(file.absolute(), (file.absolute(), file.stem)) for file in files)


def _plain(text: str) -> str:
    """Text that may be part of a file's name: "b = 800" gives "b_800"."""
    return _NOT_IN_NAMES.sub("_", text.replace(" = ", "_")).strip("_.") or "series"


def _told_apart(named: dict[Path, str]) -> dict[Path, str]:
    """Equal names get a number, in the order of the series."""
    counts: dict[str, int] = {}
    apart: dict[Path, str] = {}
    for path, name in named.items():
        counts[name] = counts.get(name, 0) + 1
        apart[path] = name if counts[name] == 1 else f"{name}_{counts[name]}"
    return apart
