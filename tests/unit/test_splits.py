"""Folds: equal to nnU-Net's where possible, otherwise whole patients, evenly dealt."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.domain.dataset import Case, Channel, Dataset, Fold, LabelClass, LabelSchema, Splits
from autoseg.domain.splits import dataset_splits, make_splits, parse_splits, splits_problems
from autoseg.errors import DatasetError

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "nnunet_folds.json").read_text())["validation_indices"]


def cases_of(count: int) -> list[Case]:
    return [Case(id=f"case_{number:03d}", images=(f"/{number}.nii.gz",)) for number in range(count)]


@pytest.mark.parametrize("count", [int(key) for key in GOLDEN])
def test_folds_equal_nnunets(count: int) -> None:
    cases = cases_of(count)
    everywhere = {case.id: frozenset({1, 2}) for case in cases}
    expected = [tuple(f"case_{number:03d}" for number in fold) for fold in GOLDEN[str(count)]]
    for presence, seed in ((None, 0), (everywhere, 7)):
        splits = make_splits(list(reversed(cases)), presence, seed)
        assert [fold.validation for fold in splits.folds] == expected
        assert "nnU-Net" in splits.rule


@st.composite
def labelled_patients(draw: st.DrawFn) -> tuple[list[Case], dict[str, frozenset[int]], int]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=14))
    names = [(f"p{patient}", f"c{patient:02d}_{scan}") for patient, size in enumerate(sizes) for scan in range(size)]
    cases = [Case(id=name, images=(f"/{name}.nii.gz",), patient=patient) for patient, name in names]
    presence = {case.id: draw(st.frozensets(st.integers(1, 4))) for case in cases}
    return cases, presence, draw(st.integers(0, 100))


@settings(max_examples=50)
@given(labelled_patients(), st.randoms(use_true_random=False))
def test_every_case_is_validated_once_and_no_patient_leaks(drawn, random) -> None:  # type: ignore[no-untyped-def]
    cases, presence, seed = drawn
    splits = make_splits(cases, presence, seed)
    patients = {case.id: case.patient for case in cases}
    assert len(splits.folds) == min(5, len(set(patients.values())))
    assert Counter(item for fold in splits.folds for item in fold.validation) == Counter(patients.keys())
    for fold in splits.folds:
        assert fold.validation
        assert {*fold.train, *fold.validation} == set(patients)
        assert not {patients[item] for item in fold.train} & {patients[item] for item in fold.validation}
    assert splits_problems(splits, cases) == ()
    shuffled = random.sample(cases, len(cases))
    assert make_splits(shuffled, presence, seed) == splits


def test_a_rare_class_is_spread_over_the_folds() -> None:
    cases = cases_of(50)
    rare = {f"case_{number:03d}" for number in (3, 4, 5, 6, 7)}  # KFold would put several of them into one fold
    presence = {case.id: frozenset({1, 2} if case.id in rare else {1}) for case in cases}
    splits = make_splits(cases, presence, seed=1)
    assert [len(rare & set(fold.validation)) for fold in splits.folds] == [1] * 5
    assert [len(fold.validation) for fold in splits.folds] == [10] * 5
    assert "stratified by class" in splits.rule


def test_few_cases_are_left_out_one_at_a_time() -> None:
    splits = make_splits(cases_of(3), None, 0)
    assert sorted(fold.validation for fold in splits.folds) == [("case_000",), ("case_001",), ("case_002",)]
    assert all(len(fold.train) == 2 for fold in splits.folds)


@pytest.mark.parametrize("count", [0, 1])
def test_one_case_has_no_folds_and_says_what_to_do(count: int) -> None:
    with pytest.raises(DatasetError) as caught:
        make_splits(cases_of(count), None, 0)
    assert "--fold all" in str(caught.value)


def test_several_cases_of_one_patient_have_no_folds() -> None:
    cases = [case.model_copy(update={"patient": "p"}) for case in cases_of(6)]
    with pytest.raises(DatasetError, match="6 cases of one patient"):
        make_splits(cases, None, 0)


def test_nnunet_splits_are_read() -> None:
    splits = parse_splits('[{"train": ["a", "b"], "val": ["c"]}]', "splits_final.json")
    assert splits.folds == (Fold(train=("a", "b"), validation=("c",)),)
    assert parse_splits(splits.to_json(), "splits.json") == splits


@pytest.mark.parametrize("text", ["{", "3", '[{"train": ["a"]}]', '["a"]', '[{"train": ["a"], "val": ["a"]}]', "[[]]"])
def test_splits_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(DatasetError):
        parse_splits(text, "splits_final.json")


def test_given_splits_are_checked_against_cases_and_patients() -> None:
    cases = [case.model_copy(update={"patient": f"p{number // 2}"}) for number, case in enumerate(cases_of(4))]
    splits = Splits(
        rule="by hand",
        folds=(
            Fold(train=("case_000", "case_002"), validation=("case_001",)),
            Fold(train=("case_000", "case_001"), validation=("other",)),
            Fold(train=("case_000",), validation=()),
        ),
    )
    problems = splits_problems(splits, cases)
    assert len(problems) == 3
    assert "same patient: p0" in problems[0]
    assert "other" in problems[1]
    assert "no validation" in problems[2]
    dataset = Dataset(
        name="x",
        channels=(Channel(name="MR"),),
        labels=LabelSchema(classes=(LabelClass(name="a", values=(1,)),)),
        cases=tuple(cases),
        splits=splits,
    )
    with pytest.raises(DatasetError) as caught:
        dataset_splits(dataset, None, 0)
    assert caught.value.problems == problems
    good = Splits(rule="by hand", folds=(Fold(train=("case_000", "case_001"), validation=("case_002",)),))
    assert dataset_splits(dataset.model_copy(update={"splits": good}), None, 0) == good
    made = dataset_splits(dataset.model_copy(update={"splits": None}), None, 0)
    assert {fold.validation for fold in made.folds} == {("case_000", "case_001"), ("case_002", "case_003")}
