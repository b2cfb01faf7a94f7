"""Folds trained several at once: never more than asked for, in the right order, and one that fails stops the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from synthetic_run import configuration, make_run

from autoseg.cli.options import parse_jobs
from autoseg.config import Settings, TrainSettings, load_settings
from autoseg.errors import ConfigError, DatasetError, TrainingInterrupted
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline import several
from autoseg.pipeline.several import Job, command, num_at_a_time, train_together, waves

SETTINGS = TrainSettings(device="cpu", epochs=3, compile="never")
JOBS = [Job("2d", str(fold)) for fold in range(5)]

# Counts how many run beside it, waits until it is told that all have been seen, or for its turn to fail.
WORKER = """
import os, sys, time
from pathlib import Path
folder, name, fails = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "fails"
(folder / f"{name}.running").touch()
time.sleep(0.3)
(folder / f"{name}.seen").write_text(str(len(list(folder.glob("*.running")))))
if fails:
    print("Error: the data are no good", file=sys.stderr)
    sys.exit(3)
if sys.argv[3] == "waits":
    time.sleep(60)
(folder / f"{name}.running").unlink()
"""


class Stand:
    """Stands for the command line."""

    def __init__(self, folder: Path, how: dict[str, str]) -> None:
        self.folder, self.how = folder, how

    def __call__(self, run: RunFolder, job: Job, device: str, settings_file: Path, *, restart: bool) -> list[str]:
        assert Settings.model_validate_json(settings_file.read_text()).train == SETTINGS
        how = self.how.get(job.fold, "ends")
        return [sys.executable, "-c", WORKER, str(self.folder), f"{job.configuration}_{job.fold}", how]


def test_no_more_than_asked_for_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "command", Stand(tmp_path, {}))
    train_together(RunFolder(tmp_path), JOBS, SETTINGS, 2)
    seen = [int(path.read_text()) for path in tmp_path.glob("*.seen")]
    assert len(seen) == len(JOBS)
    assert max(seen) <= 2
    assert not list(tmp_path.glob("*.running"))


def test_one_that_fails_stops_the_others_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "command", Stand(tmp_path, {"0": "waits", "1": "fails"}))
    with pytest.raises(DatasetError, match="2d fold_1") as stopped:
        train_together(RunFolder(tmp_path), JOBS, SETTINGS, 2)
    assert "Error: the data are no good" in stopped.value.problems
    # The one that waits was ended, and no other was begun.
    assert {path.stem for path in tmp_path.glob("*.seen")} <= {"2d_0", "2d_1"}


def test_a_stop_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(several.StopRequest):
        def __enter__(self):
            found = super().__enter__()
            self.ask()
            return found

    monkeypatch.setattr(several, "StopRequest", Asked)
    monkeypatch.setattr(several, "command", Stand(tmp_path, dict.fromkeys("01234", "waits")))
    with pytest.raises(TrainingInterrupted):
        train_together(RunFolder(tmp_path), JOBS, SETTINGS, 2)


def test_previous_stages_come_first(tmp_path: Path) -> None:
    plan = make_run(tmp_path, 2).read_plan()
    names = ("cascade", "2d", "lowres")
    parts = {name: configuration(3) for name in names}
    parts["cascade"] = parts["cascade"].model_copy(update={"previous_stage": "lowres"})
    plan = plan.model_copy(update={"configurations": parts})
    jobs = [Job(name, "0") for name in names]
    assert [[job.configuration for job in wave] for wave in waves(plan, names, jobs)] == [["lowres"], ["cascade", "2d"]]


def test_the_command_is_one_that_train_understands(tmp_path: Path) -> None:
    from scripts.check_readme import find_problem

    with several._settings_file(SETTINGS) as file:
        words = command(RunFolder(tmp_path), Job("2d", "3"), "cpu", file, restart=True)
        assert words[1:5] == ["-P", "-m", "autoseg", "train"]
        assert find_problem(words[4:]) is None
        assert load_settings(file).train == SETTINGS


def test_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, 2)
    assert num_at_a_time(run, ("2d",), SETTINGS, None) == 1
    assert num_at_a_time(run, ("2d",), SETTINGS, 3) == 3  # nothing was forecast

    class Forecast:
        class One:
            class training:
                total = 4_000_000_000

        configurations = {"2d": One}  # noqa: RUF012

    monkeypatch.setattr(several, "earlier_forecast", lambda *_: Forecast)
    monkeypatch.setattr(several, "device_memory_bytes", lambda _: (9_000_000_000, 16_000_000_000))
    assert num_at_a_time(run, ("2d",), SETTINGS, 3) == 2
    assert "2 folds at a time instead of 3" in caplog.text


def test_jobs_on_the_command_line() -> None:
    assert (parse_jobs("auto"), parse_jobs("4")) == (None, 4)
    for text in ("0", "-1", "many"):
        with pytest.raises(ConfigError, match="--jobs"):
            parse_jobs(text)
