"""A step without finite numbers changes nothing, leaves its batch behind, and too many of them end the training."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_training import PATCH, fill_store, toy_plan, train_toy

from autoseg.domain.plan import Plan
from autoseg.errors import TrainingDiverged, TrainingInterrupted
from autoseg.io.store import CaseStore
from autoseg.training import checkpoint
from autoseg.training.bad_steps import KEPT_BATCHES, MOST_BAD_STEPS, WINDOW_STEPS, BadStep, BadSteps
from autoseg.training.batches import Batch, BatchReader, assemble
from autoseg.training.checkpoint import Counters
from autoseg.training.learner import SMALLEST_LOSS_SCALE, Learner, StepOutcome
from autoseg.training.records import TrainSettings, read_metrics, read_run
from autoseg.training.schedule import Pace

CPU = torch.device("cpu")
BAD_CASE = "case_2"
NUM_CASES = 9
SEED_WITH_TWO_BAD_STEPS = 9
"""Of the toy training below: BAD_CASE is drawn in two of its steps."""


@pytest.fixture(autouse=True)
def _ctrl_c_works() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class SpoiltCase:
    """A case whose image holds nothing but one value."""

    def __init__(self, case: object, value: float) -> None:
        self.case, self.value = case, value

    def __getattr__(self, name: str) -> object:
        return getattr(self.case, name)

    def read(self, start: object, stop: object) -> object:
        image, labels = self.case.read(start, stop)  # type: ignore[attr-defined]
        image[:] = self.value
        return image, labels


class SpoiltStore:
    def __init__(self, store: CaseStore, value: float) -> None:
        self.store, self.value = store, value

    def ids(self) -> tuple[str, ...]:
        return self.store.ids()

    def open(self, case_id: str) -> object:
        case = self.store.open(case_id)
        return SpoiltCase(case, self.value) if case_id == BAD_CASE else case


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> SpoiltStore:
    return SpoiltStore(fill_store(tmp_path_factory.mktemp("store"), NUM_CASES), np.nan)


def plan() -> Plan:
    return toy_plan(batch_size=1, ema_decay=0.9)


def settings(**fields: object) -> TrainSettings:
    given = {"num_epochs": 2, "device": "cpu", "precision": "fp32", "seed": SEED_WITH_TWO_BAD_STEPS, **fields}
    return TrainSettings(**given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(spoilt: SpoiltStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of six steps, of which two are bad."""
    folder = tmp_path_factory.mktemp("trained") / "fold_0"
    train_toy(folder, spoilt, settings(), plan())  # type: ignore[arg-type]
    return folder


def bad_steps_of(folder: Path) -> tuple[int, ...]:
    found = checkpoint.newest(folder)
    assert found is not None
    return found.counters.bad_steps


def test_a_case_of_nan_costs_its_steps_and_not_the_training(spoilt: SpoiltStore, trained: Path) -> None:
    bad = bad_steps_of(trained)
    assert len(bad) == 2
    run = read_run(trained)
    assert run is not None
    assert (run.status, run.steps, run.num_bad_steps) == ("finished", 12, 2)
    records = read_metrics(trained)
    assert sum(record.num_bad_steps for record in records) == 2
    assert all(record.train_loss is not None and math.isfinite(record.train_loss) for record in records)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(trained / "weights.safetensors").values())


