"""Repairs of real files: gaps, floats, turned axes, label maps on another grid."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.checking.doctor import check_dataset
from autoseg.checking.repair import repair_dataset
from autoseg.checking.repairs import Ledger, RepairSettings
from autoseg.domain.layouts import load_dataset
from autoseg.io.images import read_labels
from autoseg.runtime import NoProgress

pytestmark = pytest.mark.data


def repaired(source: Path, out: Path, **settings: bool) -> Ledger:
    return repair_dataset(source, out, RepairSettings(**settings), workers=2, progress=NoProgress())


def manifest(path: Path, image: Path, labels: Path, value: int = 1) -> Path:
    case = {"id": "c", "image": str(image), "labels": str(labels)}
    described = {"channels": ["MR"], "labels": [{"name": "a", "value": value}], "cases": [case]}
    path.write_text(json.dumps(described))
    return path


def test_mouse_brain_gets_integers_without_gaps(data_folder: Path, tmp_path: Path) -> None:
    ledger = repaired(data_folder / "mouse_brain", tmp_path / "out")
    before, after = load_dataset(data_folder / "mouse_brain"), load_dataset(tmp_path / "out")
    assert [item.values[0] for item in after.labels.classes] == list(range(1, 38))
    assert after.labels.names == before.labels.names
    assert (ledger.num_linked + ledger.num_copied, ledger.num_written) == (6, 6)
    for old, new in zip(before.cases, after.cases, strict=True):
        first, second = (read_labels(str(case.labels))[0] for case in (old, new))
        assert second.dtype == np.uint8
        np.testing.assert_array_equal(before.labels.encode(first), after.labels.encode(second))
    assert check_dataset(tmp_path / "out", workers=2, progress=NoProgress()).count("error") == 0


def test_a_psr_spine_becomes_ras_as_nibabel_does_it(data_folder: Path, tmp_path: Path) -> None:
    nifti = data_folder / "robustness/nifti"
    files = {"imagesTr/c_0000.nii.gz": "spine_t2_PSR_image.nii.gz", "labelsTr/c.nii.gz": "spine_t2_PSR_label.nii.gz"}
    source = manifest(tmp_path / "m.json", *(nifti / name for name in files.values()))
    ledger = repaired(source, tmp_path / "out")
    assert [item.kind for item in ledger.repairs] == ["orientation", "orientation"]
    for name, original in files.items():
        expected, found = nib.as_closest_canonical(nib.load(nifti / original)), nib.load(tmp_path / "out" / name)
        np.testing.assert_array_equal(np.asanyarray(found.dataobj), np.asanyarray(expected.dataobj))
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
        assert found.get_data_dtype() == expected.get_data_dtype()


def test_a_label_map_of_another_scan_is_carried_as_simpleitk_does_it(data_folder: Path, tmp_path: Path) -> None:
    folder = data_folder / "robustness/sts_019_grids_disagree"
    image, mask = folder / "MR_T1_image.nii.gz", folder / "CT_mask.nii.gz"
    source = manifest(tmp_path / "m.json", image, mask)
    assert len(repaired(source, tmp_path / "left").left_wrong) == 1
    ledger = repaired(source, tmp_path / "out", resample_labels=True, keep_orientation=True)
    assert [item.kind for item in ledger.repairs] == ["resampled"]
    nearest = sitk.Resample(
        sitk.ReadImage(str(mask)), sitk.ReadImage(str(image)), sitk.Transform(), sitk.sitkNearestNeighbor, 0
    )
    found = read_labels(tmp_path / "out/labelsTr/c.nii.gz")[0]
    np.testing.assert_array_equal(found, sitk.GetArrayFromImage(nearest).T)
    assert 3500 < found.sum() < 4200


def test_channels_that_do_not_match_are_left(data_folder: Path, tmp_path: Path) -> None:
    folder = data_folder / "robustness/isles22_case0009"
    case = {"id": "c", "images": [str(folder / f"{n}.nii.gz") for n in ("dwi", "adc", "flair")]}
    described = {"channels": ["dwi", "adc", "flair"], "labels": [{"name": "lesion", "value": 1}]}
    (tmp_path / "m.json").write_text(json.dumps(described | {"cases": [case | {"labels": str(folder / "msk.nii.gz")}]}))
    ledger = repaired(tmp_path / "m.json", tmp_path / "out")
    assert [item.file for item in ledger.left_wrong] == ["imagesTr/c_0002.nii.gz"]
    assert "512×512×29 against 112×112×73" in ledger.left_wrong[0].what
