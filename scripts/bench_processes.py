"""What the benchmarks of memory share: a command with all the processes that it starts, watched while it runs.

Memory is the proportional set size (PSS): a page that several processes map counts once in the sum over them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOOK_INTERVAL_S = 0.2
"""Looking costs a few milliseconds, and tens of them at a process of many GB: both programs pay them."""

GB = 1e9
NUM_LAST_LINES = 12
OK = "ok"

_STATE_FIELD, _SESSION_FIELD = 0, 3
"""Of what stands behind the name in /proc/PID/stat: state, parent, group, session."""

_ENDED_STATES = ("Z", "X")
_MOST_KILLS = 200
_KILL_INTERVAL_S = 0.05

_IMPORT_TORCH = """
import torch
for line in open("/proc/self/smaps_rollup"):
    if line.startswith("Pss:"):
        print(int(line.split()[1]) * 1024)
"""


def pss_bytes(pid: int | str) -> int:
    """Proportional set size of a process; 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def processes_of(session: int) -> list[int]:
    """All processes of a session that have not ended: its leader, and what that started, whoever the parent is now."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            # The name, in parentheses, may hold anything.
            fields = Path(f"/proc/{entry.name}/stat").read_text().rpartition(")")[2].split()
            if int(fields[_SESSION_FIELD]) == session and fields[_STATE_FIELD] not in _ENDED_STATES:
                found.append(int(entry.name))
    return found


def import_torch_bytes(python: str) -> int:
    """What a process takes that has imported torch and done nothing else."""
    done = subprocess.run([python, "-c", _IMPORT_TORCH], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


@dataclass(frozen=True, slots=True)
class Watched:
    """How a command ended.

    Attributes:
        ended: `OK`, or why it is not.
        seconds: From start to end.
        peak_bytes: Most memory of all its processes together, as far as it was looked at.
        peak_at_s: When that was.
        num_processes: How many there were then.
        last_lines: Of what it said.
    """

    ended: str
    seconds: float
    peak_bytes: int
    peak_at_s: float
    num_processes: int
    last_lines: tuple[str, ...]


def end_with_this() -> None:
    """From now on the command that is watched ends where this process is asked to end (SIGTERM)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def watch(
    words: Sequence[str],
    env: Mapping[str, str],
    log: Path,
    *,
    limit_s: float | None = None,
    most_bytes: float | None = None,
) -> Watched:
    """Run a command in a session of its own and look at its memory; failing is a result.

    Args:
        words: The command line.
        env: All of its environment.
        log: Gets what it says, from the beginning.
        limit_s: It is stopped when it takes longer.
        most_bytes: It is stopped, with all that it started, when its processes together take more.
    """
    with log.open("wb") as handle:
        started = time.monotonic()
        process = subprocess.Popen(
            words, env=env, stdout=handle, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            ended, peak = _looked_at(process, started, limit_s, most_bytes)
            seconds = time.monotonic() - started
        finally:
            _end(process)
    with log.open(errors="replace") as handle:
        lines = deque((line.rstrip() for line in handle if line.strip()), NUM_LAST_LINES)
    return Watched(ended, seconds, *peak, tuple(lines))


def _looked_at(
    process: subprocess.Popen[bytes], started: float, limit_s: float | None, most_bytes: float | None
) -> tuple[str, tuple[int, float, int]]:
    """How it ended, or why it is to be stopped; the peak, when that was, and of how many processes."""
    peak = (0, 0.0, 0)
    while True:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(LOOK_INTERVAL_S)
            return (OK if status == 0 else _status_in_words(status)), peak
        pids = processes_of(process.pid)
        now, elapsed = sum(pss_bytes(pid) for pid in pids), time.monotonic() - started
        if now > peak[0]:
            peak = (now, elapsed, len(pids))
        if most_bytes is not None and now > most_bytes:
            return f"killed at {now / GB:.1f} GB", peak
        if limit_s is not None and elapsed > limit_s:
            return f"stopped after {elapsed:.0f} s", peak


def _status_in_words(status: int) -> str:
    return f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the session, and wait until its memory is free; nothing where all has ended."""
    for _ in range(_MOST_KILLS):
        left = processes_of(process.pid)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            break
        time.sleep(_KILL_INTERVAL_S)
    process.wait()
