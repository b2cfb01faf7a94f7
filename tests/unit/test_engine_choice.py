"""Which engine is chosen: the quickest that is near enough to PyTorch in float32, where finding out pays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_models import toy_model, toy_volume

from autoseg.errors import ModelError
from autoseg.inference import engines
from autoseg.inference.engines import Loaded, choice, parity, trials
from autoseg.inference.engines.base import Way
from autoseg.inference.engines.choice import Choosing
from autoseg.inference.engines.parity import compare
from autoseg.inference.engines.trials import FILE, SCHEMA_VERSION
from autoseg.inference.predictor import Predictor
from autoseg.inference.resident import resident
from autoseg.io.model import Model, ModelCard, load_model, save_model

CPU = torch.device("cpu")
EXACT = Way("torch", "fp32")
TILES = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class MadeUp:
    """An engine that says what PyTorch says, but for an error."""

    name: str
    set_up_s: float = 0.0
    error: float = 0.0
    fails: bool = False
    precisions: tuple[str, ...] = ("bf16", "fp32")
    packages: tuple[str, ...] = ()
    extra: str = ""
    takes_autocast: bool = False
    has_own_threads: bool = True
    loaded: list[str] = field(default_factory=list)

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def network(self, model: Model, device: torch.device, precision: str, batch: int) -> Callable[[Tensor], Tensor]:
        self.loaded.append(precision)
        if self.fails:
            raise ModelError("no such operation")
        network = resident(model, device, "fp32")
        return lambda x: network(x) * (1 + self.error)


@dataclass
class Bench:
    """Made-up engines and their seconds a pass of two tiles."""

    model: Model
    monkeypatch: pytest.MonkeyPatch
    engines: dict[str, MadeUp]
    seconds: dict[tuple[str, str], float]
    first_pass: float = 1.0

    def choose(self, base: Way = EXACT, precision: str = "auto", num_tiles: int = 10_000) -> Way:
        known = {"torch": engines.ENGINES["torch"], **self.engines}
        self.monkeypatch.setattr(engines, "ENGINES", known)
        self.monkeypatch.setattr(choice, "ENGINES", known)

        def timed(loaded: Loaded, tiles: Tensor, *, is_rough: bool = False) -> tuple[Tensor, float]:
            seconds = self.seconds[loaded.way.engine, loaded.way.precision]
            return loaded.forward(tiles), seconds * len(tiles) / 2 * (self.first_pass if is_rough else 1.0)

        with self.monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(choice, "_timed", timed)
            patch.setattr(choice.runtime, "pick_precision", lambda name, _: "bf16" if name == "auto" else name)
            settings = self.model.card.settings
            loaded = Loaded([self.model], settings, base, CPU, 2)
            choosing = Choosing([self.model], settings, loaded, CPU, precision, 2, is_regions=False)
            return choosing.choose(TILES, num_tiles).way


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    model = toy_model(seed=2)
    save_model(tmp_path, model.weights, model.card)
    made = {"openvino": MadeUp("openvino", set_up_s=0.5), "onnx": MadeUp("onnx", set_up_s=0.6, precisions=("fp32",))}
    seconds = {
        ("torch", "fp32"): 2.0,
        ("torch", "bf16"): 1.0,
        ("openvino", "fp32"): 1.5,
        ("openvino", "bf16"): 0.5,
        ("onnx", "fp32"): 0.1,
    }
    return Bench(load_model(tmp_path), monkeypatch, made, seconds)


def test_the_quickest_of_the_precision_that_is_near_enough_is_chosen(bench: Bench) -> None:
    assert bench.choose() == Way("openvino", "bf16")
    # In float32 nothing is tried once less was near enough.
    assert bench.engines["onnx"].loaded == []


@pytest.mark.parametrize("error", [0.9, float("nan")])
def test_an_engine_that_is_far_off_is_never_chosen(bench: Bench, error: float) -> None:
    bench.engines["openvino"].error = error
    assert bench.choose() == Way("torch", "bf16")


def test_float32_is_held_to_more_than_bfloat16(bench: Bench) -> None:
    bench.engines["onnx"].error = 0.01
    assert bench.choose(precision="fp32") == Way("openvino", "fp32")
    bench.engines["openvino"].error = 0.01
    (bench.model.folder / FILE).unlink()  # type: ignore[operator]
    assert bench.choose(precision="fp32") == Way("torch", "fp32")
    assert bench.choose() == Way("openvino", "bf16")


def test_a_precision_that_was_asked_for_is_kept(bench: Bench) -> None:
    assert bench.choose(precision="fp32") == Way("onnx", "fp32")
    assert bench.choose(base=Way("torch", "bf16"), precision="bf16") == Way("openvino", "bf16")


def test_a_base_that_is_far_off_is_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own models run in bf16 without a check where nothing is tried, but not against what a check has found."""
    monkeypatch.setattr(parity, "ROUNDED_LABELS", 1.01)
    assert bench.choose(base=Way("torch", "bf16")) == Way("onnx", "fp32")


