"""Configurations that people add: kept, checked, marked, and no concern of models that were planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planning_cases import fingerprint_of, plan_of, schema

from autoseg.cli.app import main
from autoseg.domain.plan import Plan
from autoseg.errors import ConfigError, PlanError
from autoseg.planning.additions import add_copies, keep_added
from autoseg.planning.overrides import apply_overrides

CUBES = fingerprint_of([(1.0, 1.0, 1.0)] * 20, [(64, 80, 96)] * 20, num_foreground=2)
LARGE = fingerprint_of([(1.0, 1.0, 1.0)] * 20, [(300, 300, 300)] * 20, num_foreground=2)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(CUBES)


def data_of(plan: Plan) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(plan.to_json())
    return data


def with_small(plan: Plan, **network: Any) -> dict[str, Any]:
    """plan.json after somebody copied 3d_fullres and changed the copy."""
    data = data_of(plan)
    small = json.loads(json.dumps(data["configurations"]["3d_fullres"]))
    small["network"] |= {"patch_size": [32, 32, 32], **network}
    data["configurations"]["3d_small"] = small
    return data


# --------------------------------------------------------------------------------------------------------------- keep
def test_what_was_added_stays_as_it_is_when_planned_anew(plan: Plan) -> None:
    anew = plan_of(CUBES, vram_gb=1.0)
    kept = keep_added(anew, with_small(plan), "plan.json")
    assert kept.configurations["3d_small"].network.patch_size == (32, 32, 32)
    assert kept.added_names == ("3d_small",)
    assert {name: kept.configurations[name] for name in anew.configurations} == anew.configurations
    mark = next(item for item in kept.decisions if item.configuration == "3d_small")
    assert (mark.topic, mark.inputs) == ("added by hand", "kept from plan.json")
    again = keep_added(plan_of(CUBES), data_of(kept), "plan.json")
    assert again.configurations["3d_small"] == kept.configurations["3d_small"]
    assert [item.configuration for item in again.decisions].count("3d_small") == 1


def test_planned_configurations_are_never_kept() -> None:
    large = plan_of(LARGE, vram_gb=1.0)
    assert "3d_lowres" in large.configurations
    small = plan_of(CUBES)
    assert keep_added(small, data_of(large), "plan.json") is small


def test_a_plan_of_an_older_version_is_planned_anew_unless_something_was_added(plan: Plan) -> None:
    old: dict[str, Any] = {"schema_version": 1, "configurations": {"2d": {"network": {}}}}
    assert keep_added(plan, old, "plan.json") is plan
    assert keep_added(plan, {"configurations": []}, "plan.json") is plan
    old["configurations"]["mine"] = {"network": {}}
    with pytest.raises(PlanError, match=r"plan\.json holds configurations .* do not fit any more: mine") as caught:
        keep_added(plan, old, "plan.json")
    assert any(problem.startswith("mine.preprocess: Field required") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"patch_size": [30, 32, 32]}, "3d_small.network: Value error, patch_size[0] = 30 must be divisible by"),
        ({"num_classes": 9}, "3d_small has 9 outputs, the labels need 3"),
        ({"kernel": 3}, "3d_small.network.kernel: Extra inputs are not permitted"),
    ],
)
def test_an_impossible_addition_is_named_not_dropped(plan: Plan, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError) as caught:
        keep_added(plan, with_small(plan, **change), "plan.json")
    assert problem in "\n".join(caught.value.problems)


def test_a_cascade_of_ones_own_needs_its_previous_stage() -> None:
    large = plan_of(LARGE, vram_gb=1.0)
    data = data_of(large)
    data["configurations"]["my_cascade"] = data["configurations"]["3d_cascade"]
    kept = keep_added(large, data, "plan.json")
    assert kept.configurations["my_cascade"].previous_stage == "3d_lowres"
    with pytest.raises(PlanError, match="my_cascade needs the configuration '3d_lowres'"):
        keep_added(plan_of(CUBES), data, "plan.json")


@pytest.mark.parametrize("name", ["../3d", "", "a b", ".hidden"])
def test_a_name_that_cannot_name_a_folder_is_refused(plan: Plan, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be added"):
        add_copies(plan, {name: "2d"})


# ---------------------------------------------------------------------------------------------------- copies, overrides
def test_a_copy_is_changed_by_overrides_that_stay_with_it(plan: Plan) -> None:
    copied = add_copies(plan, {"3d_small": "3d_fullres"})
    assert copied.configurations["3d_small"] == plan.configurations["3d_fullres"]
    changed = apply_overrides(copied, [("3d_small.network.patch_size", [32, 32, 32]), ("training.batch_size", 3)])
    kept = keep_added(plan_of(CUBES), data_of(changed), "plan.json")
    assert kept.configurations["3d_small"].training.batch_size == 3
    assert (
        kept.configurations["3d_fullres"].training.batch_size == plan.configurations["3d_fullres"].training.batch_size
    )
    assert {item.key for item in kept.overrides} == {"3d_small.network.patch_size", "3d_small.training.batch_size"}
    remade = add_copies(kept, {"3d_small": "2d"})
    assert remade.configurations["3d_small"] == plan.configurations["2d"]
    assert remade.overrides == ()


def test_copies_need_a_name_of_their_own_and_something_to_copy(plan: Plan) -> None:
    with pytest.raises(ConfigError, match="2d is planned by autoseg and cannot be added"):
        add_copies(plan, {"2d": "3d_fullres"})
    with pytest.raises(ConfigError, match=r"(?s)copy of '3d_lowres'.*The plan has 3d_fullres, 2d"):
        add_copies(plan, {"mine": "3d_lowres"})


# ------------------------------------------------------------------------------------------------------------- digests
def test_an_addition_names_only_its_own_models_anew(plan: Plan) -> None:
    small = keep_added(plan, with_small(plan), "plan.json")
    smaller = apply_overrides(small, [("3d_small.training.batch_size", 5)])
    for name in ("", "2d", "3d_fullres"):
        assert small.digest(name) == smaller.digest(name) == plan.digest() == plan.digest(name)
    assert len({plan.digest(), small.digest("3d_small"), smaller.digest("3d_small")}) == 3
    assert apply_overrides(small, [("2d.training.batch_size", 5)]).digest("3d_small") != small.digest("3d_small")


def test_an_added_previous_stage_counts_for_its_cascade() -> None:
    large = plan_of(LARGE, vram_gb=1.0)
    data = data_of(large)
    data["configurations"]["lower"] = data["configurations"]["3d_lowres"]
    data["configurations"]["upper"] = {**data["configurations"]["3d_cascade"], "previous_stage": "lower"}
    plan = keep_added(large, data, "plan.json")
    changed = apply_overrides(plan, [("lower.training.batch_size", 7)])
    assert changed.digest("upper") != plan.digest("upper")
    assert changed.digest("3d_cascade") == plan.digest("3d_cascade")


# -------------------------------------------------------------------------------------------------------- command line
@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """`autoseg plan` from nnU-Net's files."""
    intensities = {"max": 9.0, "mean": 3.0, "median": 2.0, "min": 0.0, "percentile_00_5": 0.5, "percentile_99_5": 7.0}
    fingerprint = {
        "spacings": [[1.0, 1.0, 1.0]] * 20,
        "shapes_after_crop": [[64, 80, 96]] * 20,
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": {**intensities, "std": 1.0}},
    }
    labels = {"background": 0, **{item.name: item.values[0] for item in schema(2).classes}}
    dataset = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 20, "file_ending": ".nii.gz"}
    for name, data in (("dataset", dataset), ("dataset_fingerprint", fingerprint)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    files = ["--fingerprint", str(tmp_path / "dataset_fingerprint.json"), "--out", str(tmp_path / "run")]
    return ["plan", str(tmp_path / "dataset.json"), "--preset", "default", *files]


def trained(run: Path, configuration: str) -> Path:
    """A fold folder as a training leaves it, as far as planning looks."""
    fold = run / "models" / configuration / "fold_0"
    fold.mkdir(parents=True, exist_ok=True)
    plan = Plan.from_json((run / "plan.json").read_text(), "plan")
    (fold / "run.json").write_text(json.dumps({"plan_digest": plan.digest(configuration)}))
    return fold


def test_adding_by_hand_planning_again_and_training_go_together(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(words) == 0
    trained(run, "3d_fullres")
    plan = Plan.from_json((run / "plan.json").read_text(), "plan")
    (run / "plan.json").write_text(json.dumps(with_small(plan)))
    assert main([*words, "--set", "3d_small.training.batch_size=4"]) == 0  # the model of 3d_fullres does not stop it
    said = " ".join(capsys.readouterr().out.split())
    assert "Added by hand, checked and kept: 3d_small." in said
    assert "(added by hand)" in said
    plan = Plan.from_json((run / "plan.json").read_text(), "plan")
    assert plan.configurations["3d_small"].training.batch_size == 4
    fold = trained(run, "3d_small")
    assert main([*words, "--set", "3d_small.training.batch_size=5"]) == 4
    refusal = capsys.readouterr().err
    assert str(fold) in "".join(refusal.split("\n"))
    assert "3d_fullres" not in refusal
    assert main([*words, "--vram", "1GB"]) == 4
    assert "3d_fullres" in capsys.readouterr().err
    assert main(words) == 0  # as it was


def test_add_makes_a_copy_on_the_command_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--add", "3d_small=3d_fullres", "--set", "3d_small.network.patch_size=32,32,32", "--why", "--json"]
    assert main([*words, *options, str(tmp_path / "out.json")]) == 0
    plan = Plan.from_json((tmp_path / "out.json").read_text(), "plan")
    assert plan.configurations["3d_small"].network.patch_size == (32, 32, 32)
    topics = [item.topic for item in plan.decisions if item.configuration == "3d_small"]
    assert topics == ["added by hand", "network.patch_size"]
    assert "a copy of 3d_fullres" in " ".join(capsys.readouterr().out.split())
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "plan:\n  configurations: {3d_small: 3d_fullres}\n  overrides: {3d_small.network.patch_size: [32, 32, 32]}\n"
    )
    again = [*words[:-1], str(tmp_path / "other"), "--config-file", str(settings), "--json", str(tmp_path / "2.json")]
    assert main(again) == 0
    assert Plan.from_json((tmp_path / "2.json").read_text(), "plan").configurations == plan.configurations
    assert main([*words, "--add", "3d_small"]) == 2


def test_a_plan_file_that_cannot_be_read_is_not_overwritten(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(words) == 0
    broken = (run / "plan.json").read_text() + "}"
    (run / "plan.json").write_text(broken)
    assert main(words) == 4
    assert (run / "plan.json").read_text() == broken
    (run / "plan.json").write_text("[]")
    assert main(words) == 4
