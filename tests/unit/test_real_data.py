"""Every real set loads, and every odd or broken real file is read rightly or refused with the reason."""

import json
import shutil
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.checking.doctor import check_dataset
from autoseg.domain.geometry import degrees_off_axis, orientation_code
from autoseg.domain.layouts import load_dataset
from autoseg.domain.splits import make_splits
from autoseg.errors import DatasetError, GeometryError
from autoseg.io.images import read_case, read_header, read_image, read_labels, write_labels
from autoseg.runtime import NoProgress

pytestmark = pytest.mark.data

SETS = {
    # path: cases, channels, classes, shape of the last case, is it 2D
    "hippocampus": (200, 1, 2, (35, 52, 38), False),
    "headneck_ct": (39, 1, 7, (128, 128, 128), False),
    "sarcoma": (12, 3, 1, (113, 111, 45), False),
    "sarcoma/dataset_mr_only.json": (12, 1, 1, (113, 111, 45), False),
    "fetal_brain": (12, 1, 8, (135, 189, 155), False),
    "mouse_brain": (6, 1, 37, (112, 128, 80), False),
    "membrane": (24, 1, 1, (512, 512, 1), True),
    "nuclei": (78, 3, 1, (256, 256, 1), True),
    "axon_sem": (7, 1, 2, (1154, 744, 1), True),
}


@pytest.mark.parametrize("name", SETS)
def test_sets_load(data_folder: Path, name: str) -> None:
    num_cases, channels, classes, shape, is_2d = SETS[name]
    dataset = load_dataset(data_folder / name)
    assert (len(dataset.cases), len(dataset.channels), len(dataset.labels.classes)) == (num_cases, channels, classes)
    assert [case.id for case in dataset.cases] == sorted(case.id for case in dataset.cases)
    case = dataset.cases[-1]
    volume = read_case(case, channels)
    assert volume.array.shape == (channels, *shape)
    assert volume.geometry.is_2d == is_2d
    assert case.labels is not None
    labels, _ = read_labels(case.labels, volume.geometry)
    encoded = dataset.labels.encode(labels)
    assert 0 < encoded.max() <= classes
    assert len(make_splits(dataset.cases, None, 0).folds) == 5


NOTES = {
    # set: kinds of notes with the number of findings; nothing worse is found in any of them
    "hippocampus": {"mixed-types": 1, "no-common-scale": 1, "float-labels": 2, "stray-islands": 1},
    "headneck_ct": {"ct-very-bright": 5, "left-right-pairs": 1},
    "sarcoma": {"brightness-outlier": 1},
    "fetal_brain": {"stray-islands": 4},
    "mouse_brain": {"float-labels": 6, "label-gaps": 1, "left-right-pairs": 1},
    "membrane": {},
    "nuclei": {"grey-as-colour": 1, "two-kinds-of-images": 1, "size-outlier": 3},
    "axon_sem": {},
}


@pytest.mark.parametrize("name", NOTES)
def test_nothing_is_made_up_about_good_sets(data_folder: Path, name: str) -> None:
    report = check_dataset(data_folder / name, workers=2, progress=NoProgress())
    assert Counter(item.code for item in report.findings) == NOTES[name]
    assert {item.severity for item in report.findings} <= {"note"}
    assert report.num_cases == SETS[name][0]


def test_scaled_pet_is_in_its_own_unit(data_folder: Path) -> None:
    pet = read_image(data_folder / "sarcoma/imagesTr/STS_002_0002.nii.gz").array
    assert pet.dtype == np.float32
    assert 1 < pet.max() < 100  # a thousand times more where the slope is ignored


NIFTI = {
    # file: channels, shape, dtype, orientation, degrees off axis
    "nifti/bigendian_int16.nii": (1, (33, 41, 25), "int16", "LAS", 0),
    "nifti/bigendian_float32.nii": (1, (21, 26, 22), "float32", "RAS", 0),
    "nifti/4d_scl_slope_inter.nii": (20, (17, 21, 3), "float32", "LAS", 0),
    "nifti/4d_two_volumes_oblique.nii.gz": (2, (128, 96, 24), "int16", "LAS", 9),
    "nifti/nifti2_4d.nii.gz": (2, (32, 20, 12), "int16", "LAS", 9),
    "nifti/tiny_4x5x7.nii.gz": (1, (4, 5, 7), "uint8", None, 0),
    "nifti/ct_rotated_16deg.nii.gz": (1, (175, 248, 58), "uint8", None, 16.5),
    "nifti/spine_t2_PSR_image.nii.gz": (1, (60, 55, 52), "int16", "PSR", None),
    "nifti/single_slice_4d.nii.gz": (3, (256, 256, 1), "int16", None, None),
    "nifti/dmri_4d_thick_slices.nii.gz": (7, (40, 42, 5), "int16", None, None),
    "nifti/spine_t2s_label_int64.nii.gz": (1, (49, 54, 9), "int64", None, None),
    "ct_abdomen/ct_int32_no_qform.nii.gz": (1, (122, 101, 112), "int32", None, None),
    "ct_abdomen/mr_small_LPS.nii.gz": (1, (117, 91, 20), "int16", "LPS", None),
    "isles22_case0009/dwi.nii.gz": (1, (112, 112, 73), "float32", None, None),
}


