"""A whole selection: on made-up probabilities, where averaging helps, and on networks at random."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from synthetic_run import SCHEMA, SHAPE, make_run

from autoseg.config import Settings, TrainSettings
from autoseg.domain.dataset import Case, Fold, Splits
from autoseg.domain.inference import InferenceRecipe, Member
from autoseg.domain.plan import Plan
from autoseg.evaluation.crossval import FoldEvaluation, evaluate_cases
from autoseg.inference.segmenter import Segmenter, WeightedStages
from autoseg.inference.settings import PredictionSettings
from autoseg.inference.stages import load_stages
from autoseg.io.files import write_json, write_text
from autoseg.io.images import read_header, read_labels, write_labels
from autoseg.io.model import ModelCard, load_model, save_model
from autoseg.io.probabilities import LAST_CODE, ProbabilityStore
from autoseg.io.run_folder import RunFolder, fold_name
from autoseg.network import unet
from autoseg.pipeline import results, selecting
from autoseg.pipeline.held_out import finished_configurations, keep_probabilities
from autoseg.pipeline.selecting import select
from autoseg.pipeline.validating import validate_fold
from autoseg.report.collect import ReportSummary
from autoseg.report.page import write_report

PAIR = "2d + 3d_fullres"
NUM_CASES = 16
NUM_FOLDS = 2
SHA = "0" * 64


def write_splits(run: RunFolder) -> None:
    ids = [case.id for case in run.read_dataset().cases]
    folds = [ids[fold::NUM_FOLDS] for fold in range(NUM_FOLDS)]
    run.write(
        run.splits_file,
        Splits(
            rule="every other case",
            folds=tuple(
                Fold(train=tuple(one for one in ids if one not in fold), validation=tuple(fold)) for fold in folds
            ),
        ),
    )


def noisy(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (K, Z, Y, X) and the label map of a network that errs in blobs of its own."""
    labels, _ = read_labels(Path(case.labels or ""), None)
    rng = np.random.default_rng([seed, int(case.id[-2:])])
    truth = np.stack([value == labels.T for value in SCHEMA.label_values]).astype(float)
    noise = np.stack([ndimage.gaussian_filter(rng.standard_normal(truth[0].shape), 2.0) for _ in truth])
    logits = 5.0 * truth + 40.0 * noise
    shares = np.exp(logits - logits.max(0))
    shares /= shares.sum(0)
    codes = np.round(np.arcsin(np.sqrt(shares)) * (2 / np.pi * LAST_CODE)).astype(np.uint8)
    return codes, SCHEMA.decode_table()[codes.argmax(0)].T


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two configurations that err independently of each other, equally often."""
    run = make_run(tmp_path_factory.mktemp("selecting"), NUM_CASES)
    write_splits(run)
    dataset = run.read_dataset()
    for seed, name in enumerate(("2d", "3d_fullres")):
        for fold, members in enumerate(run.read_splits().folds):
            folder = run.fold_folder(name, fold)
            store = ProbabilityStore(run.probabilities_folder / name / fold_name(fold), SHA)
            pairs = []
            for case in (dataset.case(case_id) for case_id in members.validation):
                codes, labels = noisy(case, seed)
                store.write(case, codes)
                path = folder / "validation" / f"{case.id}.nii.gz"
                write_labels(path, labels, read_header(case.images[0]).geometry)
                pairs.append((case.id, path, Path(case.labels or "")))
            scored = FoldEvaluation(
                weights_sha256=SHA, predict_s=4.0, score_s=1.0, evaluation=evaluate_cases(pairs, SCHEMA, 1.5)
            )
            write_text(folder / "validation" / "summary.json", scored.to_json())
    return run


@pytest.fixture(scope="module")
def selection(made_up: RunFolder):
    return select(made_up)


def dice_by_hand(run: RunFolder, folder: Path) -> float:
    dice: dict[int, list[float]] = {1: [], 2: []}
    for path in sorted(folder.glob("*.nii.gz")):
        predicted = np.asarray(nib.load(path).dataobj)
        case = run.read_dataset().case(path.name.removesuffix(".nii.gz"))
        actual = np.asarray(nib.load(case.labels).dataobj)
        for value, found in dice.items():
            one, other = predicted == value, actual == value
            if other.any():
                found.append(2 * (one & other).sum() / (one.sum() + other.sum()))
    return float(np.mean([np.mean(found) for found in dice.values()]))


def test_the_mean_of_two_is_chosen_and_written(made_up: RunFolder, selection) -> None:
    assert selection.choice == PAIR
    by_name = {item.name: item for item in selection.candidates}
    assert set(by_name) == {"2d", "3d_fullres", PAIR}
    assert selection.candidates[0].name == PAIR
    row = next(
        item
        for item in selection.comparisons
        if item.metric == "dice" and item.class_name is None and PAIR in (item.first, item.second)
    )
    assert row.num_patients == NUM_CASES // 2 == selection.statistics.num_patients
    assert row.p_value < 0.05
    recipe = made_up.read_inference()
    assert recipe == selection.recipe
    assert [member.configuration for member in recipe.members] == ["2d", "3d_fullres"]
    assert [member.folds for member in recipe.members] == [(0, 1), (0, 1)]
    assert sum(member.weight for member in recipe.members) == pytest.approx(1.0)
    assert by_name[PAIR].seconds_per_case == pytest.approx(2 * 4.0 * NUM_FOLDS / NUM_CASES)


def test_numbers_equal_those_recomputed_from_the_label_maps(made_up: RunFolder, selection) -> None:
    pair = dice_by_hand(made_up, made_up.crossval_folder / "2d+3d_fullres")
    assert selection.chosen.mean_foreground_dice == pytest.approx(pair)
    assert selection.candidates[0].mean_foreground_dice == pytest.approx(pair)
    assert selection.recipe.postprocessing  # blobs far from the balls go
    final = dice_by_hand(made_up, made_up.crossval_folder / "final")
    assert selection.final.mean_foreground_dice == pytest.approx(final)
    kept = [item for item in selection.tried_rules if item.is_kept]
    assert kept[0].dice_before == pytest.approx(pair)
    assert kept[-1].dice_after == pytest.approx(final)
    assert final > pair
    assert all(item.loss_after < item.loss_before for item in selection.calibrations)
    assert [item.case for item in selection.confidences] == [case.id for case in made_up.read_dataset().cases]
    assert all(0 <= item.mean_entropy <= 1 for item in selection.confidences)


def test_the_report_shows_it(made_up: RunFolder, selection) -> None:
    write_report(made_up)
    summary = ReportSummary.model_validate_json((made_up.report_folder / "summary.json").read_text())
    assert [(item.name, item.kind) for item in summary.configurations] == [
        ("2d", "trained"),
        ("3d_fullres", "trained"),
        (PAIR, "ensemble"),
        ("final", "final"),
    ]
    assert summary.best == PAIR
    assert summary.selection == selection
    assert summary.num_patients == NUM_CASES // 2
    rows = list(csv.DictReader((made_up.report_folder / "cases.csv").read_text().splitlines()))
    assert len(rows) == 4 * NUM_CASES * 2
    assert {row["fold"] for row in rows if row["configuration"] == "final"} == {"0", "1"}


def test_it_is_made_once_and_anew_for_other_weights(
    made_up: RunFolder, selection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Never:
        def __init__(self, *_: object) -> None:
            raise AssertionError("selected again")

    monkeypatch.setattr(selecting, "Candidates", Never)
    made_up.inference_file.unlink()
    assert select(made_up) == selection
    assert made_up.read_inference() == selection.recipe
    by_hand = InferenceRecipe(members=(Member(configuration="2d"),))
    made_up.write(made_up.inference_file, by_hand)
    assert select(made_up) == selection
    assert made_up.read_inference() == by_hand
    assert "kept as it is" in caplog.text
    made_up.inference_file.unlink()
    folder = made_up.fold_folder("2d", 0)
    card, summary = folder / "weights.json", folder / "validation" / "summary.json"
    before = card.read_text(), summary.read_text()
    try:
        write_json(card, {"weights_sha256": "1" * 64})
        summary.write_text(before[1].replace(SHA, "1" * 64))
        with pytest.raises(AssertionError, match="again"):
            select(made_up)
        write_report(made_up)
        assert json.loads((made_up.report_folder / "summary.json").read_text())["selection"] is None
        assert "other weights" in caplog.text
    finally:
        card.write_text(before[0])
        summary.write_text(before[1])


# --- With networks -------------------------------------------------------------------------------------------------


def write_models(run: RunFolder, plan: Plan) -> None:
    for seed, name in enumerate(plan.configurations):
        for fold in range(NUM_FOLDS):
            card = ModelCard(plan=plan, configuration=name, fold=fold, digest=plan.digest(name))
            weights = unet.build(plan.configurations[name].network, 2 * seed + fold).state_dict()
            save_model(run.fold_folder(name, fold), weights, card)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    run = make_run(tmp_path_factory.mktemp("networks"), 4)
    write_splits(run)
    write_models(run, run.read_plan())
    dataset, settings = run.read_dataset(), TrainSettings(device="cpu", precision="fp32")
    for name in run.read_plan().configurations:
        for fold, members in enumerate(run.read_splits().folds):
            validate_fold(run, run.fold_folder(name, fold), dataset, members.validation, settings)
    return run


def test_averages_equal_what_prediction_gives(networks: RunFolder) -> None:
    """The recipe's members with the fold that had not seen the case, by the code that `predict` uses."""
    selection = select(networks, device="cpu", precision="fp32")
    assert selection is not None
    pair = next(item for item in selection.candidates if item.name == PAIR)
    dataset = networks.read_dataset()
    for fold, members in enumerate(networks.read_splits().folds):
        stages = [
            WeightedStages(
                load_stages(
                    [load_model(networks.fold_folder(member.configuration, fold))],
                    None,
                    PredictionSettings(precision="fp32"),
                    "cpu",
                ),
                member.weight,
                member.temperatures(SCHEMA),
            )
            for member in pair.members
        ]
        segmenter = Segmenter(stages)
        for case in (dataset.case(case_id) for case_id in members.validation):
            expected = segmenter.segment(segmenter.read(case))
            stored, _ = read_labels(networks.crossval_folder / "2d+3d_fullres" / f"{case.id}.nii.gz", None)
            assert stored.shape == SHAPE
            # Networks at random are sure of nothing, so that codes of 8 bit make many ties.
            assert (stored == expected).mean() > 0.98
            assert len(np.unique(expected)) > 1


