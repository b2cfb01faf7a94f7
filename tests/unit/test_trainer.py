"""Training goes on where it was stopped, bit for bit, and says why when it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_training
from safetensors import SafetensorError
from toy_training import fill_store, toy_plan, train_toy

from autoseg.errors import ConfigError, DatasetError, DeviceMemoryError, TrainingDiverged, TrainingInterrupted
from autoseg.io.model import BEST, load_model
from autoseg.io.store import CaseStore
from autoseg.training import checkpoint, trainer, validation
from autoseg.training.learner import Learner
from autoseg.training.outputs import FoldOutputs
from autoseg.training.records import FoldCases, TrainSettings, read_metrics, read_run, write_metrics
from autoseg.training.schedule import Clock

EPOCHS = 3
STEPS = 6
TIMEOUT_S = 90.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    return fill_store(tmp_path_factory.mktemp("store"))


def settings(**fields: object) -> TrainSettings:
    return TrainSettings(**{"num_epochs": EPOCHS, "device": "cpu", "precision": "fp32", **fields})


@pytest.fixture(scope="module")
def uninterrupted(store: CaseStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "fold_0"
    train_toy(folder, store, settings(), toy_plan(ema_decay=0.9))
    return folder


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Until a checkpoint of that step or a later one is there."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        done = [int(item.name) for item in folder.glob("resume/*") if item.name.isdigit()]
        if done and max(done) >= step:
            return
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint of step {step} within {TIMEOUT_S} s")


def comparable(folder: Path) -> list[tuple[object, ...]]:
    return [(r.epoch, r.step, r.train_loss, r.pseudo_dice, r.ema_pseudo_dice) for r in read_metrics(folder)]


def test_a_killed_training_ends_with_the_same_bytes(store: CaseStore, uninterrupted: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the second epoch; what is started again ends as a run that nobody disturbed."""
    folder = tmp_path / "fold_0"
    command = [sys.executable, toy_training.__file__, str(folder), str(store.folder), str(EPOCHS)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        wait_for_step(process, folder, STEPS + 2)
        process.kill()
    assert not (folder / "weights.json").exists()
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.counters.epoch_steps > 0

    train_toy(folder, store, settings(), toy_plan(ema_decay=0.9))
    for name in ("weights.safetensors", "best.safetensors"):
        assert (folder / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert comparable(folder) == comparable(uninterrupted)


def test_reading_ahead_changes_nothing(store: CaseStore, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fold_0"
    train_toy(folder, store, settings(prefetch=0), toy_plan(ema_decay=0.9))
    assert (folder / "weights.safetensors").read_bytes() == (uninterrupted / "weights.safetensors").read_bytes()


def test_a_corrupt_checkpoint_is_passed_over(
    store: CaseStore, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "fold_0"
    train_toy(folder, store, settings(num_epochs=2), toy_plan(ema_decay=0.9))
    older, newest = sorted((folder / "resume").iterdir())
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.counters.step == int(older.name) == STEPS
    assert "corrupt" in caplog.text


def test_what_training_leaves(store: CaseStore, uninterrupted: Path) -> None:
    run = read_run(uninterrupted)
    assert run is not None
    assert (run.status, run.epochs, run.steps, run.precision) == ("finished", EPOCHS, EPOCHS * STEPS, "fp32")
    records = read_metrics(uninterrupted)
    assert [record.step for record in records] == [STEPS * (epoch + 1) for epoch in range(EPOCHS)]
    assert records[-1].train_loss < records[0].train_loss
    rates = [record.learning_rate for record in records]
    assert rates == pytest.approx([0.01 * (1 - epoch / EPOCHS) ** 0.9 for epoch in range(EPOCHS)])
    model = load_model(uninterrupted)
    assert model.card.fold == 0
    assert model.card.provenance["steps"] == EPOCHS * STEPS
    assert load_model(uninterrupted, BEST).card.digest == model.card.digest
    assert sorted(item.name for item in uninterrupted.iterdir()) == [
        "best.json", "best.safetensors", "metrics.jsonl", "resume", "run.json", "weights.json", "weights.safetensors",
    ]  # fmt: skip
    assert len(list((uninterrupted / "resume").iterdir())) == checkpoint.KEPT


def test_a_finished_fold_is_not_trained_again(store: CaseStore, uninterrupted: Path) -> None:
    before = (uninterrupted / "weights.safetensors").stat().st_mtime_ns
    result = train_toy(uninterrupted, store, settings(), toy_plan(ema_decay=0.9))
    assert (result.did_train, result.steps) == (False, EPOCHS * STEPS)
    assert (uninterrupted / "weights.safetensors").stat().st_mtime_ns == before


def test_more_epochs_go_on(store: CaseStore, tmp_path: Path) -> None:
    train_toy(tmp_path, store, settings(num_epochs=1))
    result = train_toy(tmp_path, store, settings(num_epochs=2))
    assert (result.epochs, result.steps) == (2, 2 * STEPS)
    assert len(read_metrics(tmp_path)) == 2


def test_restart_forgets(store: CaseStore, tmp_path: Path) -> None:
    train_toy(tmp_path, store, settings(num_epochs=1))
    with pytest.raises(ConfigError, match="seed 0, not 1"):
        train_toy(tmp_path, store, settings(num_epochs=2, seed=1))
    with pytest.raises(ConfigError, match="another network"):
        train_toy(tmp_path, store, settings(num_epochs=2), toy_plan(dims=2))
    result = train_toy(tmp_path, store, settings(num_epochs=1, seed=1, restart=True))
    assert result.steps == STEPS
    assert read_metrics(tmp_path)[0].epoch == 0


def test_a_budget_is_kept_and_the_rate_decays_to_nothing(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time goes on by looking at the clock, so that the machine's speed has no part in this.
    ticks = count()
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks) * 0.02)
    monkeypatch.setattr(trainer, "Clock", lambda used_s=0.0: Clock(used_s, now=time.monotonic))
    result = train_toy(tmp_path, store, settings(num_epochs=None, time_budget_s=2.0), toy_plan())
    assert 1.0 < result.seconds <= 2.1
    assert result.last is not None
    assert result.last.learning_rate < 0.0015
    again = train_toy(tmp_path, store, settings(num_epochs=None, time_budget_s=2.5), toy_plan())
    assert again.steps > result.steps
    assert result.seconds < again.seconds <= 2.6


class FlakyStore:
    """A store whose cases can be spoilt."""

    def __init__(self, store: CaseStore, bad: str, value: float) -> None:
        self.store, self.bad, self.value = store, bad, value
        self.folder = store.folder

    def ids(self) -> tuple[str, ...]:
        return self.store.ids()

    def open(self, case_id: str) -> object:
        case = self.store.open(case_id)
        if case_id == self.bad:
            return SpoiltCase(case, self.value)
        return case


class SpoiltCase:
    def __init__(self, case: object, value: float) -> None:
        self.case, self.value = case, value

    def __getattr__(self, name: str) -> object:
        return getattr(self.case, name)

    def read(self, start: object, stop: object) -> object:
        image, labels = self.case.read(start, stop)  # type: ignore[attr-defined]
        image[0, 0, 0, 0] = self.value
        return image, labels


def test_nan_stops_with_case_layer_and_value(store: CaseStore, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged) as stopped:
        train_toy(tmp_path, FlakyStore(store, "case_2", np.nan), settings())  # type: ignore[arg-type]
    message = str(stopped.value)
    assert "case_2: its patch holds" in message
    assert "layer encoder.0" in message
    assert "nan" in message
    run = read_run(tmp_path)
    assert run is not None
    assert run.status == "diverged"


def test_weights_before_the_divergence_are_kept(store: CaseStore, tmp_path: Path) -> None:
    train_toy(tmp_path, store, settings(num_epochs=1))
    with pytest.raises(TrainingDiverged):
        train_toy(tmp_path, FlakyStore(store, "case_1", np.inf), settings(num_epochs=5))  # type: ignore[arg-type]
    kept = checkpoint.newest(tmp_path)
    assert kept is not None
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.tensors.values())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_model(tmp_path, BEST).weights.values())


def test_an_unreadable_case_is_named_and_nothing_hangs(store: CaseStore, tmp_path: Path) -> None:
    class Broken(FlakyStore):
        def open(self, case_id: str) -> object:
            if case_id == self.bad:
                raise OSError("the disk has gone")
            return self.store.open(case_id)

    with pytest.raises(DatasetError, match=r"case_3 .*the disk has gone"):
        train_toy(tmp_path, Broken(store, "case_3", 0.0), settings())  # type: ignore[arg-type]


class InterruptAfter:
    """Progress that sends a signal to its own process after some steps."""

    def __init__(self, steps: int, number: signal.Signals) -> None:
        self.left, self.number = steps, number

    def start(self, description: str, total: int | None) -> None: ...

    def advance(self, step: int = 1, note: str = "") -> None:
        self.left -= step
        if self.left == 0:
            os.kill(os.getpid(), self.number)

    def finish(self, note: str = "") -> None: ...


@pytest.mark.parametrize(("step", "number"), [(STEPS + 2, signal.SIGINT), (2 * STEPS, signal.SIGTERM)])
def test_a_signal_saves_and_says_so(
    store: CaseStore, uninterrupted: Path, tmp_path: Path, step: int, number: signal.Signals
) -> None:
    """In mid-epoch and at the very end of one (which once made an epoch one step longer)."""
    with pytest.raises(TrainingInterrupted, match=f"after step {step}; everything is saved"):
        train_toy(tmp_path, store, settings(), toy_plan(ema_decay=0.9), progress=InterruptAfter(step, number))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / "lock").exists()
    train_toy(tmp_path, store, settings(), toy_plan(ema_decay=0.9))
    assert comparable(tmp_path) == comparable(uninterrupted)
    assert (tmp_path / "weights.safetensors").read_bytes() == (uninterrupted / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("way", ["SIGTERM", "kill"])
def test_a_stop_during_a_look_at_validation_cases_does_not_wait_for_its_end(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A look of fifty batches once kept a stop waiting for minutes, and a kill lost the time since the checkpoint."""
    plan = toy_plan(validation_steps_per_epoch=4)
    train_toy(tmp_path / "whole", store, settings(num_epochs=2), plan)
    folder, looks, agreement = tmp_path / "cut", count(), validation.count_agreement

    def stop_in_the_second_look(*what: object) -> torch.Tensor:
        if next(looks) == 5:
            if way == "kill":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return agreement(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(validation, "count_agreement", stop_in_the_second_look)
    with pytest.raises((KeyboardInterrupt, TrainingInterrupted)):
        train_toy(folder, store, settings(num_epochs=2, checkpoint_interval_s=0.0), plan)
    monkeypatch.undo()
    assert next(looks) == 6, "the look went on"
    found = checkpoint.newest(folder)
    assert found is not None
    assert (found.counters.step, found.counters.epoch, found.counters.epoch_steps) == (2 * STEPS, 1, STEPS)
    train_toy(folder, store, settings(num_epochs=2), plan)
    assert comparable(folder) == comparable(tmp_path / "whole")
    for name in ("weights.safetensors", "best.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_kill_costs_more_than_the_interval_between_checkpoints(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint was due when the interval was over, and so came a step and its own writing too late."""
    # Time goes on by looking at the clock, so that the machine's speed has no part in this.
    ticks, most, saved_at = count(), 0.0, 0.0
    save, step = checkpoint.save, Learner.step
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks) * 0.02)
    clock = Clock(now=time.monotonic)
    monkeypatch.setattr(trainer, "Clock", lambda: clock)

    def note_and_save(folder: Path, saved: checkpoint.Checkpoint) -> Path:
        nonlocal saved_at
        path = save(folder, saved)
        note()
        saved_at = saved.counters.used_s
        return path

    def step_and_note(learner: Learner, *rest: object) -> object:
        outcome = step(learner, *rest)  # type: ignore[arg-type]
        note()
        return outcome

    def note() -> None:
        nonlocal most
        most = max(most, clock.used_s() - saved_at)

    monkeypatch.setattr(checkpoint, "save", note_and_save)
    monkeypatch.setattr(Learner, "step", step_and_note)
    plan = toy_plan(steps_per_epoch=60, batch_size=1, validation_steps_per_epoch=0)
    train_toy(tmp_path, store, settings(num_epochs=1, checkpoint_interval_s=3.0), plan)
    assert 1.5 < most <= 3.0


