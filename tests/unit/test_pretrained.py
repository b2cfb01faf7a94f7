"""Training that begins with another model: what of it is taken, and that it stays what it began with."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from synthetic_run import make_run
from torch import Tensor
from toy_training import PATCH, fill_store, toy_plan, train_toy

from autoseg.cli.app import main
from autoseg.domain.plan import Plan
from autoseg.errors import ConfigError, ModelError, TrainingInterrupted
from autoseg.io.model import Model, ModelCard, load_model, save_model
from autoseg.io.run_folder import RunFolder
from autoseg.io.store import CaseStore
from autoseg.network.unet import build, restore
from autoseg.pipeline.pretrained import load_pretrained
from autoseg.training import checkpoint, transfer
from autoseg.training.learner import Learner
from autoseg.training.records import TrainSettings, read_run

NAME = "3d_fullres"


def varied(
    classes: Sequence[str] = ("blob 1", "blob 2"),
    channels: Sequence[str] = ("MR",),
    dims: int = 3,
    regions: bool = False,
    scheme: str = "zscore",
    dataset: str = "blobs",
    training: dict[str, object] | None = None,
    **network: object,
) -> Plan:
    """The toy plan with other classes, channels and network."""
    data = toy_plan(dims, **(training or {})).model_dump(mode="json")
    data["dataset"] = dataset
    data["channels"] = [{"name": name} for name in channels]
    values = [[index] for index in range(1, len(classes) + 1)]
    if regions:
        values[0] = list(range(1, len(classes) + 1))
    data["labels"]["classes"] = [{"name": name, "values": own} for name, own in zip(classes, values, strict=True)]
    (part,) = data["configurations"].values()
    part["preprocess"]["normalization"] = [{"scheme": scheme}] * len(channels)
    outputs = len(classes) if regions else len(classes) + 1
    part["network"] |= {"num_classes": outputs, "in_channels": len(channels), **network}
    if regions:
        part["network"]["output"] = "regions"
    return Plan.model_validate_json(json.dumps(data))


def deeper(stages: int = 4, **more: object) -> dict[str, object]:
    """Fields of a network with so many stages, those that it shares as wide as before."""
    return {
        "features_per_stage": [4, 8, 8, 8, 8][:stages],
        "strides": [[1, 1, 1], *([2, 2, 2] for _ in range(stages - 1))],
        "kernel_sizes": [[3, 3, 3]] * stages,
        "blocks_per_stage_encoder": [1] * stages,
        "blocks_per_stage_decoder": [1] * (stages - 1),
        **more,
    }


def model_of(plan: Plan, folder: Path, fold: int = 0) -> Model:
    """A model with random weights, every one of them other than any fresh one."""
    name = plan.default_configuration
    generator = torch.Generator().manual_seed(5)
    weights = {
        key: 0.3 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in build(plan.configurations[name].network, seed=1).state_dict().items()
    }
    card = ModelCard(plan=plan, configuration=name, fold=fold, digest=plan.digest(name))
    save_model(folder, weights, card)
    return load_model(folder)


def started(plan: Plan, model: Model) -> tuple[dict[str, Tensor], dict[str, Tensor], transfer.Fit]:
    """Fresh weights, those to begin with, and what was found."""
    name = plan.default_configuration
    fresh = dict(build(plan.configurations[name].network, seed=2).state_dict())
    fit = transfer.fit({key: tuple(tensor.shape) for key, tensor in fresh.items()}, plan, name, model)
    return fresh, fit.start(fresh, model), fit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_of(toy_plan(), tmp_path_factory.mktemp("model") / "fold_0")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaseStore:
    return fill_store(tmp_path_factory.mktemp("store"))


def predict(plan: Plan, weights: dict[str, Tensor], image: Tensor) -> Tensor:
    network = restore(plan.configurations[plan.default_configuration].network, weights)
    with torch.inference_mode():
        return network(image)


def image_of(channels: int = 1) -> Tensor:
    return torch.randn((1, channels, *PATCH), generator=torch.Generator().manual_seed(3))


# --- What fits --------------------------------------------------------------------------------------------------------


def test_the_same_plan_takes_everything_and_predicts_the_same(model: Model) -> None:
    _, weights, fit = started(toy_plan(), model)
    assert weights.keys() == model.weights.keys()
    assert all(torch.equal(weights[name], model.weights[name]) for name in weights)
    record = fit.record
    assert (record.num_whole, record.parameters_taken) == (record.num_tensors, record.parameters)
    assert record.leftovers == record.unused == record.remarks == ()
    assert record.lines() == (
        f"{record.num_tensors} of {record.num_tensors} tensors came whole, 100.0 % of the parameters",
    )
    assert torch.equal(predict(toy_plan(), weights, image_of()), predict(toy_plan(), dict(model.weights), image_of()))


def test_classes_in_another_order_take_their_own_rows(model: Model) -> None:
    """The outputs are those of the model, in the other order; the new class's row is fresh."""
    plan = varied(["Blob 2", "spot", "blob 1"])
    fresh, weights, fit = started(plan, model)
    theirs = dict(model.weights)
    for level in (0, 1):
        for leaf in ("weight", "bias"):
            name = f"heads.{level}.{leaf}"
            for ours, place in ((0, 0), (1, 2), (3, 1)):
                assert torch.equal(weights[name][ours], theirs[name][place])
            assert torch.equal(weights[name][2], fresh[name][2])
    mine, before = predict(plan, weights, image_of()), predict(toy_plan(), theirs, image_of())
    torch.testing.assert_close(mine[:, [0, 3, 1]], before, rtol=1e-5, atol=1e-6)
    assert {item.name for item in fit.record.leftovers} == {
        f"heads.{level}.{leaf}" for level in (0, 1) for leaf in ("weight", "bias")
    }
    assert all("begin freshly: spot" in item.reason for item in fit.record.leftovers)


