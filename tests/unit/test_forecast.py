"""Forecasts before training: disk, budgets, measured steps, and plans that become smaller."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from planning_cases import fingerprint_of, plan_of
from toy_training import toy_plan

from autoseg import machine
from autoseg.cli.app import main
from autoseg.config import PlanSettings, TrainSettings
from autoseg.domain.fingerprint import CaseStats, Fingerprint
from autoseg.domain.plan import Plan
from autoseg.errors import AutosegError, ConfigError, PlanError
from autoseg.inference.columns import LEAST_TILES, MOST_SUMS_BYTES
from autoseg.io.files import write_text
from autoseg.io.run_folder import RunFolder
from autoseg.io.store import CaseStore, foreground_locations
from autoseg.pipeline import forecast as forecasting
from autoseg.pipeline import host, measuring
from autoseg.pipeline.forecast import Forecast, MeasuredStep, Measurements, make_forecast
from autoseg.pipeline.host import Target
from autoseg.planning.presets import preset_rules
from autoseg.training import trial
from autoseg.training.speed import undisturbed_seconds
from autoseg.training.trial import TrialRequest, TrialResult

CPU = Target(torch.device("cpu"), "fp32")
BRAIN = fingerprint_of([(1.0, 1.0, 1.0)] * 3, [(120, 140, 130)] * 3)


def forecast_of(planned: Plan, folder: Path, fingerprint: Fingerprint = BRAIN, **steps: MeasuredStep) -> Forecast:
    measured = Measurements(steps=steps)
    return make_forecast(planned, fingerprint, CPU, measured, budget_gb=planned.vram_gb, folder=folder)


def test_the_cache_is_forecast_from_the_fingerprint(tmp_path: Path) -> None:
    """Against a file that the store writes of noise, which cannot be compressed; resampled from 2 to 1 mm along Z."""
    rng = np.random.default_rng(0)
    labels = np.zeros((40, 50, 60), np.int16)
    labels[5:35, 10:40, 20:50] = 1
    labels[:2] = 2
    counts = tuple(int((labels == label).sum()) for label in (1, 2))
    store = CaseStore(tmp_path)
    places = foreground_locations(labels, 3, rng)
    noise = rng.integers(0, 2**32, (2, 40, 50, 60), np.uint32).view(np.float32)
    store.write("a", noise, labels, places, spacing_mm=(1, 1, 1), sources=[])
    fingerprint = fingerprint_of([(2.0, 1.0, 1.0)], [(20, 50, 60)], channels=("T1", "T2"), num_foreground=2)
    stats = CaseStats(
        case="a",
        spacing_mm=(2, 1, 1),
        shape_original=(20, 50, 60),
        shape=(20, 50, 60),
        relative_size_fraction=1,
        class_voxels=tuple(count // 2 for count in counts),
        intensities=(),
    )
    fingerprint = fingerprint.model_copy(update={"cases": (stats,)})
    planned = plan_of(fingerprint)
    part = planned.configurations["3d_fullres"]
    part = part.model_copy(
        update={"preprocess": part.preprocess.model_copy(update={"target_spacing": (1.0, 1.0, 1.0)})}
    )
    # Labels and tables of places can be compressed, and nearly vanish.
    tables = labels.nbytes + sum(table.nbytes for table in places.values())
    written = store.path("a").stat().st_size
    assert written < forecasting.cache_bytes(part, fingerprint)
    assert forecasting.cache_bytes(part, fingerprint) == pytest.approx(noise.nbytes + tables, rel=0.01)
    assert noise.nbytes < written < noise.nbytes + tables / 4


def test_a_forecast_comes_back_from_its_file(tmp_path: Path) -> None:
    step = MeasuredStep(memory_bytes=10**9, step_seconds=0.5, num_steps=3, num_threads=1)
    made = forecast_of(plan_of(BRAIN), tmp_path, **{"3d_fullres": step})
    folder = RunFolder(tmp_path)
    folder.write(folder.forecast_file, made)
    assert forecasting.read_forecast(folder) == made
    assert forecasting.earlier_forecast(folder, CPU) == made
    assert forecasting.earlier_forecast(folder, Target(CPU.device, "bf16")) is None
    write_text(folder.forecast_file, "{}")
    assert forecasting.earlier_forecast(folder, CPU) is None
    part = made.configurations["3d_fullres"]
    assert part.epoch_seconds == pytest.approx(0.5 * (250 + 50 / 3))
    assert (part.training_seconds, made.configurations["2d"].training_steps) == (3600.0, None)


def test_a_cache_that_configurations_share_counts_once(tmp_path: Path) -> None:
    planned = plan_of(BRAIN, vram_gb=1.0)
    assert {"3d_fullres", "3d_cascade"} <= set(planned.configurations)
    made = forecast_of(planned, tmp_path)
    shared = made.configurations["3d_cascade"].cache_bytes
    assert shared == made.configurations["3d_fullres"].cache_bytes
    assert made.cache_bytes == sum(item.cache_bytes for item in made.configurations.values()) - shared


def test_networks_beyond_the_closed_form_are_forecast_too(tmp_path: Path) -> None:
    planned = toy_plan()
    part = planned.configurations["3d_fullres"]
    gated = part.network.model_copy(update={"skip_join": "gate"})
    plain, other = (
        forecasting.predicted_training(part.model_copy(update={"network": network}), CPU)
        for network in (part.network, gated)
    )
    assert other.weights > plain.weights
    assert other.activations > plain.activations


# --- Trials --------------------------------------------------------------------------------------------------------


def request(**changes: object) -> TrialRequest:
    part = toy_plan().configurations["3d_fullres"]
    fields = {"network": part.network, "training": part.training, "device": "cpu", "precision": "fp32", "seconds": 0}
    return TrialRequest.model_validate({**fields, **changes})


def test_steps_are_tried_in_this_process() -> None:
    result = trial.try_steps(request(max_steps=1))
    assert (result.outcome, result.num_steps, result.device, result.precision) == ("done", 1, "cpu", "fp32")
    assert result.step_seconds is not None
    assert result.step_seconds > 0


def test_running_out_of_memory_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial.Learner, "step", no_memory)
    assert trial.try_steps(request()).outcome == "out_of_memory"


def ended(code: int, out: str = "", error: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, out, error)


def test_however_the_process_ends_there_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[subprocess.CompletedProcess[str] | Exception] = [
        ended(-9),
        subprocess.TimeoutExpired("trial", 1),
        ended(1, error="Traceback\nValueError: odd\n"),
    ]

    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(subprocess, "run", run)
    assert trial.run_trial(request()).outcome == "out_of_memory"
    assert trial.run_trial(request()).outcome == "too_slow"
    with pytest.raises(AutosegError, match="odd"):
        trial.run_trial(request())


def test_a_process_that_takes_too_much_is_stopped_by_its_limit() -> None:
    code = (
        "import numpy as np; from autoseg.machine import limit_memory; limit_memory(2**26)\n"
        "try: np.ones(2**25)\n"
        "except MemoryError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


@pytest.mark.skipif(machine.memory_now_bytes() is None, reason="the system does not tell")
def test_the_peak_is_seen_after_it_is_gone() -> None:
    # In a process of its own: here freed memory may be kept, and given out again without growing.
    code = (
        "import time, numpy as np, torch; from autoseg.machine import PeakMemory\n"
        "with PeakMemory(torch.device('cpu')) as peak:\n"
        "    block = np.ones(2**22); time.sleep(0.3); del block\n"
        "print(peak.bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 * 2**25 <= int(done.stdout) <= 2 * 2**25


# --- Plans that become smaller ---------------------------------------------------------------------------------------


def stub_trials(monkeypatch: pytest.MonkeyPatch, factor: float, outcomes: Sequence[str] = ()) -> list[TrialRequest]:
    """Trials that take `factor` times what is predicted; `outcomes` come first."""
    asked: list[TrialRequest] = []
    first = list(outcomes)

    def run(item: TrialRequest) -> TrialResult:
        asked.append(item)
        if first:
            return TrialResult.model_validate({"outcome": first.pop(0)})
        predicted = forecasting.training_memory(item.network, item.training, "fp32", "cpu").total
        return TrialResult(outcome="done", memory_bytes=round(factor * predicted), step_seconds=1.0, num_steps=1)

    monkeypatch.setattr(measuring, "run_trial", run)
    monkeypatch.setattr(machine, "device_memory_bytes", lambda _: (10**12, 10**12))
    return asked


def measured_plan(vram_gb: float = 8.0) -> tuple[Plan, Measurements]:
    return measuring.with_measured_step(
        plan_of(BRAIN, vram_gb=vram_gb), lambda gb: plan_of(BRAIN, vram_gb=gb), CPU, Measurements()
    )


def test_a_step_that_fits_changes_nothing_but_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_trials(monkeypatch, 0.01)
    found, measured = measured_plan()
    assert found.digest() == plan_of(BRAIN, vram_gb=8.0).digest()
    assert found.decisions[-1].topic == "measured memory"
    assert "stays" in found.decisions[-1].result
    assert list(measured.steps) == ["3d_fullres"]


@pytest.mark.parametrize("factor", [1.0, 1.6, 3.0])
def test_a_step_that_takes_too_much_makes_the_plan_smaller(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    asked = stub_trials(monkeypatch, factor)
    found, measured = measured_plan(4.0)
    step = measured.steps["3d_fullres"]
    assert step.memory_bytes is not None
    assert step.memory_bytes <= 4e9
    # Not smaller than it must be: more than half of the budget is used.
    assert step.memory_bytes > 2e9
    assert len(asked) > 1
    assert found.vram_gb < 4.0
    assert "planned as for" in found.decisions[-1].result
    assert asked[-1].network == found.configurations["3d_fullres"].network


def test_running_out_of_memory_makes_the_plan_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stub_trials(monkeypatch, 0.5, ["out_of_memory", "out_of_memory"])
    found, _ = measured_plan()
    assert len(asked) == 3
    batches = [item.training.batch_size * np.prod(item.network.patch_size) for item in asked]
    assert batches[0] > batches[1] > batches[2]
    assert "do not fit" in found.decisions[-1].inputs


def test_trials_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_trials(monkeypatch, 1.0, ["out_of_memory"] * 100)
    with pytest.raises(PlanError, match="no plan of 3d_fullres"):
        measured_plan()
    stub_trials(monkeypatch, 1.0, ["too_slow"])
    found, measured = measured_plan()
    assert "not measured" in found.decisions[-1].inputs
    assert not measured.steps


def test_values_set_by_hand_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_trials(monkeypatch, 3.0)
    planned = plan_of(BRAIN)
    with pytest.raises(PlanError, match="--set"):
        measuring.with_measured_step(planned, lambda _: planned, CPU, Measurements())


def test_models_keep_the_plan_that_was_measured_for_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = stub_trials(monkeypatch, 1.6)
    found, measured = measured_plan(4.0)
    earlier = make_forecast(found, BRAIN, CPU, measured, budget_gb=4.0, folder=tmp_path)
    tried = len(asked)
    again, known = measuring.with_measured_step(
        plan_of(BRAIN, vram_gb=4.0), lambda gb: plan_of(BRAIN, vram_gb=gb), CPU, Measurements(), earlier
    )
    assert (again.digest(), known.steps) == (found.digest(), measured.steps)
    assert len(asked) == tried


# --- Budgets of this machine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free_gb", "expected"), [(100.0, 8.0), (7.3, 5.0), (3.0, 2.0), (0.1, 0.5)])
def test_vram_auto_without_a_gpu_is_the_presets_own_or_less(
    monkeypatch: pytest.MonkeyPatch, free_gb: float, expected: float
) -> None:
    monkeypatch.setattr(machine, "device_memory_bytes", lambda _: (free_gb * 1e9, 128e9))
    settings = PlanSettings(vram_gb="auto")
    assert host.budget_of(settings, preset_rules("default"), CPU, None).vram_gb == expected


def test_vram_auto_takes_what_a_card_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_memory_bytes", lambda _: (23.6e9, 25.4e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    card = Target(torch.device("cuda"), "fp16")
    assert host.budget_of(PlanSettings(vram_gb="auto"), preset_rules("default"), card, None).vram_gb == 23.0
    assert host.budget_of(PlanSettings(vram_gb=6.0), preset_rules("default"), card, None).vram_gb == 6.0


def test_only_presets_that_plan_for_time_ask_for_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "measured_speed", lambda *_: 1.5e11)
    settings = PlanSettings(step_seconds=2.0)
    budget = host.budget_of(settings, preset_rules("cpu"), CPU, None)
    assert (budget.step_seconds, budget.flops_per_second) == (2.0, 1.5e11)
    assert host.budget_of(settings, preset_rules("cpu"), CPU, 2.5e11).flops_per_second == 2.5e11
    assert host.budget_of(settings, preset_rules("default"), CPU, 2.5e11).flops_per_second is None


def test_seconds_of_a_step_are_those_of_a_machine_that_does_nothing_else() -> None:
    assert undisturbed_seconds([0.5, 0.8, 0.5], 0.0) == 0.5
    # Disturbed all the time: half of the cores was left.
    assert undisturbed_seconds([1.0, 1.1, 0.9], 0.5) == pytest.approx(0.5)
    # Disturbed now and then: the quickest had all of them.
    assert undisturbed_seconds([0.5, 2.0, 0.5], 0.1) == 0.5


def test_work_of_other_programs_is_seen_and_own_work_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "_STAT_FILE", str(stat))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {1})
    monkeypatch.setattr(machine.os, "sysconf", lambda _: 100)
    own = iter([5.0, 5.6])
    monkeypatch.setattr(machine.time, "process_time", lambda: next(own))
    # User, nice, system, idle, waiting, two kinds of interrupts, stolen; guests, which are users.
    stat.write_text("cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 100 0 0 50 10 0 0 0 7 7\n")
    with machine.OtherWork() as others:
        stat.write_text("cpu 1 1 1 1 1 1 1 1 1 1\ncpu0 999 0 0 0 0 0 0 0 0 0\ncpu1 160 20 5 60 10 0 0 5 99 7\n")
    # 60 of the 90 ticks with work were this process's own, and there were 100 in all.
    assert others.fraction == pytest.approx(0.3)


def test_without_the_systems_account_nobody_else_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_STAT_FILE", str(tmp_path / "missing"))
    with machine.OtherWork() as others:
        pass
    assert others.fraction == 0.0


def test_amounts_of_memory() -> None:
    assert PlanSettings(vram_gb="12GB").vram_gb == 12.0
    assert PlanSettings.from_json('{"vram_gb": "auto"}', "plan").vram_gb == "auto"
    with pytest.raises(ConfigError):
        PlanSettings.from_json('{"vram_gb": "automatic"}', "plan")


# --- The command -----------------------------------------------------------------------------------------------------


def test_plan_measures_a_real_step_and_writes_the_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, on a network small enough for a test."""
    description = {
        "name": "tiny",
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "one": 1},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    fingerprint = fingerprint_of([(1.0, 1.0, 1.0)] * 4, [(16, 16, 16)] * 4)
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    (tmp_path / "fingerprint.json").write_text(fingerprint.to_json())
    run = tmp_path / "run"
    words = ["plan", str(tmp_path / "dataset.json"), "--fingerprint", str(tmp_path / "fingerprint.json")]
    words += ["--out", str(run), "--measure", "--device", "cpu", "--precision", "fp32"]
    words += ["--set", "3d_fullres.network.features_per_stage=[4,8,8]", "--set", "3d_fullres.training.batch_size=2"]
    assert main(words) == 0
    made = forecasting.read_forecast(RunFolder(run))
    planned = RunFolder(run).read_plan()
    assert (made.plan_digest, made.device, made.precision) == (planned.digest(), "cpu", "fp32")
    step = made.configurations["3d_fullres"].measured
    assert step is not None
    assert step.step_seconds > 0
    if machine.memory_now_bytes() is not None:
        assert step.memory_bytes is not None
        assert 10**6 < step.memory_bytes < 10**9
    assert [item.topic for item in planned.decisions if item.topic.startswith("measured")] == ["measured memory"]
    shown = capsys.readouterr().out
    assert "memory of training, measured" in shown
    assert "forecast" not in (run / "plan.json").read_text().lower()


