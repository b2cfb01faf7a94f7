"""What `predict` writes beside label maps, through the whole of it: files, table, warnings, names that clash."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from toy_models import SCHEMA, toy_model, toy_volume

from autoseg.cli.app import main
from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.label_table import label_table
from autoseg.domain.outside import Outside
from autoseg.domain.trained_on import summarise
from autoseg.errors import ConfigError, DatasetError
from autoseg.evaluation.folders import evaluate_folder
from autoseg.inference.beside import beside, refuse_clashes
from autoseg.inference.gather import VoxelCounts, Wanted, parse_side_files
from autoseg.inference.predictor import Predictor
from autoseg.inference.statistics import CaseStatistics, ClassStatistics, class_statistics
from autoseg.inference.statistics_table import StatisticsTable, write_part, write_table
from autoseg.io.images import read_image, read_labels, write_image
from autoseg.io.label_names import read_comment, read_label_names
from autoseg.io.model import save_model
from autoseg.pipeline.prediction import predict
from autoseg.preprocessing.measure import measure_case, merge

EVERYTHING = Wanted(True, True, True, ("slicer", "itksnap", "bids"))


def write_model(folder: Path, *, seeds: tuple[int, ...] = (0,)) -> Path:
    """Models with a summary of images like `toy_volume`."""
    volume = toy_volume()
    labels = np.zeros(volume.geometry.shape, np.int16)
    labels[4:8, 4:8, 3:6] = 1
    measured = merge([measure_case(volume, labels, "a", 3)], ["MR"], 3)
    for seed in seeds:
        model = toy_model(seed)
        known = summarise(measured, model.card.settings.preprocess.normalization)
        card = model.card.model_copy(update={"trained_on": known, "fold": seed})
        save_model(folder / f"fold_{seed}", model.weights, card)
    return folder / f"fold_{seeds[0]}"


def write_images(folder: Path, names: tuple[str, ...], volume: Volume | None = None) -> list[Path]:
    volume = volume or toy_volume()
    paths = [folder / f"{name}.nii.gz" for name in names]
    for path in paths:
        write_image(path, volume.array[0], volume.geometry)
    return paths


def run(model: Path, inputs: list[Path], out: Path, wanted: Wanted) -> None:
    outcome = predict(model, inputs, out, device="cpu", precision="fp32", wanted=wanted)
    assert not outcome.failures


def test_everything_that_is_wanted_lies_beside_the_label_map(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    run(model, write_images(tmp_path / "in", ("a.b",)), out, EVERYTHING)
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == sorted(
        [
            "a.b.ctbl",
            "a.b.label.txt",
            "a.b.nii.gz",
            "a.b.seg.nrrd",
            "a.b_dseg.tsv",
            "a.b_probabilities.nii.gz",
            "a.b_uncertainty.nii.gz",
            "statistics",
            "statistics.csv",
            "statistics.json",
        ]
    )
    labels, geometry = read_labels(out / "a.b.nii.gz")
    assert read_label_names(out / "a.b.nii.gz") == label_table(SCHEMA)
    levels = read_image(out / "a.b_probabilities.nii.gz", channels=3)
    np.testing.assert_array_equal(levels.geometry.affine, geometry.affine)
    agrees = SCHEMA.decode_table()[levels.array.argmax(axis=0)] == labels
    assert agrees.mean() > 0.98  # levels of two classes may be equal
    comment = read_comment(out / "a.b_probabilities.nii.gz")
    assert comment["volumes"] == ["background", "low", "high"]
    assert read_comment(out / "a.b_uncertainty.nii.gz")["what"] == (
        "entropy of the mean probabilities of one model and of interleaved mirroring"
    )
    doubt = read_image(out / "a.b_uncertainty.nii.gz").array[0]
    assert 0 <= doubt.min() < doubt.max() <= 1
    segments = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "a.b.seg.nrrd"))).T
    assert np.array_equal(segments, labels)

    table = StatisticsTable.from_json((out / "statistics.json").read_text(), "x")
    (case,) = table.cases
    image = read_image(tmp_path / "in" / "a.b.nii.gz").array[0].astype(np.float64)
    for item, value in zip(case.classes, (7, 300), strict=True):
        inside = image[labels == value]
        assert item.voxels == inside.size
        assert item.volume_ml == pytest.approx(inside.size * 1.3 * 1.0 * 3.0 / 1000, rel=1e-5)
        assert item.volume_low_ml is not None
        assert item.volume_high_ml is not None
        assert item.volume_ml is not None
        assert item.volume_low_ml <= item.volume_ml <= item.volume_high_ml
        (found,) = item.intensities
        assert (found.channel, found.maximum) == ("MR", pytest.approx(inside.max()))
        assert (found.mean, found.median) == (pytest.approx(inside.mean()), pytest.approx(np.median(inside)))
        assert found.sd == pytest.approx(inside.std())
    rows = list(csv.DictReader((out / "statistics.csv").read_text().splitlines()))
    assert [(row["case"], row["class"], row["values"]) for row in rows] == [("a.b", "low", "7"), ("a.b", "high", "300")]
    assert float(rows[1]["MR median"]) == pytest.approx(case.classes[1].intensities[0].median)


def test_label_maps_are_the_same_with_and_without(tmp_path: Path) -> None:
    model, inputs = write_model(tmp_path / "model"), write_images(tmp_path / "in", ("a",))
    run(model, inputs, tmp_path / "plain", Wanted())
    run(model, inputs, tmp_path / "all", EVERYTHING)
    assert (tmp_path / "plain/a.nii.gz").read_bytes() == (tmp_path / "all/a.nii.gz").read_bytes()
    assert np.array_equal(
        read_labels(tmp_path / "plain/a.nii.gz")[0],
        Predictor([toy_model()], device="cpu", precision="fp32", tta="interleaved")(read_image(inputs[0])),
    )


def test_the_table_holds_all_cases_however_a_prediction_ends(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    inputs = write_images(tmp_path / "in", ("a", "b", "c"))
    whole = inputs[1].read_bytes()
    inputs[1].write_bytes(b"no image")
    wanted = Wanted(statistics=True)
    outcome = predict(model, inputs[:2], out, device="cpu", precision="fp32", wanted=wanted)
    assert len(outcome.failures) == 1

    def cases() -> list[str]:
        rows = csv.DictReader((out / "statistics.csv").read_text().splitlines())
        assert [case["case"] for case in json.loads((out / "statistics.json").read_text())["cases"]] == sorted(
            {row["case"] for row in rows}
        )
        return [case["case"] for case in json.loads((out / "statistics.json").read_text())["cases"]]

    assert cases() == ["a"]
    inputs[1].write_bytes(whole)
    (out / "statistics.csv").unlink()
    # Another start adds to it what is new, and keeps what was done before.
    run(model, inputs, out, wanted)
    assert cases() == ["a", "b", "c"]
    (out / "a.nii.gz").unlink()
    write_table(out)
    assert cases() == ["b", "c"]


def test_what_was_not_written_yet_is_written_when_it_is_wanted(tmp_path: Path) -> None:
    model, inputs, out = write_model(tmp_path / "model"), write_images(tmp_path / "in", ("a",)), tmp_path / "out"
    run(model, inputs, out, Wanted())
    run(model, inputs, out, Wanted(uncertainty=True))
    assert (out / "a_uncertainty.nii.gz").is_file()
    (item,) = StatisticsTable.from_json((out / "statistics.json").read_text(), "x").cases
    assert item.certainty == "the mean probabilities of one model and of interleaved mirroring"
    # Without --statistics there are volumes alone.
    assert item.classes[0].volume_expected_ml is not None
    assert (item.classes[0].pieces, item.classes[0].intensities) == (None, ())
    outcome = predict(model, inputs, out, device="cpu", precision="fp32", wanted=Wanted(uncertainty=True))
    assert [path.name for path in outcome.skipped] == ["a.nii.gz"]


def test_an_unusual_image_is_told_once_with_the_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, out = write_model(tmp_path / "model", seeds=(0,)), tmp_path / "out"
    usual = write_images(tmp_path / "in", ("usual",))
    odd = write_images(tmp_path / "in", ("odd",), toy_volume(spacing=(1.3, 1.0, 9.0)))
    with caplog.at_level(logging.WARNING, "autoseg"):
        run(model, [*usual, *odd], out, Wanted(statistics=True))
    (message,) = [record.getMessage() for record in caplog.records if "unlike" in record.getMessage()]
    assert message.startswith("odd: ")
    assert "9 mm long from foot to head, in training 3" in message
    table = StatisticsTable.from_json((out / "statistics.json").read_text(), "x")
    assert {case.case: [item.what for item in case.outside] for case in table.cases} == {
        "odd": ["spacing", "size"],
        "usual": [],
    }
    rows = list(csv.DictReader((out / "statistics.csv").read_text().splitlines()))
    assert {row["case"]: row["outside"] for row in rows} == {"odd": "size spacing", "usual": ""}


def test_scores_are_of_label_maps_and_not_of_what_lies_beside_them(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "out"
    inputs = write_images(tmp_path / "in", ("a", "b"))
    run(model, inputs, out, EVERYTHING)
    run(model, inputs, tmp_path / "reference", Wanted())
    found = evaluate_folder(out, tmp_path / "reference", schema=SCHEMA)
    assert sorted(case.case for case in found.cases) == ["a", "b"]


def test_names_that_clash_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    inputs = write_images(tmp_path / "in", ("a", "a_probabilities"))
    with pytest.raises(ConfigError, match="one name") as caught:
        predict(model, inputs, tmp_path / "out", device="cpu", wanted=Wanted(probabilities=True))
    assert caught.value.problems == ("a_probabilities.nii.gz, of a.nii.gz and of a_probabilities.nii.gz",)
    refuse_clashes(Wanted(uncertainty=True), [Path("a.nii.gz"), Path("a_probabilities.nii.gz")])
    # An image beside its label map is not overwritten either.
    with pytest.raises(ConfigError, match="overwrite"):
        predict(model, inputs[1:], tmp_path / "in", device="cpu", wanted=Wanted(probabilities=True))


def test_names_beside_a_label_map() -> None:
    assert beside(Path("out/x.nii.gz"), "_dseg.tsv").name == "x_dseg.tsv"
    assert beside(Path("out/sub-01_dseg.nii.gz"), "_dseg.tsv").name == "sub-01_dseg.tsv"
    assert beside(Path("out/x.y.mha"), ".seg.nrrd").name == "x.y.seg.nrrd"


def test_kinds_of_side_files_are_named_by_commas() -> None:
    assert parse_side_files("bids, slicer,bids") == ("slicer", "bids")
    assert parse_side_files("") == ()
    with pytest.raises(ConfigError, match="fsl") as caught:
        parse_side_files("slicer,fsl")
    assert "itksnap" in str(caught.value.hint)
    wanted = Wanted(True, False, True, ("slicer", "bids"))
    assert Wanted.of(("dicom_seg", *wanted.names)) == wanted


def test_the_command_line_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, (path,) = write_model(tmp_path / "model"), write_images(tmp_path / "in", ("a",))
    words = ["predict", str(model), str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, "--side-files", "slicr"]) == 2
    assert not (tmp_path / "out").exists()
    assert main([*words, "--side-files", "slicer", "--probabilities"]) == 0
    assert (tmp_path / "out/a.seg.nrrd").is_file()
    assert (tmp_path / "out/a_probabilities.nii.gz").is_file()
    assert "a.nii.gz" in capsys.readouterr().out


GRID = Geometry((6, 5, 4), np.diag([2.0, 3.0, 5.0, 1.0]))


def test_classes_are_counted_and_measured() -> None:
    labels = np.zeros(GRID.shape, np.uint8)
    labels[0:2, 1:3, 1:3] = 1  # reaches the first face
    labels[2, 3, 3] = 1  # touches it by a corner
    labels[4, 1, 1] = 2
    labels[4, 3, 1] = 2
    image = np.arange(labels.size, dtype=np.float32).reshape(1, *GRID.shape)
    schema = LabelSchema(
        classes=(
            LabelClass(name="a", values=(1,)),
            LabelClass(name="b", values=(2,)),
            LabelClass(name="c", values=(9,)),
        )
    )
    counts = [VoxelCounts(8.5, 7, 12), VoxelCounts(2.5, 3, 4), VoxelCounts(0.25, 0, 1)]
    first, second, absent = class_statistics(
        labels, GRID, schema, counts=counts, image=Volume(image, GRID), channels=["MR"]
    )
    assert (first.voxels, first.pieces, first.touches_border) == (9, 1, True)
    assert (second.voxels, second.pieces, second.touches_border) == (2, 2, False)
    assert (absent.voxels, absent.pieces, absent.touches_border, absent.intensities) == (0, 0, False, ())
    assert first.volume_ml == pytest.approx(9 * 0.03)
    assert (first.volume_low_ml, first.volume_high_ml) == (pytest.approx(0.21), pytest.approx(0.36))
    # The interval holds the volume itself, whatever the rules for afterwards have changed.
    assert (second.volume_low_ml, second.volume_high_ml) == (pytest.approx(0.06), pytest.approx(0.12))
    assert absent.volume_expected_ml == pytest.approx(0.0075)
    values = image[0][labels == 2]
    assert second.intensities[0].minimum == values.min()
    assert second.intensities[0].sd == pytest.approx(values.std())


def test_regions_are_measured_over_all_their_values_and_pictures_have_no_volume() -> None:
    picture = Geometry((6, 5, 1), np.eye(4), is_2d=True)
    labels = np.zeros(picture.shape, np.uint8)
    labels[1, 1, 0], labels[2, 1, 0], labels[4, 3, 0] = 1, 3, 3
    schema = LabelSchema(classes=(LabelClass(name="a", values=(1, 3)), LabelClass(name="b", values=(3,))))
    image = Volume(np.ones((1, *picture.shape), np.float32), picture)
    first, second = class_statistics(labels, picture, schema, image=image, channels=["MR"])
    assert (first.voxels, first.pieces, second.voxels, second.pieces) == (3, 2, 2, 2)
    assert first.volume_ml is None
    # The one slice of a picture is no border.
    assert first.touches_border is False


def test_a_channel_that_a_case_lacks_leaves_empty_cells(tmp_path: Path) -> None:
    def rows(case: str, channel: str) -> CaseStatistics:
        labels = np.ones(GRID.shape, np.uint8)
        schema = LabelSchema(classes=(LabelClass(name="a, b", values=(1,)),))
        missing = (1,) if channel == "T1" else (0,)
        image = Volume(np.ones((1, *GRID.shape)), GRID, missing)
        classes = class_statistics(labels, GRID, schema, image=image, channels=["T1", "T2"])
        found = (Outside(what="size", message="it is small", distance=4.0),)
        return CaseStatistics(case=case, label_map=f"{case}.nii", outside=found, classes=classes)

    for case, channel in (("x/1", "T1"), (".y", "T2")):
        write_part(tmp_path, rows(case, channel))
        (tmp_path / f"{case}.nii").parent.mkdir(exist_ok=True)
        (tmp_path / f"{case}.nii").touch()
    table = write_table(tmp_path)
    assert table is not None
    assert sorted(case.case for case in table.cases) == [".y", "x/1"]
    found = {row["case"]: row for row in csv.DictReader((tmp_path / "statistics.csv").read_text().splitlines())}
    assert found["x/1"]["class"] == "a, b"
    assert (found["x/1"]["T1 mean"], found["x/1"]["T2 mean"]) == ("1", "")
    assert (found[".y"]["T1 mean"], found[".y"]["T2 mean"]) == ("", "1")
    assert found[".y"]["touches_border"] == "1"
    (tmp_path / "statistics" / "broken.json").write_text("{")
    with pytest.raises(DatasetError, match=r"broken\.json"):
        write_table(tmp_path)


def test_a_folder_without_rows_has_no_table(tmp_path: Path) -> None:
    assert write_table(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert ClassStatistics(name="a", values=(1,), voxels=0).volume_ml is None