@pytest.mark.parametrize("name", NIFTI)
def test_odd_nifti_files_are_read_rightly(data_folder: Path, name: str) -> None:
    channels, shape, dtype, orientation, degrees = NIFTI[name]
    path = data_folder / "robustness" / name
    volume = read_image(path, channels)
    assert volume.array.shape == (channels, *shape)
    assert volume.array.dtype == dtype
    oracle = nib.load(path)
    truth = oracle.get_fdata().reshape(*shape, channels)
    np.testing.assert_allclose(np.moveaxis(volume.array, 0, 3), truth, rtol=1e-6)
    np.testing.assert_array_equal(volume.geometry.affine, oracle.affine)
    if orientation is not None:
        assert orientation_code(volume.geometry.affine) == orientation
    if degrees is not None:
        assert degrees_off_axis(volume.geometry.affine) == pytest.approx(degrees, abs=0.6)
    assert read_header(path).components == channels
    if channels > 1:
        with pytest.raises(DatasetError, match=f"expected 1 channel in this file, got {channels}"):
            read_image(path)


@pytest.mark.parametrize(
    "name",
    [
        "nifti/spine_t2_PSR_image.nii.gz",
        "nifti/ct_rotated_16deg.nii.gz",
        "ct_abdomen/ct_int32_no_qform.nii.gz",
        "sts_019_grids_disagree/CT_mask.nii.gz",
        "isles22_case0009/flair.nii.gz",
        "ibsi_phantom_5x4x4/image.nii.gz",
    ],
)
def test_label_maps_carry_the_grid_and_codes_of_their_image(data_folder: Path, tmp_path: Path, name: str) -> None:
    path = data_folder / "robustness" / name
    geometry = read_header(path).geometry
    write_labels(tmp_path / "out.nii.gz", np.ones(geometry.shape, np.uint8), geometry)
    before, after = nib.load(path), nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(after.affine, before.affine)
    for key in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z"):
        if key.endswith("code") or int(before.header["sform_code"]) > 0:
            np.testing.assert_array_equal(after.header[key], before.header[key])
    if int(before.header["qform_code"]) > 0:
        np.testing.assert_allclose(after.header.get_qform(), before.header.get_qform(), atol=1e-4)


@pytest.mark.parametrize("name", ["brain1_image", "brain1_label", "breast1_image"])
def test_nrrd_lies_where_itk_says(data_folder: Path, name: str) -> None:
    path = data_folder / "robustness/nrrd" / f"{name}.nrrd"
    volume, oracle = read_image(path), sitk.ReadImage(str(path))
    np.testing.assert_array_equal(volume.array[0], sitk.GetArrayFromImage(oracle).transpose())
    corner = tuple(size - 1 for size in volume.geometry.shape)
    point = oracle.TransformIndexToPhysicalPoint(corner)
    np.testing.assert_allclose(volume.geometry.affine @ [*corner, 1], [-point[0], -point[1], point[2], 1], atol=1e-4)


DICOM = {
    # folder: shape, dtype, lowest, highest, spacing, degrees off axis
    "mr_hippocampus_crop": ((35, 51, 32), "int16", 2, 154, (1, 1, 1), 0),
    "ct_jpeg2000_no_extension": ((512, 512, 20), "int16", -1024, 1839, (0.9765625, 0.9765625, 2), 0),
    "mr_adc_oblique": ((84, 128, 19), "uint16", 0, 3265, (2, 2, 3), 18.5),
}


@pytest.mark.parametrize("name", DICOM)
def test_dicom_series_lie_where_itk_says(data_folder: Path, name: str) -> None:
    shape, dtype, low, high, spacing, degrees = DICOM[name]
    folder = data_folder / "robustness/dicom" / name
    volume = read_image(folder)
    assert volume.array.shape == (1, *shape)
    assert (volume.array.dtype, volume.array.min(), volume.array.max()) == (dtype, low, high)
    assert volume.geometry.spacing_mm == pytest.approx(spacing)
    assert degrees_off_axis(volume.geometry.affine) == pytest.approx(degrees, abs=0.1)
    reader = sitk.ImageSeriesReader()
    # One of the series has no UID; its files are sorted here by hand, along z.
    files = reader.GetGDCMSeriesFileNames(str(folder)) or sorted(
        map(str, folder.iterdir()), key=lambda file: sitk.ReadImage(file).GetOrigin()[2]
    )
    reader.SetFileNames(files)
    oracle = reader.Execute()
    np.testing.assert_array_equal(volume.array[0], sitk.GetArrayFromImage(oracle).transpose())
    for corner in [(0, 0, 0), (shape[0] - 1, 0, 0), tuple(size - 1 for size in shape)]:
        x, y, z = oracle.TransformIndexToPhysicalPoint(corner)
        np.testing.assert_allclose(volume.geometry.affine @ [*corner, 1], [-x, -y, z, 1], atol=1e-3)


