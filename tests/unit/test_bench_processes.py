"""Commands watched with all that they start; see `scripts/bench_processes.py`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.bench_processes import OK, processes_of, pss_bytes, watch

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")

ROOT = Path(__file__).parents[2]
MIB = 2**20
HELD_MIB = 60

# A process that starts another one, says which they are, and ends when the other one does; that one holds memory.
HOLDER = f"""
import os, subprocess, sys
hold = "input(); b = bytearray(b'1' * {HELD_MIB} * 2**20); import time; time.sleep(SECONDS)"
child = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, text=True)
print(os.getpid(), child.pid, flush=True)
child.communicate("\\n")
"""


def watch_python(code: str, tmp_path: Path, **limits: float):
    return watch([sys.executable, "-c", code], dict(os.environ), tmp_path / "log", **limits)


def test_memory_of_what_a_command_starts_counts(tmp_path: Path) -> None:
    found = watch_python(HOLDER.replace("SECONDS", "1"), tmp_path)

    assert found.ended == OK
    assert HELD_MIB * MIB < found.peak_bytes < 3 * HELD_MIB * MIB
    assert found.num_processes == 2


def test_a_command_that_fails_is_a_result(tmp_path: Path) -> None:
    found = watch_python("print('first'); print('what went wrong'); raise SystemExit(7)", tmp_path)

    assert found.ended == "exit status 7"
    assert found.last_lines == ("first", "what went wrong")


def test_a_command_that_is_killed_says_by_what(tmp_path: Path) -> None:
    found = watch_python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)

    assert found.ended == "killed by SIGKILL"


def test_a_command_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    found = watch_python("import time; time.sleep(600)", tmp_path, limit_s=0.3)

    assert found.ended.startswith("stopped after ")


def test_nothing_is_left_of_a_command_that_took_too_much_memory(tmp_path: Path) -> None:
    found = watch_python(HOLDER.replace("SECONDS", "600"), tmp_path, most_bytes=HELD_MIB * MIB)

    assert found.ended == "killed at 0.1 GB"
    leader, child = (int(word) for word in found.last_lines[0].split())
    assert processes_of(leader) == []
    assert pss_bytes(child) == 0


def test_what_is_watched_ends_with_a_benchmark_that_is_told_to_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = (
        "import os, sys; from pathlib import Path; from scripts.bench_processes import end_with_this, watch; "
        "end_with_this(); "
        f"watch([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'], "
        f"dict(os.environ), Path({str(log)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while not (log.exists() and log.read_text().endswith("\n")):
        assert process.poll() is None
        time.sleep(0.05)

    process.terminate()

    assert process.wait() == 1
    assert processes_of(int(log.read_text())) == []
