"""Over the bank of made-up data sets of every kind, the four `nnunet` presets plan what nnU-Net's planners planned.

`scripts/nnunet_bank.py` made the bank with nnU-Net itself; docs/benchmarks/planner-bank.md tells about it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoseg.cli.app import main
from autoseg.domain.plan import Plan
from scripts.nnunet_bank import PLANNERS, compare_case, plan_differences, read_bank

BANK = Path(__file__).parent / "nnunet_bank"
ON_THE_COMMAND_LINE = (
    "brain tumour MR, regions",
    "ignore label, regions",
    "every kind of channel",
    "retina RGB",
    "same names",
    "CT at 3.5 GB",
    "description counts fewer",
)


@pytest.mark.parametrize("preset", PLANNERS)
def test_every_plan_equals_nnunets(preset: str) -> None:
    outcomes = {case["name"]: compare_case(case, golden, preset) for case, golden in read_bank(BANK, preset)}
    assert len(outcomes) >= 60
    assert {name: words for name, (outcome, words) in outcomes.items() if outcome == "different"} == {}


@pytest.mark.parametrize("preset", PLANNERS)
def test_the_bank_holds_every_kind_of_plan(preset: str) -> None:
    cases, plans = zip(*read_bank(BANK, preset), strict=True)
    names = [set(plan["configurations"]) for plan in plans if "error" not in plan]
    assert sum("3d_lowres" in found for found in names) >= 20
    assert sum(found == {"2d"} for found in names) >= 10
    assert sum("error" in plan for plan in plans) >= 3
    assert {case["vram_gb"] for case in cases} >= {None, 2.0, 80.0}
    orders = {tuple(plan["transpose_forward"]) for plan in plans if "error" not in plan}
    assert orders == {(0, 1, 2), (1, 0, 2), (2, 0, 1)}
    stages = {row["n_stages"] for plan in plans for row in plan.get("configurations", {}).values() if "n_stages" in row}
    assert {1, 4, 6, 8, 9} <= stages


@pytest.mark.parametrize("preset", PLANNERS)
def test_the_command_line_plans_the_same(preset: str, tmp_path: Path) -> None:
    """From nnU-Net's own two files, and nothing else."""
    bank = {case["name"]: (case, golden) for case, golden in read_bank(BANK, preset)}
    for name in ON_THE_COMMAND_LINE:
        case, golden = bank[name]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "dataset.json").write_text(json.dumps(case["dataset"]))
        (folder / "dataset_fingerprint.json").write_text(json.dumps(case["fingerprint"]))
        words = ["plan", folder / "dataset.json", "--fingerprint", folder / "dataset_fingerprint.json"]
        words += ["--preset", preset, "--out", folder / "run"]
        words += [] if case["vram_gb"] is None else ["--vram", f"{case['vram_gb']:g}GB"]
        assert main(list(map(str, words))) == 0
        plan = Plan.from_json((folder / "run" / "plan.json").read_text(), "plan")
        assert plan_differences(plan, golden) == [], name
