"""What a training says of itself."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import pytest
from toy_training import fill_store, toy_plan, train_toy

from autoseg.config import parse_duration_s
from autoseg.planning.flops import NetworkShape, count_training_flops
from autoseg.training.checkpoint import Counters
from autoseg.training.records import EpochRecord, TrainSettings
from autoseg.training.schedule import Course, Schedule
from autoseg.training.telling import LEAST_SLOWDOWN, LEAST_STEPS, Moment, announcement, mismatch, note, slowdown

NOON = datetime(2026, 5, 4, 12, 0)
EPOCHS = Schedule(0.01, 0.9, steps_per_epoch=250, num_epochs=1000)


def moment(schedule: Schedule = EPOCHS, used_s: float = 0.0, look_s: float = 0.0, **counters: object) -> Moment:
    return Moment(schedule, Counters(**counters), used_s, look_s, NOON)  # type: ignore[arg-type]


def record(dice: float | None, whole: float | None = None) -> EpochRecord:
    return EpochRecord(
        epoch=3,
        step=9,
        seconds=1,
        seconds_per_step=1,
        learning_rate=0.01,
        train_loss=0.25,
        mean_pseudo_dice=dice,
        mean_whole_dice=whole,
    )


def test_the_live_line_has_loss_dice_speed_and_end() -> None:
    now = moment(
        Schedule(0.01, 0.9, 250, budget_s=1800.0),
        used_s=600.0,
        step=300,
        epoch=7,
        epoch_steps=4,
        epoch_bad_steps=1,
        epoch_loss_sum=0.9,
        ema_pseudo_dice=0.5,
        step_s=1.75,
    )
    line = "epoch 7, loss 0.300, Dice 0.872 (whole 0.861), 4 samples/s, ends 12:20 (in 20:00)"
    assert note(now, 7, (record(0.8, 0.8612), record(0.8716), record(None))) == line


def test_before_the_first_look_and_step_there_is_less_to_say() -> None:
    assert note(moment(), 2, ()) == "epoch 0, ends 12:00 (in 0:00)"
    line = note(moment(step=1000, epoch=4, step_s=1.0), 2, (record(None),))
    assert line == "epoch 4, loss 0.250, 2 samples/s, ends 2026-05-07 09:10 (in 69:10:00)"


def test_the_end_of_epochs_counts_their_looks() -> None:
    plain, with_looks = (moment(step=125_000, step_s=0.1, look_s=look_s) for look_s in (0.0, 3.0))
    assert plain.left_s == 12_500
    assert with_looks.left_s == pytest.approx(12_500 + 500 * 3)
    shortened = moment(Schedule(0.01, 0.9, 250, 1000, course=Course(end=600)), step=125_000, step_s=0.1)
    assert shortened.left_s == 2_500
    assert shortened.expected_steps == 150_000


def test_the_announcement_says_what_will_be_done() -> None:
    text = announcement("fold 0", moment(step=5, step_s=0.1), device="cuda", precision="bf16")
    assert text.startswith("fold 0: 1,000 epochs of 250 steps in all, 0.10 s a step in bf16 on cuda; ends about 18:56")
    budget = Schedule(0.01, 0.9, 250, budget_s=1500.0)
    text = announcement("fold 0", moment(budget, step=5, step_s=1.0), device="cpu", precision="bf16")
    # 4 % of the time are for looks.
    assert "25 min, about 1,445 steps in all" in text
    assert "ends about 12:25 (25 min from now)" in text


@pytest.mark.parametrize("slower", [1.1, 3.0])
def test_a_budget_for_too_few_steps_is_told_with_the_plan_that_would_fit(slower: float) -> None:
    budget = Schedule(0.01, 0.9, 250, budget_s=300.0)
    text = mismatch("fold 0", moment(budget, used_s=18.0, step=5, step_s=3.5), slower)
    assert "hold about 82 steps of 3.50 s" in text
    command = re.search(r"autoseg plan DATASET --out NEW_RUN --preset cpu --step-time (\S+)\n", text)
    assert command is not None
    step_s = parse_duration_s(command[1])
    # That step, so much longer than planned, fits often enough beside looks and the last weights.
    assert LEAST_STEPS <= 0.96 * 299 / (step_s * slower) < 1.1 * LEAST_STEPS
    longer = re.search(r"--time-budget (\S+)", text)
    assert longer is not None
    seconds = parse_duration_s(longer[1])
    assert mismatch("fold 0", moment(Schedule(0.01, 0.9, 250, budget_s=seconds), step_s=3.5), slower) == ""
    assert mismatch("fold 0", moment(Schedule(0.01, 0.9, 250, budget_s=seconds - 60), step_s=3.5), slower)


def test_steps_that_take_longer_than_foreseen_make_the_advice_smaller() -> None:
    part = toy_plan().configurations["3d_fullres"]
    flops = part.training.batch_size * count_training_flops(NetworkShape.of(part.network))
    assert slowdown(part, 4.0, None) == LEAST_SLOWDOWN
    assert slowdown(part, 4.0, flops / 2.0) == pytest.approx(2.0), "foreseen were 2 s"
    assert slowdown(part, 1.0, flops / 2.0) == LEAST_SLOWDOWN


@pytest.mark.parametrize(
    "now",
    [
        moment(Schedule(0.01, 0.9, 250, budget_s=400.0), step=5, step_s=1.0),
        moment(Schedule(0.01, 0.9, 250, budget_s=1000.0), used_s=900.0, step=900, step_s=1.0),
        moment(Schedule(0.01, 0.9, 10, num_epochs=2), step=5, step_s=60.0),
    ],
)
def test_what_fits_or_was_asked_for_in_epochs_is_not_complained_of(now: Moment) -> None:
    assert mismatch("fold 0", now, 1.1) == ""


def test_a_training_tells_both_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "autoseg")
    lines: list[str] = []

    class Listening:
        def start(self, description: str, total: int | None) -> None: ...

        def advance(self, step: int = 1, note: str = "") -> None:
            lines.append(note)

        def finish(self, note: str = "") -> None: ...

    settings = TrainSettings(num_epochs=2, device="cpu", precision="fp32")
    train_toy(tmp_path / "fold", fill_store(tmp_path / "store"), settings, toy_plan(), progress=Listening())
    assert caplog.text.count("2 epochs of 6 steps in all") == 1
    told = [line for line in lines if line]
    assert len(told) == 12
    assert all(re.fullmatch(r"epoch \d, loss .*samples/s, ends .*\(in .*\)", line) for line in told)
    assert "Dice" in told[-1]
    assert "Dice" not in told[0]
