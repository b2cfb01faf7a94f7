"""A step that does not fit into memory is repeated with fewer samples at a time, and gives the same result."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from threaded_processes import ThreadedProcesses, together
from torch import Tensor
from toy_training import PATCH, fill_store, toy_plan, train_toy, train_toy_together

from autoseg.compute import ALONE, Processes
from autoseg.errors import DeviceMemoryError
from autoseg.io.model import load_model
from autoseg.io.store import CaseStore
from autoseg.training import orders
from autoseg.training.batches import Batch
from autoseg.training.compiling import Forward
from autoseg.training.learner import Learner
from autoseg.training.records import Choices, TrainSettings, read_metrics, read_run

CLOSE = 1e-5
STEPS = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    return fill_store(tmp_path_factory.mktemp("store"))


def settings(**fields: object) -> TrainSettings:
    return TrainSettings(**{"num_epochs": 2, "device": "cpu", "precision": "fp32", **fields})  # type: ignore[arg-type]


class SmallMemory:
    """Makes forward passes fail that have too many samples.

    Args:
        monkeypatch: Of the test.
        most: Samples that fit.
        after: So many passes fit in any case.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, after: int = 0) -> None:
        self.most, self.left, self.refused = most, after, 0
        run = Forward.__call__

        def limited(forward: Forward, images: Tensor) -> object:
            self.left -= 1
            if len(images) > self.most and self.left < 0:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return run(forward, images)

        monkeypatch.setattr(Forward, "__call__", limited)


def largest_difference(folder: Path, other: Path) -> float:
    found, expected = load_model(folder).weights, load_model(other).weights
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_training_whose_memory_runs_out_ends_as_any_other(
    store: CaseStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    batch_dice: bool,
) -> None:
    plan = toy_plan(batch_dice=batch_dice, batch_size=4, ema_decay=0.9)
    train_toy(tmp_path / "large", store, settings(), plan)
    memory = SmallMemory(monkeypatch, most=1, after=3)
    train_toy(tmp_path / "small", store, settings(), plan)
    # 4 samples, then 2, then 1; from then on it is known what fits.
    assert memory.refused == 2
    assert "memory does not hold 4 samples at a time: going on with 2" in caplog.text
    assert "memory does not hold 2 samples at a time: going on with 1" in caplog.text
    assert 0 < largest_difference(tmp_path / "small", tmp_path / "large") < 10 * CLOSE
    small, large = (read_metrics(tmp_path / name) for name in ("small", "large"))
    assert [record.train_loss for record in small] == pytest.approx([r.train_loss for r in large], rel=CLOSE)
    record = read_run(tmp_path / "small")
    assert record is not None
    assert record.choices is not None
    assert record.choices.micro_batch == 1


