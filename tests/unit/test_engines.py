"""Engines say what PyTorch says in float32, whatever is asked of the window around them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_models import SCHEMA, toy_model, toy_volume
from toy_runs import toy_run

from autoseg.domain.dataset import Case, Dataset, Fold, Splits
from autoseg.domain.geometry import Volume
from autoseg.errors import ConfigError, ModelError
from autoseg.inference.engines import ENGINES, base, openvino, pick_device_for, pick_way, pytorch
from autoseg.inference.engines.base import Way
from autoseg.inference.engines.openvino_graph import translated
from autoseg.inference.predictor import Predictor
from autoseg.inference.sums import Sums
from autoseg.io.images import write_image
from autoseg.io.model import Model, load_model, save_model
from autoseg.io.run_folder import RunFolder
from autoseg.network.unet import restore

CPU = torch.device("cpu")

PACKAGES = {"openvino": ("openvino",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


@pytest.fixture(params=["openvino", "onnx"])
def engine(request: pytest.FixtureRequest) -> Any:
    """An engine whose packages are optional."""
    for name in PACKAGES[request.param]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the extra [{request.param}] is not installed: {name} is missing")
    return request.param


def need_openvino() -> None:
    """Skip where it is not installed; found without importing it, which would tell its makers."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("the extra [openvino] is not installed")


def on_disk(model: Model, folder: Path) -> Model:
    save_model(folder, model.weights, model.card)
    return load_model(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Model]:
    """Models by dims and seed, in folders that keep the forms that engines make of them, which takes seconds."""
    root = tmp_path_factory.mktemp("models")
    found: dict[tuple[int, int], Model] = {}

    def of(dims: int, seed: int) -> Model:
        if (dims, seed) not in found:
            found[dims, seed] = on_disk(toy_model(seed=seed, dims=dims), root / f"{dims}-{seed}")
        return found[dims, seed]

    return of