def test_probabilities_are_made_once(networks: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = finished_configurations(networks, networks.read_dataset())
    assert [item.name for item in finished] == ["2d", "3d_fullres"]
    stores = keep_probabilities(networks, networks.read_dataset(), finished[0], device="cpu", precision="fp32")
    monkeypatch.setattr("autoseg.pipeline.held_out._predict", None)
    again = keep_probabilities(networks, networks.read_dataset(), finished[0], device="cpu", precision="fp32")
    assert {case: store.path(case) for case, store in again.items()} == {
        case: store.path(case) for case, store in stores.items()
    }
    stores["case_00"].path("case_00").unlink()
    with pytest.raises(TypeError):
        keep_probabilities(networks, networks.read_dataset(), finished[0], device="cpu", precision="fp32")


def test_nothing_is_chosen_while_a_fold_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, 4, ("3d_fullres",))
    write_splits(run)
    (run.fold_folder("3d_fullres", 1) / "weights.json").unlink()
    assert select(run) is None
    with caplog.at_level("INFO", logger="autoseg"):
        page = results.report(run.root, selects=True)
    assert page.is_file()
    assert "no configuration has all of its folds finished" in caplog.text
    assert run.read_inference() is None


def test_run_trains_every_planned_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = make_run(tmp_path, 2).read_plan()
    calls: list[tuple[object, object]] = []

    class Clean:
        stops_training = False

    def note(*_: object, configuration: str | None = None, fold: str = "each", **__: object) -> None:
        calls.append((configuration, fold))

    monkeypatch.setattr(results, "check", lambda *_, **__: Clean())
    monkeypatch.setattr(results, "plan", lambda *_, **__: plan)
    monkeypatch.setattr(results, "train", note)
    monkeypatch.setattr(results, "report", lambda *_, **__: tmp_path)
    results.run(tmp_path, tmp_path, Settings())
    results.run(tmp_path, tmp_path, Settings(), configuration="2d", fold="1")
    assert calls == [("2d", "each"), ("3d_fullres", "each"), ("2d", "1")]
