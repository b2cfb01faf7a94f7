"""Writes the files of a repaired copy: hard links where nothing changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.checking.repair_rules import ImageFile, LabelFile
from autoseg.domain.grids import carry_labels, reorder_voxels
from autoseg.io.files import atomic_path
from autoseg.io.images import read_labels, write_labels
from autoseg.io.rewriting import rewrite_image
from autoseg.io.tiff_spacing import case_name, stating_sidecars


def link_or_copy(source: Path, target: Path) -> bool:
    """Give a file a second name, or copy it where the file system has no such links; whether it is a link.

    Raises:
        OSError: It can be neither linked nor copied.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    original = source.resolve()  # a link to a symbolic link would point to nowhere when that is moved
    try:
        os.link(original, target)
    except FileExistsError:
        raise
    except OSError:  # other disk, or no links there, or too many
        with atomic_path(target) as temporary:
            shutil.copy2(original, temporary)
        return False
    return True


def write_file(file: ImageFile | LabelFile, root: Path) -> str:
    """Write one file of the copy; "linked", "copied" or "written".

    Raises:
        DatasetError: A format cannot hold what it should.
        OSError: The disk is full, or the folder cannot be written.
    """
    source, target = Path(file.source), root / file.target
    if isinstance(file, LabelFile):
        _write_label(file, target)
    elif file.geometry is None:
        _link_sidecars(source, target)
        return "linked" if link_or_copy(source, target) else "copied"
    else:
        rewrite_image(source, target, file.geometry, file.orientation, component=file.component, fill=file.fill)
    return "written"


def _link_sidecars(source: Path, target: Path) -> None:
    """The spacing of a TIFF stack may stand beside it; one file stands beside all channels of a case."""
    beside = target.with_name(f"{case_name(target)}.json")
    for file in stating_sidecars(source):
        if not beside.exists():
            link_or_copy(file, beside)


def _write_label(file: LabelFile, target: Path) -> None:
    labels, geometry = read_labels(file.source)
    moved = (
        carry_labels(labels, geometry, file.geometry) if file.is_resampled else reorder_voxels(labels, file.orientation)
    )
    write_labels(target, mapped_labels(moved, file.table), file.geometry)


def mapped_labels(labels: NDArray[np.integer[Any]], table: Mapping[int, int]) -> NDArray[np.unsignedinteger[Any]]:
    """Label values by a table, as uint8 where all fit, else uint16.

    Args:
        labels: Any shape, 0 ... 65535.
        table: Original value to new one; values that are not in it stay.
    """
    lookup = np.arange(int(labels.max()) + 1)
    for value, new in table.items():
        if value < len(lookup):
            lookup[value] = new
    mapped = lookup[labels]
    kind = np.uint8 if int(mapped.max()) <= np.iinfo(np.uint8).max else np.uint16
    out: NDArray[np.unsignedinteger[Any]] = mapped.astype(kind)
    return out


def set_aside(case: str, files: Sequence[str], root: Path, folder: str) -> tuple[str, ...]:
    """Put a case's files where nothing finds them as part of the data set; their new names, relative to the copy.

    Args:
        case: Its id.
        files: The originals; those that do not exist are passed over.
        root: The copy.
        folder: In it.
    """
    names = []
    for file in dict.fromkeys(files):
        source = Path(file)
        if not source.is_file():
            continue
        # Images and label maps of one case may have the same name, in folders of different names.
        target = root / folder / case / source.parent.name / source.name
        link_or_copy(source, target)
        names.append(target.relative_to(root).as_posix())
    return tuple(names)