def test_an_additional_channel_changes_nothing_at_first(model: Model) -> None:
    """Whatever the new channel holds, the untrained network predicts what the model did without it."""
    plan = varied(channels=("PET", "mr"))
    _, weights, fit = started(plan, model)
    image = image_of(2)
    kernel = weights["encoder.0.0.conv.weight"]
    assert torch.equal(kernel[:, 1:], model.weights["encoder.0.0.conv.weight"])
    assert not kernel[:, 0].any()
    expected = predict(toy_plan(), dict(model.weights), image[:, 1:])
    torch.testing.assert_close(predict(plan, weights, image), expected, rtol=1e-4, atol=1e-5)
    (left,) = fit.record.leftovers
    assert left.name == "encoder.0.0.conv.weight"
    assert "begin at zero: PET" in left.reason


def test_a_new_channel_learns_though_it_begins_at_zero(model: Model) -> None:
    plan = varied(channels=("MR", "PET"))
    _, weights, _ = started(plan, model)
    network = restore(plan.configurations[NAME].network, weights).train()
    network(image_of(2))[0].square().mean().backward()
    gradient = network.get_parameter("encoder.0.0.conv.weight").grad
    assert gradient is not None
    assert float(gradient[:, 1].abs().min()) > 0


def test_a_channel_that_is_gone_is_left_out(tmp_path: Path) -> None:
    two = model_of(varied(channels=("PET", "MR")), tmp_path)
    _, weights, fit = started(toy_plan(), two)
    assert torch.equal(weights["encoder.0.0.conv.weight"], two.weights["encoder.0.0.conv.weight"][:, 1:])
    assert fit.record.leftovers == ()