def test_little_work_is_done_as_it_is(bench: Bench) -> None:
    assert bench.choose(num_tiles=choice.MIN_TILES - 1) == Way("torch", "fp32")
    assert bench.engines["openvino"].loaded == []
    assert not (bench.model.folder / FILE).exists()  # type: ignore[operator]


def test_an_engine_is_tried_where_that_is_little_against_the_work(bench: Bench) -> None:
    bench.engines["openvino"].set_up_s = 30.0
    # 100 tiles take 100 s, in PyTorch's bf16 50 s: a tenth is less than it takes to set the engine up.
    assert bench.choose(num_tiles=100) == Way("torch", "bf16")
    assert bench.engines["openvino"].loaded == []
    # PyTorch's seconds are known by now: where nothing is to be tried nothing is timed.
    seconds, bench.seconds = bench.seconds, {}
    assert bench.choose(num_tiles=100) == Way("torch", "bf16")
    bench.seconds = seconds
    # Of 500 s it is 6 %.
    assert bench.choose(num_tiles=1000) == Way("openvino", "bf16")


def test_a_slow_first_pass_of_pytorch_does_not_decide(bench: Bench) -> None:
    bench.first_pass = 1.5
    bench.seconds["torch", "bf16"] = 0.45
    assert bench.choose(base=Way("torch", "bf16"), precision="bf16") == Way("torch", "bf16")
    trials = json.loads((bench.model.folder / FILE).read_text())["remembered"][0]["trials"]  # type: ignore[operator]
    seconds = {(item["engine"], item["precision"]): item["seconds_per_tile"] for item in trials}
    assert seconds["torch", "bf16"] == pytest.approx(0.45 / 2)


def test_what_was_found_is_not_tried_again(bench: Bench) -> None:
    bench.choose()
    file = bench.model.folder / FILE  # type: ignore[operator]
    before = file.read_bytes()
    made = bench.engines["openvino"]
    assert made.loaded == ["bf16"]
    assert bench.choose(num_tiles=1) == Way("openvino", "bf16")
    assert made.loaded == ["bf16", "bf16"]  # loaded again, with no trial
    assert bench.choose() == Way("openvino", "bf16")
    assert file.read_bytes() == before


def test_what_was_found_holds_for_its_circumstances_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.choose()
    monkeypatch.setattr(trials.runtime, "cpu_name", lambda: "another processor")
    assert bench.choose(num_tiles=1) == Way("torch", "fp32")
    bench.choose()
    data = json.loads((bench.model.folder / FILE).read_text())  # type: ignore[operator]
    assert [item["circumstances"]["device"][-17:] for item in data["remembered"]][-1] == "another processor"
    assert len(data["remembered"]) == 2


def test_a_remembered_engine_is_used_where_setting_it_up_pays(bench: Bench) -> None:
    bench.choose()
    path = bench.model.folder / FILE  # type: ignore[operator]
    data = json.loads(path.read_text())
    for trial in data["remembered"][0]["trials"]:
        if trial["engine"] == "openvino":
            trial["set_up_s"] = 60.0
    path.write_text(json.dumps(data))
    assert bench.choose(num_tiles=10) == Way("torch", "bf16")
    assert bench.choose(num_tiles=10_000) == Way("openvino", "bf16")


def test_an_engine_that_cannot_take_the_network_is_passed_over(bench: Bench) -> None:
    bench.engines["openvino"].fails = True
    assert bench.choose() == Way("torch", "bf16")
    assert bench.engines["openvino"].loaded == ["bf16"]
    assert "no such operation" in (bench.model.folder / FILE).read_text()  # type: ignore[operator]


