"""Patients told by names: the conventions are recognised, and names that only look like it are not."""

import logging
from pathlib import Path

import pytest

from autoseg.config import Settings
from autoseg.domain.dataset import Case, Channel, Dataset, Fold, LabelClass, LabelSchema, Splits
from autoseg.domain.layouts import load_dataset
from autoseg.domain.patients import recognise_patients
from autoseg.domain.splits import make_splits, patients_of, splits_problems
from autoseg.errors import ConfigError, DatasetError
from autoseg.pipeline.folds import require_fitting, tell_splits
from autoseg.pipeline.settings import resolve_settings
from tests.unit.test_layouts import raw_layout, write

OTHERS = ("zz_other", "yy_else")
"""So that there are always several groups."""


def cases_of(*ids: str, **patients: str) -> list[Case]:
    return [Case(id=item, images=(f"/{item}.nii.gz",), patient=patients.get(item)) for item in ids]


@pytest.mark.parametrize(
    ("names", "patient"),
    [
        (("sub-01_ses-1", "sub-01_ses-2", "sub-01_ses-2_run-01_T1w"), "sub-01"),
        (("siteA_sub-07_T1w", "siteA_sub-07_T2w"), "siteA_sub-07"),
        (("sub-01", "sub-01_acq-low"), "sub-01"),
        (("patient_007_left", "patient_007_right"), "patient_007"),
        (("Patient7_a", "Patient7_b"), "Patient7"),
        (("patient001_frame01", "patient001_frame12"), "patient001"),
        (("liver_subject-3_1", "liver_subject-3_2"), "liver_subject-3"),
        (("sub12_1", "sub12_2"), "sub12"),
        (("patient_2019_004_a", "patient_2019_004_b"), "patient_2019_004"),
        (("BraTS-GLI-00005-000", "BraTS-GLI-00005-101"), "BraTS-GLI-00005"),
        (("TCGA-02-0003-01A", "TCGA-02-0003-02B"), "TCGA-02-0003"),
        (("10005_1000005", "10005_1000006"), "10005"),
        (("knee_12_visit_3", "knee_12_visit4", "knee_12_baseline"), "knee_12"),
        (("hip_003_L", "hip_003_R"), "hip_003"),
        (("e-17-t1", "e-17-t2"), "e-17"),
        (("breast.4.l.cc", "breast.4.l.mlo", "breast.4.r.cc"), "breast.4"),
        (("scan3_slice001", "scan3_slice_002"), "scan3"),
    ],
)
def test_cases_of_one_patient_are_recognised(names: tuple[str, ...], patient: str) -> None:
    assert recognise_patients([*names, *OTHERS]) == dict.fromkeys(names, patient)


@pytest.mark.parametrize(
    "names",
    [
        ("hippocampus_003", "hippocampus_004"),
        ("case_1", "case_2"),
        ("img_1_2", "img_1_3"),
        ("hippocampus_left", "hippocampus_right"),
        ("patient_left", "patient_right"),
        ("sub_1_2", "sub_1_3"),
        ("patients_1_2", "patients_1_3"),
        ("slice_001", "slice_002"),
        ("2020_scan1", "2020_scan2"),
        ("site1_scan_1", "site1_scan_2"),
        ("site_1_t1", "site_1_t2"),
        ("batch3_slice1", "batch3_slice2"),
        ("week_3_scan_1", "week_3_scan_2"),
        ("rat3_data9", "rat3_data10"),
        ("fetal_SB_atlas_GA21_notoperated", "fetal_SB_atlas_GA22_notoperated"),
        ("10005_100", "10005_101"),
        ("case_1_t", "case_1_v"),
        ("sub-01_ses-1", "sub-02_ses-1", "patient_3_left", "knee_4_r"),  # nobody shares a patient
    ],
)
def test_names_that_only_look_like_it_say_nothing(names: tuple[str, ...]) -> None:
    assert recognise_patients([*names, *OTHERS]) == {}


def test_all_cases_of_one_patient_say_nothing_because_no_folds_could_be_made() -> None:
    names = [f"stack1_slice{number}" for number in range(6)]
    assert recognise_patients(names) == {}
    assert "equal to nnU-Net's" in make_splits(cases_of(*names), None, 0).rule


def test_recognised_patients_stay_together_and_the_rule_says_so() -> None:
    names = [f"sub-{patient:02d}_ses-{session}" for patient in range(6) for session in (1, 2)]
    splits = make_splits(cases_of(*names), None, 0)
    assert sorted(map(len, (fold.validation for fold in splits.folds))) == [2, 2, 2, 2, 4]
    for fold in splits.folds:
        assert not {name[:6] for name in fold.train} & {name[:6] for name in fold.validation}
    assert "by patient" in splits.rule
    assert "6 patients recognised by the names of 12 cases (sub-00_ses-1 and sub-00_ses-2 are of sub-00)" in splits.rule
    assert "nnU-Net" in make_splits(cases_of(*names), None, 0, names_tell_patients=False).rule