def test_what_fits_is_known_when_the_training_goes_on(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SmallMemory(monkeypatch, most=2)
    train_toy(tmp_path / "whole", store, settings())
    train_toy(tmp_path / "cut", store, settings(num_epochs=1))
    assert memory.refused == 2
    train_toy(tmp_path / "cut", store, settings(num_epochs=2))
    assert memory.refused == 2, "nothing is tried that did not fit"


def test_the_micro_batch_is_recorded_with_the_step_that_found_it(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill right afterwards does not lose it."""
    SmallMemory(monkeypatch, most=2)
    seen: list[int | None] = []

    class Look:
        def start(self, description: str, total: int | None) -> None: ...

        def finish(self, note: str = "") -> None: ...

        def advance(self, step: int = 1, note: str = "") -> None:
            record = read_run(tmp_path)
            seen.append(record.choices.micro_batch if record and record.choices else None)

    train_toy(tmp_path, store, settings(num_epochs=1), progress=Look())
    assert seen == [None, None, *[2] * (STEPS - 1)], "told at the start and after each step; written after the first"


def test_a_single_sample_that_does_not_fit_ends_the_training(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallMemory(monkeypatch, most=0)
    with pytest.raises(DeviceMemoryError, match="while training fold 0 of 3d_fullres: CUDA out of memory") as stopped:
        train_toy(tmp_path, store, settings())
    assert stopped.value.exit_code == 6
    assert not (tmp_path / "lock").exists()


def learner(
    *, processes: Processes = ALONE, choices: Choices | None = None, dropout: float = 0.0, norm: str = "instance"
) -> Learner:
    part = toy_plan(batch_size=4).configurations["3d_fullres"]
    one = Learner(
        part.network.model_copy(update={"dropout": dropout, "norm": norm}),
        part.training,
        device=torch.device("cpu"),
        precision="fp32",
        seed=0,
        processes=processes,
        choices=choices,
    )
    one.gradients.lowers_micro_batch = True
    return one


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((4, 1, *PATCH), generator=generator)
    return Batch(images, (images[:, 0] > 1).to(torch.int16), ("a", "b", "c", "d"))


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_repeated_step_is_the_step_of_the_smaller_micro_batch(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    """To the bit, random numbers of dropout and running statistics included: the try that failed left nothing."""
    known = learner(choices=Choices(micro_batch=1), dropout=0.5, norm=norm)
    known.step(batch, 0.1, 7)
    # The first of two parts of 2 passes, the second does not.
    memory = SmallMemory(monkeypatch, most=1, after=1)
    found = learner(choices=Choices(micro_batch=2), dropout=0.5, norm=norm)
    found.step(batch, 0.1, 7)
    expected = known.state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state().items())
    assert found.choices == known.choices
    assert memory.refused == 1


def test_without_leave_to_lower_it_the_error_comes_out(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of the memory that a plan takes must not be content with less."""
    SmallMemory(monkeypatch, most=2)
    one = learner()
    one.gradients.lowers_micro_batch = False
    before = {name: tensor.clone() for name, tensor in one.state().items()}
    with pytest.raises(torch.OutOfMemoryError):
        one.step(batch, 0.1, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state().items())


def test_memory_that_runs_out_in_one_process_lowers_the_micro_batch_of_all(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = toy_plan(batch_size=4, batch_dice=True)
    train_toy(tmp_path / "one", store, settings(), plan)
    refused: list[int] = []
    run = Forward.__call__

    def limited(forward: Forward, images: Tensor) -> object:
        if len(images) > 1 and small.get(id(forward)):
            refused.append(len(images))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(forward, images)

    small: dict[int, bool] = {}
    make = Forward.__init__

    def marked(forward: Forward, network: torch.nn.Module) -> None:
        make(forward, network)
        small[id(forward)] = threads.is_second()

    threads = _Threads()
    monkeypatch.setattr(Forward, "__call__", limited)
    monkeypatch.setattr(Forward, "__init__", marked)

    def work(processes: ThreadedProcesses) -> None:
        threads.enter(processes)
        train_toy_together(processes, tmp_path / "two", store, settings(), plan)

    assert together(2, work) == [None, None]
    assert refused == [2], "once in the second process; then the first one has it keep to 1"
    assert largest_difference(tmp_path / "two", tmp_path / "one") < 10 * CLOSE
    record = read_run(tmp_path / "two")
    assert record is not None
    assert record.choices is not None
    assert record.choices.micro_batch == 1


class _Threads:
    """Knows which thread is which process."""

    def __init__(self) -> None:
        self._mine = threading.local()

    def enter(self, processes: ThreadedProcesses) -> None:
        self._mine.rank = processes.rank

    def is_second(self) -> bool:
        return getattr(self._mine, "rank", 0) == 1


def test_all_processes_end_where_one_cannot_hold_a_sample(batch: Batch) -> None:
    def work(processes: ThreadedProcesses) -> None:
        one = learner(processes=processes)
        if processes.rank == 1:
            one._passes.forward = _Full(one.network)  # type: ignore[assignment]
        one.gradients.of(batch, 0, lambda value: value)

    ended = together(2, work)
    assert [type(problem) for problem in ended] == [DeviceMemoryError, DeviceMemoryError]
    assert "1 of 2 processes ran out of memory with one sample at a time" in str(ended[0])


class _Full(Forward):
    def __call__(self, images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")


def test_a_state_that_the_main_process_restores_is_told_again(batch: Batch) -> None:
    """As after a step back to a checkpoint, or for weights to begin with."""

    def work(processes: ThreadedProcesses) -> dict[str, Tensor]:
        one = learner(processes=processes)
        if processes.is_main:
            beginning = {name: tensor.clone() for name, tensor in one.state().items()}
            one.step(batch, 0.1, 0)
            one.restore(beginning, (None, 0))
            one.step(batch, 0.1, 1)
            orders.tell(processes, orders.Done())
        while not processes.is_main and not isinstance(order := orders.hear(processes), orders.Done):
            if isinstance(order, orders.State):
                one.take_over(order)
            if isinstance(order, orders.Step):
                one.step(batch, order.learning_rate, order.number, order.momentum)
        return one.state()

    first, second = together(2, work)
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
