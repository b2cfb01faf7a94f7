"""Atomic files and locks."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from autoseg.errors import ConfigError
from autoseg.io.files import Lock, atomic_path, file_digest, read_json, write_json, write_text


def started_at(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail_halfway() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder_whole(tmp_path: Path) -> None:
    path = tmp_path / "step"
    for content in ("one", "two"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [item.name for item in path.iterdir()] == ["two"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"x\.json is not valid JSON"):
        read_json(path)


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    # The test vector of FIPS 180-2.
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_live_owner_keeps_others_out_and_is_named(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": owner.pid, "started_at": started_at(owner.pid)}))
    try:
        with pytest.raises(ConfigError, match=f"fold 0 is in use by process {owner.pid}"), Lock(path, "fold 0"):
            pass
    finally:
        owner.communicate(b"\n")


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_a_lock_that_was_never_filled_is_taken_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lock"
    path.write_text(content)
    with Lock(path, "fold 0"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": dead.pid}))
    with Lock(path, "fold 0"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(ConfigError, match="elsewhere"), Lock(path, "fold 0"):
        pass


def test_a_process_number_that_is_used_again_is_no_owner(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "started_at": "1"}))
    with Lock(path, "fold 0"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_process_cannot_take_its_own_lock_twice(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path, "fold 0"):
        with pytest.raises(ConfigError, match="in use"), Lock(path, "fold 0"):
            pass
        assert path.exists()
    assert not path.exists()


def test_two_takers_of_a_stale_lock_never_both_own_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from autoseg.errors import ConfigError\n"
        "from autoseg.io.files import Lock\n"
        "try:\n"
        "    with Lock(Path(sys.argv[1]), 'x'): print('owner', flush=True); input()\n"
        "except ConfigError: print('refused', flush=True)\n"
    )
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "started_at": "1"}))
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    said = [taker.stdout.readline().strip() for taker in takers if taker.stdout]
    for taker in takers:
        taker.communicate("\n")
    assert sorted(said) == ["owner", "refused", "refused", "refused"]


def test_waiting_ends_when_the_owner_leaves(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    order: list[str] = []

    def late() -> None:
        with Lock(path, "case", wait=True):
            order.append("second")

    with Lock(path, "case"):
        thread = threading.Thread(target=late)
        thread.start()
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]
