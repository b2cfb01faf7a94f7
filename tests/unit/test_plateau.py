"""A training whose measure has stopped rising comes to its end sooner, and one that still rises does not."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toy_training import fill_store, toy_plan, train_toy

from autoseg.domain.plan import EarlyEnd, TrainingPlan
from autoseg.errors import TrainingInterrupted
from autoseg.io.store import CaseStore
from autoseg.training import plateau
from autoseg.training.plateau import LEAST_EPOCHS, LEAST_LOOKS, Rise, rise, shortened
from autoseg.training.records import TrainSettings, read_metrics, read_run
from autoseg.training.schedule import Course, Schedule

LONG = Schedule(0.01, 0.9, steps_per_epoch=250, num_epochs=1000)

# Pseudo-Dice of nnU-Net v2's own trainings after so many epochs. Source: as decision 26.
EPOCHS = (10, 25, 50, 100, 150, 250, 500, 750, 1000)
LEVELS_OFF = {
    "Hippocampus": (0.845, 0.876, 0.885, 0.885, 0.885, 0.885, 0.885, 0.884, 0.884),
    "Heart": (0.884, 0.916, 0.927, 0.931, 0.932, 0.934, 0.935, 0.935, 0.936),
}
KEEPS_RISING = {
    "Liver": (0.514, 0.653, 0.739, 0.778, 0.797, 0.803, 0.815, 0.844, 0.869),
    "Pancreas": (0.162, 0.395, 0.516, 0.572, 0.592, 0.625, 0.639, 0.658, 0.668),
    "Colon": (0.246, 0.433, 0.512, 0.564, 0.588, 0.616, 0.642, 0.651, 0.688),
}


def curve(points: tuple[float, ...], noise: float, seed: int = 0) -> list[float]:
    epochs = np.arange(1, 1001)
    values = np.interp(np.log(epochs), np.log((1, *EPOCHS)), (0.0, *points))
    return list(values + noise * np.random.default_rng(seed).standard_normal(len(epochs)))


def first_end(measures: list[float]) -> tuple[int, float] | None:
    """After how many epochs the rule fires, and the end that it sets."""
    for epochs in range(1, len(measures)):
        found = shortened(LONG, "epochs", measures[:epochs], 250 * epochs, 0.0, epochs / 1000)
        if found is not None:
            assert found[0].end is not None
            return epochs, found[0].end
    return None


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.01])
@pytest.mark.parametrize("name", LEVELS_OFF)
def test_curves_that_level_off_end_early(name: str, noise: float) -> None:
    found = first_end(curve(LEVELS_OFF[name], noise))
    assert found is not None
    epochs, end = found
    assert LEAST_EPOCHS <= epochs < 400
    assert end == epochs + -(-epochs // 2)


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.01, 0.03])
@pytest.mark.parametrize("name", KEEPS_RISING)
def test_curves_that_keep_rising_are_trained_to_the_end(name: str, noise: float) -> None:
    assert first_end(curve(KEEPS_RISING[name], noise)) is None


def test_a_measure_too_noisy_to_tell_is_no_plateau() -> None:
    flat = np.full(300, 0.8)
    assert rise(list(flat)).is_plateau
    assert not rise(list(flat + 0.05 * np.random.default_rng(0).standard_normal(300))).is_plateau
    assert not Rise(gain=-0.5, error=0.01, looks=50).is_plateau


def test_the_rise_is_that_from_one_third_to_the_next() -> None:
    found = rise([0.1 * number for number in range(90)])
    assert (found.gain, found.looks) == (pytest.approx(3.0), 30)
    # Blocks of 6 within a third rise evenly: their spread is that of 0, 0.6, 1.2, 1.8, 2.4.
    assert found.error == pytest.approx((2 * np.var([0, 0.6, 1.2, 1.8, 2.4], ddof=1) / 5) ** 0.5)


@pytest.mark.parametrize(
    ("mode", "schedule", "looks", "fires"),
    [
        ("epochs", LONG, LEAST_EPOCHS, True),
        ("epochs", LONG, LEAST_EPOCHS - 1, False),
        ("never", LONG, 300, False),
        ("epochs", Schedule(0.01, 0.9, 250, budget_s=1e5), 90, False),
        ("always", Schedule(0.01, 0.9, 250, budget_s=1e5), LEAST_LOOKS, True),
        ("epochs", Schedule(0.01, 0.9, 250, 1000, course=Course(end=900)), 300, False),
    ],
)
def test_where_it_applies(mode: EarlyEnd, schedule: Schedule, looks: int, fires: bool) -> None:
    found = shortened(schedule, mode, [0.8] * looks, 250 * looks, 1e5 * looks / 60, 0.3)
    assert (found is not None) is fires


def test_a_training_that_would_save_little_is_left_alone() -> None:
    for epochs, fires in ((600, True), (601, False)):
        assert (shortened(LONG, "epochs", [0.8] * epochs, 250 * epochs, 0.0, 0.6) is not None) is fires


def test_the_default_is_as_nnunets_and_digests_stay() -> None:
    plan = TrainingPlan(batch_size=2)
    assert plan.early_end == "never"
    assert "early_end" not in plan.model_dump(mode="json")
    assert plan.model_copy(update={"early_end": "epochs"}).model_dump(mode="json")["early_end"] == "epochs"


# -------------------------------------------------------------------------------------------------- in a real training
STEPS = 4
NUM_EPOCHS = 8
FIRES_AFTER = 2
ENDS_AT = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    return fill_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def _ctrl_c_works() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training is on a plateau from its second epoch on."""
    monkeypatch.setattr(plateau, "LEAST_EPOCHS", FIRES_AFTER)
    monkeypatch.setattr(plateau, "rise", lambda measures: Rise(0.0, 0.0, len(measures)))


