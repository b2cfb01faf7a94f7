"""The memory of this machine and of this process, now, at its peak, free; and what other programs take of its cores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

_KIB = 1024

MEMORY_POLL_S = 0.005
"""How often a process that is watched is asked for its memory; a training step's peaks last longer."""

_ROLLUP_FILE = "/proc/self/smaps_rollup"
_MEMINFO_FILE = "/proc/meminfo"

_STAT_FILE = "/proc/stat"
_STAT_COLUMNS = 8
_IDLE_COLUMNS = (3, 4)
"""Idle, and waiting for a disk."""

_MOST_OTHER_WORK = 0.9
"""Where less of the cores is left, what was measured says nothing of a free machine."""

_CGROUP_FOLDERS = ("/sys/fs/cgroup", "/sys/fs/cgroup/memory")
_CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Names of limit and use in versions 2 and 1 of Linux's control groups; a container's memory is limited by them."""


def memory_now_bytes() -> int | None:
    """Memory of this process: its own pages and its part of those it shares (PSS); None where the system is silent."""
    return _line_kib(_ROLLUP_FILE, "Pss:")


def _line_kib(file: str, key: str) -> int | None:
    """Bytes of the line "KEY number kB" of a file in /proc."""
    try:
        with open(file, encoding="ascii") as handle:
            found = [int(line.split()[1]) * _KIB for line in handle if line.startswith(key)]
    except OSError:
        return None
    return found[0] if found else None


class PeakMemory:
    """The most memory that is taken at a time inside a `with` block, beyond what was taken before it.

    On the CPU this is the growth of the process's PSS, read every few milliseconds in a thread and once more at the
    end; on CUDA it is what torch's allocator gave out.

    Args:
        device: Whose memory.

    Attributes:
        bytes: The result, once the block is over; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._highest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="autoseg-memory", daemon=True)
        self.bytes: int | None = None

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = self._highest = memory_now_bytes() or 0
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            import torch

            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._stop.set()
        self._thread.join()
        last = memory_now_bytes()
        if last is not None and self._device.type == "cpu":
            self.bytes = max(self._highest, last) - self._before

    def _watch(self) -> None:
        while not self._stop.wait(MEMORY_POLL_S):
            self._highest = max(self._highest, memory_now_bytes() or 0)


def device_memory_bytes(device: torch.device) -> tuple[int, int] | None:
    """Free and total memory of a device; of the CPU what programs may still take, a container's limit respected.

    Returns:
        None where the system does not tell.
    """
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    return host_memory_bytes() if device.type == "cpu" else None


def host_memory_bytes() -> tuple[int, int] | None:
    """What programs may still take of the computer's memory, and all of it, a container's limit respected.

    Returns:
        None where the system does not tell.
    """
    available, whole = _line_kib(_MEMINFO_FILE, "MemAvailable:"), _line_kib(_MEMINFO_FILE, "MemTotal:")
    if available is None or whole is None:
        return None
    for folder in _CGROUP_FOLDERS:
        for names in _CGROUP_FILES:
            limit, used = (_number_in(os.path.join(folder, name)) for name in names)
            if limit is not None and used is not None:
                available, whole = min(available, max(0, limit - used)), min(whole, limit)
    return available, whole


def _number_in(file: str) -> int | None:
    """The number that is all a file holds; None where there is no such file, or it says "max"."""
    try:
        with open(file, encoding="ascii") as handle:
            text = handle.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


class OtherWork:
    """The part of this process's cores that other programs took inside a `with` block.

    From the system's own account of its cores, less the CPU time of this process; Linux alone tells.

    Attributes:
        fraction: The result, once the block is over, from 0 to less than 1; 0 where the system does not tell.
    """

    def __init__(self) -> None:
        self._before: tuple[int, int, float] | None = None
        self.fraction = 0.0

    def __enter__(self) -> Self:
        self._before = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        now = self._now()
        if now is None or self._before is None:
            return
        busy, whole, own = (late - early for late, early in zip(now, self._before, strict=True))
        if whole > 0:
            others = busy - own * os.sysconf("SC_CLK_TCK")
            self.fraction = min(max(others / whole, 0.0), _MOST_OTHER_WORK)

    @staticmethod
    def _now() -> tuple[int, int, float] | None:
        """Ticks in which the cores had work, all their ticks, and seconds of this process."""
        try:
            cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            with open(_STAT_FILE, encoding="ascii") as handle:
                lines = [line.split() for line in handle if line.startswith("cpu")]
        except (OSError, AttributeError):
            return None
        # The last two columns, guests, are part of the first two.
        ticks = [[int(value) for value in line[1 : 1 + _STAT_COLUMNS]] for line in lines if line[0] in cores]
        whole = sum(map(sum, ticks))
        idle = sum(line[column] for line in ticks for column in _IDLE_COLUMNS)
        return whole - idle, whole, time.process_time()


class MemoryGate:
    """Lets so much work in at a time as there is memory for; what needs more than there is comes in alone.

    Args:
        num_bytes: What all work inside may take together; None where it is not known: then everything comes in.
    """

    def __init__(self, num_bytes: int | None) -> None:
        self._limit = num_bytes
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def room(self, num_bytes: int) -> Iterator[None]:
        """Wait until there is room, and hold it inside the `with` block."""
        with self._changed:
            self._changed.wait_for(lambda: self._fits(num_bytes))
            self._taken += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= num_bytes
                self._changed.notify_all()

    def _fits(self, num_bytes: int) -> bool:
        return self._limit is None or self._taken == 0 or self._taken + num_bytes <= self._limit


def limit_memory(num_bytes: int) -> None:
    """Let this process take at most so much more memory; what asks for more gets an error instead of the machine.

    Linux alone counts this way; elsewhere nothing is changed.
    """
    taken = _line_kib("/proc/self/status", "VmData:")
    if taken is not None and resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = taken + num_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
