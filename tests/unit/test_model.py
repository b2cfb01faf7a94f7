import json
from pathlib import Path

import pytest
import torch

from autoseg.domain.dataset import Channel, LabelClass, LabelSchema
from autoseg.domain.plan import (
    ChannelNormalization,
    Configuration,
    InferencePlan,
    NetworkPlan,
    Plan,
    PreprocessPlan,
    TrainingPlan,
)
from autoseg.errors import ModelError
from autoseg.io.files import file_digest
from autoseg.io.model import BEST, ModelCard, is_whole, load_model, read_card, save_model
from autoseg.network.unet import build


def small_plan() -> Plan:
    network = NetworkPlan(
        in_channels=1,
        num_classes=2,
        patch_size=(4, 4, 4),
        features_per_stage=(2, 4),
        strides=((1, 1, 1), (2, 2, 2)),
        kernel_sizes=((3, 3, 3), (3, 3, 3)),
        blocks_per_stage_encoder=(1, 1),
        blocks_per_stage_decoder=(1,),
    )
    configuration = Configuration(
        preprocess=PreprocessPlan(
            target_spacing=(1.0, 1.0, 1.0), normalization=(ChannelNormalization(scheme="zscore"),)
        ),
        network=network,
        training=TrainingPlan(batch_size=2),
        inference=InferencePlan(),
    )
    return Plan(
        dataset="toy",
        preset="default",
        vram_gb=8,
        fingerprint_digest="0" * 12,
        channels=(Channel(name="MR"),),
        labels=LabelSchema(classes=(LabelClass(name="blob", values=(1,)),)),
        configurations={"3d_fullres": configuration},
    )


def saved_model(folder: Path, name: str = "weights") -> dict[str, torch.Tensor]:
    plan = small_plan()
    weights = dict(build(plan.configurations["3d_fullres"].network, seed=1).state_dict())
    card = ModelCard(plan=plan, configuration="3d_fullres", fold=0, digest=plan.digest(), provenance={"epochs": 3})
    save_model(folder, weights, card, name)
    return weights


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    weights = saved_model(tmp_path / "fold_0")
    assert is_whole(tmp_path / "fold_0")
    assert not is_whole(tmp_path)
    model = load_model(tmp_path / "fold_0")
    assert model.weights.keys() == weights.keys()
    assert all(torch.equal(model.weights[name], weights[name]) for name in weights)
    assert model.card.plan == small_plan()
    assert model.card.provenance == {"epochs": 3}
    assert model.card.weights_sha256 == file_digest(tmp_path / "fold_0" / "weights.safetensors")
    assert sorted(path.name for path in (tmp_path / "fold_0").iterdir()) == ["weights.json", "weights.safetensors"]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    saved_model(tmp_path / "a")
    saved_model(tmp_path / "b")
    for name in ("weights.json", "weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_best_weights_have_their_own_card(tmp_path: Path) -> None:
    saved_model(tmp_path, BEST)
    assert load_model(tmp_path, BEST).card.fold == 0
    with pytest.raises(ModelError, match=r"weights\.json is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_weights_are_refused(tmp_path: Path, damage: str) -> None:
    saved_model(tmp_path)
    path = tmp_path / "weights.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    assert not is_whole(tmp_path)
    with pytest.raises(ModelError, match="missing" if damage == "missing" else "corrupt"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 99, "schema version 99"),
        ("configuration", "3d_lowres", "is not one of"),
        ("digest", "abc", "the card says abc"),
        ("surprise", 1, "surprise"),
    ],
)
def test_wrong_cards_are_refused_with_the_reason(tmp_path: Path, key: str, value: object, message: str) -> None:
    saved_model(tmp_path)
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=message):
        read_card(tmp_path)


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    plan = small_plan()
    weights = dict(build(plan.configurations["3d_fullres"].network, seed=1).state_dict())
    weights["heads.0.bias"] = torch.tensor([0.0, float("nan")])
    save_model(tmp_path, weights, ModelCard(plan=plan, configuration="3d_fullres", fold="all", digest=plan.digest()))
    with pytest.raises(ModelError, match=r"heads\.0\.bias"):
        load_model(tmp_path)