def test_bf16_goes_on_to_the_same_bytes_too(store: CaseStore, tmp_path: Path) -> None:
    """Its channels-last path has a backward pass of its own."""
    for name, progress in (("whole", None), ("cut", InterruptAfter(3, signal.SIGTERM))):
        with contextlib.suppress(TrainingInterrupted):
            train_toy(tmp_path / name, store, settings(num_epochs=1, precision="bf16"), progress=progress)
    # Which precision "auto" is was settled at the first start.
    train_toy(tmp_path / "cut", store, settings(num_epochs=1, precision="auto"))
    whole, cut = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_two_trainings_of_a_fold_exclude_each_other(store: CaseStore, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"):
        train_toy(tmp_path, store, settings())


def test_metrics_survive_a_torn_line(store: CaseStore, uninterrupted: Path, tmp_path: Path) -> None:
    records = read_metrics(uninterrupted)
    write_metrics(tmp_path, records)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert read_metrics(tmp_path) == records[:-1]


def test_2d_trains_on_slices(store: CaseStore, tmp_path: Path) -> None:
    result = train_toy(tmp_path, store, settings(num_epochs=1), toy_plan(dims=2))
    assert result.steps == STEPS
    assert load_model(tmp_path).card.configuration == "2d"


@pytest.fixture(scope="module")
def finished(store: CaseStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fold that was trained for one epoch, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "fold_0"
    train_toy(folder, store, settings(num_epochs=1))
    return folder


@pytest.fixture
def fold(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "fold_0"))


def write_validation(fold: Path) -> Path:
    summary = fold / "validation" / "summary.json"
    summary.parent.mkdir()
    summary.write_text("{}")
    (fold / "validation" / "case_4.nii.gz").write_bytes(b"")
    return summary


def test_restart_forgets_the_validation(store: CaseStore, fold: Path) -> None:
    write_validation(fold)
    with pytest.raises(TrainingInterrupted):
        train_toy(fold, store, settings(restart=True), progress=InterruptAfter(1, signal.SIGTERM))
    assert not (fold / "validation").exists()
    assert not (fold / "weights.json").exists()


def test_new_final_weights_make_the_validation_of_the_old_ones_void(store: CaseStore, fold: Path) -> None:
    summary = write_validation(fold)
    train_toy(fold, store, settings(num_epochs=1))
    assert summary.exists(), "a finished fold keeps it"
    train_toy(fold, store, settings(num_epochs=2))
    assert not summary.exists()


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_fold_whose_cases_have_changed_does_not_go_on(
    store: CaseStore, fold: Path, tmp_path: Path, epochs: int
) -> None:
    """Neither where it is finished already nor where more is asked for."""
    smaller = fill_store(tmp_path / "smaller", num_cases=4)
    before = (fold / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"cases of .* changed .*then 4 and 1, now 3 for .* and 1 for") as refused:
        train_toy(fold, smaller, settings(num_epochs=epochs))
    assert "--restart" in refused.value.hint
    assert (fold / "run.json").read_bytes() == before


def test_the_digest_of_cases_knows_their_part_and_not_their_order() -> None:
    digest = FoldCases(("a", "b"), ("c",)).digest
    assert FoldCases(("b", "a"), ("c",)).digest == digest
    assert FoldCases(("a",), ("b", "c")).digest != digest


def test_records_without_a_digest_of_cases_fit_any(store: CaseStore, fold: Path) -> None:
    """What an earlier version wrote."""
    path = fold / "run.json"
    record = json.loads(path.read_text())
    del record["cases_digest"]
    path.write_text(json.dumps(record))
    assert not train_toy(fold, store, settings(num_epochs=1)).did_train


def test_a_signal_while_the_final_weights_are_written_stops_the_command(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FoldOutputs.write_model

    def write_and_ask_for_a_stop(outputs: FoldOutputs, name: str, *rest: object) -> None:
        if name == "weights":
            os.kill(os.getpid(), signal.SIGTERM)
        write(outputs, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FoldOutputs, "write_model", write_and_ask_for_a_stop)
    with pytest.raises(TrainingInterrupted, match="finished and saved"):
        train_toy(tmp_path, store, settings(num_epochs=1))
    assert load_model(tmp_path).card.provenance["epochs"] == 1
    result = train_toy(tmp_path, store, settings(num_epochs=1))
    assert (result.did_train, result.epochs) == (False, 1)


@pytest.mark.parametrize("place", ["__init__", "step"])
def test_a_cpu_without_memory_is_no_plain_runtime_error(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(Learner, place, fail)
    with pytest.raises(DeviceMemoryError, match="fold 0 of 3d_fullres"):
        train_toy(tmp_path, store, settings(num_epochs=1))
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("damage", ["lost", "corrupt"])
def test_final_weights_that_are_lost_or_corrupt_are_made_anew(
    store: CaseStore, fold: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = fold / "weights.safetensors"
    good = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    result = train_toy(fold, store, settings(num_epochs=1))
    assert result.steps == STEPS
    assert path.read_bytes() == good
    load_model(fold)
    assert "lost or corrupt" in caplog.text


def test_a_kill_between_the_metrics_and_the_checkpoint_records_no_epoch_twice(store: CaseStore, fold: Path) -> None:
    """The checkpoint has the step of the record, but its epoch is still open (the last one of a time budget)."""
    with pytest.raises(TrainingInterrupted):
        train_toy(fold, store, settings(num_epochs=2), progress=InterruptAfter(STEPS + 2, signal.SIGTERM))
    records = read_metrics(fold)
    torn = records[-1].model_copy(update={"epoch": 1, "step": STEPS + 2})
    write_metrics(fold, (*records, torn))
    train_toy(fold, store, settings(num_epochs=2))
    assert [(record.epoch, record.step) for record in read_metrics(fold)] == [(0, STEPS), (1, 2 * STEPS)]


def test_a_cached_case_that_breaks_while_it_is_read_is_named(store: CaseStore, tmp_path: Path) -> None:
    copy = CaseStore(shutil.copytree(store.folder, tmp_path / "cache"))

    def broken(start: int, stop: int) -> object:
        raise SafetensorError(f"InvalidOffset {start} {stop}")

    class Broken(FlakyStore):
        def open(self, case_id: str) -> object:
            case = self.store.open(case_id)
            case._file._arrays["labels"]._fetch = broken  # type: ignore[assignment]
            return case

    with pytest.raises(DatasetError, match=r"case_\d\.safetensors is damaged and was deleted") as stopped:
        train_toy(tmp_path / "fold", Broken(copy, "", 0.0), settings())  # type: ignore[arg-type]
    assert "made anew" in stopped.value.hint


def test_divergence_is_no_bug() -> None:
    assert TrainingDiverged("").exit_code == DatasetError.exit_code


@pytest.fixture(autouse=True)
def _ctrl_c_works() -> Iterator[None]:
    """Whatever pytest's runner did to SIGINT, these tests begin with Python's own handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
