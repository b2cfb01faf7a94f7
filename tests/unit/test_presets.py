"""The shipped rules, and those in a file of one's own."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import pytest
from planning_cases import fingerprint_of, plan_of

from autoseg.config import preset_file, preset_names, read_yaml
from autoseg.domain.plan import TrainingPlan
from autoseg.errors import ConfigError, PlanError
from autoseg.planning.presets import PlannerRules, TrainingRules, preset_rules

NAMES = ("cpu", "default", "nnunet", "nnunet-resenc-l", "nnunet-resenc-m", "nnunet-resenc-xl")
CUBES = fingerprint_of([(1.0, 1.0, 1.0)] * 20, [(200, 200, 200)] * 20)


def test_the_presets_are_those_that_the_command_line_promises() -> None:
    assert preset_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_file_says_every_key_once_with_a_comment(name: str) -> None:
    assert preset_rules(name).name == name
    lines = preset_file(name).read_text().splitlines()
    keys = [match[1] for line in lines if (match := re.match(r"(\w+): (\S.*|) +# \S", line))]
    assert keys == list(dict.fromkeys(keys))
    assert set(keys) == set(PlannerRules.model_fields)
    of_training = [match[1] for line in lines if (match := re.match(r"  (\w+): \S.*  # \S", line))]
    assert sorted(of_training) == sorted(TrainingRules.model_fields)
    assert set(of_training) < set(TrainingPlan.model_fields)
    assert all(len(line) <= 125 for line in lines)


@pytest.mark.parametrize(
    ("name", "vram_gb", "activations", "blocks"),
    [
        ("nnunet", 8, (560e6, 85e6), (2, 2, 2, 2, 2)),
        ("nnunet-resenc-m", 8, (680e6, 135e6), (1, 3, 4, 6, 6)),
        ("nnunet-resenc-l", 24, (2100e6, 380e6), (1, 3, 4, 6, 6)),
        ("nnunet-resenc-xl", 40, (3600e6, 560e6), (1, 3, 4, 6, 6)),
    ],
)
def test_nnunets_constants(
    name: str, vram_gb: float, activations: tuple[float, float], blocks: tuple[int, ...]
) -> None:
    rules = preset_rules(name)
    is_residual = name != "nnunet"
    assert rules.default_vram_gb == rules.reference_vram_gb == vram_gb
    assert (rules.activations_3d, rules.activations_2d) == activations
    assert rules.encoder_blocks(5) == blocks
    assert rules.decoder_blocks(5) == ((1,) * 4 if is_residual else (2,) * 4)
    assert (rules.fitted_batch(3), rules.fitted_batch(2)) == ((2, 12) if is_residual else (2, 2))
    assert rules.batch_fraction_of_voxels == (1.0 if is_residual else 0.05)
    assert not rules.plans_for_time


def test_presets_differ_only_where_they_say_so() -> None:
    def differences(one: str, other: str) -> set[str]:
        first, second = preset_rules(one).model_dump(), preset_rules(other).model_dump()
        return {key for key in first if first[key] != second[key]} - {"name"}

    departures = {"axis_tie_fraction", "single_slice_first", "mirror_pairs", "tile_sigma_fraction"}
    departures |= {"augmentation_warm_up_passes", "training"}
    time = {"default_step_seconds", "default_flops_per_second", "timed_base_features", "smallest_base_features"}
    sizes = {"default_vram_gb", "reference_vram_gb", "activations_3d", "activations_2d"}
    assert differences("nnunet", "default") == departures
    assert differences("default", "cpu") == time
    assert differences("nnunet-resenc-m", "nnunet-resenc-l") == sizes


def test_a_file_of_ones_own_is_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(preset_file("nnunet").read_text().replace("name: nnunet", "name: narrow").replace("320 ", "100 "))
    plan = plan_of(CUBES, str(file))
    assert plan.preset == "narrow"
    assert max(plan.configurations["3d_fullres"].network.features_per_stage) == 100
    file.write_text(preset_file("nnunet").read_text())
    with pytest.raises(ConfigError, match="calls itself 'nnunet', which is a preset of autoseg's own"):
        preset_rules(str(file))
    file.write_text(preset_file("nnunet").read_text().replace("smallest_edge:", "smallest_egde:"))
    with pytest.raises(ConfigError) as caught:
        preset_rules(str(file))
    assert {problem.partition(":")[0] for problem in caught.value.problems} == {"smallest_edge", "smallest_egde"}
    with pytest.raises(ConfigError, match="does not exist"):
        preset_rules(str(tmp_path / "nowhere.yaml"))


def test_time_limits_need_each_other() -> None:
    data = read_yaml(preset_file("cpu")) | {"default_flops_per_second": None}
    with pytest.raises(ValueError, match="need each other"):
        PlannerRules.model_validate(data)


# ------------------------------------------------------------------------------------------------------ plan for time
def test_cpu_plans_short_steps_and_says_so() -> None:
    plan = plan_of(CUBES, "cpu", step_seconds=2.0, flops_per_second=4e11)
    patient = plan_of(CUBES, "default")
    small, large = (item.configurations["3d_fullres"].network.patch_size for item in (plan, patient))
    assert max(small) < min(large)
    reasons = {(item.configuration, item.topic): item for item in plan.decisions}
    patch = reasons["3d_fullres", "patch size"]
    assert "at most 2 s a step at 400 thousand million operations a second (measured)" in patch.inputs
    assert patch.would_change.startswith("With steps of 2.")
    assert "by time: 2;" in reasons["3d_fullres", "batch size"].inputs
    assert "not measured" in next(item.inputs for item in plan_of(CUBES, "cpu").decisions if item.topic == "patch size")


def network_for(seconds: float) -> tuple[int, int]:
    """Voxels of the patch and channels of the finest stage."""
    plan = plan_of(CUBES, "cpu", step_seconds=seconds, flops_per_second=4e11)
    network = plan.configurations["3d_fullres"].network
    return prod(network.patch_size), network.features_per_stage[0]


def test_with_less_time_patches_get_smaller_then_networks_narrower_then_patches_smaller_again() -> None:
    """Decision 50."""
    largest = prod(plan_of(CUBES, "default").configurations["3d_fullres"].network.patch_size)
    assert network_for(60.0) == (largest, 32)
    voxels, width = network_for(2.0)
    assert 48**3 < voxels < largest
    assert width == 16
    assert network_for(0.06) == (48**3, 8)
    voxels, width = network_for(0.03)
    assert 32**3 <= voxels < 48**3
    assert width == 8


def test_a_cpu_that_is_too_slow_for_any_network_is_told_what_to_wait() -> None:
    with pytest.raises(PlanError, match=r"(?s)no training step is as short as 1e-06 s.*--step-time"):
        plan_of(CUBES, "cpu", step_seconds=1e-6)


def test_widths_must_not_fall() -> None:
    data = read_yaml(preset_file("cpu")) | {"timed_base_features": 64}
    with pytest.raises(ValueError, match="must not fall, got 8, 64, 32"):
        PlannerRules.model_validate(data)


def test_presets_for_memory_refuse_a_step_time_but_not_a_measured_speed() -> None:
    with pytest.raises(ConfigError, match=r"(?s)plans for memory alone.*--preset cpu"):
        plan_of(CUBES, "nnunet", step_seconds=1.0)
    assert plan_of(CUBES, "nnunet", flops_per_second=1e9) == plan_of(CUBES, "nnunet")


@pytest.mark.parametrize("key", ["step_seconds", "flops_per_second"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_time_must_be_above_zero(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match="must be above 0"):
        plan_of(CUBES, "cpu", **{key: value})