def test_channels_of_other_names_are_taken_by_their_place_where_they_are_as_many(model: Model) -> None:
    _, weights, fit = started(varied(channels=("CT",), scheme="rescale"), model)
    assert torch.equal(weights["encoder.0.0.conv.weight"], model.weights["encoder.0.0.conv.weight"])
    assert any("by their place: CT as MR" in remark for remark in fit.record.remarks)
    assert "channel CT is normalised as rescale, for the model it was zscore" in fit.record.remarks


def test_unknown_channels_of_another_number_begin_freshly(model: Model) -> None:
    fresh, weights, fit = started(varied(channels=("red", "green", "blue")), model)
    for leaf in ("weight", "bias"):
        assert torch.equal(weights[f"encoder.0.0.conv.{leaf}"], fresh[f"encoder.0.0.conv.{leaf}"])
    assert [(item.name, item.reason) for item in fit.record.leftovers] == [
        ("encoder.0.0.conv.weight", "the model knows none of the channels"),
        ("encoder.0.0.conv.bias", "it goes with its weight"),
    ]
    assert torch.equal(weights["encoder.1.0.conv.weight"], model.weights["encoder.1.0.conv.weight"])


def test_a_deeper_network_is_aligned_at_full_resolution(model: Model) -> None:
    fresh, weights, fit = started(varied(**deeper(4)), model)
    for name in (
        "encoder.0.0.conv.weight",
        "encoder.2.0.conv.weight",
        "decoder.1.blocks.0.conv.weight",
        "heads.1.bias",
    ):
        assert torch.equal(weights[name], model.weights[name])
    assert {item.name.rsplit(".", 2)[0] for item in fit.record.leftovers} == {
        "encoder.3.0", "decoder.2", "decoder.2.blocks.0", "heads"
    }  # fmt: skip
    for item in fit.record.leftovers:
        assert item.reason == "not in the model"
        assert torch.equal(weights[item.name], fresh[item.name])
    lines = fit.record.lines()
    assert "  encoder.3 (4 tensors): not in the model" in lines
    assert fit.record.num_whole == len(model.weights)


def test_a_flatter_network_names_what_had_no_place(tmp_path: Path) -> None:
    deep = model_of(varied(**deeper(4)), tmp_path)
    _, _, fit = started(toy_plan(), deep)
    assert fit.record.num_whole == fit.record.num_tensors
    assert set(fit.record.unused) == set(deep.weights) - set(started(toy_plan(), deep)[0])
    assert "no place for 12 tensors of the model: decoder.2, encoder.3, heads.2" in fit.record.lines()[1]


def test_the_middle_of_another_depth_is_another_one(tmp_path: Path) -> None:
    shallow = model_of(varied(**deeper(3, has_middle=True, attention={"in_middle": False})), tmp_path)
    same = started(varied(**deeper(3, has_middle=True, attention={"in_middle": False})), shallow)[2]
    assert same.record.leftovers == ()
    other = started(varied(**deeper(4, has_middle=True, attention={"in_middle": False})), shallow)[2]
    reasons = {item.name: item.reason for item in other.record.leftovers}
    assert "coarsest stage" in reasons["middle.first.conv.weight"]


def test_kernels_and_strides_of_another_shape_begin_freshly(model: Model) -> None:
    """The stride is no part of an encoder's kernel, but the shape of the step up."""
    plan = varied(
        patch_size=[8, 16, 16],
        strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    )
    fresh, weights, fit = started(plan, model)
    reasons = {item.name: item.reason for item in fit.record.leftovers}
    assert reasons["encoder.0.0.conv.weight"] == "its shape is 4 x 1 x 1 x 3 x 3, in the model 4 x 1 x 3 x 3 x 3"
    assert reasons["decoder.0.up.weight"] == "its shape is 8 x 4 x 1 x 2 x 2, in the model 8 x 4 x 2 x 2 x 2"
    assert "encoder.1.0.conv.weight" not in reasons
    for name in reasons:
        assert torch.equal(weights[name], fresh[name])
    taken = sum(tensor.numel() for name, tensor in weights.items() if name not in reasons)
    assert fit.record.parameters_taken == taken