def body(shape: tuple[int, int, int]) -> Volume:
    """A volume with air in the middle."""
    volume = toy_volume(shape, (1.0, 1.5, 2.0))
    volume.array[:, shape[0] // 4 : -shape[0] // 4] = 0
    return volume


@pytest.mark.parametrize(
    ("dims", "settings"),
    [
        (3, {}),
        (3, {"tta": "interleaved", "tile_batch": 3}),
        (3, {"tta": "full", "tile_batch": 2, "skip_empty": True}),
        (2, {"tta": "full", "tile_batch": 5}),
    ],
)
def test_an_engine_predicts_what_pytorch_does(
    engine: str, dims: int, settings: dict[str, Any], saved: Callable[[int, int], Model]
) -> None:
    models = [saved(dims, seed) for seed in (0, 1)]
    volume = body((40, 16, 12))
    found, logits = {}, {}
    for name in ("torch", engine):
        predictor = Predictor(models, device="cpu", precision="fp32", engine=name, **settings)  # type: ignore[arg-type]
        assert predictor.way == Way(name, "fp32")  # type: ignore[arg-type]
        prepared = predictor.prepare(volume)
        with torch.inference_mode():
            logits[name] = torch.cat([slab.clone().flatten() for _, _, slab in predictor.logits(prepared)[1]])
        found[name] = predictor.segment(prepared)
    torch.testing.assert_close(logits[engine], logits["torch"], atol=1e-4, rtol=1e-4)
    assert len(np.unique(found["torch"])) > 1
    assert np.mean(found[engine] != found["torch"]) < 1e-3  # a tie may be broken


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
def test_openvino_divides_a_batch_or_runs_it_together(number: int, saved: Callable[[int, int], Model]) -> None:
    need_openvino()
    model = saved(3, 0)
    plan = model.card.settings.network
    tiles = torch.randn(number, plan.in_channels, *plan.patch_size, generator=torch.Generator().manual_seed(number))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        network = ENGINES["openvino"].network(model, CPU, "fp32", 4)
        found = network(tiles)
        # Outputs are the caller's own: they stay as they are.
        kept = found.clone()
        network(torch.zeros_like(tiles))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, kept)
    with torch.inference_mode():
        expected = ENGINES["torch"].network(model, CPU, "fp32", 4)(tiles)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_between_passes_of_an_engine_with_threads_of_its_own_pytorch_has_one(
    engine: str, saved: Callable[[int, int], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: dict[str, list[int]] = {"adding": [], "using": []}
    add = Sums.add

    def noted(*arguments: Any) -> None:
        seen["adding"].append(torch.get_num_threads())
        add(*arguments)

    monkeypatch.setattr(Sums, "add", noted)
    try:
        for name in (engine, "torch"):
            predictor = Predictor([saved(3, 0)], device="cpu", precision="fp32", engine=name)  # type: ignore[arg-type]
            with torch.inference_mode():
                for _ in predictor.logits(predictor.prepare(toy_volume()))[1]:
                    seen["using"].append(torch.get_num_threads())
            assert set(seen["adding"]) == {2 if name == "torch" else 1}
            assert set(seen["using"]) == {torch.get_num_threads()} == {2}
            seen["adding"].clear()
    finally:
        torch.set_num_threads(before)


def test_openvino_in_bf16_is_near_float32(saved: Callable[[int, int], Model]) -> None:
    need_openvino()
    volume = toy_volume((20, 22, 24), (1.0, 1.5, 2.0))
    model = saved(3, 1)
    exact = Predictor([model], device="cpu", precision="fp32", engine="torch")(volume)
    quick = Predictor([model], device="cpu", precision="bf16", engine="openvino")(volume)
    assert np.mean(exact != quick) < 0.02


def test_a_form_that_was_kept_is_used_again(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # OpenVINO's form of this one takes long to make, and so is kept.
    model = on_disk(toy_model(activation="silu"), tmp_path)
    volume = toy_volume()
    first = Predictor([model], device="cpu", precision="fp32", engine=engine)(volume)  # type: ignore[arg-type]
    (kept,) = (tmp_path / "engines").iterdir()

    def refuse(*_: object) -> None:
        raise AssertionError("made again")

    module = sys.modules[type(ENGINES[engine]).__module__]  # type: ignore[index]
    step = {"openvino": "exported", "onnx": "onnx_of"}[engine]
    with monkeypatch.context() as patch:
        patch.setattr(module, step, refuse)
        again = Predictor([model], device="cpu", precision="fp32", engine=engine)(volume)  # type: ignore[arg-type]
        assert np.array_equal(first, again)
        other = on_disk(toy_model(seed=5, activation="silu"), tmp_path)
        with pytest.raises(AssertionError, match="made again"):
            Predictor([other], device="cpu", precision="fp32", engine=engine)  # type: ignore[arg-type]
    # The form of weights that are gone goes too.
    Predictor([other], device="cpu", precision="fp32", engine=engine)  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "engines").iterdir()] != [kept.name]
    assert len(list((tmp_path / "engines").iterdir())) == 1


def test_a_broken_form_is_made_anew(engine: str, tmp_path: Path) -> None:
    model = on_disk(toy_model(activation="silu"), tmp_path)
    volume = toy_volume()
    first = Predictor([model], device="cpu", precision="fp32", engine=engine)(volume)  # type: ignore[arg-type]
    for path in (tmp_path / "engines").rglob("*"):
        if path.suffix in (".xml", ".onnx"):
            path.write_bytes(path.read_bytes()[:100])
    again = Predictor([model], device="cpu", precision="fp32", engine=engine)(volume)  # type: ignore[arg-type]
    assert np.array_equal(first, again)


def test_what_is_made_in_a_moment_is_not_kept(tmp_path: Path) -> None:
    need_openvino()
    Predictor([on_disk(toy_model(), tmp_path)], device="cpu", precision="fp32", engine="openvino")
    assert not (tmp_path / "engines").exists()


def test_openvino_reports_nothing_to_its_makers(saved: Callable[[int, int], Model]) -> None:
    """Merely importing it would send a message over the network."""
    need_openvino()
    Predictor([saved(3, 0)], device="cpu", precision="fp32", engine="openvino")
    telemetry = importlib.import_module("openvino.tools.ovc.telemetry_utils").tm
    assert telemetry.__name__.endswith("telemetry_stub")


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_a_missing_package_is_named_with_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=PACKAGES[name][-1]) as problem:
        Predictor([toy_model()], device="cpu", engine=name)  # type: ignore[arg-type]
    assert f"pip install 'autoseg-unet[{name}]'" in problem.value.hint


