"""A training that goes on with another length than before: more or fewer epochs, a larger or smaller budget."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from toy_training import fill_store, toy_plan, train_toy

from autoseg.errors import TrainingInterrupted
from autoseg.io.store import CaseStore
from autoseg.training import checkpoint, trainer
from autoseg.training.records import Start, TrainResult, TrainSettings, read_metrics, read_run
from autoseg.training.schedule import Clock

STEPS = 3
RATE = 0.01
TICK_S = 0.02


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    return fill_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def _ctrl_c_works() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class StopAfter:
    """Progress that sends a signal to its own process after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def start(self, description: str, total: int | None) -> None: ...

    def advance(self, step: int = 1, note: str = "") -> None:
        if note:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, note: str = "") -> None: ...


def train(
    folder: Path, store: CaseStore, epochs: int | None = None, budget_s: float | None = None, stop_after: int = 0
) -> TrainResult | None:
    settings = TrainSettings(num_epochs=epochs, time_budget_s=budget_s, device="cpu", precision="fp32")
    try:
        return train_toy(folder, store, settings, toy_plan(steps_per_epoch=STEPS), progress=StopAfter(stop_after))
    except TrainingInterrupted:
        return None


def rates(folder: Path) -> list[float]:
    return [record.learning_rate for record in read_metrics(folder)]


def decayed(*fractions: float) -> object:
    return pytest.approx([RATE * (1 - fraction) ** 0.9 for fraction in fractions])


def starts(folder: Path) -> list[tuple[int | None, float | None, int]]:
    run = read_run(folder)
    assert run is not None
    return [(start.num_epochs, start.time_budget_s, start.step) for start in run.starts]


def test_twice_as_many_epochs_rise_from_the_rate_that_was_left(store: CaseStore, tmp_path: Path) -> None:
    train(tmp_path, store, 2)
    result = train(tmp_path, store, 4)
    assert result is not None
    assert (result.epochs, result.steps) == (4, 4 * STEPS)
    # The last epoch had a half done; one tenth of what is left later the training is where it would have been.
    assert rates(tmp_path) == decayed(0, 1 / 2, 1 / 2, 3 / 4)
    assert starts(tmp_path) == [(2, None, 0), (4, None, 2 * STEPS)]


@pytest.mark.parametrize("stop", [STEPS, STEPS + 1])
def test_another_length_goes_on_bit_for_bit_whenever_it_is_stopped_again(
    store: CaseStore, tmp_path: Path, stop: int
) -> None:
    for name, stops in (("whole", ()), ("cut", (stop,))):
        train(tmp_path / name, store, 2)
        for steps in stops:
            assert train(tmp_path / name, store, 5, stop_after=steps) is None
        train(tmp_path / name, store, 5)
    whole, cut = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert [start[2] for start in starts(tmp_path / "cut")] == [0, 2 * STEPS, 2 * STEPS + stop]


def test_a_change_that_was_never_saved_is_made_again(store: CaseStore, tmp_path: Path) -> None:
    """run.json has the new length already, the checkpoint does not."""
    train(tmp_path, store, 8, stop_after=2 * STEPS)
    before = checkpoint.newest(tmp_path)
    assert before is not None
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_epochs": 4}))
    train(tmp_path, store, 4)
    assert rates(tmp_path) == decayed(0, 1 / 8, 1 / 8, 3 / 4)


def test_fewer_epochs_than_are_done_end_at_once_and_say_so(
    store: CaseStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, store, 10, stop_after=2 * STEPS + 1)
    result = train(tmp_path, store, 2)
    assert result is not None
    assert (result.did_train, result.steps) == (True, 2 * STEPS + 1)
    assert "asked for 10 epochs and now for 2 epochs, which is done already" in caplog.text
    assert "had fallen from 0.01 to 0.0082 only" in caplog.text
    run = read_run(tmp_path)
    assert run is not None
    assert (run.status, run.num_epochs) == ("finished", 2)
    assert (tmp_path / "weights.safetensors").is_file()


