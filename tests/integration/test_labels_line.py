"""The whole line with labels that are not one value a class: crossing regions, ignored voxels, hidden classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from small_network import SMALL_NETWORK

from autoseg.cli.app import main
from autoseg.domain.dataset import Fold, Splits
from autoseg.domain.geometry import Geometry
from autoseg.domain.plan import Plan
from autoseg.io.images import read_labels, write_image, write_labels
from autoseg.io.model import load_model
from autoseg.io.run_folder import RunFolder
from autoseg.io.store import CaseStore
from autoseg.training.records import read_metrics

SHAPE = (20, 18, 22)
IGNORE = 255
NUM_CASES = 6
SMALL = {
    **SMALL_NETWORK,
    "network.features_per_stage": [6, 8],
    "training.steps_per_epoch": 20,
    "training.validation_steps_per_epoch": 2,
    "training.momentum": 0.9,
    "training.learning_rate": 0.05,
    # Brightness tells the classes apart here, and nothing else has to be learnt.
    **{f"training.augmentation.{what}_probability": 0 for what in ("rotation", "scaling", "gamma", "gamma_inverted")},
    **{f"training.augmentation.{what}_probability": 0 for what in ("contrast", "brightness", "low_resolution", "blur")},
}


def balls(number: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Two balls that cross, the second one smaller."""
    rng = np.random.default_rng(number)
    grid = np.moveaxis(np.indices(SHAPE), 0, -1)
    centre = rng.uniform(7, np.asarray(SHAPE) - 8)
    first, second = (((grid - centre - shift) ** 2).sum(-1) < radius**2 for shift, radius in ((0, 6), (3, 4.5)))
    return first, second


def write_case(folder: Path, number: int, image: NDArray[Any], labels: NDArray[Any]) -> dict[str, Any]:
    geometry = Geometry(SHAPE, np.eye(4))
    noise = np.random.default_rng(100 + number).normal(0, 0.15, SHAPE)
    write_image(folder / f"i{number}.nii.gz", (image + noise + 5).astype(np.float32), geometry)
    write_labels(folder / f"l{number}.nii.gz", labels.astype(np.uint8), geometry)
    return {"id": f"c{number}", "image": f"i{number}.nii.gz", "labels": f"l{number}.nii.gz"}


def train(folder: Path, manifest: dict[str, Any], epochs: int) -> RunFolder:
    """Check, plan and train fold 0 of a manifest."""
    (folder / "set.json").write_text(json.dumps({"channels": ["MR"], **manifest}))
    settings = [word for key, value in SMALL.items() for word in ("--set", f"3d_fullres.{key}={json.dumps(value)}")]
    assert main(["check", str(folder / "set.json")]) == 0
    assert main(["plan", str(folder / "set.json"), "--out", str(folder / "run"), *settings]) == 0
    words = ["train", str(folder / "run"), "--fold", "0", "--epochs", str(epochs), "--device", "cpu"]
    words += ["--precision", "fp32"]
    assert main(words) == 0
    return RunFolder(folder / "run")