def test_a_file_of_a_series_of_three_b_values_stands_for_its_volume(data_folder: Path) -> None:
    folder = data_folder / "robustness/dicom/mr_dwi_three_b_values"
    means = [read_image(folder / name).array.mean() for name in ("1-01.dcm", "1-20.dcm", "1-57.dcm")]
    assert means[0] > means[1] > means[2]  # the more the weighting, the darker
    assert read_header(folder / "1-20.dcm").geometry.shape == (84, 128, 19)
    assert read_header(folder / "1-20.dcm").geometry.spacing_mm == pytest.approx((2, 2, 3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nifti/broken_lfs_pointer.nii.gz", "Git LFS pointer"),
        ("other/analyze_header_without_img.hdr", "Analyze .* missing"),
        ("other/small_4d.mgz", "expected 1 channel in this file, got 2"),
        (
            "dicom/mr_dwi_three_b_values",
            "57 slices lie at 19 positions: it holds 3 volumes: b = 50 .*b = 400 .*b = 800",
        ),
        ("dicom/mr_missing_slice", "1 slice is missing: 6 mm between 1-07.dcm and 1-05.dcm, where others are 3 mm"),
        ("dicom", "holds 5 series"),
    ],
)
def test_what_is_not_supported_is_named(data_folder: Path, name: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_image(data_folder / "robustness" / name)


def test_nothing_in_the_odd_files_gives_another_error(data_folder: Path) -> None:
    files = [item for name in ("robustness", "hippocampus_defects") for item in (data_folder / name).rglob("*")]
    # Of a DICOM series any file stands for the whole: one is enough.
    files = [item for item in files if item.parent.parent.name != "dicom" or item == min(item.parent.iterdir())]
    refused = 0
    for path in files:
        for read in (read_header, read_image, read_labels):
            try:
                read(path)
            except DatasetError as problem:
                refused += 1
                if str(path) not in str(problem):
                    raise
    assert 0 < refused < 3 * len(files)


def test_soft_labels_and_nan_are_refused_as_labels(data_folder: Path) -> None:
    with pytest.raises(DatasetError, match="not integers, in 203 of 8,000 voxels"):
        read_labels(data_folder / "robustness/nifti/spine_mt1_soft_label.nii.gz")
    with pytest.raises(DatasetError, match="NaN"):
        read_labels(data_folder / "robustness/nifti/bigendian_float32_with_nan.nii")


def test_grids_that_disagree_are_told_with_the_difference(data_folder: Path) -> None:
    image = read_header(data_folder / "robustness/sts_019_grids_disagree/MR_T1_image.nii.gz").geometry
    read_labels(data_folder / "robustness/sts_019_grids_disagree/MR_T1_mask.nii.gz", image)
    with pytest.raises(GeometryError, match="136×134×47 against 112×110×47"):
        read_labels(data_folder / "robustness/sts_019_grids_disagree/CT_mask.nii.gz", image)
    dwi = read_header(data_folder / "robustness/isles22_case0009/dwi.nii.gz").geometry
    with pytest.raises(GeometryError, match="512×512×29 against 112×112×73"):
        read_labels(data_folder / "robustness/isles22_case0009/flair.nii.gz", dwi)


def test_the_defects_of_hippocampus_are_all_found_at_once(data_folder: Path, tmp_path: Path) -> None:
    source, defects = data_folder / "hippocampus", data_folder / "hippocampus_defects"
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    for case in ("hippocampus_001", "hippocampus_003", "hippocampus_281"):
        shutil.copy(source / "imagesTr/hippocampus_004.nii.gz", tmp_path / f"imagesTr/{case}_0000.nii.gz")
    for case in ("hippocampus_001", "hippocampus_003"):
        shutil.copy(source / "labelsTr/hippocampus_004.nii.gz", tmp_path / f"labelsTr/{case}.nii.gz")
    shutil.copy(defects / "images/hippocampus_118.nii.gz", tmp_path / "imagesTr/hippocampus_118_0000.nii.gz")
    shutil.copy(defects / "labels/hippocampus_010.nii.gz", tmp_path / "labelsTr")
    shutil.copy(defects / "labels/hippocampus_281.nii.gz", tmp_path / "labelsTr")
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    report = check_dataset(tmp_path, workers=2, progress=NoProgress())
    assert [(item.case, item.code) for item in report.findings if item.case] == [
        ("hippocampus_118", "missing-label"),
        ("hippocampus_281", "label-grid"),
        ("hippocampus_010", "missing-image"),
    ]
    assert report.stops_training