def test_precisions_that_an_engine_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="onnx does not compute in bf16"):
        pick_way("onnx", "bf16", "auto", CPU)
    with pytest.raises(ConfigError, match="fp16"):
        pick_way("openvino", "fp16", "auto", CPU)
    assert pick_way("onnx", "auto", "auto", CPU) == Way("onnx", "fp32")
    # What the plan says of an imported model holds for every engine.
    assert pick_way("openvino", "auto", "fp32", CPU) == Way("openvino", "fp32")
    assert pick_way("openvino", "bf16", "fp32", CPU) == Way("openvino", "bf16")
    assert pick_way("auto", "auto", "fp32", CPU) == Way("torch", "fp32")


def test_engines_of_the_cpu_go_there_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: name)
    monkeypatch.setattr("autoseg.inference.engines.pick_device", lambda _: torch.device("cuda"))
    assert pick_device_for("openvino", "auto") == CPU
    assert pick_device_for("torch", "auto").type == "cuda"
    with pytest.raises(ConfigError, match="onnx does not run on cuda"):
        pick_device_for("onnx", "cuda")


def test_a_compiled_network_sees_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of tiles is compiled for up to a minute."""
    seen: list[int] = []

    def compile_(network: Callable[[Tensor], Tensor], **_: object) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            seen.append(len(x))
            return network(x)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    model, volume = toy_model(), body((40, 16, 12))
    settings: dict[str, Any] = {"device": "cpu", "precision": "fp32", "tta": "interleaved", "tile_batch": 5}
    found = Predictor([model], engine="compile", **settings)(volume)
    assert np.array_equal(found, Predictor([model], engine="torch", **settings)(volume))
    assert set(seen) <= {1, 2, 4, 8}
    assert len(set(seen)) > 1


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def compile_(network: object, **_: object) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            raise InvalidCxxCompiler

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(ModelError, match="cannot be compiled"):
        Predictor([toy_model()], device="cpu", precision="fp32", engine="compile")


def test_compiled_tiles_are_as_many_as_were_given() -> None:
    network = pytorch.PowersOfTwo.__new__(pytorch.PowersOfTwo)
    network._run = lambda x: x * 2
    for number in range(1, 9):
        x = torch.arange(float(number))[:, None]
        assert torch.equal(network(x), x * 2)


def test_a_model_that_was_never_saved_leaves_nothing(engine: str, tmp_path: Path) -> None:
    model = replace(toy_model(), folder=tmp_path)
    Predictor([model], device="cpu", precision="fp32", engine=engine)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def need_nncf() -> None:
    """Skip where it is not installed."""
    if importlib.util.find_spec("nncf") is None:
        pytest.skip("the extra [int8] is not installed")


def test_int8_is_for_openvino_alone() -> None:
    assert pick_way("openvino", "int8", "auto", CPU) == Way("openvino", "int8")
    for engine in ("auto", "torch", "compile", "onnx"):
        with pytest.raises(ConfigError, match="does not compute in int8") as problem:
            pick_way(engine, "int8", "auto", CPU)  # type: ignore[arg-type]
        assert "--engine openvino" in problem.value.hint


def test_int8_without_nncf_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    need_openvino()
    monkeypatch.setattr(openvino, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="nncf") as problem:
        Predictor([toy_model()], device="cpu", precision="int8", engine="openvino")
    assert "pip install 'autoseg-unet[int8]'" in problem.value.hint


def run_with_a_fold(root: Path, dims: int) -> Model:
    """A run of six cases, of which the fold was validated with two, and one of whose images is damaged."""
    run, cases = RunFolder(root / "run"), []
    for number in range(6):
        volume = toy_volume((13 + number, 18, 9))
        path = root / f"{number}.nii.gz"
        write_image(path, volume.array[0], volume.geometry)
        cases.append(Case(id=str(number), images=(str(path),)))
    (root / "5.nii.gz").write_bytes(b"damaged")
    model = toy_model(dims=dims)
    run.write(run.dataset_file, Dataset(name="toy", channels=model.card.plan.channels, labels=SCHEMA, cases=cases))
    run.write(run.splits_file, Splits(rule="", folds=(Fold(train=("2", "3", "4", "5"), validation=("0", "1")),)))
    folder = run.fold_folder("3d_fullres", 0)
    folder.mkdir(parents=True)
    return on_disk(model, folder)


@pytest.mark.parametrize("dims", [2, 3])
def test_int8_is_calibrated_once_by_images_of_the_training(
    dims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_openvino()
    need_nncf()
    model = run_with_a_fold(tmp_path, dims)
    volume = toy_volume((20, 22, 24), (1.0, 1.5, 2.0))
    shown: list[int] = []
    quantised = openvino._quantised

    def noted(of: Model, tiles: Callable[[Model], Any]) -> Any:
        shown.append(len(tiles(of)))
        return quantised(of, tiles)

    monkeypatch.setattr(openvino, "_quantised", noted)
    predictor = Predictor([model], device="cpu", precision="int8", engine="openvino")
    assert predictor.way == Way("openvino", "int8")
    labels = predictor(volume)
    # Those of the fold's training that can be read.
    assert shown == [3]
    assert model.folder is not None
    (kept,) = (model.folder / "engines").iterdir()
    assert kept.name.startswith("int8-")
    exact = Predictor([model], device="cpu", precision="fp32", engine="torch")(volume)
    assert 0 < np.mean(exact != labels) < 0.1
    with monkeypatch.context() as patch:
        # It is kept, with no need of images or nncf.
        patch.setattr(openvino, "_quantised", None)
        patch.setattr(openvino, "find_spec", lambda _: None)
        assert np.array_equal(Predictor([model], device="cpu", precision="int8", engine="openvino")(volume), labels)
        # What is damaged would be made anew.
        damaged = Predictor([model], device="cpu", precision="int8", engine="openvino")
        for path in kept.glob("*.xml"):
            path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ConfigError, match="nncf"):
            damaged(volume)


def test_int8_that_cannot_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    need_openvino()

    class Making:
        calls = 0

        def __call__(self, model: Model, tiles: Callable[[Model], Any]) -> Any:
            self.calls += 1
            if self.calls == 1:
                raise ModelError("not this time")
            assert len(tiles(model)) >= 1
            return translated(restore(model.card.settings.network, model.weights), model.card.settings.network)

    monkeypatch.setattr(openvino, "_quantised", Making())
    monkeypatch.setattr(openvino, "find_spec", lambda _: True)
    predictor = Predictor([toy_model()], device="cpu", precision="int8", engine="openvino")
    with pytest.raises(ModelError, match="not this time"):
        predictor(toy_volume())
    assert len(np.unique(predictor(toy_volume()))) > 1


def test_int8_refuses_a_cascade(tmp_path: Path) -> None:
    need_openvino()
    run = toy_run(tmp_path, {"3d_cascade": (0,)}, has_cascade=True)
    model = load_model(run.fold_folder("3d_cascade", 0))
    with pytest.raises(ConfigError, match="not offered for cascades"):
        Predictor([model], device="cpu", precision="int8", engine="openvino")


def test_int8_is_calibrated_by_the_first_volume_where_there_is_no_other(tmp_path: Path) -> None:
    need_openvino()
    need_nncf()
    volume = toy_volume((20, 22, 24), (1.0, 1.5, 2.0))
    models = [on_disk(toy_model(seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    labels = Predictor(models, device="cpu", precision="int8", engine="openvino")(volume)
    assert all((tmp_path / str(seed) / "engines").is_dir() for seed in (0, 1))
    assert len(np.unique(labels)) > 1
