"""Loggers hear everything once, know where a training goes on, and can never stop it."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from toy_training import fill_store, toy_plan, train_toy

from autoseg.cli.app import main
from autoseg.errors import ConfigError, TrainingInterrupted
from autoseg.io.store import CaseStore
from autoseg.pipeline.settings import resolve_settings
from autoseg.training import loggers, trackers
from autoseg.training.loggers import PACKAGES, Loggers, RunFacts, require, scalars
from autoseg.training.records import EpochRecord, Status, TrainSettings

STEPS = 2
RECORD = EpochRecord(
    epoch=3,
    step=8,
    seconds=90.0,
    seconds_per_step=1.5,
    learning_rate=0.005,
    train_loss=None,
    pseudo_dice=(0.8, None),
    mean_pseudo_dice=0.8,
    whole_dice=(0.7, 0.6),
    mean_whole_dice=0.65,
)


class Spy:
    """Keeps what it is told; raises in the call of that name."""

    def __init__(self, fails_in: str = "") -> None:
        self.told: list[tuple[str, Any]] = []
        self.fails_in = fails_in

    def _note(self, name: str, value: object) -> None:
        self.told.append((name, value))
        if name == self.fails_in:
            raise ConnectionError("the server is gone")

    def start(self, run: RunFacts) -> None:
        self._note("start", run)

    def log(self, record: EpochRecord) -> None:
        self._note("log", record)

    def finish(self, status: Status) -> None:
        self._note("finish", status)

    @property
    def calls(self) -> list[object]:
        return [name if name == "start" else (name, getattr(value, "epoch", value)) for name, value in self.told]


@pytest.fixture(autouse=True)
def _ctrl_c_works() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    return fill_store(tmp_path_factory.mktemp("store"))


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


def train(folder: Path, store: CaseStore, log: tuple[str, ...] = (), stop_after: int = 0, epochs: int = 2) -> None:
    settings = TrainSettings(num_epochs=epochs, device="cpu", precision="fp32", log=log)
    train_toy(folder, store, settings, toy_plan(steps_per_epoch=STEPS), progress=StopAfter(stop_after))


def spying(monkeypatch: pytest.MonkeyPatch, **spies: Spy) -> None:
    monkeypatch.setattr(
        "autoseg.training.trainer.trackers", lambda names: Loggers({name: spies[name] for name in names})
    )


# -------------------------------------------------------------------------------------------------------- the protocol
def test_a_training_tells_its_loggers_everything_once(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Spy(), Spy()
    spying(monkeypatch, a=first, b=second)
    train(tmp_path, store, ("a", "b"))
    assert first.calls == second.calls == ["start", ("log", 0), ("log", 1), ("finish", "finished")]
    run = first.told[0][1]
    assert (run.name, run.classes, run.done) == ("blobs 3d_fullres fold 0", ("blob 1", "blob 2"), ())
    assert run.folder == tmp_path / "logs"
    assert run.facts["batch_size"] == 3
    assert run.facts["num_epochs"] == 2
    json.dumps(run.facts, allow_nan=False)


def test_a_training_that_goes_on_tells_what_was_told_before(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Spy(), Spy()
    spying(monkeypatch, a=first, b=second)
    with pytest.raises(TrainingInterrupted):
        train(tmp_path, store, ("a",), stop_after=STEPS + 1)
    train(tmp_path, store, ("b",))
    assert first.calls == ["start", ("log", 0), ("finish", "interrupted")]
    assert second.calls == ["start", ("log", 1), ("finish", "finished")]
    assert [record.epoch for record in second.told[0][1].done] == [0]


@pytest.mark.parametrize("fails_in", ["start", "log", "finish"])
def test_a_logger_that_fails_is_switched_off_and_nothing_else_happens(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_in: str
) -> None:
    bad, good = Spy(fails_in), Spy()
    spying(monkeypatch, bad=bad, good=good)
    train(tmp_path, store, ("bad", "good"))
    assert good.calls == ["start", ("log", 0), ("log", 1), ("finish", "finished")]
    assert [name for name, _ in bad.told][-1] == fails_in
    assert caplog.text.count("logging to bad failed and is switched off: ConnectionError: the server is gone") == 1


def test_an_error_of_the_training_is_not_hidden() -> None:
    spy = Spy("finish")
    with pytest.raises(ValueError, match="of the training"), Loggers({"spy": spy}):
        raise ValueError("of the training")
    assert spy.calls == [("finish", "interrupted")]


def test_the_numbers_of_an_epoch_that_there_are() -> None:
    found = scalars(RECORD, ("left (old)", "right"))
    assert found["dice/left _old_"] == 0.8
    assert found["whole_dice/right"] == 0.6
    assert found["training/minutes"] == 1.5
    assert not {"dice/right", "loss/train", "loss/validation"} & found.keys()


# ------------------------------------------------------------------------------------------------------ what is missing
def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name != "wandb" else ModuleSpec(name, None))
    require(())
    require(("wandb",))
    with pytest.raises(ConfigError, match="logging to tensorboard and mlflow") as caught:
        require(("tensorboard", "mlflow", "wandb"))
    assert caught.value.hint == "Install them with: pip install 'autoseg-unet[tensorboard,mlflow]'"


def test_every_logger_has_its_extra() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert PACKAGES.keys() == trackers._KINDS.keys()
    for name in PACKAGES:
        assert len(project["optional-dependencies"][name]) == 1


def test_the_command_line_names_loggers(capsys: pytest.CaptureFixture[str]) -> None:
    settings = resolve_settings(None, log=["wandb", "tensorboard", "wandb"])
    assert settings.train.log == ("wandb", "tensorboard")
    assert main(["train", "nowhere", "--log", "clearml"]) == 2
    assert "'tensorboard', 'mlflow' or 'wandb'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- each library, made up
class Recorder:
    """Takes any call and keeps it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            return None

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, options) for called, args, options in self.calls if called == name]


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def facts(folder: Path, *done: EpochRecord) -> RunFacts:
    return RunFacts("blobs 2d fold 0", folder, ("one", "two"), {"batch_size": 2}, done)


