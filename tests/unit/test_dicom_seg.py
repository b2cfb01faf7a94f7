"""DICOM in predictions: which series are which case, and segmentations that lie on their series voxel by voxel."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
import pytest
from dicom_series import STRAIGHT, rotation, stored_numbers, uid, write_enhanced, write_series
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import FileDataset
from toy_training import toy_plan
from typer.testing import CliRunner

from autoseg.checking.doctor import check_dataset
from autoseg.cli.app import app
from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.layouts import load_dataset
from autoseg.errors import ConfigError, DatasetError
from autoseg.inference.inputs import find_cases, output_ending
from autoseg.io import dicom_seg
from autoseg.io.dicom_seg import Algorithm, segmentation_path, write_segmentation
from autoseg.io.images import read_case, read_header, write_labels
from autoseg.io.model import ModelCard, save_model
from autoseg.network.unet import build
from autoseg.runtime import NoProgress

SCHEMA = LabelSchema(
    classes=(LabelClass(name="liver", values=(3,)), LabelClass(name="Nierenstein\\größer", values=(300,)))
)
ALGORITHM = Algorithm("autoseg", "1.2.3", {"model": "0123abcd", "plan": "feed"})


def label_map(shape: Sequence[int] = (7, 6, 5)) -> NDArray[np.uint16]:
    labels = np.zeros(shape, np.uint16)
    labels[1:5, 2:4, 1:4] = 3
    labels[4:6, 3:5, 3] = 300
    return labels


def segments_by_world(path: Path, affine: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.bool_]:
    """Segments (n, I, J, K) put onto a grid by what the object itself says of each frame's place, by pydicom alone."""
    dataset = dcmread(path)
    frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    out = np.zeros((len(dataset.SegmentSequence), *shape), bool)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    row, column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    down, across = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        origin = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        y, x = np.nonzero(frame)
        points = origin + np.outer(x * across, row) + np.outer(y * down, column)
        ras = np.c_[points * [-1, -1, 1], np.ones(len(x))]
        voxels = (np.linalg.inv(affine) @ ras.T)[:3]
        assert np.abs(voxels - np.rint(voxels)).max(initial=0) < 1e-3
        out[(number - 1, *np.rint(voxels).astype(int))] = True
    return out


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_segmentation_lies_on_its_series_voxel_by_voxel(tmp_path: Path, seed: int | None) -> None:
    axes = STRAIGHT if seed is None else rotation(seed)
    files = write_series(tmp_path / "ct", stored_numbers(), axes)
    labels, geometry = label_map(), read_header(tmp_path / "ct").geometry
    write_segmentation(tmp_path / "x.seg.dcm", labels, tmp_path / "ct", SCHEMA, ALGORITHM)
    found = segments_by_world(tmp_path / "x.seg.dcm", geometry.affine, labels.shape)
    np.testing.assert_array_equal(found[0], labels == 3)
    np.testing.assert_array_equal(found[1], labels == 300)

    dataset = highdicom.seg.segread(tmp_path / "x.seg.dcm")
    assert dataset.SegmentationType == "BINARY"
    assert [item.SegmentLabel for item in dataset.SegmentSequence] == ["liver", "Nierenstein/größer"]
    first = dataset.SegmentSequence[0]
    assert "label value 3 of" in first.SegmentDescription
    assert first.SegmentedPropertyTypeCodeSequence[0].CodeValue == "91723000"
    algorithm = first.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("autoseg", "1.2.3")
    assert algorithm.AlgorithmParameters == "model=0123abcd,plan=feed"
    source = dcmread(files[0])
    assert dataset.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert dataset.StudyInstanceUID == source.StudyInstanceUID
    assert str(dataset.PatientName) == "Doe^Jane"
    assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
    (reference,) = dataset.ReferencedSeriesSequence
    assert reference.SeriesInstanceUID == source.SeriesInstanceUID
    instances = {item.ReferencedSOPInstanceUID for item in reference.ReferencedInstanceSequence}
    assert instances == {dcmread(file).SOPInstanceUID for file in files}
    # Each frame names the very slice it was drawn on.
    for group in dataset.PerFrameFunctionalGroupsSequence:
        position = group.PlanePositionSequence[0].ImagePositionPatient
        image = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        slice_ = next(item for item in map(dcmread, files) if image == item.SOPInstanceUID)
        np.testing.assert_allclose(np.array(position, float), np.array(slice_.ImagePositionPatient, float))