def test_given_patients_win_over_names() -> None:
    cases = cases_of("sub-1_a", "sub-1_b", "x", **{"x": "Q"})
    assert patients_of(cases) == {"x": "Q"}
    assert "recognised" not in make_splits(cases, None, 0).rule


def dataset_of(cases: list[Case], splits: Splits | None = None) -> Dataset:
    labels = LabelSchema(classes=(LabelClass(name="a", values=(1,)),))
    return Dataset(name="x", channels=(Channel(name="MR"),), labels=labels, cases=tuple(cases), splits=splits)


def test_what_was_recognised_is_told(caplog: pytest.LogCaptureFixture) -> None:
    cases = cases_of("sub-1_a", "sub-1_b", "sub-2_a")
    with caplog.at_level(logging.INFO, "autoseg"):
        tell_splits(make_splits(cases, None, 0), dataset_of(cases), names_tell_patients=True)
    assert "sub-1_a and sub-1_b are of sub-1" in caplog.messages[0]
    assert "--set splits.patients=given" in caplog.messages[0]
    assert "there are 2 patients" in caplog.messages[1]


def test_given_folds_that_leak_by_names_are_used_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    cases = cases_of(*(f"sub-{patient}_{scan}" for patient in range(5) for scan in "ab"))
    given = Splits(rule="by hand", folds=(Fold(train=("sub-0_a", "sub-1_a"), validation=("sub-1_b",)),))
    assert splits_problems(given, cases) == ()
    tell_splits(given, dataset_of(cases, given), names_tell_patients=True)
    assert "fold 0" in caplog.text
    assert "sub-1 (sub-1_a and sub-1_b)" in caplog.text
    caplog.clear()
    tell_splits(given, dataset_of(cases, given), names_tell_patients=False)
    assert caplog.text == ""


def test_folds_edited_by_hand_are_checked_with_every_problem_named() -> None:
    cases = cases_of("a", "b", "c", "d", a="P", b="P")
    bad = Splits(
        rule="edited",
        folds=(
            Fold(train=("a", "c", "c"), validation=("b",)),
            Fold(train=("a", "e"), validation=("c", "d", "d")),
        ),
    )
    with pytest.raises(DatasetError) as caught:
        require_fitting(Path("run/splits.json"), bad, dataset_of(cases))
    assert caught.value.problems == (
        "fold 0 names 1 case twice under train: c",
        "fold 0 trains and validates on cases of the same patient: P (a and b)",
        "fold 1 names 1 case not in the data set: e",
        "fold 1 names 1 case twice under validation: d",
    )
    assert "run/splits.json" in str(caught.value)
    assert "delete it" in caught.value.hint


def test_the_command_line_can_say_that_names_tell_nothing() -> None:
    assert Settings().plan.patients == "names"
    settings = resolve_settings(None, assignments=["splits.patients=given", "2d.training.batch_size=4"])
    assert settings.plan.patients == "given"
    assert settings.plan.overrides == {"2d.training.batch_size": 4}
    with pytest.raises(ConfigError, match="not a valid"):
        resolve_settings(None, assignments=["splits.patients=no"])


def test_a_raw_data_set_may_name_patients_and_strata(tmp_path: Path) -> None:
    more = {"patients": {"a": "P1", "b": 2}, "strata": {"a": {"site": "Lyon"}}}
    dataset = load_dataset(raw_layout(tmp_path / "x", ("a", "b", "c"), **more))
    assert [(case.patient, case.strata) for case in dataset.cases] == [("P1", {"site": "Lyon"}), ("2", {}), (None, {})]


@pytest.mark.parametrize("patients", [51, ["p1", "p2"], {"a": ["p"]}])
def test_other_meanings_of_patients_in_foreign_files_are_ignored(tmp_path: Path, patients: object) -> None:
    dataset = load_dataset(raw_layout(tmp_path / "x", ("a",), patients=patients))
    assert dataset.cases[0].patient is None


def test_manifests_give_strata(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.nii.gz")
    write(tmp_path / "cases.json", {"channels": ["T1"], "labels": [{"name": "x", "value": 1}]})
    table = (
        "id,image,label,patient,stratify_site,stratify_scanner\na,a.nii.gz,a.nii.gz,p,Lyon,3T\nb,b.nii.gz,b.nii.gz,,,\n"
    )
    cases = load_dataset(write(tmp_path / "cases.csv", table)).cases
    assert cases[0].strata == {"site": "Lyon", "scanner": "3T"}
    assert cases[1].strata == {"site": "", "scanner": ""}
    entry = {"id": "a", "image": "a.nii.gz", "labels": "a.nii.gz", "strata": {"site": "Lyon"}}
    content = {"channels": ["T1"], "labels": [{"name": "x", "value": 1}], "cases": [entry]}
    assert load_dataset(write(tmp_path / "set.json", content)).cases[0].strata == {"site": "Lyon"}
    with pytest.raises(DatasetError, match="unknown columns: site"):
        load_dataset(write(tmp_path / "cases.csv", "id,image,site\na,a.nii.gz,Lyon\n"))