def test_outputs_of_regions_are_none_of_classes(model: Model) -> None:
    _, _, fit = started(varied(regions=True), model)
    reasons = {item.reason for item in fit.record.leftovers if item.name.startswith("heads") and "weight" in item.name}
    assert reasons == {"its outputs are regions, the model's are classes"}


def test_nothing_fits_between_2d_and_3d(tmp_path: Path) -> None:
    flat = model_of(toy_plan(dims=2), tmp_path)
    with pytest.raises(
        ConfigError, match=r"nothing of the pretrained model fits: it is 2D .* network is 3D"
    ) as refused:
        started(toy_plan(), flat)
    assert "encoder.0.0.conv.weight: its shape is" in str(refused.value)


def test_norms_and_heads_alone_are_no_start(model: Model) -> None:
    """Every norm of as many channels fits any other, and 1x1 heads do; without a kernel that says nothing."""
    plan = varied(
        channels=("a", "b"),
        kernel_sizes=[[1, 3, 3]] * 3,
        patch_size=[4, 16, 16],
        strides=[[1, 1, 1], [1, 2, 2], [1, 2, 2]],
    )
    with pytest.raises(ConfigError, match="nothing of the pretrained model fits"):
        started(plan, model)


@pytest.mark.parametrize(
    ("wanted", "known", "expected"),
    [
        (["a", "b"], ["b", "a"], (1, 0)),
        (["A", "a"], ["a", "A"], (1, 0)),
        (["Liver", "x"], ["liver"], (0, None)),
        (["MR", "MR"], ["MR", "CT", "MR"], (0, 2)),
        (["MR", "MR"], ["MR"], (0, None)),
    ],
)
def test_names_find_their_counterparts(wanted: list[str], known: list[str], expected: tuple[int | None, ...]) -> None:
    assert transfer.counterparts(wanted, known) == expected


# --- A training -------------------------------------------------------------------------------------------------------


def settings(**fields: object) -> TrainSettings:
    return TrainSettings(**{"num_epochs": 1, "device": "cpu", "precision": "fp32", **fields})


def test_training_begins_with_the_model_its_running_mean_too(
    store: CaseStore, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, Tensor] = {}
    step = Learner.step

    def look_and_step(learner: Learner, *rest: object) -> object:
        if not first:
            first.update({name: tensor.clone() for name, tensor in learner.state().items()})
        return step(learner, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "step", look_and_step)
    train_toy(tmp_path, store, settings(pretrained=model), toy_plan(ema_decay=0.9))
    for name, tensor in model.weights.items():
        assert torch.equal(first[f"weights.{name}"], tensor)
        assert torch.equal(first[f"mean.{name}"], tensor)