def test_what_is_kept_is_the_batch_as_the_step_saw_it(spoilt: SpoiltStore, trained: Path) -> None:
    step = bad_steps_of(trained)[0]
    text = (trained / "diverged" / f"step_{step}.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    record = BadStep.from_json(text, "step.json")
    assert (record.step, record.loss, record.precision) == (step, "nan", "fp32")
    assert any(f"case {BAD_CASE}: its patch holds {math.prod(PATCH)} values" in text for text in record.findings)
    assert any("layer encoder.0" in text for text in record.findings)

    part = plan().configurations["3d_fullres"]
    cases = spoilt.ids()[:-1]
    samples = BatchReader.of(part, spoilt, cases, SEED_WITH_TWO_BAD_STEPS, 2).read(step)  # type: ignore[arg-type]
    batch = assemble(samples, CPU)
    kept = load_file(trained / "diverged" / f"step_{step}.safetensors")
    torch.testing.assert_close(kept["images"], batch.images, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(kept["labels"], batch.labels)
    (sample,) = record.samples
    assert (sample.case, sample.start, sample.size) == (BAD_CASE, samples[0].spec.start, PATCH)
    drawn = samples[0].augmentation
    assert tuple(sample.augmentation.get("flips", ())) == drawn.flips  # type: ignore[arg-type]
    assert ("matrix" in sample.augmentation) == (drawn.matrix is not None)


class StopAfter:
    """Progress that sends a signal to its own process after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def start(self, description: str, total: int | None) -> None: ...

    def advance(self, step: int = 1, note: str = "") -> None:
        self.left -= step
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, note: str = "") -> None: ...


@pytest.mark.parametrize("after", [0, 1])
def test_a_training_with_bad_steps_goes_on_to_the_same_bytes(
    spoilt: SpoiltStore, trained: Path, tmp_path: Path, after: int
) -> None:
    """Stopped right after a bad step, and one step later."""
    bad = bad_steps_of(trained)
    with pytest.raises(TrainingInterrupted):
        train_toy(tmp_path, spoilt, settings(), plan(), progress=StopAfter(bad[0] + 1 + after))  # type: ignore[arg-type]
    assert bad_steps_of(tmp_path) == bad[:1]
    train_toy(tmp_path, spoilt, settings(), plan())  # type: ignore[arg-type]
    assert bad_steps_of(tmp_path) == bad
    for name in ("weights.safetensors", *(f"diverged/step_{step}.json" for step in bad)):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    losses = [[(record.train_loss, record.num_bad_steps) for record in read_metrics(f)] for f in (tmp_path, trained)]
    assert losses[0] == losses[1]


def test_restart_forgets_bad_steps(spoilt: SpoiltStore, tmp_path: Path) -> None:
    (tmp_path / "diverged").mkdir()
    (tmp_path / "diverged" / "step_1.json").touch()
    short = settings(num_epochs=1, restart=True, seed=0)
    train_toy(tmp_path, spoilt.store, short, toy_plan(steps_per_epoch=1))
    assert not (tmp_path / "diverged").exists()


def test_a_network_that_overflows_ends_with_a_diagnosis_and_the_batches(spoilt: SpoiltStore, tmp_path: Path) -> None:
    wild = toy_plan(learning_rate=1e38)
    with pytest.raises(TrainingDiverged, match=r"in 3 of the last 3 steps") as stopped:
        train_toy(tmp_path, spoilt.store, settings(), wild)
    message = str(stopped.value)
    assert "is the first to give" in message
    for step in (1, 2, 3):
        assert f"step_{step}.safetensors" in message
        assert (tmp_path / "diverged" / f"step_{step}.safetensors").is_file()
    assert "--set training.learning_rate" in stopped.value.hint
    run = read_run(tmp_path)
    assert run is not None
    assert run.status == "diverged"
    assert not (tmp_path / "lock").exists()


# ------------------------------------------------------------------------------------------------- when it is too many
@pytest.fixture
def noting(tmp_path: Path, spoilt: SpoiltStore) -> Callable[[Counters, int], Counters]:
    """Notes a bad step of that number."""
    part = plan().configurations["3d_fullres"]
    learner = Learner(part.network, part.training, device=CPU, precision="fp32", seed=0)
    samples = BatchReader.of(part, spoilt.store, ("case_0",), 0, 2).read(0)
    batch = assemble(samples, CPU)
    bad_steps = BadSteps(tmp_path, "fold 0", learner.network, CPU, "fp32")

    def note(counters: Counters, step: int) -> Counters:
        now = counters.model_copy(update={"step": step})
        return bad_steps.note(now, samples, batch, StepOutcome(math.inf, math.nan, False), Pace(0.01, 0.9))

    return note


def noted(note: Callable[[Counters, int], Counters], *steps: int) -> Counters:
    counters = Counters()
    for step in steps:
        counters = note(counters, step)
    return counters


def test_three_bad_steps_within_the_window_are_too_many(noting: Callable[[Counters, int], Counters]) -> None:
    far = WINDOW_STEPS
    assert noted(noting, 10, 11, 10 + far).bad_steps == (10, 11, 10 + far)
    assert noted(noting, 10, 30, 50, 70).num_bad_steps == 4
    for steps in ((10, 11, 12), (10, 11, 9 + far), (1, 1 + far, 100, 101, 102)):
        with pytest.raises(TrainingDiverged):
            noted(noting, *steps)


def test_so_many_batches_are_kept_and_no_more(noting: Callable[[Counters, int], Counters], tmp_path: Path) -> None:
    steps = [number * WINDOW_STEPS for number in range(KEPT_BATCHES + 2)]
    noted(noting, *steps)
    names = {f"step_{step}{ending}" for step in steps[-KEPT_BATCHES:] for ending in (".json", ".safetensors")}
    assert {path.name for path in (tmp_path / "diverged").iterdir()} == names
    assert KEPT_BATCHES >= MOST_BAD_STEPS


def test_a_full_disk_costs_the_file_and_not_the_training(
    noting: Callable[[Counters, int], Counters], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("autoseg.training.bad_steps.write_tensors", full)
    assert noted(noting, 5).bad_steps == (5,)
    assert "cannot be kept: No space left" in caplog.text


# ------------------------------------------------------------------------------------------- a skipped step is no step
@pytest.mark.parametrize(("norm", "precision"), [("instance", "fp32"), ("batch", "fp32"), ("batch", "fp16")])
def test_a_bad_step_changes_no_weight_no_momentum_and_no_running_mean(norm: str, precision: str) -> None:
    torch.set_num_threads(1)
    part = toy_plan(ema_decay=0.5).configurations["3d_fullres"]
    network = part.network.model_copy(update={"norm": norm})
    learner = Learner(network, part.training, device=CPU, precision=precision, seed=0)
    learner.restore(learner.state(), (1024.0, 0))
    good = torch.randn((2, 1, *PATCH), generator=torch.Generator().manual_seed(0))
    labels = (good[:, 0] > 1).to(torch.int16)
    assert learner.step(Batch(good, labels, ("a", "b")), 0.01, 0).is_finite
    before = {name: tensor.clone() for name, tensor in learner.state().items()}
    assert any(name.startswith("momentum.") for name in before)

    bad = good.clone()
    bad[0, 0, 3, 3, 3] = math.nan
    for number in (1, 2):
        assert not learner.step(Batch(bad, labels, ("a", "b")), 0.01, number).is_finite
    after = learner.state()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert learner.step(Batch(good, labels, ("a", "b")), 0.01, 3).is_finite


def test_a_scale_that_collapses_is_no_excuse() -> None:
    """An overflow at a high scale is ordinary, and one without any scaling is not."""
    torch.set_num_threads(1)
    part = toy_plan().configurations["3d_fullres"]
    learner = Learner(part.network, part.training, device=CPU, precision="fp16", seed=0)
    images = torch.randn((1, 1, *PATCH), generator=torch.Generator().manual_seed(0))
    batch = Batch(images, (images[:, 0] > 1).to(torch.int16), ("a",))
    learner.network.get_parameter("encoder.0.0.conv.weight").register_hook(lambda gradient: gradient * math.inf)
    for scale, is_ordinary in ((2.0, True), (SMALLEST_LOSS_SCALE, True), (SMALLEST_LOSS_SCALE / 2, False)):
        learner.restore(learner.state(), (scale, 0))
        assert learner.step(batch, 0.01, 0).is_finite is is_ordinary
        assert learner.loss_scale[0] == scale / 2