def test_tensorboard_gets_scalars_over_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[tuple[str, int, Recorder]] = []

    def make(folder: str, purge_step: int) -> Recorder:
        writers.append((folder, purge_step, Recorder()))
        return writers[-1][2]

    fake_module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=make)
    for done in ((), (RECORD,)):
        logger = trackers.TensorBoard()
        logger.start(facts(tmp_path, *done))
        logger.log(RECORD)
        logger.finish("finished")
    assert [(folder, first) for folder, first, _ in writers] == [(str(tmp_path / "tensorboard"), n) for n in (0, 9)]
    writer = writers[0][2]
    written = {args[0]: args[1:] for args, _ in writer.of("add_scalar")}
    assert written == {name: (value, 8) for name, value in scalars(RECORD, ("one", "two")).items()}
    assert writer.calls[-1][0] == "close"


def test_mlflow_stays_in_the_fold_folder_and_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    class Client(Recorder):
        def __init__(self, tracking_uri: str) -> None:
            super().__init__()
            made.append(tracking_uri)
            clients.append(self)

        def get_experiment_by_name(self, name: str) -> None:
            self.calls.append(("get_experiment_by_name", (name,), {}))

        def create_experiment(self, name: str) -> str:
            return f"experiment of {name}"

        def create_run(self, experiment: str, run_name: str) -> Any:
            self.calls.append(("create_run", (experiment, run_name), {}))
            run = ModuleType("run")
            run.info = ModuleType("info")  # type: ignore[attr-defined]
            run.info.run_id = "r1"  # type: ignore[attr-defined]
            return run

    clients: list[Client] = []
    fake_module(monkeypatch, "mlflow")
    fake_module(monkeypatch, "mlflow.tracking", MlflowClient=Client)
    fake_module(monkeypatch, "mlflow.entities", Metric=lambda *args: args, Param=lambda *args: args)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    for status in ("interrupted", "finished"):
        logger = trackers.MLflow()
        logger.start(facts(tmp_path))
        logger.log(RECORD)
        logger.finish(status)  # type: ignore[arg-type]
    assert made == [(tmp_path / "mlflow").as_uri()] * 2
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    first, second = clients
    assert first.of("create_run") == [(("experiment of autoseg", "blobs 2d fold 0"), {})]
    assert second.of("create_run") == []
    (batch,) = [options for _, options in second.of("log_batch")]
    assert {(key, value, step) for key, value, _, step in batch["metrics"]} == {
        (key, value, 8) for key, value in scalars(RECORD, ("one", "two")).items()
    }
    assert [args for args, _ in (*first.of("set_terminated"), *second.of("set_terminated"))] == [
        ("r1", "KILLED"),
        ("r1", "FINISHED"),
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://example.org")
    trackers.MLflow().start(facts(tmp_path))
    assert made[-1] == "https://example.org"


@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb_is_offline_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    given: list[dict[str, Any]] = []
    runs: list[Recorder] = []

    def init(**options: Any) -> Recorder:
        given.append(options)
        runs.append(Recorder())
        return runs[-1]

    fake_module(monkeypatch, "wandb", init=init)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    if mode is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", mode)
    for _ in range(2):
        logger = trackers.WeightsAndBiases()
        logger.start(facts(tmp_path))
        logger.log(RECORD)
        logger.finish("diverged")
    assert [options["mode"] for options in given] == [mode or "offline"] * 2
    assert given[0]["id"] == given[1]["id"]
    assert given[0]["dir"] == str(tmp_path)
    assert given[0]["config"] == {"batch_size": 2}
    assert runs[0].of("log") == [((scalars(RECORD, ("one", "two")),), {"step": 8})]
    assert runs[0].of("finish") == [((), {"exit_code": 1})]


# ------------------------------------------------------------------------------------------------ each library, itself
@pytest.fixture
def _foreign_warnings() -> Iterator[None]:
    """What other people's libraries warn of is not ours to repair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("_foreign_warnings")
def test_tensorboard_itself_shows_each_epoch_once(store: CaseStore, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(TrainingInterrupted):
        train(tmp_path, store, ("tensorboard",), stop_after=STEPS + 1)
    train(tmp_path, store, ("tensorboard",))
    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == [STEPS, 2 * STEPS]


@pytest.mark.usefixtures("_foreign_warnings")
def test_mlflow_itself_has_one_run_with_all_epochs(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    with pytest.raises(TrainingInterrupted):
        train(tmp_path, store, ("mlflow",), stop_after=STEPS + 1)
    train(tmp_path, store, ("mlflow",))
    client = MlflowClient(tracking_uri=(tmp_path / "logs" / "mlflow").resolve().as_uri())
    (experiment,) = [item for item in client.search_experiments() if item.name == "autoseg"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert [metric.step for metric in history] == [STEPS, 2 * STEPS]
    assert (run.info.status, run.data.params["batch_size"]) == ("FINISHED", "3")


@pytest.mark.usefixtures("_foreign_warnings")
def test_wandb_itself_writes_an_offline_run(
    store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(tmp_path, store, ("wandb",))
    run_id = json.loads((tmp_path / "logs" / "wandb.json").read_text())["run_id"]
    assert list((tmp_path / "logs" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert "switched off" not in caplog.text
