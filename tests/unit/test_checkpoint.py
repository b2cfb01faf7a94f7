"""Checkpoints: there is always one that is whole, and a training is never lost without a word."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import killed_training
import pytest
import torch
from toy_training import fill_store, toy_plan, train_toy

from autoseg.errors import ModelError
from autoseg.io.store import CaseStore
from autoseg.training import checkpoint
from autoseg.training.checkpoint import Checkpoint, Counters
from autoseg.training.records import TrainSettings, read_metrics


def save(folder: Path, step: int, value: float = 0.0) -> Path:
    return checkpoint.save(folder, Checkpoint(Counters(step=step, used_s=value), {"weight": torch.full((3,), value)}))


def steps(folder: Path) -> list[str]:
    return sorted(item.name for item in (folder / "resume").iterdir())


def newest_step(folder: Path) -> int:
    found = checkpoint.newest(folder)
    assert found is not None
    return found.counters.step


def spoil(path: Path, how: str) -> None:
    tensors, counters = path / "state.safetensors", path / "state.json"
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    elif how == "flipped":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif how == "counters cut short":
        counters.write_text(counters.read_text()[:40])
    elif how == "of a newer version":
        counters.write_text(json.dumps({**json.loads(counters.read_text()), "invented": 1}))
    else:
        {"no tensors": tensors, "no counters": counters}[how].unlink()


WAYS = ["truncated", "flipped", "counters cut short", "of a newer version", "no tensors", "no counters"]


@pytest.mark.parametrize("how", WAYS)
def test_the_previous_checkpoint_stands_in_for_one_that_is_not_whole(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 3)
    spoil(save(tmp_path, 5), how)
    assert newest_step(tmp_path) == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "checkpoint 000000005 is passed over: " in caplog.text


def test_a_disk_that_gives_an_error_is_passed_over_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    bad = save(tmp_path, 5)
    digest = checkpoint.file_digest

    def broken(path: Path) -> str:
        if path.parent == bad:
            raise OSError("Input/output error")
        return digest(path)

    monkeypatch.setattr(checkpoint, "file_digest", broken)
    assert newest_step(tmp_path) == 3


@pytest.mark.parametrize("kept", [1, 2])
def test_checkpoints_of_which_none_is_whole_stop_the_training(tmp_path: Path, kept: int) -> None:
    """To begin anew, as it once did, would lose what was trained without a word."""
    paths = [save(tmp_path, step) for step in (3, 5)][:kept]
    for path in (tmp_path / "resume").iterdir():
        if path not in paths:
            shutil.rmtree(path)
    for path in paths:
        spoil(path, "truncated")
    with pytest.raises(ModelError, match="none of the checkpoints") as stopped:
        checkpoint.newest(tmp_path)
    assert len(stopped.value.problems) == kept
    assert "--restart" in stopped.value.hint
    assert [path.is_dir() for path in paths] == [True] * kept, "they may still be rescued"
    checkpoint.clear(tmp_path)
    assert checkpoint.newest(tmp_path) is None


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert steps(tmp_path) == ["000000003", "000000010"]


def test_later_checkpoints_that_were_passed_over_do_not_take_the_place_of_good_ones(tmp_path: Path) -> None:
    """The corrupt one counted as one of the two that are kept, so that only a single good one was left."""
    for step in (3, 5, 8):
        save(tmp_path, step)
    spoil(tmp_path / "resume" / "000000008", "truncated")
    assert newest_step(tmp_path) == 5
    save(tmp_path, 6)
    assert steps(tmp_path) == ["000000005", "000000006"]


def test_a_checkpoint_of_the_same_step_is_there_all_the_time_while_it_is_replaced(tmp_path: Path) -> None:
    """It was removed before the new one took its name: a kill in between lost the only checkpoint."""
    save(tmp_path, 5, 1.0)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autoseg.io.files.os.replace", fail_for("000000005", killed))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 5, 2.0)
    assert steps(tmp_path) == ["000000005.replaced"]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.counters.used_s == 1.0
    save(tmp_path, 5, 2.0)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.counters.used_s == 2.0
    assert steps(tmp_path) == ["000000005"]


def fail_for(name: str, failure):
    replace = os.replace

    def act(source: Path, target: Path) -> None:
        if Path(target).name == name:
            failure()
        replace(source, target)

    return act


def test_a_kill_while_checkpoints_are_forgotten_leaves_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a folder would be a checkpoint that is not whole, which stops a training."""
    save(tmp_path, 5)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    checkpoint.clear(tmp_path)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path) is None
    checkpoint.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
    checkpoint.clear(tmp_path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    return fill_store(tmp_path_factory.mktemp("store"))


def settings(**fields: object) -> TrainSettings:
    return TrainSettings(**{"num_epochs": 2, "device": "cpu", "precision": "fp32", **fields})


def test_a_corrupt_checkpoint_costs_time_but_not_the_result(
    store: CaseStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = toy_plan(steps_per_epoch=2, batch_size=2)
    train_toy(tmp_path / "whole", store, settings(num_epochs=3), plan)
    folder = tmp_path / "spoilt"
    train_toy(folder, store, settings(num_epochs=3), plan)
    (folder / "weights.json").unlink()
    spoil(folder / "resume" / "000000006", "truncated")
    train_toy(folder, store, settings(num_epochs=3), plan)
    assert "checkpoint 000000006 is passed over" in caplog.text
    assert (folder / "weights.safetensors").read_bytes() == (tmp_path / "whole" / "weights.safetensors").read_bytes()
    assert [record.step for record in read_metrics(folder)] == [2, 4, 6]


def test_a_training_of_which_no_checkpoint_is_whole_stops_and_changes_nothing(store: CaseStore, tmp_path: Path) -> None:
    plan = toy_plan(steps_per_epoch=2, batch_size=2)
    train_toy(tmp_path, store, settings(), plan)
    for path in (tmp_path / "resume").iterdir():
        spoil(path, "flipped")
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "run.json", "weights.safetensors")}
    with pytest.raises(ModelError, match="none of the checkpoints"):
        train_toy(tmp_path, store, settings(num_epochs=3), plan)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert train_toy(tmp_path, store, settings(restart=True), plan).steps == 4


def kills(folder: Path, every: int) -> list[dict[str, object]]:
    command = [sys.executable, killed_training.__file__, str(folder), str(every)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *moments, _ = (json.loads(line) for line in done.stdout.splitlines())
    return moments


SOME = 19
"""One moment in so many is tried where time is short; a number that goes around the changes of a step."""


@pytest.mark.parametrize(
    "every", [pytest.param(SOME, id="some moments"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_a_kill_at_any_change_on_the_disk_ends_with_the_same_bytes(tmp_path: Path, every: int) -> None:
    """In the first epoch, in the middle of a checkpoint, between weights and their card, at the very end."""
    moments = kills(tmp_path, every)
    assert len(moments) > (1 if every > 1 else 2 * SOME)
    assert [moment for moment in moments if not moment["is_same"]] == []
    if every == 1:
        changed = " ".join(str(moment["change"]) for moment in moments)
        assert all(name in changed for name in ("weights.json", "best.json", "run.json", "metrics.jsonl", "state.json"))
