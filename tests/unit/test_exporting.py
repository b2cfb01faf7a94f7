"""A model as one folder or zip: it predicts what its run does, holds all that it needs and nothing that can harm."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from toy_runs import toy_run, write_images

from autoseg.cli.app import main
from autoseg.domain.inference import FillHoles, InferenceRecipe, KeepLargest, Member
from autoseg.errors import ConfigError, ModelError
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.exporting import export_model, opened
from autoseg.pipeline.members import choose
from autoseg.pipeline.prediction import predict

RECIPE = InferenceRecipe(
    members=(
        Member(configuration="3d_cascade", weight=2.0, temperature=0.5),
        Member(configuration="2d", folds=(1,), temperature=0.3),
    ),
    postprocessing=(KeepLargest(classes=("low", "high"), joined=True), FillHoles(classes=("low",), max_ml=2)),
)
CASCADE = {"3d_cascade": (0, 1), "3d_lowres": (0, 1), "3d_fullres": (0,), "2d": (0, 1)}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = toy_run(tmp_path / "run", CASCADE, has_cascade=True)
    made.write(made.inference_file, RECIPE)
    return made


def predicted(model: Path, images: list[Path], out: Path) -> list[bytes]:
    outcome = predict(model, images, out, device="cpu", precision="fp32")
    outcome.raise_failures()
    return [path.read_bytes() for path in outcome.written]


def test_folder_and_zip_predict_what_the_run_does_when_it_is_gone(run: RunFolder, tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 1)
    expected = predicted(run.root, images, tmp_path / "by_run")
    folder = export_model(run.root, tmp_path / "somewhere" / "model")
    archive = export_model(folder, tmp_path / "model.zip")
    digest = choose(run.root).digest()
    shutil.rmtree(run.root)
    assert predicted(folder, images, tmp_path / "by_folder") == expected
    shutil.rmtree(folder)
    assert predicted(archive, images, tmp_path / "by_zip") == expected
    with opened(archive) as inside:
        assert choose(inside).digest() == digest
    assert not inside.exists()


def test_every_member_and_the_stage_before_it_are_there_and_nothing_else(run: RunFolder, tmp_path: Path) -> None:
    folder = export_model(run.root, tmp_path / "model")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    folds = ["2d/fold_1", "3d_cascade/fold_0", "3d_cascade/fold_1", "3d_lowres/fold_0", "3d_lowres/fold_1"]
    weights = [f"models/{fold}/weights.{ending}" for fold in folds for ending in ("json", "safetensors")]
    assert files == ["README.md", "inference.json", *weights]
    recipe = RunFolder(folder).read_inference()
    assert recipe is not None
    # What stood for every finished fold is named now.
    assert [member.folds for member in recipe.members] == [(0, 1), (1,)]
    assert recipe.postprocessing == RECIPE.postprocessing


def test_a_run_without_inference_json_and_a_single_fold_can_be_exported(run: RunFolder, tmp_path: Path) -> None:
    run.inference_file.unlink()
    default = export_model(run.root, tmp_path / "default")
    named = export_model(run.root, tmp_path / "named", "2d", "0")
    alone = export_model(run.fold_folder("3d_fullres", 0), tmp_path / "alone")
    found = [
        [(member.member.configuration, member.member.folds) for member in choose(folder).members]
        for folder in (default, named, alone)
    ]
    assert found == [[("3d_fullres", (0,))], [("2d", (0,))], [("3d_fullres", (0,))]]


def test_the_card_says_what_it_is(run: RunFolder, tmp_path: Path) -> None:
    card = (export_model(run.root, tmp_path / "model") / "README.md").read_text()
    for text in (
        "# toy: low, high in MR",
        "| 0 | MR | no |",
        "| low | 7 |",
        "| 3d_cascade | 0, 1 | 2 | 0.5 | 8 × 8 × 8 | 2 × 1.5 × 1 | 3d_lowres |",
        "1. Keep the largest component of low and high together (neighbours: corners).",
        "2. Fill holes up to 2 ml in low (neighbours: faces).",
        "No scores are beside these weights.",
        "Not stated.",
    ):
        assert text in card


def test_nothing_is_overwritten_and_damaged_weights_are_not_passed_on(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        export_model(run.root, tmp_path / "there")
    weights = run.fold_folder("2d", 1) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="do not match") as broken:
        export_model(run.root, tmp_path / "model.zip")
    assert "fold_1" in broken.value.problems[0]
    assert not (tmp_path / "model.zip").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_zipped_folder_is_a_model_too_and_other_archives_are_refused(run: RunFolder, tmp_path: Path) -> None:
    folder = export_model(run.root, tmp_path / "exported" / "model")
    (folder / "notes.txt").write_text("not needed")
    archive = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", folder.parent))
    with opened(archive) as inside:
        assert choose(inside).digest() == choose(folder).digest()
        assert not (inside / "notes.txt").exists()
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as packed:
        packed.writestr("plans.json", "{}")
    evil = tmp_path / "evil.zip"
    shutil.copy(archive, evil)
    with zipfile.ZipFile(evil, "a") as packed:
        packed.writestr("../inference.json", "{}")
    text = tmp_path / "text.zip"
    text.write_text("no archive")
    for path, message in ((other, "holds no model"), (evil, "is refused"), (text, "neither a folder nor")):
        with pytest.raises(ModelError, match=message), opened(path):
            pass
    assert not (tmp_path / "inference.json").exists()


def test_the_command_writes_and_predict_takes_it(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "model.zip"
    assert main(["export", str(run.root), "--out", str(archive), "--config", "3d_fullres"]) == 0
    assert capsys.readouterr().out == f"{archive}\n"
    (image,) = write_images(tmp_path / "in", 1)
    assert main(["predict", str(archive), str(image), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / image.name}\n"
    assert main(["info", str(archive), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["classes"], list(facts["configurations"])) == (["low", "high"], ["3d_fullres"])
    assert main(["info", str(archive)]) == 0
    assert main(["export", str(run.root), "--out", str(archive)]) == 2
    assert main(["export", str(run.root), "--out", str(archive), "--format", "onyx"]) == 2
