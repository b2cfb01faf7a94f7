"""Zip archives of unknown origin: only what is asked for is unpacked, and nothing outside the folder it goes to."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from autoseg.errors import ModelError

MOST_ENTRIES = 100_000
"""An exported model has some tens of files, with all predictions of its cross-validation some thousands."""

LARGEST_RATIO = 100
"""Unpacked to packed bytes. Trained weights hardly shrink, JSON does by ten to twenty times; deflate can reach 1032."""

_RATIO_FROM_BYTES = 1 << 20
"""Smaller files may shrink as they like."""

_SPARE_BYTES = 1 << 28
"""Left free on the disk."""

_COPY_BYTES = 1 << 20
_MOST_NAMED = 8
_DRIVE = re.compile(r"[A-Za-z]:")


def extract(archive: Path, folder: Path, is_wanted: Callable[[PurePosixPath], bool]) -> None:
    """Unpack the wanted files of a zip archive below a folder.

    The names of all entries are looked at first: an archive with one that leads outside, with a link, or with
    passwords is refused as a whole, whatever is wanted of it.

    Args:
        archive: The file.
        folder: Where to; made when missing.
        is_wanted: Gets the name of a file inside the archive.

    Raises:
        ModelError: It is no zip archive, is damaged, or could do harm; all reasons are listed.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = opened.infolist()
            _refuse(archive, _problems(entries))
            wanted = [item for item in entries if not item.is_dir() and is_wanted(PurePosixPath(item.filename))]
            _refuse(archive, _bombs(wanted, folder))
            for item in wanted:
                _copy(opened, item, folder / item.filename)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as problem:
        raise ModelError(f"{archive} cannot be read as a zip archive: {problem}", hint="Copy the file again.") from None


def _refuse(archive: Path, problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _MOST_NAMED} more"] if len(problems) > _MOST_NAMED else []
        raise ModelError(
            f"the archive {archive} is refused, nothing was unpacked",
            problems=[*problems[:_MOST_NAMED], *more],
            hint="No program's export makes such an archive. Unpack it yourself if you trust it, and give the folder.",
        )


def _problems(entries: list[zipfile.ZipInfo]) -> list[str]:
    if len(entries) > MOST_ENTRIES:
        return [f"it has {len(entries):,} entries, at most {MOST_ENTRIES:,} are read"]
    problems = []
    seen: set[str] = set()
    for item in entries:
        reason = _reason_against(item)
        if item.filename in seen:
            reason = reason or "occurs twice"
        seen.add(item.filename)
        if reason:
            problems.append(f"{item.filename!r} {reason}")
    return problems


def _reason_against(item: zipfile.ZipInfo) -> str:
    # zipfile makes slashes of the separators of its own system only; others' may come as they are.
    name = item.filename.replace("\\", "/")
    mode = stat.S_IFMT(item.external_attr >> 16)
    if name.startswith("/") or _DRIVE.match(name):
        return "is an absolute path"
    if ".." in name.split("/"):
        return "leads out of the archive's folder"
    if mode == stat.S_IFLNK:
        return "is a link"
    if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is no ordinary file"
    if item.flag_bits & 0x1:
        return "is encrypted"
    return ""


def _bombs(wanted: list[zipfile.ZipInfo], folder: Path) -> list[str]:
    problems = [
        f"{item.filename!r} would unpack {item.compress_size:,} bytes to {item.file_size:,}"
        for item in wanted
        if item.file_size > max(_RATIO_FROM_BYTES, LARGEST_RATIO * item.compress_size)
    ]
    total = sum(item.file_size for item in wanted)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free - _SPARE_BYTES
    if total > free:
        problems.append(f"its files would take {total:,} bytes, {max(0, free):,} are free")
    return problems


def _copy(opened: zipfile.ZipFile, item: zipfile.ZipInfo, target: Path) -> None:
    """Never more bytes than were promised, whatever the stream gives."""
    target.parent.mkdir(parents=True, exist_ok=True)
    left = item.file_size
    with opened.open(item) as source, target.open("wb") as out:
        while chunk := source.read(_COPY_BYTES):
            left -= len(chunk)
            if left < 0:
                raise zipfile.BadZipFile(f"{item.filename!r} holds more than it says")
            out.write(chunk)