def test_overlapping_classes_are_overlapping_segments(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", stored_numbers())
    schema = LabelSchema(classes=(LabelClass(name="whole", values=(3, 300)), LabelClass(name="core", values=(300,))))
    labels = label_map()
    write_segmentation(tmp_path / "x.dcm", labels, tmp_path / "ct", schema, ALGORITHM)
    found = segments_by_world(tmp_path / "x.dcm", read_header(tmp_path / "ct").geometry.affine, labels.shape)
    np.testing.assert_array_equal(found[0], labels > 0)
    np.testing.assert_array_equal(found[1], labels == 300)


def test_nothing_found_is_a_segmentation_too(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", stored_numbers())
    write_segmentation(tmp_path / "x.dcm", np.zeros((7, 6, 5), np.uint8), tmp_path / "ct", SCHEMA, ALGORITHM)
    dataset = dcmread(tmp_path / "x.dcm")
    assert len(dataset.SegmentSequence) == 2
    assert not dataset.pixel_array.any()


def test_enhanced_sources_keep_the_order_of_their_frames(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "ct" / "x.dcm", stored_numbers(), [3, 0, 4, 1, 2])
    labels = label_map()
    write_segmentation(tmp_path / "x.dcm", labels, tmp_path / "ct", SCHEMA, ALGORITHM)
    found = segments_by_world(tmp_path / "x.dcm", read_header(tmp_path / "ct").geometry.affine, labels.shape)
    np.testing.assert_array_equal(found[0], labels == 3)
    np.testing.assert_array_equal(found[1], labels == 300)


def test_a_series_that_nobody_can_refer_to_is_refused(tmp_path: Path) -> None:
    def anonymous(out: FileDataset, _: int) -> None:
        out.SeriesInstanceUID = ""
        del out.StudyInstanceUID

    write_series(tmp_path / "ct", stored_numbers(), change=anonymous)
    with pytest.raises(DatasetError, match="because it lacks StudyInstanceUID, SeriesInstanceUID"):
        write_segmentation(tmp_path / "x.dcm", label_map(), tmp_path / "ct", SCHEMA, ALGORITHM)
    with pytest.raises(DatasetError, match="does not fit"):
        write_segmentation(tmp_path / "x.dcm", label_map((7, 6, 4)), tmp_path / "ct", SCHEMA, ALGORITHM)
    assert [item.name for item in tmp_path.iterdir()] == ["ct"]


def test_without_highdicom_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_seg, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="highdicom, which is not installed") as caught:
        dicom_seg.require_highdicom()
    assert "pip install 'autoseg-unet[dicom]'" in caught.value.hint
    result = CliRunner().invoke(app, ["predict", "run", str(tmp_path), "--out", str(tmp_path / "o"), "--dicom-seg"])
    assert isinstance(result.exception, ConfigError)


# --- Which series are which case ------------------------------------------------------------------------------------


def named(inputs: list[Path], channels: int = 1) -> dict[str, list[Path]]:
    return {case.id: [Path(file) for file in case.images] for case in find_cases(inputs, channels)}


def test_folders_and_files_stand_for_series(tmp_path: Path) -> None:
    array = stored_numbers()
    files = write_series(tmp_path / "alone", array)
    assert named([tmp_path / "alone"]) == {"alone": [tmp_path / "alone"]}
    assert named([files[1]]) == named(files) == {"alone": [min(files)]}
    (case,) = find_cases([files[1]], 1)
    assert output_ending(case) == ".nii.gz"
    write_series(tmp_path / "study" / "1" / "T2", array, series="T2")
    write_series(tmp_path / "study" / "2", array, series="CT: thin / lung")
    assert named([tmp_path / "study"]) == {
        "1_T2": [tmp_path / "study" / "1" / "T2"],
        "2": [tmp_path / "study" / "2"],
    }


def test_series_that_share_a_folder_are_named_by_their_description(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    array = stored_numbers()
    first = write_series(tmp_path, array, series="CT: thin / lung", prefix="a")
    again = write_series(tmp_path, array, series="CT thin / lung", prefix="b")
    both = [
        write_series(
            tmp_path, array, series="DWI", prefix=f"d{b}", change=lambda out, _, b=b: setattr(out, "DiffusionBValue", b)
        )
        for b in (0.0, 800.0)
    ]
    with caplog.at_level(logging.WARNING, "autoseg"):
        found = named([tmp_path])
    assert sorted(found) == ["CT_thin_lung", "CT_thin_lung_2"]
    assert {file.name[0] for (file,) in found.values()} == {first[0].name[0], again[0].name[0]}
    assert "left out the series 'DWI' of 2 volumes: b = 0 (5 slices" in caplog.text
    assert named([both[1][0]]) == {"DWI_b_800": [min(both[1])]}
    assert named([*both[1], *both[0]]) == {"DWI_b_0": [min(both[0])], "DWI_b_800": [min(both[1])]}


def test_a_file_with_several_volumes_stands_for_none_of_them(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "both" / "x.dcm", stored_numbers(), range(5), echoes=(10.0, 30.0))
    for path in (tmp_path / "both", tmp_path / "both" / "x.dcm"):
        (case,) = find_cases([path], 1)
        assert case.id == "both"
        with pytest.raises(DatasetError, match="it holds 2 volumes"):
            read_case(case, 1)


def test_channels_are_series_in_the_order_given_or_by_number(tmp_path: Path) -> None:
    first, second = stored_numbers(seed=1), stored_numbers(seed=2)
    write_series(tmp_path / "s" / "T2", second, series="T2")
    write_series(tmp_path / "s" / "T1", first, series="T1")
    (case,) = find_cases([tmp_path / "s" / "T2", tmp_path / "s" / "T1"], 2)
    assert case.id == "T2"
    np.testing.assert_array_equal(read_case(case, 2).array, np.stack([second, first]))
    with pytest.raises(ConfigError) as caught:
        find_cases([tmp_path / "s"], 2)
    assert "nothing says which of them is which channel" in caught.value.problems[0]
    write_series(tmp_path / "n" / "p1_0001", second, series="T2")
    write_series(tmp_path / "n" / "p1_0000", first, series="T1")
    (case,) = find_cases([tmp_path / "n"], 2)
    assert case.id == "p1"
    np.testing.assert_array_equal(read_case(case, 2).array, np.stack([first, second]))


# --- From end to end ------------------------------------------------------------------------------------------------


def write_toy_model(folder: Path) -> Path:
    plan = toy_plan()
    weights = build(plan.configurations["3d_fullres"].network, seed=0).state_dict()
    save_model(folder, weights, ModelCard(plan=plan, configuration="3d_fullres", fold=0, digest=plan.digest()))
    return folder


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_predict_takes_a_series_and_writes_nifti_and_segmentation(tmp_path: Path) -> None:
    model = write_toy_model(tmp_path / "model")
    write_series(tmp_path / "head", stored_numbers((16, 18, 12)), rotation(4))
    broken = write_series(tmp_path / "broken", stored_numbers((16, 18, 12)))
    broken[4].unlink()
    out = tmp_path / "out"
    result = run("predict", model, tmp_path / "head", tmp_path / "broken", "--out", out, "--dicom-seg", "--device=cpu")
    assert result.exit_code != 0
    assert isinstance(result.exception, DatasetError)
    assert "1 slice is missing" in result.exception.problems[0]
    assert result.stdout.split() == [str(out / "head.nii.gz"), str(out / "head.seg.dcm")]
    assert sorted(item.name for item in out.iterdir()) == [".autoseg", "head.nii.gz", "head.seg.dcm"]
    image = nib.load(out / "head.nii.gz")
    labels = np.asarray(image.dataobj)
    assert len(np.unique(labels)) > 1  # otherwise there is nothing to compare
    found = segments_by_world(segmentation_path(out / "head.nii.gz"), image.affine, labels.shape)
    for value in (1, 2):
        np.testing.assert_array_equal(found[value - 1], labels == value)
    version = dcmread(out / "head.seg.dcm").SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert "configuration=3d_fullres" in version.AlgorithmParameters
    np.testing.assert_allclose(image.affine, read_header(tmp_path / "head").geometry.affine, atol=1e-4)


def test_segmentations_of_other_images_are_refused_before_work_begins(tmp_path: Path) -> None:
    model = write_toy_model(tmp_path / "model")
    write_series(tmp_path / "head", stored_numbers())
    write_labels(tmp_path / "x.nii.gz", label_map(), read_header(tmp_path / "head").geometry)
    result = run("predict", model, tmp_path / "head", tmp_path / "x.nii.gz", "--out", tmp_path / "o", "--dicom-seg")
    assert isinstance(result.exception, ConfigError)
    assert result.exception.problems == (str(tmp_path / "x.nii.gz"),)
    assert not (tmp_path / "o").exists()


def test_info_says_what_a_folder_of_dicom_is(tmp_path: Path) -> None:
    write_series(tmp_path / "a", stored_numbers(), rotation(1))
    files = write_series(tmp_path / "b", stored_numbers(), series="T2")
    files[2].unlink()
    (tmp_path / "c.dcm").write_text("no")
    result = run("info", tmp_path, "--json", "-")
    facts = json.loads(result.stdout)
    assert facts["series 1"]["usable"] == "yes"
    assert facts["series 1"]["shape"] == [7, 6, 5]
    assert facts["series 2"]["usable"].startswith("no: 1 slice is missing")
    assert facts["unreadable"] == {"c.dcm": "it has no DICOM mark"}
    assert uid("T1") == facts["series 1"]["uid"]


def test_a_manifest_may_name_series(tmp_path: Path) -> None:
    cases = []
    for number in range(2):
        files = write_series(tmp_path / f"p{number}", stored_numbers(seed=number), rotation(number))
        label = tmp_path / f"p{number}.nii.gz"
        write_labels(label, label_map(), read_header(tmp_path / f"p{number}").geometry)
        cases.append({"id": f"p{number}", "image": f"p{number}", "labels": label.name})
    labels = [{"name": "liver", "value": 3}, {"name": "stone", "value": 300}]
    (tmp_path / "set.json").write_text(json.dumps({"channels": ["MR"], "labels": labels, "cases": cases}))
    report = check_dataset(tmp_path / "set.json", workers=1, progress=NoProgress())
    assert {item.code for item in report.findings} == {"few-cases", "equal-labels", "label-gaps", "tiny-structures"}
    assert not report.stops_training
    case = load_dataset(tmp_path / "set.json").cases[1]
    np.testing.assert_array_equal(read_case(case, 1).array[0], stored_numbers(seed=1))
    files[2].unlink()
    report = check_dataset(tmp_path / "set.json", workers=1, progress=NoProgress())
    (problem,) = [item for item in report.findings if item.severity == "error"]
    assert (problem.code, problem.case) == ("unreadable-image", "p1")
    assert problem.message.startswith("1 slice is missing")
