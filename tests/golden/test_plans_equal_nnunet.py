"""On the fingerprints that nnU-Net measured of nine real data sets, our plans are nnU-Net's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planning_cases import GOLDEN, load_golden, plan_of

from autoseg.domain.dataset import Channel, LabelClass, LabelSchema
from autoseg.domain.plan import Plan
from autoseg.planning.importing import import_fingerprint
from scripts.nnunet_bank import as_nnunet

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


def plan_golden(golden: dict[str, Any], folder: Path, preset: str, **replaced: Any) -> Plan:
    dataset = {**golden["dataset"], **replaced}
    channels = [Channel(name=name) for name in dataset["channel_names"].values()]
    values = {name: value for name, value in dataset["labels"].items() if name != "background"}
    labels = LabelSchema(classes=tuple(LabelClass(name=name, values=(value,)) for name, value in values.items()))
    file = folder / "dataset_fingerprint.json"
    file.write_text(json.dumps(golden["fingerprint"]))
    fingerprint = import_fingerprint(file, channels, labels.num_classes, dataset["numTraining"])
    return plan_of(fingerprint, preset, labels=labels)


def in_terms_of_the_bank(expected: dict[str, Any]) -> dict[str, Any]:
    """A golden configuration with the keys of `as_nnunet`."""
    return expected | {
        "network": "PlainConvUNet",
        "blocks_encoder": expected["n_conv_per_stage"],
        "blocks_decoder": expected["n_conv_per_stage_decoder"],
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
        ours, wanted = as_nnunet(plan.configurations[item]), in_terms_of_the_bank(expected[item])
        assert ours == {key: wanted[key] for key in ours}
        order = plan.configurations[item].preprocess.axis_order
        assert [2 - axis for axis in order] == expected["transpose_forward"]


def test_hippocampus_of_the_challenge_with_260_cases(tmp_path: Path) -> None:
    plan = plan_golden(load_golden("hippocampus"), tmp_path, "nnunet", numTraining=260)
    assert plan.configurations["3d_fullres"].network.patch_size == (40, 56, 40)
    assert plan.configurations["3d_fullres"].network.features_per_stage == (32, 64, 128, 256)
    assert plan.configurations["3d_fullres"].training.batch_size == 9
    assert plan.configurations["2d"].network.patch_size == (56, 40)
    assert plan.configurations["2d"].training.batch_size == 366