@pytest.mark.parametrize("ask", [{"epochs": 2}, {"epochs": 1}, {"budget_s": 1e-3}])
def test_a_finished_training_that_is_asked_for_less_is_left_alone(
    store: CaseStore, tmp_path: Path, ask: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "autoseg")
    train(tmp_path, store, 2)
    summary = tmp_path / "validation" / "summary.json"
    summary.parent.mkdir()
    summary.write_text("{}")
    before = (tmp_path / "run.json").read_bytes()
    result = train(tmp_path, store, **ask)  # type: ignore[arg-type]
    assert result is not None
    assert (result.did_train, result.steps) == (False, 2 * STEPS)
    assert ("is finished: it has done 6 steps" in caplog.text) is (ask != {"epochs": 2})
    assert (tmp_path / "run.json").read_bytes() == before
    assert summary.is_file()


def test_a_start_is_recorded_with_what_it_was_asked_for(store: CaseStore, tmp_path: Path) -> None:
    train(tmp_path, store, 1)
    run = read_run(tmp_path)
    assert run is not None
    (start,) = run.starts
    assert start == Start(
        at=start.at, num_epochs=1, time_budget_s=None, step=0, seconds=start.seconds, device="cpu", precision="fp32"
    )
    assert start.at.endswith("+00:00")


def test_a_checkpoint_of_an_older_version_goes_on_the_straight_way(store: CaseStore, tmp_path: Path) -> None:
    train(tmp_path, store, 4, stop_after=2 * STEPS)
    for path in tmp_path.glob("resume/*/state.json"):
        stored = json.loads(path.read_text())
        for key in ("num_epochs", "time_budget_s", "fraction", "course", "bad_steps", "num_bad_steps"):
            del stored["counters"][key]
        path.write_text(json.dumps(stored))
    train(tmp_path, store, 8)
    # The epoch that is still open in the checkpoint is recorded by the length that is known.
    assert rates(tmp_path) == decayed(*(epoch / 8 for epoch in range(8)))


# ------------------------------------------------------------------------------------------------------------- budgets
@pytest.fixture
def _time_by_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time goes on by looking at the clock, so that the machine's speed has no part in this."""
    ticks = count()
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks) * TICK_S)
    monkeypatch.setattr(trainer, "Clock", lambda used_s=0.0: Clock(used_s, now=time.monotonic))
    monkeypatch.setattr("autoseg.training.schedule.MIN_EPOCH_S", 0.5)


@pytest.mark.usefixtures("_time_by_looking")
@pytest.mark.parametrize("second_s", [6.0, 2.6])
def test_another_budget_is_used_up_with_the_decay_fitted_into_what_is_left(
    store: CaseStore, tmp_path: Path, second_s: float
) -> None:
    assert train(tmp_path, store, budget_s=4.0, stop_after=10) is None
    found = checkpoint.newest(tmp_path)
    assert found is not None
    fraction, used_s = found.counters.fraction, found.counters.used_s
    assert fraction is not None
    assert 0.1 < fraction < 0.6
    result = train(tmp_path, store, budget_s=second_s)
    assert result is not None
    # A second is kept free for writing the weights.
    assert second_s - 1.2 < result.seconds <= second_s + 0.1
    assert rates(tmp_path)[-1] < 0.25 * RATE
    after = [record for record in read_metrics(tmp_path) if record.seconds > used_s]
    assert after[0].learning_rate < RATE
    assert [start[:2] for start in starts(tmp_path)] == [(None, 4.0), (None, second_s)]


@pytest.mark.usefixtures("_time_by_looking")
def test_a_budget_that_is_used_already_ends_at_once(
    store: CaseStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tmp_path, store, budget_s=4.0, stop_after=10) is None
    found = checkpoint.newest(tmp_path)
    assert found is not None
    result = train(tmp_path, store, budget_s=found.counters.used_s / 2)
    assert result is not None
    assert result.steps == found.counters.step
    assert "which is done already: it ends at step 10" in caplog.text


@pytest.mark.usefixtures("_time_by_looking")
def test_epochs_after_a_budget_count_the_steps_that_it_made(store: CaseStore, tmp_path: Path) -> None:
    assert train(tmp_path, store, budget_s=4.0, stop_after=2 * STEPS) is None
    result = train(tmp_path, store, epochs=4)
    assert result is not None
    assert result.steps == 4 * STEPS
