"""Several processes train one fold: what they agree on, and how each of them ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy_training
from threaded_processes import ThreadedProcesses, together
from toy_training import fill_store, toy_plan, train_toy, train_toy_together

from autoseg import compute, runtime
from autoseg.cli.app import main
from autoseg.compute import ALONE, own_device
from autoseg.errors import (
    AutosegError,
    ConfigError,
    DatasetError,
    DeviceMemoryError,
    LeaderStopped,
    ProcessLost,
    TrainingInterrupted,
)
from autoseg.io.model import load_model
from autoseg.io.store import CaseStore
from autoseg.training import checkpoint, following, orders
from autoseg.training.batches import BatchReader
from autoseg.training.following import require_shares
from autoseg.training.records import Choices, TrainSettings, read_metrics, read_run
from tests.conftest import PROJECT

EPOCHS, STEPS = 2, 6
CLOSE = 1e-4
"""Of weights of about 1 after a dozen steps that each round in another order."""

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def settings(**fields: object) -> TrainSettings:
    return TrainSettings(**{"num_epochs": EPOCHS, "device": "cpu", "precision": "fp32", **fields})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    return fill_store(tmp_path_factory.mktemp("store"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder).weights)


def assert_close(folder: Path, other: Path) -> None:
    found, expected = weights(folder), weights(other)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < CLOSE


@pytest.mark.parametrize(
    ("world_size", "training", "precision"),
    [
        (2, {"ema_decay": 0.9}, "fp32"),
        (3, {"batch_dice": True}, "fp32"),
        (2, {"batch_dice": True, "optimiser": "adamw", "learning_rate": 1e-4}, "fp32"),
        (2, {"optimiser": "muon"}, "fp32"),
        (2, {}, "bf16"),
    ],
)
def test_processes_end_as_one_does(
    store: CaseStore, tmp_path: Path, world_size: int, training: dict[str, object], precision: str
) -> None:
    """With 2 processes and 3 samples a step the shares are uneven."""
    plan, asked = toy_plan(**training), settings(precision=precision)
    train_toy(tmp_path / "one", store, asked, plan)
    ended = together(world_size, lambda some: train_toy_together(some, tmp_path / "many", store, asked, plan))
    assert ended == [None] * world_size
    if (precision, plan.configurations["3d_fullres"].training.optimiser) == ("fp32", "sgd"):
        # AdamW and Muon take whole steps where a gradient is nothing but rounding, and the weights follow it.
        assert_close(tmp_path / "many", tmp_path / "one")
    one, many = (read_metrics(tmp_path / name) for name in ("one", "many"))
    tolerance = {"fp32": 3 * CLOSE, "bf16": 1e-2}[precision]
    assert [record.train_loss for record in many] == pytest.approx([r.train_loss for r in one], rel=tolerance)
    assert [record.validation_loss for record in many] == pytest.approx(
        [r.validation_loss for r in one], rel=10 * tolerance
    )
    record = read_run(tmp_path / "many")
    assert record is not None
    assert (record.num_processes, record.status, record.steps) == (world_size, "finished", EPOCHS * STEPS)


class StopElsewhere:
    """Progress of the main process after some steps of which the other process is asked to stop."""

    def __init__(self, steps: int) -> None:
        self.left, self.is_time = steps, threading.Event()

    def start(self, description: str, total: int | None) -> None: ...

    def advance(self, step: int = 1, note: str = "") -> None:
        self.left -= step
        if self.left == 0:
            self.is_time.set()

    def finish(self, note: str = "") -> None: ...

    @property
    def is_set(self) -> bool:
        """As the other process's `StopRequest`."""
        return self.is_time.is_set()

    def __enter__(self) -> StopElsewhere:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_a_training_of_two_is_stopped_by_either_and_goes_on_bit_for_bit(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process restores; the other is told weights and momentum."""
    plan = toy_plan(ema_decay=0.9)
    together(2, lambda some: train_toy_together(some, tmp_path / "whole", store, settings(), plan))
    stop = StopElsewhere(STEPS + 1)

    def work(processes: ThreadedProcesses) -> None:
        if not processes.is_main:
            train_toy_together(processes, tmp_path / "cut", store, settings(), plan)
            return
        with orders.leading(processes):
            train_toy(tmp_path / "cut", store, settings(), plan, processes=processes, progress=stop)

    with monkeypatch.context() as patched:
        patched.setattr(following, "StopRequest", lambda: stop)
        first, second = together(2, work)
    assert isinstance(first, TrainingInterrupted)
    assert f"after step {STEPS + 2}; everything is saved" in first.message
    assert isinstance(second, LeaderStopped)
    assert (second.message, second.exit_code) == (first.message, first.exit_code)
    ended = together(2, lambda some: train_toy_together(some, tmp_path / "cut", store, settings(), plan))
    assert ended == [None] * 2
    whole, cut = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_a_case_that_another_process_cannot_read_stops_both(store: CaseStore, tmp_path: Path) -> None:
    class Broken:
        folder = store.folder

        def ids(self) -> tuple[str, ...]:
            return store.ids()

        def open(self, case_id: str) -> object:
            raise OSError("the disk has gone")

    def work(processes: ThreadedProcesses) -> None:
        given = store if processes.is_main else Broken()
        train_toy_together(processes, tmp_path, given, settings())  # type: ignore[arg-type]

    first, second = together(2, work)
    assert isinstance(first, ProcessLost)
    assert isinstance(second, DatasetError)
    assert "the disk has gone" in second.message
    assert not (tmp_path / "lock").exists()


def test_the_others_hear_of_an_error_of_the_main_process(store: CaseStore, tmp_path: Path) -> None:
    together(2, lambda some: train_toy_together(some, tmp_path, store, settings(num_epochs=1)))
    ended = together(2, lambda some: train_toy_together(some, tmp_path, store, settings(seed=1)))
    assert isinstance(ended[0], ConfigError)
    assert isinstance(ended[1], LeaderStopped)
    assert ended[1].exit_code == ConfigError.exit_code
    # And of a fold that is finished already.
    finished = together(2, lambda some: train_toy_together(some, tmp_path, store, settings(num_epochs=1)))
    assert finished == [None, None]


def test_a_process_that_is_gone_hangs_nobody(store: CaseStore, tmp_path: Path) -> None:
    def work(processes: ThreadedProcesses) -> None:
        if processes.rank == 1:
            raise SystemExit("killed")
        train_toy_together(processes, tmp_path, store, settings())

    ended = together(3, work)
    assert [type(problem) for problem in ended] == [ProcessLost, SystemExit, ProcessLost]


def test_an_error_of_no_kind_of_ours_is_told_too() -> None:
    def work(processes: ThreadedProcesses) -> None:
        if processes.is_main:
            with orders.leading(processes):
                raise ZeroDivisionError("a bug")
        orders.hear(processes)

    first, second = together(2, work)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, LeaderStopped)
    assert (second.exit_code, second.message) == (AutosegError.exit_code, "ZeroDivisionError('a bug')")


def test_nothing_is_told_to_processes_that_have_parted() -> None:
    def work(processes: ThreadedProcesses) -> None:
        processes.part()
        if processes.is_main:
            with orders.leading(processes):
                raise DeviceMemoryError("on all of them")

    first, second = together(2, work)
    assert isinstance(first, DeviceMemoryError)
    assert second is None


@pytest.mark.parametrize(
    "order",
    [
        orders.Begin(precision="bf16", choices=Choices(layout="channels_last", micro_batch=2)),
        orders.Step(number=7, learning_rate=0.1 + 0.2, momentum=None, micro_batch=None),
        orders.State(tensors=(orders.TensorLike.of("a", torch.zeros(2, 3)),), loss_scale=1.0, growth=3),
        orders.TakePart(fold=3),
        orders.TakePart(fold="all"),
        orders.Done(),
    ],
)
def test_orders_arrive_as_they_were_given(order: orders.Order) -> None:
    def work(processes: ThreadedProcesses) -> orders.Order:
        if processes.is_main:
            orders.tell(processes, order)
            return order
        return orders.hear(processes)

    assert together(2, work) == [order, order]


def test_more_processes_than_samples_are_refused() -> None:
    part = toy_plan().configurations["3d_fullres"]
    require_shares(part, ThreadedProcesses.of(0, part.training.batch_size))
    with pytest.raises(ConfigError, match="3 samples cannot be shared by 4 processes"):
        require_shares(part, ThreadedProcesses.of(0, 4))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_are_the_samples_of_the_batch(store: CaseStore, world_size: int) -> None:
    """To the voxel, whoever reads them, and in turns, so that samples centred on foreground are spread evenly."""
    part = toy_plan(batch_size=5).configurations["3d_fullres"]
    reader = BatchReader.of(part, store, store.ids(), 0, runtime.STAGE_SAMPLE)
    whole = reader.read(7)
    shares = [reader.shared(ThreadedProcesses.of(rank, world_size)).read(7) for rank in range(world_size)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for place, sample in enumerate(whole):
        found = shares[place % world_size][place // world_size]
        assert (found.spec, found.augmentation.noise_seed) == (sample.spec, sample.augmentation.noise_seed)
        assert np.array_equal(found.image, sample.image)
        assert np.array_equal(found.labels, sample.labels)


# --- How processes are started ---------------------------------------------------------------------------------------


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert not compute.is_launched()
    assert compute.launched_rank() == 0
    with compute.joined(torch.device("cpu")) as processes:
        assert processes is ALONE
    total = torch.ones(3)
    ALONE.add_up(total)
    assert total.tolist() == [1, 1, 1]
    assert ALONE.broadcast({"a": 1}) == {"a": 1}
    assert ALONE.sums(1, 2) == (1, 2)


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_what_other_programs_leave_in_the_environment_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert compute.is_launched()
    assert compute.launched_rank() == 1
    monkeypatch.delenv(missing)
    assert not compute.is_launched()
    monkeypatch.setenv(missing, LAUNCHED[missing])
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not compute.is_launched()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that says it has two GPUs, and the second of two processes on it; which GPUs were taken."""
    taken: list[int] = []
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_each_process_takes_the_gpu_of_its_number(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("auto") == torch.device("cuda")
    assert two_gpus == [1]
    with pytest.raises(ConfigError, match="cannot share the device cuda:0"):
        own_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU of its own: there are 2"):
        own_device("cuda")
    assert own_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("command", ["run", "plan", "predict", "report"])
def test_only_training_is_shared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert main([command, "somewhere"]) == ConfigError.exit_code
    assert f"`autoseg {command}` was started as 2 processes" in capsys.readouterr().err


def test_processes_that_are_started_again_do_not_meet_the_dead() -> None:
    """The same store serves every start; in the first one the second process died before it had understood."""
    store = dist.HashStore()
    store.set("autoseg/hello/1", "dead")
    store.set("autoseg/starts", "1")
    numbers = [together(3, lambda some: compute.meet(store, some.rank, 3)) for _ in range(2)]
    assert numbers == [[2] * 3, [3] * 3]


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "WORK_TIMEOUT", timedelta(seconds=0))
    with pytest.raises(RuntimeError, match=r"processes \[1, 2\] did not come"):
        compute.meet(dist.HashStore(), 0, 3)


def test_real_processes_end_as_threads(store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo, joined by the variables that torchrun sets; the same bits, because sums of two have one order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (LAUNCHED | {"MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    plan, real, threads = toy_plan(ema_decay=0.9), tmp_path / "real", tmp_path / "threads"
    command = [sys.executable, toy_training.__file__, str(real), str(store.folder), str(EPOCHS)]
    other = subprocess.Popen(command, env=os.environ | {"RANK": "1", "PYTHONPATH": str(PROJECT)})
    with compute.joined(torch.device("cpu")) as processes:
        assert (processes.rank, processes.world_size) == (0, 2)
        train_toy_together(processes, real, store, settings(), plan)
    assert other.wait(timeout=60) == 0
    together(2, lambda some: train_toy_together(some, threads, store, settings(), plan))
    assert (real / "weights.safetensors").read_bytes() == (threads / "weights.safetensors").read_bytes()
    assert checkpoint.newest(real) is not None
