"""The planner's parts: spacing, topology, memory, normalisation, importing, overrides, reasons."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
from planning_cases import fingerprint_of, load_golden, plan_of, schema

from autoseg.config import preset_names
from autoseg.domain.dataset import Channel
from autoseg.domain.fingerprint import Budget, Fingerprint
from autoseg.domain.plan import Plan
from autoseg.errors import ConfigError, DatasetError, PlanError
from autoseg.planning.activations import count_activations
from autoseg.planning.explain import explain
from autoseg.planning.importing import import_fingerprint
from autoseg.planning.overrides import apply_overrides
from autoseg.planning.planner import make_plan
from autoseg.planning.presets import preset_rules
from autoseg.planning.spacing import choose_spacing
from autoseg.planning.topology import find_topology

NNUNET = preset_rules("nnunet")
CUBE = fingerprint_of([(1.0, 1.0, 1.0)] * 20, [(64, 80, 96)] * 20, channels=("MRI",), num_foreground=2)


# ------------------------------------------------------------------------------------------------------------ spacing
def test_spacing_is_the_median_unless_thick_slices_are_few() -> None:
    shapes = [(20, 200, 200)] * 11
    thick = [(float(value), 1.0, 1.0) for value in (2, 3, *[5] * 9)]
    assert choose_spacing(fingerprint_of(thick, shapes), NNUNET).target == (3.0, 1.0, 1.0)
    # 70 slices are more than a third of 200 pixels: not short; 3 mm is not more than 3 times 1 mm: not thick.
    assert choose_spacing(fingerprint_of(thick, [(70, 200, 200)] * 11), NNUNET).target == (5.0, 1.0, 1.0)
    assert choose_spacing(fingerprint_of([(3.0, 1.0, 1.0)] * 2, shapes[:2]), NNUNET).target == (3.0, 1.0, 1.0)


def test_percentile_of_a_thick_axis_stays_above_the_others() -> None:
    rows = [(4.0, 1.0, 1.0)] * 9 + [(0.5, 1.0, 1.0)] * 2
    choice = choose_spacing(fingerprint_of(rows, [(10, 64, 64)] * 11), NNUNET)
    assert choice.percentile == 0.5
    assert choice.target == (1.0 + 1e-5, 1.0, 1.0)


@pytest.mark.parametrize(
    ("spacing", "axis_order"),
    [((3.0, 1.0, 1.0), (2, 1, 0)), ((1.0, 3.0, 1.0), (1, 2, 0)), ((1.0, 1.0, 3.0), (0, 2, 1)), ((1.0,) * 3, (2, 1, 0))],
)
def test_the_coarsest_axis_goes_first(spacing: tuple[float, ...], axis_order: tuple[int, ...]) -> None:
    for preset in preset_names():
        plan = plan_of(fingerprint_of([spacing], [(64, 64, 64)]), preset)
        for item in plan.configurations.values():
            assert item.preprocess.axis_order == axis_order
        assert plan.configurations["2d"].preprocess.target_spacing == tuple(sorted(spacing))[:2]


def test_impossible_measurements_are_refused_all_at_once() -> None:
    bad = fingerprint_of([(1.0, 0.0, 1.0), (1.0, 1.0, 1.0)], [(4, 4, 4), (4, 0, 4)])
    with pytest.raises(PlanError, match=r"case 0: spacing .*\n.*case 1: shape"):
        plan_of(bad)


# ----------------------------------------------------------------------------------------------------------- topology
def test_topology_halves_fine_axes_until_voxels_are_cubes() -> None:
    found = find_topology((5.0, 1.0, 1.0), (20, 320, 320), NNUNET)
    assert found.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2))
    assert found.kernel_sizes == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert found.patch_size == (20, 320, 320)
    assert found.divisors == (4, 64, 64)


@pytest.mark.parametrize(
    ("size", "strides", "patch"),
    [
        ((7, 7), [(1, 1)], (7, 7)),
        ((11, 7), [(1, 1)], (11, 7)),  # alone, an axis needs 12
        ((12, 7), [(1, 1), (2, 1)], (12, 7)),
        ((8, 8), [(1, 1), (2, 2)], (8, 8)),
        ((35.5, 8), [(1, 1), (2, 2), (2, 1)], (36, 8)),  # fractional medians are rounded up
    ],
)
def test_topology_of_small_patches(size: Any, strides: Any, patch: Any) -> None:
    found = find_topology((1.0, 1.0), size, NNUNET)
    assert found.strides[: len(strides)] == tuple(strides)
    assert found.num_stages == len(strides)
    assert found.patch_size == patch


def test_activations_counted_by_hand() -> None:
    # Encoder 2 x 32 x 64 + 2 x 64 x 16, decoder (2 + 1) x 32 x 64, head 3 x 64.
    assert count_activations((8, 8), ((1, 1), (2, 2)), (32, 64), (2, 2), (2,), 3) == 4096 + 2048 + 6144 + 192
    assert count_activations((5, 5), ((1, 1),), (32,), (2,), (), 3) == 2 * 32 * 25


# ------------------------------------------------------------------------------------------------- plan, normalisation
def test_hippocampus_at_8_gb() -> None:
    golden = load_golden("hippocampus")["fingerprint"]
    fingerprint = fingerprint_of(golden["spacings"], golden["shapes_after_crop"], num_foreground=2)
    plan = plan_of(fingerprint)
    full, flat = plan.configurations["3d_fullres"], plan.configurations["2d"]
    assert (full.network.patch_size, full.training.batch_size) == ((40, 56, 40), 7)
    assert full.network.features_per_stage == (32, 64, 128, 256)
    assert (flat.network.patch_size, flat.training.batch_size) == ((56, 40), 281)
    assert (full.training.batch_dice, flat.training.batch_dice) == (False, True)
    assert plan.vram_gb == 8.0
    assert plan.default_configuration == "3d_fullres"


def test_channel_names_choose_the_normalisation_and_only_zscore_uses_the_mask() -> None:
    names = ("cT", "T1", "noNorm", "rescale_to_0_1", "RGB_to_0_1", "zscore")
    fingerprint = fingerprint_of([(1.0,) * 3], [(32,) * 3], channels=names, relative_size=0.7499)
    found = plan_of(fingerprint).configurations["2d"].preprocess.normalization
    assert [item.scheme for item in found] == ["ct", "zscore", "none", "rescale", "rgb", "zscore"]
    assert [item.use_mask for item in found] == [False, True, False, False, False, True]
    assert (found[0].lower, found[0].upper, found[0].mean, found[0].std) == (-96.0, 644.0, 40.0, 92.0)
    whole = fingerprint_of([(1.0,) * 3], [(32,) * 3], channels=names, relative_size=0.75)
    assert not any(item.use_mask for item in plan_of(whole).configurations["2d"].preprocess.normalization)


def test_rotation_suits_the_patch() -> None:
    long = plan_of(fingerprint_of([(1.0,) * 3], [(64, 128, 64)])).configurations
    assert long["2d"].training.augmentation.rotation_degrees == (15.0,)
    assert long["3d_fullres"].training.augmentation.rotation_degrees == (30.0, 30.0, 30.0)
    flat = plan_of(fingerprint_of([(5.0, 1.0, 1.0)], [(16, 128, 128)])).configurations
    assert flat["2d"].training.augmentation.rotation_degrees == (180.0,)
    assert flat["2d"].training.augmentation.mirror_axes == flat["2d"].inference.mirror_axes == (0, 1)
    assert flat["3d_fullres"].training.augmentation.rotation_degrees == (180.0, 0.0, 0.0)
    assert flat["3d_fullres"].training.augmentation.dummy_2d


def test_batch_dice_in_3d_needs_images_that_want_a_low_resolution_stage() -> None:
    large = fingerprint_of([(1.0,) * 3] * 3, [(400, 400, 400)] * 3)
    assert plan_of(large).configurations["3d_fullres"].training.batch_dice
    assert not plan_of(CUBE).configurations["3d_fullres"].training.batch_dice


def test_the_ignore_label_counts_as_an_output_when_memory_is_estimated() -> None:
    fingerprint = fingerprint_of([(1.0,) * 3] * 900, [(64, 64, 64)] * 900, num_foreground=40)
    plain = plan_of(fingerprint, labels=schema(40)).configurations["2d"]
    ignoring = plan_of(fingerprint, labels=schema(40, ignore=41)).configurations["2d"]
    assert ignoring.network.num_classes == plain.network.num_classes == 41
    assert ignoring.training.batch_size < plain.training.batch_size


@pytest.mark.parametrize("amount", [0.0, -1.0, float("nan"), float("inf")])
def test_budget_must_be_above_zero(amount: float) -> None:
    with pytest.raises(ConfigError, match="memory budget must be above 0 GB"):
        plan_of(CUBE, vram_gb=amount)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown preset 'nnunett'\nKnown presets: cpu, default, nnunet, .* mean 'nnunet'"
    ):
        plan_of(CUBE, "nnunett")


def test_fingerprint_of_another_data_set_is_refused() -> None:
    with pytest.raises(PlanError, match="has 1 channels and 3 classes, the data set 2 and 3"):
        make_plan(CUBE, "x", schema(2), (Channel(name="A"), Channel(name="B")), NNUNET, Budget())


# ---------------------------------------------------------------------------------------------------------- importing
def test_own_fingerprint_is_read_back_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "fingerprint.json"
    file.write_text(CUBE.to_json())
    assert import_fingerprint(file, ("MRI",), 3, 20) == CUBE
    with pytest.raises(DatasetError, match=r"another data set\n  - channels: .*\n  - training cases: got 20"):
        import_fingerprint(file, ("CT",), 3, 21)
    assert import_fingerprint(file, ("MRI",), 3, 0) == CUBE
    file.write_text(CUBE.to_json().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(DatasetError, match="schema version 99"):
        import_fingerprint(file, ("MRI",), 3, 20)


def test_nnunet_fingerprint_is_read_in_its_own_order(tmp_path: Path) -> None:
    golden = load_golden("sarcoma")["fingerprint"]
    file = tmp_path / "dataset_fingerprint.json"
    file.write_text(json.dumps({**golden, "something_else": 1}))
    found = import_fingerprint(file, [Channel(name=name) for name in ("MR_T1", "CT", "PET")], 2, 12)
    assert found.spacings_mm[0] == tuple(golden["spacings"][0])
    assert found.shapes[-1] == tuple(golden["shapes_after_crop"][-1])
    assert found.intensities[1].std == golden["foreground_intensity_properties_per_channel"]["1"]["std"]
    assert found.num_training_cases == 12
    names = ("MR_T1", "CT", "PET")
    assert import_fingerprint(file, names, 2, 15).num_training_cases == 15
    assert import_fingerprint(file, names, 2, 0).num_training_cases == len(golden["spacings"])
    with pytest.raises(DatasetError, match="has intensities of channels 0, 1, 2; expected 0 for MR"):
        import_fingerprint(file, ["MR"], 2, 12)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, ConfigError, "does not exist"),
        ("{", DatasetError, "cannot be read as JSON"),
        ("[1]", DatasetError, "must hold keys and values, got list"),
        ("{}", DatasetError, "neither autoseg's nor nnU-Net's fingerprint"),
        ('{"spacings": [], "shapes_after_crop": [[1, 2, 3]]', DatasetError, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, error: type[Exception], message: str) -> None:
    file = tmp_path / "fingerprint.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(error, match=message):
        import_fingerprint(file, ("MRI",), 2, 1)


def test_nnunet_fingerprint_with_holes_is_refused(tmp_path: Path) -> None:
    golden = load_golden("hippocampus")["fingerprint"]
    file = tmp_path / "dataset_fingerprint.json"
    file.write_text(json.dumps({**golden, "spacings": golden["spacings"][:5]}))
    with pytest.raises(DatasetError, match="5 spacings and 200 shapes"):
        import_fingerprint(file, ("MRI",), 3, 200)


@pytest.mark.parametrize("what", ["not a number", "missing"])
def test_intensities_that_a_fingerprint_does_not_tell_matter_for_ct_alone(tmp_path: Path, what: str) -> None:
    """nnU-Net's planner does not look at them either, and writes NaN where no voxel is labelled."""
    golden = load_golden("hippocampus")["fingerprint"]
    file = tmp_path / "dataset_fingerprint.json"
    entry = {**golden["foreground_intensity_properties_per_channel"]["0"], "std": float("nan")}
    entries = {"0": entry} if what == "not a number" else {}
    file.write_text(json.dumps({**golden, "foreground_intensity_properties_per_channel": entries}))
    found = import_fingerprint(file, ("MRI",), 3, 200)
    assert found.intensities == (None,)
    plan = plan_of(found)
    assert plan.configurations["2d"].preprocess.normalization[0].scheme == "zscore"
    assert ": not measured" in next(item.inputs for item in plan.decisions if item.topic == "normalisation of MRI")
    with pytest.raises(PlanError, match="does not tell the intensities of CT, by which CT images are scaled"):
        plan_of(import_fingerprint(file, ("CT",), 3, 200))