def test_what_it_began_with_is_recorded_and_told(
    store: CaseStore, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train_toy(tmp_path, store, settings(pretrained=model), varied(["blob 1", "spot"]))
    run = read_run(tmp_path)
    assert run is not None
    assert run.pretrained is not None
    assert (run.pretrained.weights_sha256, run.pretrained.dataset) == (model.card.weights_sha256, "blobs")
    provenance = load_model(tmp_path).card.provenance["pretrained"]
    assert provenance == run.pretrained.model_dump(mode="json")
    assert str(model.folder) not in (tmp_path / "run.json").read_text() + (tmp_path / "weights.json").read_text()
    assert "begins with the weights of blobs, 3d_fullres fold 0" in caplog.text
    assert "heads.0 (2 tensors): classes that the model does not know begin freshly: spot" in caplog.text


def test_a_model_that_may_know_the_validation_cases_is_warned_of(
    store: CaseStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other_fold = model_of(toy_plan(), tmp_path / "model", fold=3)
    train_toy(tmp_path / "fold_0", store, settings(pretrained=other_fold))
    assert "may have learned from validation cases of fold 0" in caplog.text
    caplog.clear()
    other_set = model_of(varied(dataset="balls"), tmp_path / "other", fold=3)
    train_toy(tmp_path / "fold_1", store, settings(pretrained=other_set))
    assert "validation cases" not in caplog.text


class StopAfter:
    """Progress that interrupts as Ctrl-C in the middle of a step would: nothing is saved."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def start(self, description: str, total: int | None) -> None: ...

    def advance(self, step: int = 1, note: str = "") -> None:
        self.left -= step
        if self.left == 0:
            raise TrainingInterrupted("in the middle of a step")

    def finish(self, note: str = "") -> None: ...


def test_going_on_keeps_the_start_and_refuses_another(store: CaseStore, model: Model, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_toy(whole, store, settings(num_epochs=2, pretrained=model))
    with pytest.raises(TrainingInterrupted):
        train_toy(cut, store, settings(num_epochs=2, pretrained=model), progress=StopAfter(8))
    other = model_of(varied(dataset="balls"), tmp_path / "other")
    assert other.card.weights_sha256 == model.card.weights_sha256
    changed = Model({**model.weights, "heads.0.bias": torch.ones(3)}, model.card)
    save_model(tmp_path / "changed", changed.weights, changed.card)
    with pytest.raises(ConfigError, match=r"began with the weights of blobs, .* not with those of") as refused:
        train_toy(cut, store, settings(num_epochs=2, pretrained=load_model(tmp_path / "changed")))
    assert "--restart" in refused.value.hint
    # Its checkpoint has everything: the model is not needed any more.
    copy = Path(shutil.copytree(cut, tmp_path / "copy"))
    for folder, again in ((cut, model), (copy, None)):
        train_toy(folder, store, settings(num_epochs=2, pretrained=again))
        assert (folder / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
        run = read_run(folder)
        assert run is not None
        assert run.pretrained is not None
    # Finished: the same model is no news, another one is refused.
    assert not train_toy(cut, store, settings(num_epochs=2, pretrained=model)).did_train
    with pytest.raises(ConfigError, match="began with the weights of blobs"):
        train_toy(cut, store, settings(num_epochs=2, pretrained=load_model(tmp_path / "changed")))


def test_a_training_of_fresh_weights_does_not_go_on_with_a_model(
    store: CaseStore, model: Model, tmp_path: Path
) -> None:
    train_toy(tmp_path, store, settings())
    with pytest.raises(ConfigError, match="began with fresh weights, not with those of blobs"):
        train_toy(tmp_path, store, settings(num_epochs=2, pretrained=model))
    train_toy(tmp_path, store, settings(pretrained=model, restart=True))
    run = read_run(tmp_path)
    assert run is not None
    assert run.pretrained is not None


def test_a_start_that_saved_nothing_is_not_forgotten(store: CaseStore, model: Model, tmp_path: Path) -> None:
    """Killed in its first minute and started again without --pretrained, it would quietly begin with fresh weights."""
    with pytest.raises(TrainingInterrupted):
        train_toy(tmp_path, store, settings(pretrained=model), progress=StopAfter(2))
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(ConfigError, match="stopped before any checkpoint") as refused:
        train_toy(tmp_path, store, settings())
    assert "--pretrained" in refused.value.hint
    train_toy(tmp_path, store, settings(pretrained=model))


# --- Which model is meant ---------------------------------------------------------------------------------------------


def run_of(root: Path, plan: Plan, folds: dict[str, tuple[int, ...]]) -> Path:
    """A run with models; every configuration is the plan's own one."""
    (part,) = plan.configurations.values()
    plan = plan.model_copy(update={"configurations": {"2d": part, "3d_fullres": part, "small": part}})
    run = RunFolder(root)
    run.write(run.plan_file, plan)
    for name, numbers in folds.items():
        for number in numbers:
            weights = build(part.network, seed=number).state_dict()
            card = ModelCard(plan=plan, configuration=name, fold=number, digest=plan.digest(name))
            save_model(run.fold_folder(name, number), weights, card)
    return root


@pytest.mark.parametrize(
    ("dataset", "folds", "expected"),
    [
        ("balls", {"3d_fullres": (0, 1)}, ("3d_fullres", 0)),
        ("balls", {"3d_fullres": (2,)}, ("3d_fullres", 2)),
        ("blobs", {"3d_fullres": (0, 1)}, ("3d_fullres", 1)),
        ("blobs", {"3d_fullres": (0, 2)}, ("3d_fullres", 0)),
        ("balls", {"small": (0,)}, ("small", 0)),
    ],
)
def test_a_run_stands_for_one_of_its_folds(
    tmp_path: Path, dataset: str, folds: dict[str, tuple[int, ...]], expected: tuple[str, int]
) -> None:
    path = run_of(tmp_path / "run", varied(dataset=dataset), folds)
    card = load_pretrained(path, toy_plan(), NAME, 1, tmp_path / "own" / "models" / NAME / "fold_1").card
    assert (card.configuration, card.fold) == expected


@pytest.mark.parametrize(
    ("folds", "said"),
    [({"3d_fullres": (1, 2)}, "which fold"), ({"2d": (0,), "small": (0,)}, "which configuration")],
)
def test_a_run_that_may_mean_several_is_refused(tmp_path: Path, folds: dict[str, tuple[int, ...]], said: str) -> None:
    path = run_of(tmp_path / "run", varied(dataset="balls"), folds)
    with pytest.raises(ConfigError, match=said) as refused:
        load_pretrained(path, toy_plan(), NAME, 0, tmp_path / "own")
    assert len(refused.value.problems) == len(next(iter(folds.values()))) * len(folds)


def test_no_run_begins_with_itself(tmp_path: Path) -> None:
    path = run_of(tmp_path / "run", toy_plan(), {"3d_fullres": (0,), "small": (0,)})
    target = path / "models" / NAME / "fold_0"
    for named in (path, target):
        with pytest.raises(ConfigError, match="is what is to be trained itself"):
            load_pretrained(named, toy_plan(), NAME, 0, target)
    assert load_pretrained(path / "models" / "small" / "fold_0", toy_plan(), NAME, 0, target).card.fold == 0


def test_models_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    target = tmp_path / "own"
    with pytest.raises(ModelError, match="is not a folder"):
        load_pretrained(tmp_path / "nowhere", toy_plan(), NAME, 0, target)
    path = run_of(tmp_path / "run", toy_plan(), {})
    with pytest.raises(ModelError, match="no finished model"):
        load_pretrained(path, toy_plan(), NAME, 0, target)
    model_of(toy_plan(), tmp_path / "fold_0")
    weights = tmp_path / "fold_0" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="corrupt"):
        load_pretrained(tmp_path / "fold_0", toy_plan(), NAME, 0, target)


def test_the_command_line_refuses_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured, planned or preprocessed."""
    run = make_run(tmp_path)
    data = str(tmp_path / "data")
    for words in (["train", str(run.root), "--fold", "all"], ["run", data, "--out", str(tmp_path / "new")]):
        assert main([*words, "--pretrained", str(tmp_path / "nowhere")]) == ModelError.exit_code
        assert "nowhere is not a folder" in " ".join(capsys.readouterr().err.split())
    assert not run.root.joinpath("cache").exists()
    assert not (tmp_path / "new").exists()


def test_a_model_that_does_not_fit_is_refused_before_anything_is_preprocessed(tmp_path: Path) -> None:
    model_of(toy_plan(dims=2), tmp_path / "fold_0")
    with pytest.raises(ConfigError, match="nothing of the pretrained model fits"):
        load_pretrained(tmp_path / "fold_0", toy_plan(), NAME, 0, tmp_path / "own")