def test_the_sums_of_a_prediction_stay_within_their_limit_however_large_image_and_labels_are(tmp_path: Path) -> None:
    """The forecast knows that large images are predicted in columns; it said 20 GB for the last of these."""
    found = []
    for side in (200, 400, 800):
        large = fingerprint_of([(1.0, 1.0, 1.0)] * 3, [(side, side, side)] * 3, num_foreground=59)
        planned = plan_of(large)
        made = forecast_of(planned, tmp_path, large).configurations["3d_fullres"].prediction
        network = planned.configurations["3d_fullres"].network
        tile = 4 * network.num_classes * int(np.prod(network.patch_size))
        assert made.logits <= max(MOST_SUMS_BYTES, LEAST_TILES * tile)
        found.append((made.logits, made.images))
    assert found[2][0] < 2 * found[0][0]
    assert found[2][1] > 60 * found[0][1]


def test_where_a_training_would_run() -> None:
    assert Target.of(TrainSettings(device="cpu", precision="bf16")) == Target(torch.device("cpu"), "bf16")
    with pytest.raises(ConfigError, match="fp16"):
        Target.of(TrainSettings(device="cpu", precision="fp16"))


def test_a_trial_is_augmented_as_most_of_a_training_is() -> None:
    """Though its steps are the first ones, where augmentation has hardly begun."""
    (part,) = toy_plan().configurations.values()
    always = part.training.augmentation.model_copy(update={"rotation_probability": 1.0, "warm_up_steps": 1000})
    training = part.training.model_copy(update={"augmentation": always})
    samples = trial.made_up_reader(TrialRequest(network=part.network, training=training)).read(0)
    assert all(sample.augmentation.matrix is not None for sample in samples)
