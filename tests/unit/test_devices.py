"""Several devices at one list of cases, shown by processes on the CPU."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import toy_run, write_images

from autoseg.errors import ConfigError, DeviceMemoryError, ModelError
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline import devices
from autoseg.pipeline.device_worker import Refusal, Report
from autoseg.pipeline.devices import parse_devices
from autoseg.pipeline.prediction import predict
from autoseg.pipeline.workers import end_process


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return toy_run(tmp_path / "run", {"3d_fullres": (0,)})


def test_two_processes_write_what_one_does_and_share_the_cases(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "in", 9)
    images[4].write_bytes(b"no image")
    one = predict(run.root, images, tmp_path / "one", device="cpu", precision="fp32")
    processes = []
    start = devices.start_process

    def started(module: str, num_threads: int) -> subprocess.Popen[str]:
        processes.append(start(module, num_threads))
        return processes[-1]

    monkeypatch.setattr(devices, "start_process", started)
    two = predict(run.root, images, tmp_path / "two", device="cpu,cpu", precision="fp32")
    assert [path.name for path in two.written] == [path.name for path in one.written]
    assert len(two.written) == 8
    assert [failure[:9] for failure in two.failures] == ["case_04: "]
    for path in one.written:
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    assert len(processes) == 2
    assert [process.returncode for process in processes] == [0, 0]
    # What is finished is known to whoever comes next, whatever worked on it.
    assert len(predict(run.root, images, tmp_path / "two", device="cpu", precision="fp32").skipped) == 8


def test_a_case_that_ends_its_process_is_tried_on_another_and_named_and_the_others_are_done(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_images(tmp_path / "in", 5)
    monkeypatch.setenv("FRAGILE_CASE", "case_01")
    script = Path(__file__).parents[1] / "fragile_worker.py"

    def fragile(module: str, num_threads: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(script)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    monkeypatch.setattr(devices, "start_process", fragile)
    with caplog.at_level(logging.WARNING, "autoseg"):
        outcome = predict(run.root, images, tmp_path / "out", device="cpu,cpu", precision="fp32")
    assert [path.name[:7] for path in outcome.written] == ["case_00", "case_02", "case_03", "case_04"]
    (failure,) = outcome.failures
    assert failure.startswith("case_01: its process was ended by SIGKILL")
    assert outcome.num_short_of_memory == 1
    assert "case case_01 is tried again, alone" in caplog.text
    with pytest.raises(DeviceMemoryError, match="1 of 5"):
        outcome.raise_failures()


def test_a_device_that_refuses_is_left_out_and_where_all_do_the_first_says_why(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "in", 5)
    weights = run.fold_folder("3d_fullres", 0) / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match="no device can go on") as refused:
        predict(run.root, images, tmp_path / "out", device="cpu,cpu", precision="fp32")
    assert "is corrupt" in refused.value.problems[0]
    assert list((tmp_path / "out").glob("*.nii.gz")) == []


def test_a_process_that_refuses_leaves_its_cases_to_one_that_works_on_the_same_device(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second network may be too much for a GPU that works well with one."""
    refusal = Report(refusal=Refusal(exit_code=6, message="too little memory for the networks"))
    code = f"import sys; sys.stdin.readline(); print({refusal.model_dump_json()!r}, flush=True); sys.stdin.read()"
    start, started = devices.start_process, list[str]()

    def second_refuses(module: str, num_threads: int) -> subprocess.Popen[str]:
        started.append(module)
        if len(started) != 2:
            return start(module, num_threads)
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    monkeypatch.setattr(devices, "start_process", second_refuses)
    monkeypatch.setattr(devices, "end_process", _killed_and_ended)
    images = write_images(tmp_path / "in", 4)
    outcome = predict(run.root, images, tmp_path / "out", device="cpu,cpu", precision="fp32")
    assert (len(outcome.written), outcome.failures) == (4, ())


def _killed_and_ended(process: subprocess.Popen[str]) -> int:
    process.kill()
    return end_process(process)


def test_devices_are_named_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_devices("cpu") == ("cpu",)
    assert parse_devices("cpu, cpu") == ("cpu", "cpu")
    for wrong in ("cpu,tpu", "cuda:97,cpu", ""):
        with pytest.raises(ConfigError):
            parse_devices(wrong)


def test_the_order_of_a_worker_is_a_value(run: RunFolder, tmp_path: Path) -> None:
    from autoseg.inference.settings import PredictionSettings
    from autoseg.pipeline.device_worker import Order
    from autoseg.pipeline.predicting import Predicting

    task = Predicting(
        model="m", configuration=None, folds="0", models_digest="d", settings=PredictionSettings(), out="o"
    )
    order = Order(task=task, device="cpu", num_threads=2)
    assert Order.model_validate_json(order.model_dump_json()) == order
    assert json.loads(order.model_dump_json())["task"]["settings"]["tta"] == "interleaved"
