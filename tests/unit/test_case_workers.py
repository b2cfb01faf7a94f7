"""Work over cases by threads and by processes: the same results, nothing lost when memory or the disk runs out."""

from __future__ import annotations

import errno
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from autoseg.domain.dataset import Case
from autoseg.domain.fingerprint import CaseStats
from autoseg.errors import AutosegError, ConfigError, DatasetError, DeviceMemoryError
from autoseg.io import cached
from autoseg.io.files import remove_leftovers
from autoseg.io.store import CaseStore
from autoseg.pipeline import cases as mapping
from autoseg.pipeline import disk
from autoseg.pipeline.cases import map_cases
from autoseg.pipeline.disk import DiskGuard
from autoseg.pipeline.needs import measuring_bytes, preparing_bytes
from autoseg.pipeline.tasks import Measuring
from autoseg.pipeline.worker import Answer
from autoseg.pipeline.workers import Processes, WorkerEnded
from tests.scale_cases import A_CASE_BYTES, PLAN, SCHEMA, contents, fill, write_case, write_cases


@pytest.fixture
def cases(tmp_path: Path) -> tuple[Case, ...]:
    return write_cases(tmp_path / "files", 3)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is short: every case gets a process of its own."""
    monkeypatch.setattr(mapping, "_THREADS_FRACTION", 0.0)


def measure(cases: tuple[Case, ...], after_each: Callable[[], None] | None = None) -> tuple[CaseStats, ...]:
    needs = {case.id: A_CASE_BYTES for case in cases}
    task = Measuring(labels=SCHEMA, num_channels=1)
    return map_cases(task, CaseStats, cases, needs, description="measuring", after_each=after_each)


def test_processes_do_what_threads_do(cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    by_threads = measure(cases)
    assert [stats.case for stats in by_threads] == [case.id for case in cases]
    monkeypatch.setattr(mapping, "_THREADS_FRACTION", 0.0)
    assert measure(cases) == by_threads


def test_a_killed_worker_is_named_and_its_case_done_again_alone(
    cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = measure(cases)
    monkeypatch.setattr(mapping, "_THREADS_FRACTION", 0.0)
    start, killed = Processes._start, list[int]()

    def killed_at_first(self: Processes) -> subprocess.Popen[str]:
        process = start(self)
        if not killed:
            killed.append(process.pid)
            process.kill()
        return process

    monkeypatch.setattr(Processes, "_start", killed_at_first)
    with caplog.at_level(logging.WARNING, "autoseg"):
        assert measure(cases) == expected
    assert len(killed) == 1
    assert "SIGKILL, as the system does when memory runs out" in caplog.text
    named = [case.id for case in cases if f"case {case.id} is tried again, alone" in caplog.text]
    assert len(named) == 1
    assert f"case {named[0]}: its process" in caplog.text


def ended_for(case_id: str, returncode: int) -> Callable[[Processes, Case], Answer]:
    ask = Processes.ask

    def ended(self: Processes, case: Case) -> Answer:
        if case.id == case_id:
            raise WorkerEnded(returncode)
        return ask(self, case)

    return ended


@pytest.mark.usefixtures("processes")
def test_a_case_that_is_killed_even_alone_is_named_and_the_others_are_done(
    cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Processes, "ask", ended_for("case_01", -9))
    done: list[None] = []
    with pytest.raises(DeviceMemoryError, match="1 of 3 cases need more memory") as stopped:
        measure(cases, lambda: done.append(None))
    assert len(done) == 2
    (problem,) = stopped.value.problems
    assert problem.startswith("case_01: its process was ended by SIGKILL")
    assert "it needs about 0.1 GB" in problem


@pytest.mark.usefixtures("processes")
def test_a_worker_that_ends_by_itself_is_a_bug(cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "ask", ended_for("case_01", 3))
    with pytest.raises(AutosegError, match="case case_01: its process ended with exit code 3, which is a bug"):
        measure(cases)


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_every_case_that_fails_is_named(
    cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    monkeypatch.setattr(mapping, "_THREADS_FRACTION", fraction)
    for case in cases[:2]:
        Path(case.images[0]).write_bytes(b"no image")
    with pytest.raises(DatasetError, match="2 of 3 cases cannot be used") as stopped:
        measure(cases)
    assert [problem.split(":")[0] for problem in stopped.value.problems] == ["case_00", "case_01"]


@pytest.mark.usefixtures("processes")
def test_whoever_stops_leaves_no_process(cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = Processes._start, list[subprocess.Popen[str]]()

    def noted(self: Processes) -> subprocess.Popen[str]:
        started.append(start(self))
        return started[-1]

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Processes, "_start", noted)
    with pytest.raises(KeyboardInterrupt):
        measure(cases, interrupt)
    assert started
    assert all(process.returncode is not None for process in started)


def test_a_new_case_is_the_only_one_that_is_prepared(tmp_path: Path, cases: tuple[Case, ...]) -> None:
    cache = tmp_path / "cache"
    assert fill(cases, cache) == 3
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert fill((*cases, write_case(tmp_path / "files", 3, 24)), cache) == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(cache.iterdir())) == 4


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def guard_of(cases: tuple[Case, ...], cache: Path) -> DiskGuard:
    store = CaseStore(cache)
    return DiskGuard(cache, [(store.path(case.id), 200_000.0) for case in cases])


def test_too_little_room_is_told_before_anything_is_done(
    tmp_path: Path, cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 5000, 5000))
    with pytest.raises(ConfigError, match=r"the 3 cases .* need at most 0\.6 MB, 0\.0 MB are free") as stopped:
        guard_of(cases, tmp_path / "cache").check()
    assert "goes on" in stopped.value.hint


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    tmp_path: Path, cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    cache, write, count = tmp_path / "cache", cached._write, list[Path]()

    def full(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        count.append(path)
        if len(count) > 1:
            raise OSError(number, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(cached, "_write", full)
        with pytest.raises(ConfigError, match="is too full: the 2 cases"), guard_of(cases, cache).room():
            fill(cases, cache)
    assert len(contents(cache)) == 1
    assert fill(cases, cache) == 2


def test_other_system_errors_are_not_taken_for_a_full_disk(tmp_path: Path, cases: tuple[Case, ...]) -> None:
    with pytest.raises(PermissionError), guard_of(cases, tmp_path).room():
        raise PermissionError(errno.EACCES, "no")


def test_what_dead_processes_left_is_taken_away(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    code = (
        "import os, sys; from pathlib import Path; from autoseg.io.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    import sys

    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.bin")], check=False)
    assert [path.name.startswith(".tmp-") for path in tmp_path.iterdir()] == [True]
    (tmp_path / ".tmp-of somebody else").write_bytes(b"")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-of somebody else"]


def test_needs_follow_the_headers_and_small_files_are_not_opened(tmp_path: Path) -> None:
    small, large = write_case(tmp_path, 0, 24), write_case(tmp_path, 1, 96)
    needs = measuring_bytes([small, large], 1)
    assert needs["case_00"] < 50_000_000
    assert needs["case_01"] == 96**3 * 32
    prepared = preparing_bytes([small, large], PLAN)
    # 1.25 to 1 mm: about twice as many voxels.
    growth = 1.25**3
    assert prepared["case_01"] == pytest.approx(96**3 * (4 + 18 + growth * (8 + 22)), rel=0.01)
    broken = small.model_copy(update={"images": (str(tmp_path / "missing.nii.gz"),)})
    assert measuring_bytes([broken], 1) == {"case_00": 0}
    assert preparing_bytes([broken], PLAN) == {"case_00": 0}