# ---------------------------------------------------------------------------------------------------------- overrides
@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(CUBE)


def test_a_value_set_by_hand_is_checked_and_recorded(plan: Plan) -> None:
    patch = plan.configurations["3d_fullres"].network.patch_size
    changed = apply_overrides(plan, [("3d_fullres.network.patch_size", [32, 32, 32])])
    assert changed.configurations["3d_fullres"].network.patch_size == (32, 32, 32)
    assert changed.configurations["2d"] == plan.configurations["2d"]
    (record,) = changed.overrides
    assert (record.key, record.value) == ("3d_fullres.network.patch_size", "[32, 32, 32]")
    assert json.loads(record.planned) == list(patch)
    assert changed.digest() != plan.digest()
    again = apply_overrides(changed, [("3d_fullres.network.patch_size", [64, 64, 64])])
    assert [json.loads(item.planned) for item in again.overrides] == [list(patch)]
    assert again.overrides[0].value == "[64, 64, 64]"
    assert Plan.from_json(again.to_json(), "plan") == again
    assert apply_overrides(plan, []) is plan


def test_a_key_without_configuration_means_every_one(plan: Plan) -> None:
    changed = apply_overrides(plan, [("training.learning_rate", 1e-3), ("2d.training.learning_rate", "2e-3")])
    rates = {name: item.training.learning_rate for name, item in changed.configurations.items()}
    assert rates == {"3d_fullres": 1e-3, "2d": 2e-3}
    assert {item.key for item in changed.overrides} == {
        "3d_fullres.training.learning_rate",
        "2d.training.learning_rate",
    }


