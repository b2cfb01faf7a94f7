"""Writing files so that a crash never leaves half of one, and locks so that two processes never share a folder."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from autoseg.errors import AutosegError, ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when there is no room left, or none for this user."""

_HASH_CHUNK_BYTES = 1 << 20

log = logging.getLogger("autoseg")

_WAIT_INTERVAL_S = 0.2
"""Between two looks at a lock that is waited for."""

_TELL_INTERVAL_S = 30.0
"""Between two messages about a lock that is waited for: its owner may have died on another host."""


_TEMPORARY = re.compile(r"\.tmp-(?P<host>.+)-(?P<pid>[0-9]+)-(?P<started_at>[0-9]*)-[0-9a-f]{8}-", re.DOTALL)


def _temporary_name(path: Path) -> Path:
    """A name in the same folder, so that renaming is atomic, with the same ending, by which writers choose formats.

    No other process has it, on this host or another that shares the folder.
    """
    owner = _Owner.this_process()
    token = secrets.token_hex(4)
    return path.with_name(f".tmp-{owner.host}-{owner.pid}-{owner.started_at}-{token}-{path.name}")


def remove_leftovers(folder: Path) -> None:
    """Take away temporary files and folders in a folder whose process has ended before it could."""
    for path in folder.glob(".tmp-*"):
        found = _TEMPORARY.match(path.name)
        if found is None or not _Owner(found["host"], int(found["pid"]), found["started_at"]).is_gone:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


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
def atomic_path(path: Path, *, is_durable: bool = True) -> Iterator[Path]:
    """A temporary path (file or folder) in the same folder that takes the name `path` when the block succeeds.

    Args:
        path: The name in the end.
        is_durable: Whether to wait until the disk has it, so that it outlives a power failure too.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        yield temporary
        if temporary.is_file():
            if is_durable:
                _sync(temporary)
        elif path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        if is_durable:
            _sync_folder(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A folder beside a path, for as long as the block lasts; see `remove_leftovers` for that of a killed process.

    Args:
        beside: What is made of it; its folder is made when missing.

    Raises:
        OSError: It cannot be made.
    """
    folder = _temporary_name(Path(beside))
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _started_at(pid: int) -> str:
    """When a process of this host started, in the system's own unit; empty where the system does not tell."""
    try:
        # Field 22; the second field is the command in parentheses and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder's locks for a moment, where the file system can."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no locks of this kind; then two takers in the same instant are not told apart.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Owner(NamedTuple):
    """Who holds a lock: a process number is used again some day, so its start counts too."""

    host: str
    pid: int
    started_at: str

    @classmethod
    def this_process(cls) -> Self:
        return cls(socket.gethostname(), os.getpid(), _started_at(os.getpid()))

    @property
    def is_gone(self) -> bool:
        """Whether it is certain that the owner has ended; of another host nothing is certain."""
        if self.host != socket.gethostname():
            return False
        return not _is_alive(self.pid) or self.started_at != _started_at(self.pid)


class LockHeld(ConfigError):
    """Somebody else holds a lock that was not to be waited for."""


class Lock:
    """One owner at a time for a folder, by a file with host and process; the lock of a dead process is taken over.

    Args:
        path: The lock file.
        what: What is locked, for messages ("fold 0 of 3d_fullres").
        wait: Wait until it is free instead of raising.

    Raises:
        LockHeld: On entering, when a live process on this host, or any on another host, holds it.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False) -> None:
        self._path = Path(path)
        self._what = what
        self._wait = wait

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        told_at = time.monotonic() + _TELL_INTERVAL_S
        while (owner := self._take()) is not None:
            message = f"{self._what} is in use by process {owner.pid} on {owner.host}"
            hint = f"If that process is gone, delete {self._path}."
            if not self._wait:
                raise LockHeld(message, hint=f"Wait for it or stop it. {hint}")
            if time.monotonic() >= told_at:
                log.warning("waiting: %s. %s", message, hint)
                told_at += _TELL_INTERVAL_S
            time.sleep(_WAIT_INTERVAL_S)
        return self

    def _take(self) -> _Owner | None:
        """Make the lock file ours; the owner when somebody else holds it."""
        with _alone_in(self._path.parent):
            owner = self._owner()
            if owner is not None and not owner.is_gone:
                return owner
            try:
                self._path.write_text(json.dumps(_Owner.this_process()._asdict()))
            except OSError:
                # A full disk leaves an empty file.
                self._path.unlink(missing_ok=True)
                raise
            return None

    def _owner(self) -> _Owner | None:
        try:
            data = json.loads(self._path.read_text())
            return _Owner(str(data["host"]), int(data["pid"]), str(data.get("started_at", "")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Not there, or cut short by a full disk: nobody owns it.
            return None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _alone_in(self._path.parent):
            if self._owner() == _Owner.this_process():
                self._path.unlink(missing_ok=True)
