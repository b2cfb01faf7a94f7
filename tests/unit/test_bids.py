"""BIDS derivatives: what belongs together is found by the names, and what could be read in two ways is refused."""

import json
from pathlib import Path

import pytest

from autoseg.domain.layouts import load_dataset, resolve_dataset
from autoseg.errors import DatasetError

TABLE = "index\tname\tabbreviation\n0\tbackground\tBG\n2\tright hippocampus\tRH\n1\tleft hippocampus\tLH\n"


def write(path: Path, content: object = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def raw_and_derivative(
    root: Path, subjects: tuple[str, ...] = ("01", "02"), suffixes: tuple[str, ...] = ("T1w",)
) -> Path:
    """A raw data set with images of all subjects and of a third, and a derivative with their segmentations."""
    write(root / "dataset_description.json", {"Name": "Raw", "BIDSVersion": "1.9.0"})
    derivative = root / "derivatives/manual"
    write(derivative / "dataset_description.json", {"Name": "Manual", "DatasetType": "derivative"})
    write(derivative / "dseg.tsv", TABLE)
    for subject in (*subjects, "99"):
        for suffix in suffixes:
            write(root / f"sub-{subject}/anat/sub-{subject}_{suffix}.nii.gz")
            write(root / f"sub-{subject}/anat/sub-{subject}_{suffix}.json", {})
    for subject in subjects:
        write(derivative / f"sub-{subject}/anat/sub-{subject}_dseg.nii.gz")
    return derivative


def problems(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        load_dataset(path)
    return str(caught.value)


def test_a_derivative_inside_its_raw_data_set(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path)
    for path in (derivative, derivative / "dataset_description.json", tmp_path):
        dataset = load_dataset(path)
        assert [channel.name for channel in dataset.channels] == ["T1w"]
        assert [(item.name, item.values) for item in dataset.labels.classes] == [
            ("left hippocampus", (1,)),
            ("right hippocampus", (2,)),
        ]
        case = dataset.case("sub-01")
        assert case.images == (str(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz"),)
        assert case.labels == str(derivative / "sub-01/anat/sub-01_dseg.nii.gz")
        assert case.patient == "sub-01"
        assert [item.id for item in dataset.test_cases] == ["sub-99"]


def test_sessions_are_cases_of_one_patient_and_images_may_lie_in_the_derivative(tmp_path: Path) -> None:
    write(tmp_path / "dataset_description.json", {"DatasetType": "derivative"})
    for session in ("1", "2"):
        folder = tmp_path / f"sub-x/ses-{session}/anat"
        write(folder / f"sub-x_ses-{session}_space-MNI_desc-preproc_T1w.nii.gz")
        write(folder / f"sub-x_ses-{session}_desc-preproc_T1w.nii.gz")  # in another space than the segmentation
        write(folder / f"sub-x_ses-{session}_space-MNI_desc-atlas_dseg.nii.gz")
        write(folder / f"sub-x_ses-{session}_space-MNI_probseg.nii.gz")
    write(tmp_path / "space-MNI_desc-atlas_dseg.tsv", TABLE)
    dataset = load_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == ["sub-x_ses-1", "sub-x_ses-2"]
    assert {case.patient for case in dataset.cases} == {"sub-x"}
    assert dataset.cases[0].images[0].endswith("sub-x_ses-1_space-MNI_desc-preproc_T1w.nii.gz")


def test_suffixes_and_what_tells_scans_apart_are_channels(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path, suffixes=("T1w", "FLAIR", "ce-gad_T1w"))
    dataset = load_dataset(derivative)
    assert [channel.name for channel in dataset.channels] == ["FLAIR", "T1w", "ce-gad_T1w"]
    names = [Path(file).name for file in dataset.cases[1].images]
    assert names == ["sub-02_FLAIR.nii.gz", "sub-02_T1w.nii.gz", "sub-02_ce-gad_T1w.nii.gz"]


def test_a_segmentation_of_one_acquisition_takes_its_images_only(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path, suffixes=("acq-fine_T1w", "acq-fast_T1w"))
    for file in derivative.glob("sub-*/anat/*.nii.gz"):
        file.rename(file.with_name(file.name.replace("_dseg", "_acq-fine_dseg")))
    dataset = load_dataset(derivative)
    assert [case.id for case in dataset.cases] == ["sub-01_acq-fine", "sub-02_acq-fine"]
    assert [Path(file).name for file in dataset.cases[0].images] == ["sub-01_acq-fine_T1w.nii.gz"]


def test_several_segmentations_are_refused_and_one_can_be_chosen(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path)
    for name in ("sub-01_desc-b_dseg", "sub-02_desc-b_dseg"):
        write(derivative / f"{name[:6]}/anat/{name}.nii.gz")
    text = problems(derivative)
    assert "several kinds: desc-b_dseg (2 files), dseg (2 files)" in text
    assert '"segmentation": {"desc": "b", "suffix": "dseg"}' in text or '"segmentation": {"suffix": "dseg"}' in text
    write(tmp_path / "mine.json", {"bids": "derivatives/manual", "segmentation": {"desc": "b"}})
    dataset = load_dataset(tmp_path / "mine.json")
    assert [Path(str(case.labels)).name for case in dataset.cases] == [
        "sub-01_desc-b_dseg.nii.gz",
        "sub-02_desc-b_dseg.nii.gz",
    ]


def test_who_drew_the_only_segmentation_of_a_scan_does_not_matter(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path)
    for number, rater in (("01", "a"), ("02", "b")):
        old = derivative / f"sub-{number}/anat/sub-{number}_dseg.nii.gz"
        old.rename(old.with_name(f"sub-{number}_desc-{rater}_dseg.nii.gz"))
    assert len(load_dataset(derivative).cases) == 2


def test_images_that_differ_between_subjects_are_refused_and_can_be_chosen(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path)
    write(tmp_path / "sub-01/anat/sub-01_FLAIR.nii.gz")
    assert "different images: FLAIR in 1 of 2, T1w in 2 of 2" in problems(derivative)
    write(tmp_path / "mine.json", {"bids": "derivatives/manual", "channels": ["T1w"]})
    assert [channel.name for channel in load_dataset(tmp_path / "mine.json").channels] == ["T1w"]
    write(tmp_path / "mine.json", {"bids": "derivatives/manual", "channels": ["T1w", "FLAIR"]})
    dataset, findings = resolve_dataset(tmp_path / "mine.json")
    assert [(item.case, item.code) for item in findings] == [("sub-02", "missing-channel")]
    assert dataset is not None
    assert [case.id for case in dataset.cases] == ["sub-01"]


def test_repeats_of_a_scan_are_no_channels(tmp_path: Path) -> None:
    assert "repeats of one scan" in problems(raw_and_derivative(tmp_path, suffixes=("run-1_T1w", "run-2_T1w")))


def test_two_versions_of_one_image_are_refused(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path)
    for version in ("a", "b"):
        write(derivative / f"sub-01/anat/sub-01_desc-{version}_T1w.nii.gz")
    text = problems(derivative)
    assert "case sub-01" in text
    assert "sub-01_desc-a_T1w.nii.gz and sub-01_desc-b_T1w.nii.gz claim to be channel T1w" in text


def test_tables_are_inherited_and_the_nearest_wins(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path)
    for subject in ("01", "02"):
        write(derivative / f"sub-{subject}/anat/sub-{subject}_dseg.tsv", "index\tname\n7\ttumour\n")
    assert load_dataset(derivative).labels.declared_values == {0, 7}
    write(derivative / "sub-02/anat/sub-02_dseg.tsv", "index\tname\n7\tcyst\n")
    assert "value 7 is 'tumour' in some cases and 'cyst'" in problems(derivative)
    write(derivative / "sub-02/anat/sub-02_dseg.tsv", "index\tname\nseven\tcyst\n")
    assert "sub-02_dseg.tsv, line 2: expected an index and a name" in problems(derivative)


def test_names_may_stand_in_json_or_in_the_selection_but_must_stand_somewhere(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path)
    (derivative / "dseg.tsv").unlink()
    write(derivative / "sub-01/anat/sub-01_dseg.json", {"Manual": True})
    assert "nothing says what the values of" in problems(derivative)
    write(derivative / "dseg.json", {"LabelMap": {"tumour": 3}})
    assert load_dataset(derivative).labels.names == ("tumour",)
    (derivative / "dseg.json").unlink()
    labels = [{"name": "core", "value": 1}, {"name": "edge", "value": 2}]
    write(tmp_path / "mine.json", {"bids": str(derivative), "images": str(tmp_path), "labels": labels})
    assert load_dataset(tmp_path / "mine.json").labels.names == ("core", "edge")
    write(tmp_path / "mine.json", {"bids": str(derivative), "chanels": ["T1w"]})
    assert "chanels" in problems(tmp_path / "mine.json")


def test_masks_are_one_class_where_there_is_nothing_else(tmp_path: Path) -> None:
    derivative = raw_and_derivative(tmp_path)
    for file in list(derivative.glob("sub-*/anat/*.nii.gz")):
        file.rename(file.with_name(file.name.replace("_dseg", "_label-lesion_mask")))
    assert load_dataset(derivative).labels.names == ("lesion",)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    write(tmp_path / "raw/dataset_description.json", {"Name": "x"})
    write(tmp_path / "raw/sub-1/anat/sub-1_T1w.nii.gz")
    assert "holds no segmentations" in problems(tmp_path / "raw")
    write(tmp_path / "alone/dataset_description.json", {"DatasetType": "derivative"})
    write(tmp_path / "alone/sub-1/anat/sub-1_dseg.nii.gz")
    write(tmp_path / "alone/dseg.tsv", TABLE)
    assert "no image lies beside" in problems(tmp_path / "alone")
    sources = [{"URL": "https://example.org/x"}, {"URL": "../raw"}]
    write(tmp_path / "alone/dataset_description.json", {"DatasetType": "derivative", "SourceDatasets": sources})
    assert len(load_dataset(tmp_path / "alone").cases) == 1
    raw_and_derivative(tmp_path / "two")
    write(tmp_path / "two/derivatives/other/sub-01/anat/sub-01_dseg.nii.gz")
    assert "several derivatives hold segmentations: derivatives/manual, derivatives/other" in problems(tmp_path / "two")
