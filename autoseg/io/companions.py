"""Files that belong to an image without being named: voxels of detached headers, spacings beside TIFF stacks.

What a path stands for is its own content and theirs; of a DICOM series it is every file of it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from autoseg.domain.endings import PAIR_ENDING, TIFF_ENDINGS, split_ending
from autoseg.io import dicom_files
from autoseg.io.content import pair_voxels
from autoseg.io.itk import detached_voxels
from autoseg.io.tiff_spacing import sidecars

Stamp = tuple[int, int, int]


def companions(path: Path) -> list[Path]:
    """The files that belong to an image file besides itself, as far as they exist."""
    ending = split_ending(path)[1].lower()
    if ending == PAIR_ENDING:
        return [file for file in (pair_voxels(path),) if file.is_file()]
    if ending in TIFF_ENDINGS:
        return sidecars(path)
    return detached_voxels(path)


def look(path: str | Path) -> tuple[int, Stamp]:
    """Size of all that an image path stands for, and a stamp that changes when any of it is touched.

    Raises:
        OSError: It is not there.
    """
    size, stamp = dicom_files.look(path)
    for file in companions(Path(path)):
        status = file.stat()
        size += status.st_size
        inode = (stamp[2] + status.st_ino) % 2**63
        stamp = (max(stamp[0], status.st_mtime_ns), max(stamp[1], status.st_ctime_ns), inode)
    return size, stamp


def content_digest(path: str | Path) -> str:
    """SHA-256 of all that an image path stands for.

    Raises:
        OSError: It cannot be read.
    """
    digest = dicom_files.content_digest(path)
    others = [dicom_files.content_digest(file) for file in companions(Path(path))]
    return hashlib.sha256("\n".join([digest, *others]).encode()).hexdigest() if others else digest