def test_memory_that_runs_out_during_a_trial_is_no_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(bench.engines["openvino"], "network", exhaust)
    assert bench.choose() == Way("torch", "bf16")


def test_a_folder_that_is_read_only_is_no_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(trials, "write_text", refuse)
    assert bench.choose() == Way("openvino", "bf16")


@pytest.mark.parametrize("content", ["", "[]", '{"schema_version": 99}', '{"schema_version": 2, "remembered": [1]}'])
def test_a_file_that_cannot_be_read_is_written_anew(bench: Bench, content: str) -> None:
    path = bench.model.folder / FILE  # type: ignore[operator]
    path.write_text(content)
    assert bench.choose() == Way("openvino", "bf16")
    assert json.loads(path.read_text())["schema_version"] == SCHEMA_VERSION


def logits(*rows: list[float]) -> Tensor:
    """(1, K, 1, 1, n) of n voxels, from rows of classes."""
    return torch.tensor(rows)[None, :, None, None]


def test_parity_is_of_labels_and_probabilities() -> None:
    expected = logits([4.0, -4.0, 0.0], [-4.0, 4.0, 0.1])
    same = compare(expected.clone(), expected, is_regions=False)
    assert (same.same_labels, same.largest_difference, same.mean_difference) == (1.0, 0.0, 0.0)
    other = compare(logits([4.0, -4.0, 0.2], [-4.0, 4.0, 0.1]), expected, is_regions=False)
    # One of two foreground voxels changed its label; sigmoid(0.1) - sigmoid(-0.1) is 0.04996.
    assert other.same_labels == 0.5
    assert other.largest_difference == pytest.approx(0.04996, abs=1e-4)
    assert other.mean_difference == pytest.approx(0.02498, abs=1e-4)
    assert not other.is_met("bf16")
    close = compare(expected + logits([1e-3] * 3, [0.0] * 3), expected, is_regions=False)
    assert close.is_met("bf16")
    assert not close.is_met("fp32")
    # A constant added to every class changes no probability.
    assert compare(expected + 7, expected, is_regions=False).is_met("fp32")


def test_regions_have_a_threshold_each() -> None:
    expected = logits([1.0, -1.0], [-1.0, -1.0])
    assert compare(expected + 3e-5, expected, is_regions=True).is_met("fp32")
    swapped = compare(logits([1.0, -1.0], [1.0, -1.0]), expected, is_regions=True)
    assert swapped.same_labels == 0.0


def test_the_first_of_many_volumes_finds_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the way: a model that is to run in float32 is found to be quick and near enough in bf16; the next knows."""
    model = toy_model(seed=2)
    inference = model.card.settings.inference.model_copy(update={"precision": "fp32"})
    part = model.card.settings.model_copy(update={"inference": inference})
    plan = model.card.plan.model_copy(update={"configurations": {"3d_fullres": part}})
    card = ModelCard(plan=plan, configuration="3d_fullres", fold=0, digest=plan.digest("3d_fullres"))
    save_model(tmp_path, model.weights, card)
    model = load_model(tmp_path)

    def timed(loaded: Loaded, tiles: Tensor, *, is_rough: bool = False) -> tuple[Tensor, float]:
        del is_rough
        found = loaded.forward(tiles)
        # Far above what setting it up takes on the slowest machine.
        return found, 1e5 if found.dtype == torch.bfloat16 else 2e5

    # Whatever the processor: bf16 is on offer, and the quicker one.
    monkeypatch.setattr(choice, "installed", lambda: ("torch",))
    monkeypatch.setattr(choice.runtime, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(choice, "_timed", timed)
    volume = toy_volume((20, 22, 24), (1.0, 1.5, 2.0))
    predictor = Predictor([model], device="cpu", num_volumes=100)
    assert predictor.way == EXACT
    labels = predictor(volume)
    assert predictor.way == Way("torch", "bf16")
    expected = Predictor([model], device="cpu", precision="bf16", engine="torch")(volume)
    assert np.array_equal(labels, expected)
    later = Predictor([model], device="cpu")
    assert np.array_equal(later(toy_volume((7, 8, 8))), predictor(toy_volume((7, 8, 8))))
    assert later.way == Way("torch", "bf16")
    # What was asked for is done.
    asked = Predictor([model], device="cpu", precision="fp32", num_volumes=100)
    asked(volume)
    assert asked.way == EXACT
