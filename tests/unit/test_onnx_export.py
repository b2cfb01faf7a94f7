"""The ONNX form of networks, and `autoseg export --format onnx`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from network_family import FAMILY, awake, image, member
from toy_models import SCHEMA, toy_model, toy_volume

from autoseg.cli.app import main
from autoseg.errors import ConfigError
from autoseg.inference.export import labels_from_stream
from autoseg.inference.ladder import Ladder
from autoseg.inference.predictor import Predictor
from autoseg.inference.sliding_window import make_grid, stream_slabs
from autoseg.interop import onnx as interop
from autoseg.interop.onnx import OnnxCard, export_onnx
from autoseg.io.files import file_digest, read_text
from autoseg.io.model import load_model, save_model
from autoseg.network.export import MeanOf, exported, onnx_of
from autoseg.network.unet import build, restore
from autoseg.preprocessing.transform import apply

PLAIN = [name for name in FAMILY if member(name).condition is None and member(name).context_channels is None]


def run_onnx(form: bytes, x: torch.Tensor) -> torch.Tensor:
    pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    session = runtime.InferenceSession(form, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"image": x.numpy()})
    return torch.from_numpy(found)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_every_member_of_the_family_has_an_onnx_form(name: str, dims: int) -> None:
    pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")
    plan = member(name, dims)
    network = awake(build(plan, 0)).eval()
    x = torch.cat([image(plan), image(plan).flip(2)])
    plan = plan.model_copy(update={"patch_size": tuple(x.shape[2:])})
    form = onnx_of(network, plan)
    with torch.inference_mode():
        expected = network(x)
    for number in (1, len(x)):
        torch.testing.assert_close(run_onnx(form, x[:number]), expected[:number], atol=1e-4, rtol=1e-4)


def test_a_graph_takes_any_number_of_tiles() -> None:
    model = toy_model()
    plan = model.card.settings.network
    network = restore(plan, model.weights)
    graph = exported(network, plan).module()
    for number in (1, 3):
        x = torch.randn(number, 1, *plan.patch_size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.testing.assert_close(graph(x), network(x), atol=1e-5, rtol=1e-5)


def test_the_mean_of_networks() -> None:
    models = [toy_model(seed=seed) for seed in (0, 1, 2)]
    networks = [restore(model.card.settings.network, model.weights) for model in models]
    x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.stack([network(x) for network in networks]).mean(0)
        torch.testing.assert_close(MeanOf(networks)(x), expected)


def test_the_command_writes_a_file_and_a_card_that_say_what_the_model_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")
    model = toy_model(seed=2)
    save_model(tmp_path / "fold_0", model.weights, model.card)
    target = tmp_path / "out" / "model.onnx"
    assert main(["export", str(tmp_path / "fold_0"), "--out", str(target), "--format", "onnx"]) == 0
    assert capsys.readouterr().out.split() == [str(target)]
    card = OnnxCard.from_json(read_text(target.with_suffix(".json")), "card")
    assert card.onnx_sha256 == file_digest(target)
    assert card.members[0].weights_sha256 == load_model(tmp_path / "fold_0").card.weights_sha256
    assert [(item.name, item.values) for item in card.outputs] == [
        ("background", (0,)),
        ("low", (7,)),
        ("high", (300,)),
    ]
    assert (card.activation, card.labels, card.patch_size) == ("softmax", SCHEMA, (8, 8, 8))
    assert card.preprocess == model.card.settings.preprocess
    x = torch.randn(3, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = restore(model.card.settings.network, model.weights)(x)
    torch.testing.assert_close(run_onnx(target.read_bytes(), x), expected, atol=1e-4, rtol=1e-4)


def test_the_file_and_its_card_give_the_labels_of_a_whole_volume(tmp_path: Path) -> None:
    """As another program does it: the network from the file, everything else as the card says."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    pytest.importorskip("onnxscript", reason="the extra [onnx] is not installed")
    models = [toy_model(seed=seed) for seed in (0, 1)]
    export_onnx(models, tmp_path / "model.onnx")
    card = OnnxCard.from_json(read_text(tmp_path / "model.json"), "card")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])

    def forward(tiles: torch.Tensor, _: object) -> list[torch.Tensor]:
        return list(torch.from_numpy(session.run([card.output_name], {card.input_name: tiles.numpy()})[0]))

    volume = toy_volume((30, 26, 14), (1.0, 1.5, 2.0))
    prepared = apply(volume, card.preprocess)
    grid = make_grid(prepared.image.shape[1:], card.patch_size, card.inference.overlap)
    stream = stream_slabs(
        Ladder(forward, tile_batch=3),
        torch.from_numpy(prepared.image),
        grid,
        sigma_fraction=card.inference.gaussian_sigma_fraction,
    )
    found = labels_from_stream(stream, grid.stream_axis, prepared.trail, card.preprocess, card.labels)
    expected = Predictor(models, device="cpu", precision="fp32", engine="torch")(volume)
    assert len(np.unique(expected)) > 1
    assert np.array_equal(found, expected)


def test_what_is_missing_or_misnamed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="onnx and onnxscript, which are not installed") as problem:
        export_onnx([toy_model()], tmp_path / "model.onnx")
    assert "pip install 'autoseg-unet[onnx]'" in problem.value.hint
    monkeypatch.setattr(interop, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"does not end in \.onnx"):
        export_onnx([toy_model()], tmp_path / "model.bin")
