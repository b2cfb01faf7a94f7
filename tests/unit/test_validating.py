"""The final weights are the headline; the best ones stand beside them, marked as chosen on the cases scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import synthetic_run
import torch

from autoseg.config import TrainSettings
from autoseg.domain.plan import Plan
from autoseg.errors import DeviceMemoryError
from autoseg.evaluation.crossval import BestWeights, FoldEvaluation
from autoseg.io.model import BEST, WEIGHTS, ModelCard, save_model
from autoseg.io.run_folder import RunFolder
from autoseg.network import unet
from autoseg.pipeline import validating
from autoseg.pipeline.training import FoldOutcome
from autoseg.report.collect import read_fold_evaluation

NAME = "3d_fullres"
SETTINGS = TrainSettings(device="cpu", precision="fp32")
CASES = ("case_00", "case_02")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    return synthetic_run.make_run(tmp_path_factory.mktemp("run"), 3, (NAME,))


def write_model(folder: Path, plan: Plan, name: str, seed: int, seconds: float = 100.0) -> str:
    card = ModelCard(
        plan=plan,
        configuration=NAME,
        fold=0,
        digest=plan.digest(NAME),
        provenance={"epochs": 10 + seed, "seconds": seconds},
    )
    weights = unet.build(plan.configurations[NAME].network, seed).state_dict()
    return save_model(folder, weights, card, name).weights_sha256


@pytest.fixture
def fold(run: RunFolder, tmp_path: Path) -> Path:
    write_model(tmp_path, run.read_plan(), WEIGHTS, 1)
    return tmp_path


def validate(run: RunFolder, folder: Path) -> FoldEvaluation:
    scored = validating.validate_fold(run, folder, run.read_dataset(), CASES, SETTINGS)
    assert scored is not None
    return scored


def test_the_best_weights_stand_beside_the_final_ones(run: RunFolder, fold: Path, tmp_path: Path) -> None:
    checksum = write_model(fold, run.read_plan(), BEST, 2)
    scored = validate(run, fold)
    best = scored.best
    assert best is not None
    assert (best.weights_sha256, best.differ, best.epoch, best.skipped) == (checksum, True, 12, "")
    stored = json.loads((fold / "validation" / "summary.json").read_text())
    assert stored["best"]["chosen_on_these_cases"] is True
    assert stored["evaluation"]["summary"]["mean_foreground_dice"] == scored.evaluation.summary.mean_foreground_dice

    # The same numbers as if each of the two were the final one, whose predictions are kept.
    alone = {}
    for seed in (1, 2):
        write_model(tmp_path / f"{seed}", run.read_plan(), WEIGHTS, seed)
        alone[seed] = validate(run, tmp_path / f"{seed}").evaluation.summary
    assert 0 < (alone[1].mean_foreground_dice or 0) != alone[2].mean_foreground_dice
    assert scored.evaluation.summary == alone[1]
    assert best.mean_foreground_dice == alone[2].mean_foreground_dice
    assert best.class_dice == {item.name: item.metric("dice").mean for item in alone[2].classes}
    for case in CASES:
        file = Path("validation") / f"{case}.nii.gz"
        assert (tmp_path / "1" / file).read_bytes() == (fold / file).read_bytes()
    assert not list(fold.glob(".tmp-*"))
    assert read_fold_evaluation(fold) == scored


@pytest.mark.parametrize(
    ("seed", "skipped", "differ"), [(None, "there are none", False), (1, "they are the final weights", False)]
)
def test_where_there_is_nothing_to_compare(
    run: RunFolder, fold: Path, seed: int | None, skipped: str, differ: bool
) -> None:
    if seed is not None:
        write_model(fold, run.read_plan(), BEST, seed)
    best = validate(run, fold).best
    assert best is not None
    assert (best.skipped, best.differ, best.mean_foreground_dice) == (skipped, differ, None)


@pytest.mark.parametrize(("fraction", "is_skipped"), [(0.0, True), (1e6, False)])
def test_a_comparison_that_takes_long_beside_the_training_is_left_out(
    run: RunFolder, fold: Path, monkeypatch: pytest.MonkeyPatch, fraction: float, is_skipped: bool
) -> None:
    write_model(fold, run.read_plan(), BEST, 2)
    monkeypatch.setattr(validating, "BEST_S", 0.0)
    monkeypatch.setattr(validating, "BEST_FRACTION", fraction)
    best = validate(run, fold).best
    assert best is not None
    assert best.differ
    assert best.skipped.startswith("it would take about") is is_skipped


def test_what_was_scored_is_not_scored_again(run: RunFolder, fold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(fold, run.read_plan(), BEST, 2)
    scored = validate(run, fold)
    calls: list[object] = []
    score = validating._Scoring.score
    monkeypatch.setattr(validating._Scoring, "score", lambda *args: calls.append(args) or score(*args))
    assert validate(run, fold) == scored
    assert not calls
    # Killed between the two comparisons.
    path = fold / "validation" / "summary.json"
    path.write_text(scored.model_copy(update={"best": None}).to_json())
    again = validate(run, fold)
    assert len(calls) == 1
    assert again.best is not None
    assert scored.best is not None
    assert again.best.mean_foreground_dice == scored.best.mean_foreground_dice
    assert again.evaluation == scored.evaluation
    # By an earlier version, which did not mirror.
    data = json.loads(scored.to_json())
    del data["tta"]
    path.write_text(json.dumps(data))
    assert validate(run, fold).tta == "interleaved"
    assert len(calls) == 3


def test_best_weights_that_fail_do_not_fail_the_fold(
    run: RunFolder, fold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(fold, run.read_plan(), BEST, 2)
    predict, calls = validating.predict_cases, []

    def fail_later(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) > 1:
            raise DeviceMemoryError("the device is full")
        return predict(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(validating, "predict_cases", fail_later)
    scored = validate(run, fold)
    assert scored.best is not None
    assert scored.best.skipped == "the device is full"
    assert not list(fold.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (None, ""),
        (BestWeights(skipped="there are none"), ""),
        (
            BestWeights(differ=True, skipped="it would take about 9 min"),
            "were not compared: it would take about 9 min.",
        ),
        (
            BestWeights(differ=True, epoch=31, mean_foreground_dice=0.87124, seconds=12.3),
            "(epoch 31) have 0.8712 there, but were chosen on these cases (another 12 s).",
        ),
    ],
)
def test_the_line_says_what_the_best_weights_are(best: BestWeights | None, expected: str) -> None:
    outcome = FoldOutcome("2d", 0, Path("fold_0"), 0.87, 40, 1500.0, 10.0, best)
    line = outcome.line()
    assert "mean foreground Dice 0.8700 on 40 validation cases (predicted and scored in 10 s)" in line
    assert expected in line
    assert ("best weights" in line) is bool(expected)


def test_scores_of_an_earlier_version_are_made_anew_without_predicting(
    run: RunFolder, fold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = validate(run, fold)
    path = fold / "validation" / "summary.json"
    old = json.loads(path.read_text())
    del old["evaluation"]["metrics_version"]
    old["evaluation"]["summary"]["classes"][0].pop("lesions")
    path.write_text(json.dumps(old))
    monkeypatch.setattr(validating, "predict_cases", None)
    renewed = validate(run, fold)
    assert renewed.evaluation == scored.evaluation
    assert FoldEvaluation.model_validate_json(path.read_text()).evaluation == scored.evaluation
    assert renewed.predict_s == scored.predict_s
