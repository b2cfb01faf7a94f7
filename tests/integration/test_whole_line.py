"""The whole line from the command line on the packaged real data, with a network small enough for a test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from autoseg.cli.app import main
from autoseg.pipeline.demo import copy_demo_data

NUM_CASES = 7
SMALL = [
    "--set",
    "3d_fullres.network.features_per_stage=[4,8,8,8]",
    "--set",
    "3d_fullres.training.batch_size=2",
    "--set",
    "3d_fullres.training.steps_per_epoch=3",
    "--set",
    "3d_fullres.training.validation_steps_per_epoch=1",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of the packaged cases."""
    folder = tmp_path_factory.mktemp("line") / "data"
    copy_demo_data(folder)
    description = json.loads((folder / "dataset.json").read_text())
    description["training"] = description["training"][:NUM_CASES]
    description["numTraining"] = NUM_CASES
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def run(dataset: Path) -> Path:
    """A run with one trained fold."""
    folder = dataset.parent / "run"
    assert main(["plan", str(dataset), "--out", str(folder), *SMALL]) == 0
    assert main(["train", str(folder), "--fold", "0", "--epochs", "2"]) == 0
    return folder


def test_the_run_folder_has_its_fixed_names(run: Path) -> None:
    fold = run / "models" / "3d_fullres" / "fold_0"
    for name in ("dataset.json", "fingerprint.json", "plan.json", "splits.json"):
        assert (run / name).is_file()
    for name in ("weights.safetensors", "weights.json", "best.safetensors", "metrics.jsonl", "run.json"):
        assert (fold / name).is_file()
    assert not list(run.rglob(".tmp-*"))
    assert len((fold / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(list((run / "cache").iterdir())) == 1


def test_overrides_are_recorded(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    assert [item["key"] for item in plan["overrides"]] == [item.split("=")[0] for item in SMALL[1::2]]
    assert plan["configurations"]["3d_fullres"]["network"]["features_per_stage"] == [4, 8, 8, 8]


def test_validation_cases_are_predicted_and_scored(run: Path) -> None:
    fold = run / "models" / "3d_fullres" / "fold_0"
    expected = set(json.loads((run / "splits.json").read_text())["folds"][0]["validation"])
    assert {path.name.split(".")[0] for path in (fold / "validation").glob("*.nii.gz")} == expected
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert {case["case"] for case in summary["evaluation"]["cases"]} == expected


def test_a_finished_fold_is_not_trained_again(run: Path) -> None:
    weights = run / "models" / "3d_fullres" / "fold_0" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(["train", str(run), "--fold", "0", "--epochs", "2"]) == 0
    assert weights.stat().st_mtime_ns == before


def test_a_plan_that_does_not_fit_the_models_is_refused(
    run: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(dataset), "--out", str(run)]) == 4
    assert "fold_0" in capsys.readouterr().err


def test_train_sets_training_keys_only(run: Path) -> None:
    assert main(["train", str(run), "--fold", "1", "--epochs", "1", "--set", "network.patch_size=[8,8,8]"]) == 2


def test_the_last_fold_does_not_exist(run: Path) -> None:
    assert main(["train", str(run), "--fold", "5", "--epochs", "1"]) == 2


def test_predictions_lie_on_the_grid_of_their_image(run: Path, dataset: Path, tmp_path: Path) -> None:
    images = sorted((dataset / "imagesTs").glob("*.nii.gz"))[:2]
    assert main(["predict", str(run), *map(str, images), "--out", str(tmp_path), "--tta", "full"]) == 0
    for path in images:
        image, labels = nib.load(path), nib.load(tmp_path / path.name)
        assert labels.shape == image.shape
        assert labels.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(labels.affine, image.affine)
        assert labels.header["sform_code"] == image.header["sform_code"]
        assert labels.header["qform_code"] == image.header["qform_code"]
        assert set(np.unique(labels.dataobj)) <= {0, 1, 2}


def test_a_model_folder_predicts_the_same_as_its_run(run: Path, dataset: Path, tmp_path: Path) -> None:
    image = sorted((dataset / "imagesTs").glob("*.nii.gz"))[0]
    moved = tmp_path / "elsewhere"
    shutil.copytree(run / "models" / "3d_fullres" / "fold_0", moved)
    assert main(["predict", str(run), str(image), "--out", str(tmp_path / "a")]) == 0
    assert main(["predict", str(moved), str(image), "--out", str(tmp_path / "b")]) == 0
    first, second = (nib.load(tmp_path / name / image.name).get_fdata() for name in ("a", "b"))
    np.testing.assert_array_equal(first, second)


def test_one_bad_image_does_not_stop_the_others(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    for path in sorted((dataset / "imagesTs").glob("*.nii.gz"))[:2]:
        shutil.copy(path, inputs)
    (inputs / "broken.nii.gz").write_text("not an image")
    assert main(["predict", str(run), str(inputs), "--out", str(tmp_path / "out")]) == 3
    captured = capsys.readouterr()
    assert "broken" in captured.err
    assert len(captured.out.split()) == len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


def test_evaluate_scores_references_against_themselves_as_perfect(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(dataset / "labelsTs"), str(dataset / "labelsTs"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["mean_foreground_dice"] == 1.0


def test_the_report_is_one_page_without_network(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    page = run / "report" / "index.html"
    assert str(page) in capsys.readouterr().out.replace("\n", "")
    text = page.read_text()
    assert 'src="http' not in text
    summary = json.loads((run / "report" / "summary.json").read_text())
    stored = json.loads((run / "models" / "3d_fullres" / "fold_0" / "validation" / "summary.json").read_text())
    assert str(stored["evaluation"]["summary"]["mean_foreground_dice"])[:8] in json.dumps(summary)


def test_run_does_it_all_and_does_it_once(dataset: Path, tmp_path: Path) -> None:
    only = ["--config", "3d_fullres", "--fold", "0", "--epochs", "1"]
    words = ["run", str(dataset), "--out", str(tmp_path / "run"), *only, *SMALL]
    assert main(words) == 0
    page = tmp_path / "run" / "report" / "index.html"
    weights = tmp_path / "run" / "models" / "3d_fullres" / "fold_0" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    assert page.is_file()
    assert main(words) == 0
    assert weights.stat().st_mtime_ns == before


@pytest.mark.slow
def test_run_cross_validates_every_configuration_and_chooses(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, image = tmp_path / "run", sorted((dataset / "imagesTs").glob("*.nii.gz"))[0]
    flat = ["--set", "2d.network.features_per_stage=[4,8,8,8]", "--set", "2d.training.batch_size=4"]
    flat += ["--set", "2d.training.steps_per_epoch=3", "--set", "2d.training.validation_steps_per_epoch=1"]
    words = ["run", str(dataset), "--out", str(run), "--epochs", "1", *SMALL, *flat]
    assert main(words) == 0
    selection = json.loads((run / "crossval" / "selection.json").read_text())
    assert {item["name"] for item in selection["candidates"]} == {"2d", "3d_fullres", "3d_fullres + 2d"}
    assert selection["num_cases"] == NUM_CASES
    written = (run / "inference.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (run / "inference.json").stat().st_mtime_ns == written
    assert main(["report", str(run), "--json", str(tmp_path / "summary.json")]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == summary["selection"]["choice"] == selection["choice"]
    assert selection["choice"] in capsys.readouterr().out
    assert main(["predict", str(run), str(image), "--out", str(tmp_path / "out")]) == 0
    assert nib.load(tmp_path / "out" / image.name).shape == nib.load(image).shape


def test_a_2d_network_goes_the_same_way(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = [
        "--set",
        "2d.network.features_per_stage=[4,8,8,8]",
        "--set",
        "2d.training.batch_size=4",
        "--set",
        "training.steps_per_epoch=2",
    ]
    assert main(["plan", str(dataset), "--out", str(run), *small]) == 0
    assert main(["train", str(run), "--config", "2d", "--fold", "1", "--epochs", "1"]) == 0
    image = sorted((dataset / "imagesTs").glob("*.nii.gz"))[0]
    assert main(["predict", str(run), str(image), "--config", "2d", "--out", str(tmp_path / "out")]) == 0
    assert nib.load(tmp_path / "out" / image.name).shape == nib.load(image).shape


def test_a_single_case_can_be_trained_on_but_not_held_out(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(dataset, data)
    description = json.loads((data / "dataset.json").read_text())
    description |= {"training": description["training"][:1], "numTraining": 1}
    (data / "dataset.json").write_text(json.dumps(description))
    assert main(["plan", str(data), "--out", str(run), *SMALL]) == 0
    assert main(["train", str(run), "--epochs", "1"]) == 2
    assert "--fold all" in capsys.readouterr().err
    assert main(["train", str(run), "--epochs", "1", "--fold", "all"]) == 0
    assert (run / "models" / "3d_fullres" / "fold_all" / "weights.json").is_file()


def test_edited_folds_are_kept_when_planning_again(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["plan", str(dataset), "--out", str(run), *SMALL]) == 0
    splits = json.loads((run / "splits.json").read_text())
    moved = splits["folds"][0]["train"].pop()
    splits["folds"][0]["validation"].append(moved)
    (run / "splits.json").write_text(json.dumps(splits))
    assert main(["plan", str(dataset), "--out", str(run), *SMALL]) == 0
    assert moved in json.loads((run / "splits.json").read_text())["folds"][0]["validation"]


def test_a_folder_that_cannot_be_written_is_no_traceback(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["plan", str(dataset), "--out", str(tmp_path / "file" / "run"), *SMALL]) == 2
    assert "cannot be read or written" in capsys.readouterr().err