class StopAfter:
    """Progress that sends a signal to its own process after some steps."""

    def __init__(self, steps: int) -> None:
        self.left, self.totals = steps, []

    def start(self, description: str, total: int | None) -> None:
        self.totals.append(total)

    def advance(self, step: int = 1, note: str = "") -> None:
        if note:
            self.left -= step
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, note: str = "") -> None: ...


def train(folder: Path, store: CaseStore, epochs: int = NUM_EPOCHS, early_end: str = "epochs", stop_after: int = 0):
    settings = TrainSettings(num_epochs=epochs, device="cpu", precision="fp32")
    plan = toy_plan(steps_per_epoch=STEPS, ema_decay=0.9, early_end=early_end)
    progress = StopAfter(stop_after)
    with contextlib.suppress(TrainingInterrupted):
        train_toy(folder, store, settings, plan, progress=progress)
    return progress


@pytest.fixture
def whole(store: CaseStore, tmp_path: Path, flat: None) -> Path:
    train(tmp_path / "whole", store)
    return tmp_path / "whole"


def test_a_plateau_brings_the_whole_decay_and_the_end(
    store: CaseStore, tmp_path: Path, flat: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "autoseg")
    progress = train(tmp_path, store)
    assert "ends after 3 instead of 8 epochs" in caplog.text
    run = read_run(tmp_path)
    assert run is not None
    assert (run.status, run.num_epochs, run.epochs, run.course.end) == ("finished", NUM_EPOCHS, ENDS_AT, ENDS_AT)
    records = read_metrics(tmp_path)
    assert [record.ends_at for record in records] == [None, ENDS_AT, None]
    rates = [0.01 * (1 - part) ** 0.9 for part in (0, 1 / NUM_EPOCHS, 1 / NUM_EPOCHS)]
    assert [record.learning_rate for record in records] == pytest.approx(rates)
    assert progress.totals == [NUM_EPOCHS * STEPS, ENDS_AT * STEPS]


@pytest.mark.parametrize("steps", [FIRES_AFTER * STEPS - 1, FIRES_AFTER * STEPS, FIRES_AFTER * STEPS + 2])
def test_a_plateau_survives_a_stop_bit_for_bit(store: CaseStore, tmp_path: Path, whole: Path, steps: int) -> None:
    train(tmp_path, store, stop_after=steps)
    assert not (tmp_path / "weights.json").exists()
    train(tmp_path, store)
    assert (tmp_path / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    run = read_run(tmp_path)
    assert run is not None
    assert [start.step for start in run.starts] == [0, steps]


def test_a_training_that_ended_early_is_finished(store: CaseStore, whole: Path) -> None:
    before = (whole / "weights.safetensors").stat().st_mtime_ns
    train(whole, store)
    train(whole, store, epochs=NUM_EPOCHS - 1)
    assert (whole / "weights.safetensors").stat().st_mtime_ns == before


def test_more_epochs_go_on_after_a_plateau(store: CaseStore, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plateau, "LEAST_EPOCHS", 100)
    train(whole, store, epochs=NUM_EPOCHS + 1)
    run = read_run(whole)
    assert run is not None
    assert (run.epochs, run.course.end, run.course.since) == (NUM_EPOCHS + 1, None, ENDS_AT)


def test_never_lifts_an_end_that_a_plateau_brought(store: CaseStore, tmp_path: Path, flat: None) -> None:
    train(tmp_path, store, stop_after=FIRES_AFTER * STEPS + 1)
    train(tmp_path, store, early_end="never")
    run = read_run(tmp_path)
    assert run is not None
    assert (run.epochs, run.course.end) == (NUM_EPOCHS, None)


def test_a_budget_is_used_to_its_end_unless_somebody_says_always() -> None:
    budget = Schedule(0.01, 0.9, 250, budget_s=6000.0)
    measures = [0.8] * 40
    assert shortened(budget, "epochs", measures, 5000, 3000.0, 0.5) is None
    found = shortened(budget, "always", measures, 5000, 3000.0, 0.5)
    assert found is not None
    assert found[0] == Course.falling(3000.0, 0.5, 1500.0)
