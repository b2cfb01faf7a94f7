"""The whole line with label values that have gaps, left/right pairs, and cases that lack a channel."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_network import SMALL_NETWORK

from autoseg.cli.app import main
from autoseg.domain.geometry import Geometry
from autoseg.domain.plan import Plan
from autoseg.io.images import read_labels, write_image
from autoseg.io.model import load_model
from autoseg.io.run_folder import RunFolder

SHAPE = (20, 16, 18)
LEFT, RIGHT, MIDDLE = 40, 7, 22
SMALL = {
    **SMALL_NETWORK,
    "network.features_per_stage": [4, 6],
    "training.steps_per_epoch": 4,
    "training.validation_steps_per_epoch": 1,
}


def bodies(number: int) -> NDArray[np.float32]:
    """A ball on either side and a bar between them, as float labels with gaps; the first axis runs to the left."""
    labels = np.zeros(SHAPE, np.float32)
    labels[2:7, 4:9, 4 + number % 3 : 10] = RIGHT
    labels[13:18, 4:9, 4 + number % 3 : 10] = LEFT
    labels[9:11, 3:12, 5:12] = MIDDLE
    return labels


def settings(values: dict[str, Any], prefix: str = "3d_fullres.") -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{prefix}{key}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five cases with two channels, of which the first case lacks the second; trained for four steps."""
    folder = tmp_path_factory.mktemp("line")
    rng = np.random.default_rng(0)
    geometry = Geometry(SHAPE, np.diag([-1.0, 1, 1, 1]))
    cases = []
    for number in range(5):
        labels = bodies(number)
        write_image(folder / f"l{number}.nii.gz", labels, geometry)
        images: list[str | None] = []
        for channel in range(2):
            image = (labels > 0) * (2.0 - channel) + rng.normal(0, 0.2, SHAPE) + 3
            write_image(folder / f"c{number}_{channel:04d}.nii.gz", image.astype(np.float32), geometry)
            images.append(f"c{number}_{channel:04d}.nii.gz")
        images[1] = None if number == 0 else images[1]
        cases.append({"id": f"c{number}", "images": images, "labels": f"l{number}.nii.gz"})
    names = {"kidney_R": RIGHT, "cord": MIDDLE, "kidney_L": LEFT}
    manifest = {"channels": ["MR", "PET"], "labels": [{"name": n, "value": v} for n, v in names.items()]}
    (folder / "set.json").write_text(json.dumps(manifest | {"cases": cases}))
    run = folder / "run"
    words = settings(SMALL) + settings({"sides.mirror_pairs": "swap"})
    assert main(["check", str(folder / "set.json")]) == 0
    assert main(["plan", str(folder / "set.json"), "--out", str(run), *words]) == 0
    fold = next(
        str(number) for number, fold in enumerate(RunFolder(run).read_splits().folds) if "c0" in fold.validation
    )
    train = ["train", str(run), "--fold", fold, "--epochs", "1", "--device", "cpu", "--precision", "fp32"]
    assert main(train) == 0
    return folder


def predict(folder: Path, out: str, *names: str, options: tuple[str, ...] = ()) -> int:
    words = ["predict", str(folder / "run"), *(str(folder / name) for name in names), "--out", str(folder / out)]
    return main([*words, "--device", "cpu", "--precision", "fp32", *options])


def label_map(path: Path) -> NDArray[Any]:
    return read_labels(path)[0]


def test_what_was_planned_travels_with_the_weights(trained: Path) -> None:
    (folder,) = (trained / "run/models/3d_fullres").iterdir()
    card = load_model(folder).card
    sides = card.settings.sides
    assert sides is not None
    assert (sides.axis, sides.mirror_pairs, sides.labels) == (2, "swap", (0, 3, 2, 1))
    assert card.plan.channels[1].may_be_missing
    assert card.settings.training.augmentation.channel_dropout == (0.0, 0.2)
    # The validation case lacks its channel, and its map has the values of the files.
    assert set(np.unique(label_map(folder / "validation/c0.nii.gz"))) <= {0, LEFT, RIGHT, MIDDLE}


def test_a_case_that_lacks_the_channel_is_segmented_as_in_validation(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(trained, "lacking", "c0_0000.nii.gz") == 0
    assert "c0: segmented without the channel 1 (PET)" in " ".join(capsys.readouterr().err.split())
    (validated,) = (trained / "run/models/3d_fullres").glob("*/validation/c0.nii.gz")
    np.testing.assert_array_equal(label_map(trained / "lacking/c0.nii.gz"), label_map(validated))
    # The channel was left in the folder: with it the case is another one.
    assert predict(trained, "whole", "c0_0000.nii.gz", "c0_0001.nii.gz", options=("--tta", "full")) == 0
    assert "segmented without" not in capsys.readouterr().err
    assert set(np.unique(label_map(trained / "whole/c0.nii.gz"))) <= {0, LEFT, RIGHT, MIDDLE}


def test_the_channel_that_every_case_has_is_needed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(trained / "c1_0001.nii.gz", trained / "x_0001.nii.gz")
    assert predict(trained, "none", "c1_0000.nii.gz", "c1_0001.nii.gz", "x_0001.nii.gz") == 2
    assert "inputs do not make cases for a model with 2 channels" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.slow
def test_mouse_brain_trains_unrepaired_and_keeps_its_label_values(data_folder: Path, tmp_path: Path) -> None:
    words = settings(SMALL) + settings({"sides.mirror_pairs": "swap"})
    assert main(["plan", str(data_folder / "mouse_brain"), "--out", str(tmp_path / "run"), *words]) == 0
    run = RunFolder(tmp_path / "run")
    plan: Plan = run.read_plan()
    assert len(plan.labels.sided_pairs) == 17
    assert main(["train", str(tmp_path / "run"), "--fold", "0", "--epochs", "1", "--device", "cpu"]) == 0
    maps = list((run.fold_folder("3d_fullres", 0) / "validation").glob("*.nii.gz"))
    assert maps
    for path in maps:
        found = set(np.unique(label_map(path)))
        assert found <= set(range(41)) - {22, 30, 37}
        assert max(found) > 20


@pytest.mark.data
@pytest.mark.slow
def test_sarcoma_without_pet_in_a_third_of_the_cases(data_folder: Path, tmp_path: Path) -> None:
    source, target = data_folder / "sarcoma", tmp_path / "sarcoma"
    (target / "imagesTr").mkdir(parents=True)
    os.symlink(source / "labelsTr", target / "labelsTr")
    ids = sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").glob("*.nii.gz"))
    lacking = ids[::3]
    for path in (source / "imagesTr").glob("*.nii.gz"):
        if not (path.name[:-12] in lacking and path.name.endswith("_0002.nii.gz")):
            os.symlink(path, target / "imagesTr" / path.name)
    description = json.loads((source / "dataset.json").read_text())
    description["missing_channels"] = {case_id: [2] for case_id in lacking}
    (target / "dataset.json").write_text(json.dumps(description))
    run = tmp_path / "run"
    assert main(["check", str(target)]) == 0
    assert main(["plan", str(target), "--out", str(run), *settings(SMALL)]) == 0
    assert main(["train", str(run), "--fold", "0", "--epochs", "1", "--device", "cpu"]) == 0
    for count in (3, 2):
        files = [str(source / f"imagesTr/{ids[1]}_{number:04d}.nii.gz") for number in range(count)]
        assert main(["predict", str(run), *files, "--out", str(tmp_path / f"out{count}"), "--device", "cpu"]) == 0
        assert label_map(tmp_path / f"out{count}/{ids[1]}.nii.gz").any()
