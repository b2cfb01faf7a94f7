"""One cache, many processes: killed at random moments, started all at once, or on a disk that is too small."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.scale_cases import case_contents, contents, fill, write_cases

pytestmark = pytest.mark.slow

NUM_CASES, EDGE = 8, 80
NUM_KILLS = 10
NUM_PROCESSES = 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_cases(folder, NUM_CASES, EDGE)
    return folder


def start(source: Path, cache: Path, how: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tests.scale_cases", str(source), str(NUM_CASES), str(EDGE), str(cache), how]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(
        words, env=environment, cwd=PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture(scope="module")
def in_one_go(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The cache made without a stop, and the seconds it takes."""
    cache = tmp_path_factory.mktemp("one") / "cache"
    started = time.monotonic()
    process = start(source, cache, "threads")
    assert process.communicate(timeout=300)[0].strip() == str(NUM_CASES)
    return contents(cache), time.monotonic() - started


def wait_for_cases(process: subprocess.Popen[str], cache: Path, number: int) -> None:
    """Until so many cases are there and one more is being made, or the process has ended."""
    while process.poll() is None and (len(case_contents(cache)) < number or not list(cache.glob(".lock-*"))):
        time.sleep(0.002)


@pytest.mark.parametrize("how", ["threads", "processes"])
def test_kills_at_random_moments_leave_the_same_cache(
    source: Path, in_one_go: tuple[dict[str, bytes], float], tmp_path: Path, how: str
) -> None:
    expected, seconds = in_one_go
    cache, draws, seen = tmp_path / "cache", random.Random(how), []
    cache.mkdir()
    for attempt in range(NUM_KILLS):
        process = start(source, cache, how)
        wait_for_cases(process, cache, draws.randrange(len(case_contents(cache)), NUM_CASES))
        time.sleep(draws.uniform(0, seconds / NUM_CASES))
        if attempt % 2:
            # Its workers have to notice by themselves.
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        there = case_contents(cache)
        assert all(expected[name] == content for name, content in there.items())
        seen.append(len(there))
        if len(there) > NUM_CASES // 2:
            # Take most away again, so that every kill finds work.
            for name in list(there)[1:]:
                (cache / name).unlink()
    assert len(set(seen)) > 1
    process = start(source, cache, how)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert case_contents(cache) == expected


def test_five_processes_make_each_case_once(
    source: Path, in_one_go: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    together = [start(source, cache, "processes" if number % 2 else "threads") for number in range(NUM_PROCESSES)]
    made = [int(process.communicate(timeout=300)[0]) for process in together]
    assert sum(made) == NUM_CASES
    assert contents(cache) == in_one_go[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_of_20_mb_stops_with_the_room_that_is_needed(
    source: Path, in_one_go: tuple[dict[str, bytes], float], small_disk: Path, tmp_path: Path
) -> None:
    """The whole command line, from a data set in nnU-Net's layout."""
    dataset = tmp_path / "Dataset001_balls"
    for folder in ("imagesTr", "labelsTr"):
        (dataset / folder).mkdir(parents=True)
    for number in range(NUM_CASES):
        name = f"case_{number:02}"
        os.link(source / f"{name}_image.nii.gz", dataset / "imagesTr" / f"{name}_0000.nii.gz")
        os.link(source / f"{name}_labels.nii.gz", dataset / "labelsTr" / f"{name}.nii.gz")
    (dataset / "dataset.json").write_text(
        '{"channel_names": {"0": "T1"}, "labels": {"background": 0, "ball": 1}, "numTraining": 8, '
        '"file_ending": ".nii.gz"}'
    )

    def autoseg(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "autoseg", *words],
            cwd=PROJECT,
            env=os.environ | {"PYTHONPATH": str(PROJECT), "COLUMNS": "1000"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    run = small_disk / "run"
    planned = autoseg("plan", str(dataset), "--out", str(run), "--vram", "1GB")
    assert planned.returncode == 0, planned.stderr
    # Leave less than the cases need.
    free = shutil.disk_usage(small_disk).free
    (small_disk / "else").write_bytes(b"\0" * max(0, free - 6_000_000))
    stopped = autoseg("train", str(run), "--fold", "0", "--epochs", "1", "--device", "cpu")
    assert stopped.returncode not in (0, -9)
    assert "is too full" in stopped.stderr
    assert " MB are free" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    left = [path for path in run.rglob("*") if path.name.startswith((".tmp-", ".lock-"))]
    assert left == []
    whole = list((run / "cache").rglob("*.safetensors"))
    assert all(path.stat().st_size > 100_000 for path in whole)


def test_the_made_cases_are_those_of_this_process(
    source: Path, in_one_go: tuple[dict[str, bytes], float], tmp_path: Path
) -> None:
    cases = write_cases(source, NUM_CASES, EDGE)
    assert fill(cases, tmp_path) == NUM_CASES
    assert case_contents(tmp_path).keys() == in_one_go[0].keys()
