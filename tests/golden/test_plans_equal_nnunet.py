"""On the fingerprints that nnU-Net measured of nine real data sets, our plans are nnU-Net's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planning_cases import GOLDEN, load_golden, plan_of

from autoseg.domain.dataset import Channel, LabelClass, LabelSchema
from autoseg.domain.plan import Configuration, Plan
from autoseg.planning.importing import import_fingerprint

NAMES = (
    "hippocampus",
    "headneck_ct",
    "sarcoma",
    "sarcoma_mr",
    "fetal_brain",
    "mouse_brain",
    "membrane",
    "nuclei",
    "axon_sem",
)
SCHEMES = {
    "zscore": "ZScoreNormalization",
    "ct": "CTNormalization",
    "none": "NoNormalization",
    "rescale": "RescaleTo01Normalization",
    "rgb": "RGBTo01Normalization",
}


def plan_golden(golden: dict[str, Any], folder: Path, preset: str, **replaced: Any) -> Plan:
    dataset = {**golden["dataset"], **replaced}
    channels = [Channel(name=name) for name in dataset["channel_names"].values()]
    values = {name: value for name, value in dataset["labels"].items() if name != "background"}
    labels = LabelSchema(classes=tuple(LabelClass(name=name, values=(value,)) for name, value in values.items()))
    file = folder / "dataset_fingerprint.json"
    file.write_text(json.dumps(golden["fingerprint"]))
    fingerprint = import_fingerprint(file, channels, labels.num_classes, dataset["numTraining"])
    return plan_of(fingerprint, preset, labels=labels)


def as_nnunet(configuration: Configuration) -> dict[str, Any]:
    """The fields of a golden configuration, from ours."""
    preprocess, network, training = configuration.preprocess, configuration.network, configuration.training
    return {
        "spacing": list(preprocess.target_spacing),
        "patch_size": list(network.patch_size),
        "batch_size": training.batch_size,
        "batch_dice": training.batch_dice,
        "n_stages": network.num_stages,
        "features_per_stage": list(network.features_per_stage),
        "kernel_sizes": [list(row) for row in network.kernel_sizes],
        "strides": [list(row) for row in network.strides],
        "n_conv_per_stage": list(network.blocks_per_stage_encoder),
        "n_conv_per_stage_decoder": list(network.blocks_per_stage_decoder),
        "normalization_schemes": [SCHEMES[item.scheme] for item in preprocess.normalization],
        "use_mask_for_norm": [item.use_mask for item in preprocess.normalization],
    }


def test_no_golden_file_is_missing_or_untested() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("preset", ["nnunet", "default"])
@pytest.mark.parametrize("name", NAMES)
def test_plan_equals_nnunets(name: str, preset: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    expected = golden["plans"]
    plan = plan_golden(golden, tmp_path, preset)
    planned = set(expected["configurations"])
    assert set(plan.configurations) == {item.replace("3d_cascade_fullres", "3d_cascade") for item in planned}
    for item in planned - {"3d_cascade_fullres"}:
        ours = as_nnunet(plan.configurations[item])
        assert ours == {key: expected[item][key] for key in ours}
        order = plan.configurations[item].preprocess.axis_order
        assert [2 - axis for axis in order] == expected["transpose_forward"]


def test_hippocampus_of_the_challenge_with_260_cases(tmp_path: Path) -> None:
    plan = plan_golden(load_golden("hippocampus"), tmp_path, "nnunet", numTraining=260)
    assert plan.configurations["3d_fullres"].network.patch_size == (40, 56, 40)
    assert plan.configurations["3d_fullres"].network.features_per_stage == (32, 64, 128, 256)
    assert plan.configurations["3d_fullres"].training.batch_size == 9
    assert plan.configurations["2d"].network.patch_size == (56, 40)
    assert plan.configurations["2d"].training.batch_size == 366
