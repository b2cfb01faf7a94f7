"""Laws of folds, for any patients, classes and strata."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.domain.dataset import Case
from autoseg.domain.splits import make_splits, splits_problems


@st.composite
def any_cases(draw: st.DrawFn) -> tuple[list[Case], dict[str, frozenset[int]] | None, int]:
    """Patients of 1 to 4 cases, given or told by names, with classes and up to two strata."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=14))
    is_given, columns = draw(st.booleans()), draw(st.integers(0, 2))
    cases = []
    for patient, size in enumerate(sizes):
        for scan in range(size):
            name = f"c{patient:02d}x{scan}" if is_given else f"sub-{patient:02d}_ses-{scan}"
            strata = {f"column{number}": draw(st.sampled_from("AB")) for number in range(columns)}
            cases.append(Case(id=name, images=("/x",), patient=f"p{patient}" if is_given else None, strata=strata))
    presence = {case.id: draw(st.frozensets(st.integers(1, 3))) for case in cases} if draw(st.booleans()) else None
    return cases, presence, draw(st.integers(0, 100))


def patient_of(case_id: str) -> str:
    return case_id[:3] if case_id.startswith("c") else case_id[:6]


@settings(max_examples=80)
@given(any_cases(), st.randoms(use_true_random=False))
def test_each_case_is_validated_once_no_patient_leaks_and_order_says_nothing(drawn, random) -> None:  # type: ignore[no-untyped-def]
    cases, presence, seed = drawn
    splits = make_splits(cases, presence, seed)
    ids = {case.id for case in cases}
    assert Counter(item for fold in splits.folds for item in fold.validation) == Counter(ids)
    for fold in splits.folds:
        assert fold.validation
        assert {*fold.train, *fold.validation} == ids
        assert not {patient_of(item) for item in fold.train} & {patient_of(item) for item in fold.validation}
    assert len(splits.folds) == min(5, len({patient_of(item) for item in ids}))
    assert splits_problems(splits, cases) == ()
    assert make_splits(random.sample(cases, len(cases)), presence, seed) == splits


@settings(max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=25), st.integers(0, 100))
def test_without_strata_folds_differ_by_no_more_than_the_largest_patient(sizes: list[int], seed: int) -> None:
    cases = [
        Case(id=f"{patient:02d}x{scan}", images=("/x",), patient=f"p{patient}")
        for patient, size in enumerate(sizes)
        for scan in range(size)
    ]
    lengths = [len(fold.validation) for fold in make_splits(cases, None, seed).folds]
    assert max(lengths) - min(lengths) <= max(sizes)


@settings(max_examples=60)
@given(st.lists(st.sampled_from("ABCD"), min_size=5, max_size=40), st.integers(0, 100))
def test_every_value_of_a_column_is_spread_evenly(values: list[str], seed: int) -> None:
    cases = [Case(id=f"c{number:02d}", images=("/x",), strata={"site": value}) for number, value in enumerate(values)]
    splits = make_splits(cases, None, seed)
    sites = {case.id: case.strata["site"] for case in cases}
    counts = [Counter(sites[item] for item in fold.validation) for fold in splits.folds]
    for value in set(values):
        assert max(count[value] for count in counts) - min(count[value] for count in counts) <= 1
    lengths = [len(fold.validation) for fold in splits.folds]
    assert max(lengths) - min(lengths) <= max(1, len(set(values)) - 1)
    assert ("stratified by site" in splits.rule) == (len(set(values)) > 1)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from(("15T", "3T")), st.booleans()), min_size=15, max_size=60),
    st.integers(0, 100),
)
def test_classes_and_two_columns_are_spread_together(drawn: list[tuple[str, str, bool]], seed: int) -> None:
    cases = [
        Case(id=f"c{number:02d}", images=("/x",), strata={"site": site, "scanner": scanner})
        for number, (site, scanner, _) in enumerate(drawn)
    ]
    presence = {f"c{number:02d}": frozenset({1, 2} if has else {1}) for number, (_, _, has) in enumerate(drawn)}
    traits = {case.id: {*case.strata.values(), *map(str, presence[case.id])} for case in cases}
    counts = [
        Counter(trait for item in fold.validation for trait in traits[item])
        for fold in make_splits(cases, presence, seed).folds
    ]
    for trait in {item for found in traits.values() for item in found}:
        spread = max(count[trait] for count in counts) - min(count[trait] for count in counts)
        assert spread <= 3