def evaluation_of(run: RunFolder) -> dict[str, Any]:
    path = run.fold_folder("3d_fullres", 0) / "validation" / "summary.json"
    return dict(json.loads(path.read_text())["evaluation"])


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two regions that cross (value 3 is both), and in every other case a third of the image that nobody annotated."""
    folder = tmp_path_factory.mktemp("regions")
    cases = []
    for number in range(NUM_CASES):
        first, second = balls(number)
        labels = first + 2 * second
        image = 1.0 * first + 2.0 * second
        if number % 2:
            labels = np.where(np.arange(SHAPE[2]) > 14, IGNORE, labels)
        cases.append(write_case(folder, number, image, labels))
    labels_entry = [{"name": "organ", "values": [1, 3]}, {"name": "vessel", "values": [2, 3]}]
    return train(folder, {"labels": labels_entry, "ignore": IGNORE, "cases": cases}, epochs=2)


def test_crossing_regions_are_learnt_and_written(regions: RunFolder) -> None:
    part = regions.read_plan().configurations["3d_fullres"]
    assert (part.network.output, part.network.num_classes) == ("regions", 2)
    summary = evaluation_of(regions)["summary"]
    assert [item["name"] for item in summary["classes"]] == ["organ", "vessel"]
    assert summary["mean_foreground_dice"] > 0.8
    maps = list((regions.fold_folder("3d_fullres", 0) / "validation").glob("*.nii.gz"))
    values = {int(value) for path in maps for value in np.unique(read_labels(path, None)[0])}
    assert values == {0, 1, 2, 3}, "the overlap has its value, and nobody predicts what is to be ignored"


def test_measurements_and_cache_know_regions_and_ignored_voxels(regions: RunFolder) -> None:
    stats = {item.case: item for item in regions.read_fingerprint().cases}
    (cache,) = (regions.root / "cache").iterdir()
    for number in range(NUM_CASES):
        first, second = balls(number)
        seen = (np.arange(SHAPE[2]) <= 14) | (number % 2 == 0)
        expected = ((first & seen).sum(), (second & seen).sum())
        assert stats[f"c{number}"].class_voxels == expected
        assert stats[f"c{number}"].intensities[0].count == ((first | second) & seen).sum()
        foreground = CaseStore(cache).open(f"c{number}").foreground
        assert tuple(len(foreground[index]) for index in (1, 2)) == expected
        assert (0 in foreground) == bool(number % 2)


def test_what_is_looked_at_and_reported_are_the_regions(regions: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    fold = regions.fold_folder("3d_fullres", 0)
    last = read_metrics(fold)[-1]
    assert len(last.pseudo_dice) == 2
    assert last.mean_pseudo_dice is not None
    assert last.mean_pseudo_dice > 0.8
    card = load_model(fold).card
    assert card.plan.labels.has_regions
    assert card.trained_on is not None
    assert card.trained_on.num_cases == NUM_CASES
    assert card.trained_on.extent_mm[0].high == SHAPE[2]
    capsys.readouterr()
    assert main(["info", str(fold), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == ["organ", "vessel"]
    assert main(["report", str(regions.root)]) == 0
    assert "vessel" in (regions.root / "report" / "index.html").read_text()


def test_a_folder_of_label_maps_is_scored_by_regions(regions: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    maps = regions.fold_folder("3d_fullres", 0) / "validation"
    capsys.readouterr()
    assert main(["evaluate", str(maps), str(regions.root.parent / "set.json"), "--json"]) == 0
    # The labels have other names than the cases, so the manifest pairs them by case id.
    assert json.loads(capsys.readouterr().out)["summary"] == evaluation_of(regions)["summary"]


def test_a_cascade_of_regions_sees_the_label_values_of_its_previous_stage(regions: RunFolder, tmp_path: Path) -> None:
    """Two folds of each stage, trained as little as possible; the lines from labels to label map must fit."""
    run, dataset, plan = RunFolder(tmp_path / "run"), regions.read_dataset(), regions.read_plan()
    part = plan.configurations["3d_fullres"].model_dump()
    part["training"] |= {"steps_per_epoch": 1, "validation_steps_per_epoch": 1}
    cascade = part | {"previous_stage": "3d_lowres", "network": part["network"] | {"in_channels": 1 + 3}}
    parts = {"3d_fullres": part, "3d_lowres": part, "3d_cascade": cascade}
    ids = tuple(case.id for case in dataset.cases)
    folds = (Fold(train=ids[::2], validation=ids[1::2]), Fold(train=ids[1::2], validation=ids[::2]))
    run.write(run.dataset_file, dataset)
    run.write(run.fingerprint_file, regions.read_fingerprint())
    run.write(run.plan_file, Plan.model_validate(plan.model_dump() | {"configurations": parts}))
    run.write(run.splits_file, Splits(rule="by hand", folds=folds))
    short = ["--epochs", "1", "--device", "cpu", "--precision", "fp32"]
    assert main(["train", str(run.root), "--config", "3d_lowres", *short]) == 0
    assert main(["train", str(run.root), "--config", "3d_cascade", "--fold", "0", *short]) == 0
    assert (
        main(
            [
                "predict",
                str(run.root),
                dataset.cases[0].images[0],
                "--config",
                "3d_cascade",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert set(np.unique(read_labels(tmp_path / "out" / "i0.nii.gz", None)[0])) <= {0, 1, 2, 3}
    wrong = parts | {"3d_cascade": cascade | {"network": part["network"] | {"in_channels": 1 + 2}}}
    with pytest.raises(ValidationError, match="takes 2 channels of its previous stage, the labels need 3"):
        Plan.model_validate(plan.model_dump() | {"configurations": wrong})


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two classes side by side; in half of the cases the second one is not annotated, and labelled as background."""
    folder = tmp_path_factory.mktemp("partial")
    cases = []
    for number in range(NUM_CASES):
        first, second = balls(number)
        hidden = number % 2 == 1
        labels = np.where(second & ~first, 0 if hidden else 2, first)
        case = write_case(folder, number, 1.0 * first + 2.0 * (second & ~first), labels)
        cases.append(case | ({"annotated": ["first"]} if hidden else {}))
    labels_entry = [{"name": "first", "value": 1}, {"name": "second", "value": 2}]
    return train(folder, {"labels": labels_entry, "cases": cases}, epochs=5)


def test_a_class_hidden_in_half_of_the_cases_is_learnt(partial: RunFolder) -> None:
    run, dataset = partial, partial.read_dataset()
    assert [case.annotated for case in dataset.cases] == [None, ("first",)] * 3
    (fold, *_) = run.read_splits().folds
    hidden = [case_id for case_id in fold.validation if dataset.case(case_id).annotated is not None]
    out = run.root.parent / "out"
    images = [dataset.case(case.id).images[0] for case in dataset.cases]
    assert main(["predict", str(run.root), *images, "--out", str(out), "--device", "cpu"]) == 0
    for number in range(NUM_CASES):
        first, second = balls(number)
        found = read_labels(out / f"i{number}.nii.gz", None)[0] == 2
        wanted = second & ~first
        assert 2 * (found & wanted).sum() / (found.sum() + wanted.sum()) > 0.6, "also where it was hidden"
    counts = {item["name"]: item for item in evaluation_of(run)["summary"]["classes"]}
    assert counts["second"]["num_unannotated"] == len(hidden)
    assert counts["first"]["num_unannotated"] == 0
    assert counts["second"]["num_spurious"] == 0, "what was found there is no false alarm"


def test_folds_and_classes_of_partial_cases(partial: RunFolder) -> None:
    """A class that was not annotated counts as absent where folds are stratified."""
    stats = {item.case: item.class_voxels for item in partial.read_fingerprint().cases}
    assert [stats[f"c{number}"][1] > 0 for number in range(NUM_CASES)] == [True, False] * 3
    splits = partial.read_splits()
    assert "stratified" in splits.rule


def test_a_fold_is_not_continued_with_other_annotations(
    partial: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = partial.dataset_file.read_text()
    data = json.loads(text)
    for case in data["cases"]:
        case["annotated"] = None
    try:
        partial.dataset_file.write_text(json.dumps(data))
        assert main(["train", str(partial.root), "--fold", "0", "--epochs", "6", "--device", "cpu"]) == 2
    finally:
        partial.dataset_file.write_text(text)
    assert "have changed" in capsys.readouterr().err
