"""How long a training is."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from autoseg.domain.plan import TrainingPlan
from autoseg.errors import ConfigError
from autoseg.training.records import TrainSettings
from autoseg.training.schedule import Clock, Course, Schedule, adapted_momentum
from autoseg.training.validation import affordable_patches, pseudo_dice, running_mean


def test_epochs_decay_as_nnunets() -> None:
    schedule = Schedule(0.01, 0.9, steps_per_epoch=250, num_epochs=1000)
    for step, rate in ((0, 0.01), (249, 0.01), (250, 0.01 * 0.999**0.9), (249_999, 0.01 * 0.001**0.9)):
        assert schedule.rate(schedule.fraction(step, 0.0, 0.0)) == pytest.approx(rate)
    assert not schedule.is_over(249_999, 1e9, 0, 1.0)
    assert schedule.is_over(250_000, 0, 0, 1.0)
    assert schedule.left_s(249_990, 0, 2.0) == 20


def test_a_budget_decays_to_zero_before_the_reserve() -> None:
    schedule = Schedule(0.01, 0.9, steps_per_epoch=250, budget_s=100.0)
    assert schedule.rate(schedule.fraction(0, 0.0, 10.0)) == 0.01
    assert schedule.rate(schedule.fraction(50, 45.0, 10.0)) == pytest.approx(0.01 * 0.5**0.9)
    assert schedule.rate(schedule.fraction(99, 90.0, 10.0)) == 0
    assert not schedule.is_over(50, 89.4, 10.0, 1.0)
    assert schedule.is_over(50, 89.6, 10.0, 1.0)
    assert not schedule.is_over(0, 1e9, 10.0, 1.0), "one step is always made"
    assert schedule.ends_epoch(1, 10.0)
    assert not schedule.ends_epoch(10_000, 9.9)


def test_an_epoch_of_a_long_budget_is_a_sixtieth() -> None:
    assert Schedule(0.01, 0.9, 250, budget_s=1500.0).epoch_s == 25.0


def test_the_clock_goes_on() -> None:
    seconds = iter([100.0, 103.0])
    clock = Clock(7.0, now=lambda: next(seconds))
    assert clock.used_s() == 10.0


def test_settings_that_contradict() -> None:
    for wrong in ({"num_epochs": 1, "time_budget_s": 5.0}, {"num_epochs": 0}, {"time_budget_s": 0.0}):
        with pytest.raises(ConfigError):
            TrainSettings(**wrong)


def test_the_plan_says_how_long_when_nobody_does() -> None:
    plan = TrainingPlan(batch_size=2)
    assert TrainSettings().with_length(plan, "cpu").time_budget_s == 3600.0
    assert TrainSettings().with_length(plan, "cuda").num_epochs == 1000
    assert TrainSettings(num_epochs=3).with_length(plan, "cpu").time_budget_s is None


def test_the_default_recipe_is_nnunets() -> None:
    plan = TrainingPlan(batch_size=2)
    assert (plan.learning_rate, plan.momentum, plan.weight_decay, plan.decay_power) == (0.01, 0.99, 3e-5, 0.9)
    assert (plan.num_epochs, plan.steps_per_epoch, plan.validation_steps_per_epoch) == (1000, 250, 50)
    assert (plan.gradient_clip, plan.ema_decay, plan.foreground_fraction) == (12.0, 0.0, 1 / 3)


def test_pseudo_dice() -> None:
    assert pseudo_dice([[6, 8, 10], [0, 0, 0], [0, 4, 0]]) == (12 / 18, None, 0.0)
    assert running_mean(None, 0.5) == 0.5
    assert running_mean(0.5, None) == 0.5
    assert running_mean(0.5, 1.0) == pytest.approx(0.55)


def test_looks_take_their_part() -> None:
    # A patch costs a third of 1.4 s / 7; 3 % of 25 s are 0.75 s.
    assert affordable_patches(25.0, 1.4, 7, 350) == 11
    assert affordable_patches(25.0, 100.0, 7, 350) == 4
    assert affordable_patches(1e6, 1.4, 7, 350) == 350


@pytest.mark.parametrize(
    ("step", "momentum", "factor"),
    [(0, 0.9, 10), (100, 0.9, 10), (200, 0.95, 5), (500, 0.98, 2), (1000, 0.99, 1), (250_000, 0.99, 1)],
)
def test_the_memory_of_the_momentum_grows_with_the_steps_done(step: int, momentum: float, factor: float) -> None:
    assert adapted_momentum(0.99, step) == pytest.approx((momentum, factor))


def test_little_momentum_stays_as_planned() -> None:
    assert adapted_momentum(0.8, 10) == (0.8, 1.0)
    assert adapted_momentum(0.0, 10) == (0.0, 1.0)


def test_the_long_run_size_of_a_step_is_that_of_the_plan() -> None:
    for adapts, start in ((True, (0.1, 0.9)), (False, (0.01, 0.99))):
        schedule = Schedule(0.01, 0.9, 250, 1000, momentum=0.99, adapts_momentum=adapts)
        assert schedule.pace(0, 0.0, 0.0)[:2] == pytest.approx(start)
        for step in (0, 150, 249):
            pace = schedule.pace(step, 0.0, 0.0)
            assert pace.rate / (1 - pace.momentum) == pytest.approx(1.0)


def test_the_learning_rate_rises_to_its_own_over_the_warm_up() -> None:
    plain = Schedule(0.01, 0.9, 10, 100, momentum=0.9)
    warm = Schedule(0.01, 0.9, 10, 100, momentum=0.9, warm_up_steps=4)
    parts = [warm.pace(step, 0.0, 0.0)[0] / plain.pace(step, 0.0, 0.0)[0] for step in range(6)]
    assert parts == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


# --------------------------------------------------------------------------------------- another length, or a plateau
def on_course(schedule: Schedule, course: Course) -> Schedule:
    return replace(schedule, course=course)


@pytest.mark.parametrize("epochs", [20, 1000, 12])
def test_another_number_of_epochs_begins_at_the_rate_that_was_and_ends_at_nothing(epochs: int) -> None:
    """Then it is soon where it would be with that number from the start."""
    schedule = Schedule(0.01, 0.9, steps_per_epoch=10, num_epochs=epochs)
    course = schedule.rejoined(0.5, 100, 0.0, 0.0)
    joined = on_course(schedule, course)
    assert joined.fraction(100, 0, 0) == 0.5
    joint = 10 + 0.1 * (epochs - 10)
    for epoch in range(10, epochs):
        expected = epoch / epochs if epoch >= joint else 0.5 + (joint / epochs - 0.5) * (epoch - 10) / (joint - 10)
        assert joined.fraction(epoch * 10, 0, 0) == pytest.approx(expected)
    assert joined.fraction(epochs * 10, 0, 0) == 1
    assert joined.total_steps == epochs * 10


def test_another_budget_leaves_no_jump_in_the_rate() -> None:
    for budget_s in (100.0, 400.0, 1e5):
        schedule = Schedule(0.01, 0.9, 250, budget_s=budget_s)
        joined = on_course(schedule, schedule.rejoined(0.45, 50, 90.0, 5.0))
        assert joined.fraction(50, 90.0, 5.0) == pytest.approx(0.45)
        assert joined.fraction(50, budget_s - 5.0, 5.0) == 1
        seconds = [90.0 + (budget_s - 95.0) * number / 1000 for number in range(1001)]
        fractions = [joined.fraction(50, used_s, 5.0) for used_s in seconds]
        assert max(abs(b - a) for a, b in pairwise(fractions)) < 0.01


def test_less_than_is_done_already_is_over() -> None:
    schedule = Schedule(0.01, 0.9, steps_per_epoch=10, num_epochs=5)
    assert schedule.rejoined(0.5, 60, 0.0, 0.0) == Course()
    assert schedule.is_over(60, 0.0, 0.0, 1.0)


def test_a_course_that_falls_ends_early_with_the_whole_decay() -> None:
    schedule = Schedule(0.01, 0.9, steps_per_epoch=10, num_epochs=100)
    falling = on_course(schedule, Course.falling(20, 0.2, 10))
    assert [falling.fraction(10 * epoch, 0, 0) for epoch in (20, 25, 30)] == pytest.approx([0.2, 0.6, 1.0])
    assert falling.total_steps == 300
    assert falling.left_s(290, 0, 2.0) == 20
    seconds = on_course(Schedule(0.01, 0.9, 250, budget_s=1000.0), Course.falling(400.0, 0.4, 200.0))
    assert seconds.fraction(0, 495.0, 10.0) == pytest.approx(0.7)
    assert seconds.is_over(10, 590.0, 10.0, 1.0)
    assert seconds.left_s(10, 450.0, 1.0) == 150.0
