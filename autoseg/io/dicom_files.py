"""Which files are DICOM, told by their mark and not by their names, and what a folder of them holds as a whole."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from autoseg.domain.endings import IMAGE_ENDINGS, split_ending
from autoseg.io.files import file_digest

DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
"""Files of these names claim to be DICOM: without the mark they are broken, not strangers."""

_MARK_AT, _MARK = 128, b"DICM"
"""Source: DICOM PS3.10, section 7.1."""

_INDEX_FILE = "DICOMDIR"
"""The table of contents of a medium; holds no image. Source: DICOM PS3.10, section 8.6."""

_WARNINGS_LOCK = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's warnings about odd but readable values away from the user.

    Python's list of warning filters belongs to the whole process, so only one thread at a time is in here.
    """
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def has_mark(path: Path) -> bool:
    """Whether the file carries DICOM's mark; False when it cannot be read."""
    if not path.is_file():  # opening a pipe would wait for ever
        return False
    try:
        with path.open("rb") as stream:
            stream.seek(_MARK_AT)
            return stream.read(len(_MARK)) == _MARK
    except OSError:
        return False


def is_dicom(path: str | Path) -> bool:
    """Whether a path is read as DICOM: a folder, a file named so, or a file of no known ending that has the mark."""
    path = Path(path)
    ending = split_ending(path)[1].lower()
    if ending in IMAGE_ENDINGS:
        return False
    return path.is_dir() or ending in DICOM_ENDINGS or has_mark(path)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files that a series may be made of.

    Attributes:
        dicom: Files with the mark, sorted.
        unmarked: Files that are named as DICOM and are not.
        num_others: Strangers and tables of contents.
    """

    dicom: tuple[Path, ...]
    unmarked: tuple[Path, ...]
    num_others: int


def list_files(path: Path) -> Listing:
    """Sort the files of a folder and its subfolders; of a file, those that lie beside it in its folder.

    Hidden files are passed over.
    """
    files = _below(path) if path.is_dir() else [item for item in path.parent.iterdir() if item.is_file()]
    dicom, unmarked, num_others = [], [], 0
    for file in sorted(files):
        if file.name.startswith("."):
            continue
        if file.name.upper() == _INDEX_FILE:
            num_others += 1
        elif has_mark(file):
            dicom.append(file)
        elif file.suffix.lower() in DICOM_ENDINGS:
            unmarked.append(file)
        else:
            num_others += 1
    return Listing(tuple(dicom), tuple(unmarked), num_others)


def _below(folder: Path) -> list[Path]:
    """Every file of a folder and its subfolders; links to folders are not followed, so that no loop is."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent) / name for name in names]
    return found


def look(path: str | Path) -> tuple[int, tuple[int, int, int]]:
    """Size of what an image path stands for, and a stamp that changes when a file is touched, added or taken away.

    Args:
        path: A file, or a path that `is_dicom` takes for DICOM; then every DICOM file of the folder counts.

    Raises:
        OSError: It is not there.
    """
    path = Path(path)
    if not is_dicom(path):
        status = path.stat()
        return status.st_size, (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    path.stat()
    states = [file.stat() for file in list_files(path).dicom]
    newest = max((state.st_mtime_ns for state in states), default=0)
    changed = max((state.st_ctime_ns for state in states), default=0)
    # The inodes tell apart what size and times do not, such as a file that went while another came.
    inodes = sum(state.st_ino for state in states) % 2**63
    return sum(state.st_size for state in states), (newest, changed, inodes)


def content_digest(path: str | Path) -> str:
    """SHA-256 of what an image path stands for; names and order of a folder's DICOM files do not count.

    Raises:
        OSError: It cannot be read.
    """
    path = Path(path)
    if not is_dicom(path):
        return file_digest(path)
    path.stat()
    parts = sorted(file_digest(file) for file in list_files(path).dicom)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