def test_an_entry_of_a_list_and_a_nested_group_can_be_set(plan: Plan) -> None:
    changed = apply_overrides(
        plan, [("preprocess.normalization.0.scheme", "none"), ("2d.training.augmentation.mirror_axes", [])]
    )
    assert {item.preprocess.normalization[0].scheme for item in changed.configurations.values()} == {"none"}
    assert changed.configurations["2d"].training.augmentation.mirror_axes == ()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("3d_fullres.network.patchsize", r"unknown plan key .*\nDid you mean 3d_fullres\.network\.patch_size"),
        ("training.lerning_rate", "training.learning_rate"),
        ("patch_size", "unknown plan key 'patch_size'"),
        ("3d_lowres.network.patch_size", "3d_fullres.network.patch_size"),
        ("2d.preprocess.normalization.1.scheme", "unknown plan key"),
        ("2d.network.patch_size.0.1", "unknown plan key"),
        ("", "unknown plan key"),
        ("2d", "unknown plan key"),
        ("2d.network", "is a group, not a value"),
    ],
)
def test_unknown_keys_are_refused_with_near_ones(plan: Plan, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(plan, [(key, 1)])


def test_an_impossible_plan_cannot_be_set(plan: Plan) -> None:
    with pytest.raises(
        PlanError, match=r"(?s)impossible with 2d.network.patch_size, 2d.training.batch_size.*divisible by"
    ):
        apply_overrides(plan, [("2d.network.patch_size", [33, 32]), ("2d.training.batch_size", 0)])


# ------------------------------------------------------------------------------------------------------------ reasons
def test_every_decision_has_a_reason_in_words() -> None:
    fingerprint = fingerprint_of([(3.0, 1.0, 1.0)] * 20, [(90, 400, 400)] * 20, channels=("CT", "PET"))
    plan = plan_of(fingerprint, vram_gb=4)
    topics = {(item.configuration, item.topic) for item in plan.decisions}
    common = {
        "target spacing",
        "axis order",
        "median shape",
        "normalisation of CT",
        "normalisation of PET",
        "normalisation mask",
    }
    each = {
        "first guess of the patch",
        "patch size",
        "depth, strides and kernels",
        "channels and convolutions",
        "batch size",
        "batch Dice",
        "rotation in training",
    }
    assert {("", topic) for topic in common} <= topics
    assert {(name, topic) for name in ("2d", "3d_fullres") for topic in each} <= topics
    assert ("3d_fullres", "whether there is a 3D network") in topics
    assert ("3d_lowres", "whether there is a low-resolution network") in topics
    assert len(topics) == len(plan.decisions)
    for item in plan.decisions:
        assert all((item.rule, item.inputs, item.result, item.would_change)), item


def test_reasons_state_the_result_of_the_plan_and_every_step() -> None:
    plan = plan_of(fingerprint_of([(3.0, 1.0, 1.0)] * 20, [(90, 400, 400)] * 20), vram_gb=4)
    network = plan.configurations["3d_fullres"].network
    patch = next(item for item in plan.decisions if (item.configuration, item.topic) == ("3d_fullres", "patch size"))
    assert patch.result.startswith("×".join(map(str, network.patch_size)))
    steps = int(patch.result.split("after ")[1].split()[0])
    left_out = int(patch.inputs.split("... ")[1].split(" more steps")[0])
    assert patch.inputs.count("shorten") + left_out == steps == 15
    assert prod(network.patch_size) < 90 * 400 * 400


def test_the_budget_named_by_a_reason_changes_the_patch() -> None:
    """ "From --vram N GB on the patch would be P": true at N, not just below."""
    fingerprint = fingerprint_of([(3.0, 1.0, 1.0)] * 20, [(90, 400, 400)] * 20)
    plan = plan_of(fingerprint, vram_gb=4)
    item = next(item for item in plan.decisions if (item.configuration, item.topic) == ("3d_fullres", "patch size"))
    amount = float(item.would_change.split()[2])
    named = tuple(map(int, item.would_change.split(" be ")[1].split(" ")[0].split("×")))
    now = plan.configurations["3d_fullres"].network.patch_size
    assert plan_of(fingerprint, vram_gb=amount * 0.95).configurations["3d_fullres"].network.patch_size == now
    larger = plan_of(fingerprint, vram_gb=amount * 1.05).configurations["3d_fullres"].network.patch_size
    assert prod(larger) >= prod(named) > prod(now)


def test_what_was_set_by_hand_is_listed_with_the_reasons(plan: Plan) -> None:
    changed = apply_overrides(plan, [("2d.training.batch_size", 3)])
    last = explain(changed)[-1]
    assert (last.configuration, last.topic, last.result) == ("2d", "training.batch_size", "3")
    assert last.would_change == "Planning again without this setting."
    assert len(explain(changed)) == len(plan.decisions) + 1


def test_2d_sets_say_that_there_is_no_3d_network() -> None:
    plan = plan_of(fingerprint_of([(999.0, 1.0, 1.0)] * 3, [(1, 300, 200)] * 3))
    assert set(plan.configurations) == {"2d"}
    item = next(item for item in plan.decisions if item.topic == "whether there is a 3D network")
    assert item.result.startswith("not planned")
    assert not any(item.configuration == "3d_lowres" for item in plan.decisions)


def test_planning_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, autoseg.planning.planner, autoseg.planning.explain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_old_fingerprints_without_cases_still_load() -> None:
    data = json.loads(CUBE.to_json())
    data.pop("cases")
    assert Fingerprint.from_json(json.dumps(data), "fingerprint") == CUBE
