"""Writing files so that a crash never leaves half of one, and locks so that two processes never share a folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from autoseg.errors import AutosegError, ConfigError

_HASH_CHUNK_BYTES = 1 << 20


def _temporary_name(path: Path) -> Path:
    """A name in the same folder, so that renaming is atomic, with the same ending, by which writers choose formats."""
    return path.with_name(f".tmp-{os.getpid()}-{path.name}")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path (file or folder) in the same folder that takes the name `path` when the block succeeds.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        elif path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON; NaN and infinity are refused because JSON has none."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_text(path: Path, error: type[AutosegError] = ConfigError) -> str:
    """Read a UTF-8 file.

    Raises:
        AutosegError: Of kind `error`: it is missing or not text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read as text: {problem}") from None


def read_json(path: Path, error: type[AutosegError] = ConfigError) -> Any:
    """Read JSON.

    Raises:
        AutosegError: Of kind `error`: it is missing, not text or not JSON.
    """
    try:
        return json.loads(read_text(path, error))
    except json.JSONDecodeError as problem:
        raise error(f"{path} is not valid JSON: {problem}") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content as hex, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while chunk := handle.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Lock:
    """One owner at a time for a folder, by a file with host and pid; the lock of a dead process is taken over.

    Args:
        path: The lock file.
        what: What is locked, for messages ("fold 0 of 3d_fullres").

    Raises:
        ConfigError: On entering, when a live process on this host, or any on another host, holds it.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path = Path(path)
        self._what = what

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Two tries: the second after a stale lock was removed.
        for _ in range(2):
            if self._take():
                return self
            self._remove_if_stale()
        raise ConfigError(f"{self._what} is in use by another process that has just taken {self._path}")

    def _take(self) -> bool:
        """Make the lock file, already filled, unless there is one: a hard link never replaces a file."""
        temporary = _temporary_name(self._path)
        temporary.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        try:
            os.link(temporary, self._path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def _remove_if_stale(self) -> None:
        try:
            owner = json.loads(self._path.read_text())
            host, pid = str(owner["host"]), int(owner["pid"])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            # Not written by us, or cut short by a full disk: nobody owns it.
            self._path.unlink(missing_ok=True)
            return
        if host == socket.gethostname() and (pid == os.getpid() or not _is_alive(pid)):
            self._path.unlink(missing_ok=True)
            return
        raise ConfigError(
            f"{self._what} is in use by process {pid} on {host}",
            hint=f"Wait for it or stop it. If that process is gone, delete {self._path}.",
        )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
