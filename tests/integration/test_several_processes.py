"""`torchrun -m autoseg train`: on one node and on two, killed and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from autoseg.cli.app import main
from autoseg.io.model import load_model
from autoseg.pipeline.demo import copy_demo_data
from tests.conftest import PROJECT

pytestmark = pytest.mark.slow

NUM_CASES, EPOCHS, STEPS = 7, 3, 4
SETTINGS = {
    "network.features_per_stage": "[4,8,8,8]",
    "training.batch_size": "3",
    "training.steps_per_epoch": str(STEPS),
    "training.validation_steps_per_epoch": "1",
    # Muon turns rounding of small gradients into whole steps.
    "training.optimiser": "sgd",
    "training.batch_dice": "true",
}
CLOSE = 1e-4
TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is planned and nothing else."""
    root = tmp_path_factory.mktemp("several")
    copy_demo_data(root / "data")
    description = json.loads((root / "data" / "dataset.json").read_text())
    description["training"] = description["training"][:NUM_CASES]
    description["numTraining"] = NUM_CASES
    (root / "data" / "dataset.json").write_text(json.dumps(description))
    words = [word for key, value in SETTINGS.items() for word in ("--set", f"3d_fullres.{key}={value}")]
    assert main(["plan", str(root / "data"), "--out", str(root / "planned"), *words]) == 0
    return root / "planned"


def words_of(run: Path) -> list[str]:
    return ["train", str(run), "--fold", "0", "--epochs", str(EPOCHS), "--device", "cpu", "--precision", "fp32"]


def start(run: Path, *options: str) -> subprocess.Popen[str]:
    """Several processes of the command, by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "autoseg", *words_of(run)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def fold_of(run: Path) -> Path:
    return run / "models" / "3d_fullres" / "fold_0"


@pytest.fixture(scope="module")
def alone(planned: Path) -> Path:
    """A run that one process has trained."""
    run = Path(shutil.copytree(planned, planned.with_name("alone")))
    assert main(words_of(run)) == 0
    return run


@pytest.fixture(scope="module")
def shared(planned: Path) -> tuple[Path, str]:
    """A run that two processes have trained, and what they said."""
    run = Path(shutil.copytree(planned, planned.with_name("shared")))
    process = start(run, "--standalone", "--nproc-per-node", "2")
    words, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, words
    return run, words


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(fold_of(run)).weights)


def bytes_of(run: Path) -> bytes:
    return (fold_of(run) / "weights.safetensors").read_bytes()


def test_two_processes_end_as_one_does(alone: Path, shared: tuple[Path, str]) -> None:
    run, words = shared
    found, expected = weights(run), weights(alone)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < CLOSE
    record = json.loads((fold_of(run) / "run.json").read_text())
    assert (record["num_processes"], record["status"]) == (2, "finished")
    # One of them speaks, preprocesses, validates.
    assert words.count("Preprocessing 3d_fullres: ") == 1
    assert words.count("mean foreground Dice") == 1
    assert (fold_of(run) / "validation" / "summary.json").is_file()
    assert not (fold_of(run) / "lock").exists()
    assert not list(run.rglob(".tmp-*"))


def test_two_nodes_end_as_one_does(planned: Path, shared: tuple[Path, str]) -> None:
    """The documented command line, on two nodes that are this one."""
    run = Path(shutil.copytree(planned, planned.with_name("nodes")))
    place = ("--master-addr", "127.0.0.1", "--master-port", free_port())
    nodes = [
        start(run, "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", *place) for rank in range(2)
    ]
    said = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert bytes_of(run) == bytes_of(shared[0])
    assert "mean foreground Dice" in said[0]
    assert "mean foreground Dice" not in said[1]


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started, in their order."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return sorted(map(int, found.stdout.split()))


def kill_one(process: subprocess.Popen[str], run: Path, rank: int) -> None:
    """Kill a worker in the midst of the training."""
    deadline = time.monotonic() + TIMEOUT_S
    while not list((fold_of(run) / "resume").glob("[0-9]*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.kill(workers_of(process)[rank], signal.SIGKILL)


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep finds the workers")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_hangs_nobody_and_loses_nothing(planned: Path, shared: tuple[Path, str], rank: int) -> None:
    run = Path(shutil.copytree(planned, planned.with_name(f"killed-{rank}")))
    process = start(run, "--standalone", "--nproc-per-node", "2")
    kill_one(process, run, rank)
    words, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    assert "another process of this training has ended" in words
    again = start(run, "--standalone", "--nproc-per-node", "2")
    words, _ = again.communicate(timeout=TIMEOUT_S)
    assert again.returncode == 0, words
    assert "goes on at step" in words
    assert bytes_of(run) == bytes_of(shared[0])


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep finds the workers")
@pytest.mark.parametrize("place", ["standalone", "address"])
def test_torchrun_starts_killed_processes_again(planned: Path, shared: tuple[Path, str], place: str) -> None:
    """By its own store and by that of an address, in which both stand what the dead have said."""
    run = Path(shutil.copytree(planned, planned.with_name(f"restarted-{place}")))
    where = ("--standalone",) if place == "standalone" else ("--master-addr", "127.0.0.1", "--master-port", free_port())
    process = start(run, "--nproc-per-node", "2", "--max-restarts", "1", *where)
    kill_one(process, run, 1)
    words, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, words
    assert "goes on at step" in words
    assert bytes_of(run) == bytes_of(shared[0])
