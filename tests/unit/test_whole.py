"""Looks at whole validation cases: what they say, which cases, and the time that they may take."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_training import fill_store, toy_case, toy_plan, train_toy

from autoseg import machine
from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.domain.plan import Configuration
from autoseg.io.store import CaseStore
from autoseg.training import whole
from autoseg.training.batches import BatchReader
from autoseg.training.cascade import PreviousReader
from autoseg.training.checkpoint import Counters
from autoseg.training.interrupt import Stopped
from autoseg.training.learner import Learner
from autoseg.training.records import TrainSettings, read_metrics, read_run
from autoseg.training.schedule import Schedule
from autoseg.training.validation import WHOLE_FRACTION
from autoseg.training.whole import MOST_CASES, WANTED_LOOKS, WholeLooks, mean_dice

CPU = torch.device("cpu")
NUM_CASES = 12
STEP_S = 0.3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    return fill_store(tmp_path_factory.mktemp("store"), NUM_CASES)


def part_of(dims: int = 3, **training: object) -> Configuration:
    plan = toy_plan(dims, **training)
    return plan.configurations[plan.default_configuration]


def looks_at(
    store: object, part: Configuration, seed: int = 0, case_ids: tuple[str, ...] | None = None, **more: object
) -> WholeLooks:
    torch.set_num_threads(1)
    learner = Learner(part.network, part.training, device=CPU, precision="fp32", seed=0)
    known = tuple(f"case_{number}" for number in range(NUM_CASES))
    reader = BatchReader.of(part, store, known, seed, 4, **more)  # type: ignore[arg-type]
    return WholeLooks(part, learner, reader, CPU, "fp32", case_ids)


def rounded(tiles: torch.Tensor) -> torch.Tensor:
    """Logits of a network that takes a voxel's brightness, rounded, as its class."""
    brightness = tiles[:, 0].round().clamp(0, 2).long()
    return torch.nn.functional.one_hot(brightness, 3).movedim(-1, 1).float()


def dice_of_rounding(number: int) -> list[float | None]:
    image, labels = toy_case(number)
    predicted = np.clip(np.round(image[0]), 0, 2)
    scores: list[float | None] = []
    for label in (1, 2):
        found, truth = predicted == label, labels == label
        scores.append(float(2 * (found & truth).sum() / (found.sum() + truth.sum())) if truth.any() else None)
    return scores


LATE = Counters(step=1000, step_s=STEP_S, epoch=10)
LONG = Schedule(0.01, 0.9, 250, budget_s=1e6)


def look(looks: WholeLooks, counters: Counters = LATE, used_s: float = 1e5):
    return looks.look(counters, LONG, 0.5, used_s)


def test_dice_is_the_mean_over_whole_cases_that_contain_the_class(
    store: CaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = looks_at(store, part_of(), case_ids=("case_1", "case_3", "case_7"))
    monkeypatch.setattr(WholeLooks, "_forward", lambda _: rounded)
    found = look(looks)
    expected = np.array([dice_of_rounding(number) for number in (1, 3, 7)]).mean(axis=0)
    assert found.dice == pytest.approx(tuple(expected))
    assert found.mean == pytest.approx(expected.mean())
    assert found.num_cases == 3


def test_a_stop_does_not_wait_for_the_end_of_a_case(store: CaseStore) -> None:
    """A large case on a CPU takes minutes."""
    looks = looks_at(store, part_of(), case_ids=("case_1",))
    asked = count()

    def stop_at_the_second_question() -> None:
        if next(asked) == 1:
            raise Stopped

    looks.check = stop_at_the_second_question
    looks.learner.network.train()
    with pytest.raises(Stopped):
        look(looks)
    assert looks.reader.pool.get("case_1").shape[0] > part_of().network.patch_size[0], "so it comes in several parts"
    assert looks.learner.network.training, "as it was"


def test_classes_count_where_they_are_present_and_annotated() -> None:
    both = torch.tensor([[3, 4, 5], [0, 2, 0], [0, 0, 0]])
    other = torch.tensor([[1, 2, 1], [2, 2, 2], [0, 7, 0]])
    assert mean_dice([both, other]) == (pytest.approx((6 / 9 + 2 / 3) / 2), 1.0, None)


class Relabelled:
    """A store that changes the labels of every case."""

    def __init__(self, store: CaseStore, change: object) -> None:
        self.store, self.change = store, change

    def open(self, case_id: str) -> object:
        case, change = self.store.open(case_id), self.change

        def read(start: object, stop: object) -> object:
            image, labels = case.read(start, stop)  # type: ignore[arg-type]
            return image, change(labels)  # type: ignore[operator]

        return SimpleNamespace(shape=case.shape, channels=case.channels, foreground=case.foreground, read=read)


def test_voxels_to_ignore_and_classes_nobody_drew_are_left_out(
    store: CaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WholeLooks, "_forward", lambda _: rounded)

    def ignore_errors(labels: np.ndarray) -> np.ndarray:
        image, _ = toy_case(2)
        wrong = np.clip(np.round(image[0]), 0, 2) != labels
        return np.where(wrong, IGNORE_INDEX, labels).astype(np.int16)

    looks = looks_at(Relabelled(store, ignore_errors), part_of(), case_ids=("case_2",))
    assert look(looks).dice == (1.0, 1.0)
    annotated = {f"case_{number}": (False, True) for number in range(NUM_CASES)}
    looks = looks_at(store, part_of(), case_ids=("case_2",), annotated=annotated)
    assert look(looks).dice == (None, pytest.approx(dice_of_rounding(2)[1]))


def test_regions_are_counted_where_they_are_predicted(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first region holds both classes, the second one the brighter of them."""

    def above(tiles: torch.Tensor) -> torch.Tensor:
        return torch.cat([tiles[:, :1] - 0.5, tiles[:, :1] - 1.5], dim=1)

    looks = looks_at(store, part_of(), case_ids=("case_4",))
    looks.learner.regions = torch.tensor([[False, True, True], [False, False, True]])
    monkeypatch.setattr(WholeLooks, "_forward", lambda _: above)
    image, labels = toy_case(4)
    expected = []
    for bound, truth in ((0.5, labels >= 1), (1.5, labels == 2)):
        found = image[0] > bound
        expected.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
    assert look(looks).dice == pytest.approx(tuple(expected))


class CopiesTheMap(torch.nn.Module):
    """A cascade that believes its previous stage."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == 3, "the image and one channel a foreground class"
        return torch.cat([0.5 - x[:, 1:].sum(1, keepdim=True), x[:, 1:]], dim=1)


def test_a_cascade_sees_the_map_of_its_previous_stage(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Maps:
        def open(self, case_id: str) -> object:
            _, labels = toy_case(int(case_id.removeprefix("case_")))
            return SimpleNamespace(shape=labels.shape, read=lambda start, stop: labels.astype(np.uint8))

    looks = looks_at(store, part_of(), case_ids=("case_5", "case_6"))
    looks.reader = replace(looks.reader, previous=PreviousReader(Maps(), 3, None, 0))
    looks.learner.network = CopiesTheMap()
    monkeypatch.setattr(Learner, "weights", {})
    assert look(looks).dice == (1.0, 1.0)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_network_looks_with_the_weights_that_predict_and_stays_as_it_is(store: CaseStore, dims: int) -> None:
    part = part_of(dims, ema_decay=0.9)
    looks = looks_at(store, part, case_ids=("case_0",))
    blind = looks.learner
    before = {name: tensor.clone() for name, tensor in blind.state().items()}
    first = look(looks)
    assert first.dice == look(looks).dice
    # A running mean that says class 2 everywhere.
    for name, mean in blind.weights.items():
        mean.zero_()
        if mean.shape == (3,) and name.endswith("bias"):
            mean.copy_(torch.tensor([0.0, 0.0, 9.0]))
    _, labels = toy_case(0)
    inside = int((labels == 2).sum())
    assert look(looks).dice == (0.0, pytest.approx(2 * inside / (inside + labels.size)))
    assert blind.network.training
    after = blind.state()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("mean."))


# ---------------------------------------------------------------------------------------------------------- which, when
def seconds_of_a_case(part: Configuration) -> float:
    """(18, 20, 16) voxels in patches of 16 cubed, half overlapped: 2 x 2 x 1 tiles."""
    return 4 * STEP_S / 3 / part.training.batch_size


def test_the_same_cases_for_the_same_seed(store: CaseStore) -> None:
    def chosen(seed: int) -> tuple[str, ...]:
        looks = looks_at(store, part_of(), seed)
        look(looks, used_s=0.0)
        assert looks.case_ids is not None
        return looks.case_ids

    assert len(chosen(0)) == len(set(chosen(0))) == MOST_CASES
    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


@pytest.mark.parametrize(("num_looks", "expected"), [(0.9, 0), (1.1, 1), (2.1 * WANTED_LOOKS, 2), (1e6, MOST_CASES)])
def test_as_many_cases_as_there_is_time_for(store: CaseStore, num_looks: float, expected: int) -> None:
    """One case as soon as a single look at it fits, more where several looks do."""
    part = part_of()
    looks = looks_at(store, part)
    schedule = Schedule(0.01, 0.9, 250, budget_s=num_looks * seconds_of_a_case(part) / WHOLE_FRACTION)
    looks.look(LATE, schedule, 0.5, 0.0)
    assert looks.case_ids is not None
    assert len(looks.case_ids) == expected


def test_a_case_that_does_not_fit_the_memory_is_passed_over(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = looks_at(store, part_of())
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: (10_000, 10_000))
    assert look(looks) is None
    assert looks.case_ids == ()


def test_looks_take_their_part_of_the_time_and_no_more(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WholeLooks, "_forward", lambda _: rounded)
    part = part_of()
    looks = looks_at(store, part, case_ids=("case_0", "case_1"))
    first_s = 2 * seconds_of_a_case(part) / WHOLE_FRACTION
    assert look(looks, used_s=0.99 * first_s) is None
    assert look(looks, used_s=1.01 * first_s) is not None
    again = LATE.model_copy(update={"whole_s": 7.0, "whole_cost_s": 3.0})
    assert look(looks, again, used_s=9.9 / WHOLE_FRACTION) is None
    assert look(looks, again, used_s=10.1 / WHOLE_FRACTION) is not None
    assert look(looks, again, used_s=LONG.length - 2.9) is None, "it would not be over in time"


@pytest.mark.parametrize("pseudo_dice", [None, 0.0, 0.05])
def test_nothing_is_looked_at_before_there_is_something_to_see(store: CaseStore, pseudo_dice: float | None) -> None:
    looks = looks_at(store, part_of(), case_ids=("case_0",))
    assert looks.look(LATE, LONG, pseudo_dice, 1e5) is None


def test_a_look_without_memory_is_the_last_one_and_not_the_end(
    store: CaseStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    looks = looks_at(store, part_of(), case_ids=("case_0",))
    monkeypatch.setattr(WholeLooks, "_count", fail)
    assert look(looks) is None
    assert looks.case_ids == ()
    assert "goes on without such looks" in caplog.text


# -------------------------------------------------------------------------------------------------- in a real training
@pytest.mark.parametrize("dims", [2, 3])
def test_looks_are_recorded_and_change_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dims: int) -> None:
    few = fill_store(tmp_path / "store", 5)
    settings = TrainSettings(num_epochs=3, device="cpu", precision="fp32")
    plan = toy_plan(dims, steps_per_epoch=3)
    train_toy(tmp_path / "without", few, settings, plan)
    monkeypatch.setattr(whole, "WHOLE_FRACTION", 1e9)
    monkeypatch.setattr(whole, "USEFUL_DICE", 0.0)
    train_toy(tmp_path / "with", few, settings, plan)
    records = read_metrics(tmp_path / "with")
    assert [record.num_whole_cases for record in records] == [1, 1, 0], "the end has its own validation"
    assert all(record.mean_whole_dice is not None and len(record.whole_dice) == 2 for record in records[:2])
    run = read_run(tmp_path / "with")
    assert run is not None
    assert run.whole_cases == ("case_4",)
    with_looks, without = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("with", "without"))
    assert with_looks == without
    assert [record.num_whole_cases for record in read_metrics(tmp_path / "without")] == [0, 0, 0]
