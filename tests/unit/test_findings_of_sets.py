"""What only cases side by side show: each kind of finding where it is due, and none where it is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from checked_cases import case_of, channel_of, dataset_of, structure_of, told

from autoseg.checking.classes import check_classes, class_presence, summarise_classes
from autoseg.checking.facts import CaseFacts
from autoseg.checking.outliers import deviations, find_outliers
from autoseg.checking.plausibility import find_implausible
from autoseg.checking.prints import content_digest, correlations, detail_print
from autoseg.checking.sides import check_sides
from autoseg.checking.twins import find_twins
from autoseg.domain.dataset import Channel, Dataset
from autoseg.domain.findings import Finding, Findings
from autoseg.domain.geometry import Geometry
from autoseg.domain.splits import make_splits

MR = (Channel(name="MR"),)


def twins_of(facts: list[CaseFacts], dataset: Dataset | None = None) -> list[Finding]:
    dataset = dataset or dataset_of(len(facts))
    found = Findings()
    find_twins(facts, dataset.channels, make_splits(dataset.cases, None, 0), found)
    return found.items


def outliers_of(facts: list[CaseFacts], *channels: str) -> list[Finding]:
    found = Findings()
    find_outliers(facts, [Channel(name=name) for name in channels or ("MR",)], found)
    return found.items


def implausible_of(facts: list[CaseFacts], *channels: str) -> list[Finding]:
    found = Findings()
    find_implausible(facts, [Channel(name=name) for name in channels], found)
    return found.items


def classes_of(facts: list[CaseFacts], *classes: str) -> list[Finding]:
    dataset = dataset_of(len(facts), classes or ("a",))
    found = Findings()
    splits = make_splits(dataset.cases, class_presence(facts, dataset), 0)
    check_classes(facts, dataset, summarise_classes(facts, dataset, (1.0, 1.0, 2.0)), splits, found)
    return found.items


# --- Copies ---------------------------------------------------------------------------------------------------------


def test_different_images_are_no_copies() -> None:
    assert twins_of([case_of(number) for number in range(10)]) == []


def test_copies_are_told_with_the_folds_they_spoil() -> None:
    facts = [case_of(number) for number in range(10)]
    facts[7] = case_of(7, channel_of(7, digest=bytes([2, 0])))
    (item,) = twins_of(facts)
    assert told([item]) == [("warning", "duplicates", ("c2", "c7"))]
    assert "label maps differ" in item.message
    splits = make_splits(dataset_of(10).cases, None, 0)
    spoilt = sum(len({"c2", "c7"} & set(fold.validation)) == 1 for fold in splits.folds)
    assert f"scores of {spoilt} of 5 folds are too good" in item.cost


def test_copies_of_one_patient_only_teach_nothing_new() -> None:
    facts = [case_of(number) for number in range(10)]
    facts[7] = case_of(7, channel_of(7, digest=bytes([2, 0])), digest=bytes([200, 2]))
    dataset = dataset_of(10)
    cases = [case.model_copy(update={"patient": "p" if case.id in ("c2", "c7") else case.id}) for case in dataset.cases]
    (item,) = twins_of(facts, dataset.model_copy(update={"cases": tuple(cases)}))
    assert item.cost == "nothing new to learn from 1 case"
    assert "label maps are equal too" in item.message


def test_a_copy_among_the_test_cases_is_a_leak() -> None:
    facts = [case_of(number) for number in range(10)]
    facts.append(case_of(10, channel_of(10, digest=bytes([3, 0])), is_test=True))
    (item,) = twins_of(facts, dataset_of(10))
    assert item.cost == "scores on test cases (c10) are too good"


def test_near_copies_need_a_like_pattern_and_a_like_histogram() -> None:
    facts = [case_of(number) for number in range(10)]
    pattern = channel_of(4).detail.astype(int)
    noisy = np.clip(pattern + np.random.default_rng(0).integers(-25, 26, pattern.size), -127, 127).astype(np.int8)
    facts[8] = case_of(8, channel_of(8, detail=noisy))
    (item,) = twins_of(facts)
    assert told([item]) == [("warning", "near-duplicates", ("c4", "c8"))]
    assert "agree to 0.98" in item.message
    facts[8] = case_of(8, channel_of(8, detail=noisy, power=6))
    assert twins_of(facts) == []


def test_fainter_copies_are_told_where_all_other_pairs_are_far_apart() -> None:
    """A pattern that agrees to 0.8: told among ten unlike cases, but not of few, and not where many pairs agree."""
    pattern = channel_of(4).detail.astype(float)
    noise = np.random.default_rng(0).normal(0, 0.75 * pattern.std(), pattern.size)
    faint = np.clip((pattern + noise) / 2, -127, 127).astype(np.int8)
    facts = [case_of(number) for number in range(10)]
    facts[8] = case_of(8, channel_of(8, detail=faint))
    (item,) = twins_of(facts)
    assert told([item]) == [("warning", "near-duplicates", ("c4", "c8"))]
    assert "agree to 0.80" in item.message
    assert twins_of([facts[4], *facts[5:9]], dataset_of(10)) == []
    shared = [
        np.random.default_rng([number, 9]).normal(0, 30, pattern.size) + pattern / (2 + number) for number in range(10)
    ]
    alike = [
        case_of(number, channel_of(number, detail=np.clip(one, -127, 127).astype(np.int8)))
        for number, one in enumerate(shared)
    ]
    assert twins_of(alike) == []


def test_one_image_under_two_channels_and_grey_pictures_in_colour() -> None:
    pairs = [case_of(number, channel_of(number, 0), channel_of(number, 1)) for number in range(6)]
    dataset = dataset_of(6, channels=("T1", "T2"))
    assert twins_of(pairs, dataset) == []
    pairs[3] = case_of(3, channel_of(3, 0), channel_of(3, 1, digest=bytes([3, 0])))
    (item,) = twins_of(pairs, dataset)
    assert told([item]) == [("warning", "equal-channels", ("c3",))]
    grey = [
        case_of(
            number,
            *(channel_of(number, band, digest=bytes([number]), file=f"/data/c{number}.png") for band in range(3)),
        )
        for number in range(6)
    ]
    (item,) = twins_of(grey, dataset_of(6, channels=("R", "G", "B")))
    assert (item.severity, item.code, len(item.cases)) == ("note", "grey-as-colour", 6)


def test_one_label_map_for_all_images_teaches_a_place() -> None:
    facts = [case_of(number, digest=b"template") for number in range(6)]
    (item,) = twins_of(facts)
    assert told([item]) == [("warning", "equal-labels", tuple(f"c{number}" for number in range(6)))]
    assert item.message.startswith("all 6 cases have the same label map")
    # Two cases with equal images and labels are told as copies alone.
    both = [case_of(number) for number in range(6)]
    both[1] = case_of(1, channel_of(1, digest=bytes([0, 0])), digest=bytes([200, 0]))
    assert [item.code for item in twins_of(both)] == ["duplicates"]


GRID = Geometry((40, 44, 30), np.diag([1.0, 1, 1, 1]))


def smooth_image(seed: int) -> np.ndarray:
    from scipy import ndimage

    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=GRID.shape), 1.2)


def print_of(array: np.ndarray, grid: Geometry = GRID) -> np.ndarray:
    return detail_print(array, grid, (float(array.min()), float(array.max())))[np.newaxis]


def test_prints_know_an_image_on_another_grid_scale_and_axis_order() -> None:
    from scipy import ndimage

    image = smooth_image(0)
    resampled = ndimage.zoom(image, 1.25, order=1)
    turned = Geometry((44, 40, 30), np.array([[0, -1.0, 0, 39], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    copies = [
        print_of(image * 37 + 900),
        print_of(image + 0.1 * image.std() * np.random.default_rng(1).normal(size=image.shape)),
        print_of(resampled, Geometry(resampled.shape, np.diag([0.8, 0.8, 0.8, 1]))),
        print_of(image.transpose(1, 0, 2)[:, ::-1], turned),
    ]
    assert all(correlations(print_of(image), copy).item() > 0.92 for copy in copies)
    assert abs(correlations(print_of(image), print_of(smooth_image(1))).item()) < 0.2
    flat = np.zeros((1, 24**3), np.int8)
    assert correlations(flat, flat).item() == 0  # images without any pattern are not copies of each other


def test_digests_tell_values_and_shapes_but_no_types() -> None:
    image = np.arange(24).reshape(2, 3, 4)
    assert content_digest(image.astype(np.uint8)) == content_digest(np.asfortranarray(image.astype(np.float32)))
    assert content_digest(image) != content_digest(image.reshape(3, 2, 4))
    assert content_digest(image) != content_digest(image + (image == 23))


# --- Outliers -------------------------------------------------------------------------------------------------------


def test_deviations_are_those_of_a_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(5, 2, 20_001)
    assert deviations(np.append(values, 25.0), 0.0)[-1] == pytest.approx(10, rel=0.05)
    assert deviations(np.array([1.0, 1, 1, 1, 3]), 0.5)[-1] == 4  # the floor where all are alike


def test_a_set_of_one_kind_has_no_outliers() -> None:
    facts = [case_of(number, channel_of(number, high=1000 + 40 * number)) for number in range(12)]
    assert outliers_of(facts) == []


def test_sizes_and_spacings_far_from_the_rest() -> None:
    facts = [case_of(number) for number in range(20)]
    facts[3] = case_of(3, spacing_mm=(1.0, 1.0, 5.0), shape=(100, 100, 20))
    facts[5] = case_of(5, shape=(300, 100, 50))
    found = outliers_of(facts)
    assert told(found) == [("note", "spacing-outlier", ("c3",)), ("note", "size-outlier", ("c5",))]
    assert "1 × 1 × 5 mm, in the middle case 1 × 1 × 2" in found[0].message
    many = [case_of(number, spacing_mm=(1.0, 1.0, 6.0 if number < 6 else 2.0)) for number in range(20)]
    (spacing, size) = outliers_of(many)
    assert (spacing.code, size.code, len(spacing.cases)) == ("spacing-varies", "size-varies", 6)


def test_pictures_of_another_size_are_counted_in_pixels() -> None:
    facts = [case_of(number, shape=(256, 256, 1), is_2d=True) for number in range(12)]
    facts[0] = case_of(0, shape=(1024, 1024, 1), is_2d=True)
    (item,) = outliers_of(facts)
    assert item.message == "its size is 1024 × 1024 pixels, in the middle case 256 × 256"


@pytest.mark.parametrize(("name", "severity"), [("MR", "note"), ("CT", "warning")])
def test_a_forgotten_scale_factor_harms_where_all_images_are_scaled_alike(name: str, severity: str) -> None:
    facts = [case_of(number) for number in range(12)]
    facts[4] = case_of(4, channel_of(4, high=1_000_000.0))
    (item,) = outliers_of(facts, name)
    assert told([item]) == [(severity, "other-scale", ("c4",))]
    assert "about 1,000 times larger" in item.message


def test_many_scales_are_one_finding() -> None:
    facts = [case_of(number, channel_of(number, high=10.0 ** (2 + number % 5))) for number in range(20)]
    (item,) = outliers_of(facts)
    assert (item.code, item.severity) == ("no-common-scale", "note")
    assert "a factor of 10,000" in item.message


def test_eight_bit_images_among_others() -> None:
    facts = [case_of(number, channel_of(number, dtype="uint8" if number < 5 else "int16")) for number in range(20)]
    (item,) = outliers_of(facts)
    assert told([item]) == [("note", "mixed-types", ("c0", "c1", "c2", "c3", "c4"))]
    assert item.cost == "5 of 20 cases have 256 grey levels at most"


def test_inverted_images_are_odd_one_by_one_and_a_kind_when_they_are_many() -> None:
    dark, bright = 3.0, 0.2
    facts = [case_of(number, channel_of(number, power=bright if number == 7 else dark)) for number in range(20)]
    assert told(outliers_of(facts)) == [("note", "brightness-outlier", ("c7",))]
    facts = [case_of(number, channel_of(number, power=bright if number < 6 else dark)) for number in range(20)]
    (item,) = outliers_of(facts)
    assert (item.code, len(item.cases)) == ("two-kinds-of-images", 6)


# --- Plausibility ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "dtype", "codes"),
    [
        (-1000, 2000, "int16", []),
        (-160, 240, "int16", []),  # a soft-tissue crop
        (0, 255, "uint8", ["ct-not-hu"]),
        (0, 1, "float32", ["ct-not-hu"]),
        (-3, 3, "float32", ["ct-not-hu"]),
        (0, 3000, "int16", ["ct-no-intercept"]),
        (0, 400, "int16", ["ct-cut-off"]),
        (-3024, 1500, "int16", ["ct-padding"]),
        (-1000, 31743, "int16", ["ct-very-bright"]),
    ],
)
def test_hounsfield_units_are_plausible(low: float, high: float, dtype: str, codes: list[str]) -> None:
    facts = [case_of(0, channel_of(0, low=low, high=high, dtype=dtype))]
    assert [item.code for item in implausible_of(facts, "CT")] == codes
    assert implausible_of(facts, "T1") == []


def test_uptake_values_are_plausible() -> None:
    assert implausible_of([case_of(0, channel_of(0, high=25.0))], "PET") == []
    (item,) = implausible_of([case_of(0, channel_of(0, high=21_000.0))], "FDG-PET")
    assert item.code == "pet-scale"


def swapped_set(swapped: int | None) -> list[CaseFacts]:
    facts = []
    for number in range(8):
        mr = channel_of(number, 0, high=900.0 + 30 * number, power=1.5)
        ct = channel_of(number, 1, low=-1000, high=1200.0 + 50 * number, power=0.8)
        if number == swapped:
            mr, ct = replace(ct, number=0, file="/data/mr"), replace(mr, number=1, file="/data/ct")
        facts.append(case_of(number, mr, ct))
    return facts


def test_channels_in_each_others_place_are_found() -> None:
    assert implausible_of(swapped_set(None), "T1", "T2") == []
    (item,) = implausible_of(swapped_set(5), "T1", "T2")
    assert told([item]) == [("warning", "channels-swapped", ("c5",))]
    assert item.file == "/data/mr"


def test_channels_that_look_alike_are_never_told_as_swapped() -> None:
    facts = [case_of(number, *(channel_of(number, band) for band in range(3))) for number in range(8)]
    assert implausible_of(facts, "R", "G", "B") == []


# --- Classes --------------------------------------------------------------------------------------------------------


def test_ordinary_classes_have_no_findings() -> None:
    facts = [
        case_of(number, structures={"a": structure_of(900 + 10 * number), "b": structure_of(200)})
        for number in range(12)
    ]
    assert classes_of(facts, "a", "b") == []


def test_a_class_in_no_case_cannot_be_learnt() -> None:
    (item,) = classes_of([case_of(number) for number in range(6)], "a", "b")
    assert (item.code, item.severity, item.cost) == ("class-never-occurs", "warning", "the class 'b' cannot be learnt")


@pytest.mark.parametrize(("having", "severity"), [(3, "warning"), (4, "note"), (5, None), (12, None)])
def test_rare_classes_are_told_with_the_folds_that_lack_them(having: int, severity: str | None) -> None:
    facts = [
        case_of(number, structures={"a": structure_of()} | ({"b": structure_of()} if number < having else {}))
        for number in range(12)
    ]
    found = classes_of(facts, "a", "b")
    assert [item.severity for item in found] == ([] if severity is None else [severity])
    if severity == "warning":
        assert found[0].cost == "'b' is hardly learnt in 3 of 5 folds"
        assert "is in 3 of 12 cases (c0, c1 and c2)" in found[0].message
    if severity == "note":
        assert found[0].cost == "'b' is not scored in 1 of 5 folds"


def test_tiny_classes_are_measured_at_the_planned_spacing() -> None:
    """63 voxels are tiny on the planned grid, 64 are not, and 70 of half the size are 35."""
    for voxels, spacing_mm, is_tiny in (
        (63, (1.0, 1.0, 2.0), True),
        (64, (1.0, 1.0, 2.0), False),
        (70, (1.0, 1.0, 1.0), True),
    ):
        facts = [
            case_of(number, structures={"a": structure_of(voxels)}, spacing_mm=spacing_mm, shape=(100, 100, 100))
            for number in range(6)
        ]
        assert [item.code for item in classes_of(facts)] == (["tiny-structures"] if is_tiny else [])


def test_stray_islands_are_told_where_others_have_one_piece() -> None:
    structures = [structure_of() for _ in range(12)]
    structures[4] = structure_of(1000, pieces=3, stray=12)
    structures[9] = structure_of(1000, pieces=2, stray=300)
    found = classes_of([case_of(number, structures={"a": item}) for number, item in enumerate(structures)])
    assert told(found) == [("note", "stray-islands", ("c4",)), ("warning", "stray-islands", ("c9",))]
    assert "in 3 pieces: 12 voxels (1.2 % of it) off the largest; 10 of 12 cases have one piece" in found[0].message
    many = [
        case_of(number, structures={"a": structure_of(1000, pieces=1 + number % 3, stray=9)}) for number in range(12)
    ]
    assert classes_of(many) == []


def test_structures_of_another_size() -> None:
    facts = [
        case_of(number, structures={"a": structure_of(50 if number == 2 else 1000 + 7 * number)})
        for number in range(12)
    ]
    (item,) = classes_of(facts)
    assert told([item]) == [("note", "volume-outlier", ("c2",))]


def test_gaps_between_label_values_are_a_note() -> None:
    dataset = dataset_of(6, ("a", "b", "c"))
    labels = dataset.labels.model_copy(update={"classes": (dataset.labels.classes[0], dataset.labels.classes[2])})
    found = Findings()
    facts = [case_of(number, structures={"a": structure_of(), "c": structure_of()}) for number in range(6)]
    gapped = dataset.model_copy(update={"labels": labels})
    check_classes(facts, gapped, summarise_classes(facts, gapped, None), None, found)
    assert [item.code for item in found.items] == ["label-gaps"]
    assert "2 of 1 to 3 is not used" in found.items[0].message


def sided(number: int, left_x: float, right_x: float) -> CaseFacts:
    return case_of(
        number,
        structures={
            "left lung": structure_of(centre_mm=(left_x, 0, 0)),
            "right lung": structure_of(centre_mm=(right_x, 0, 0)),
        },
    )


def sides_of(facts: list[CaseFacts], *names: str) -> list[Finding]:
    found = Findings()
    check_sides(facts, dataset_of(len(facts), names or ("left lung", "right lung")).labels, found)
    return found.items


def test_sides_that_contradict_the_other_cases() -> None:
    facts = [sided(number, -40, 40) for number in range(6)]
    assert [item.code for item in sides_of(facts)] == ["left-right-pairs"]
    facts[2] = sided(2, 40, -40)
    assert told(sides_of(facts))[1:] == [("warning", "sides-swapped", ("c2",))]
    facts[2] = sided(2, 0.2, -0.2)  # less than a voxel apart: nobody can tell
    assert len(sides_of(facts)) == 1
    assert sides_of(facts, "anterior", "posterior") == []


def test_sets_that_are_mirrored_throughout_are_a_note() -> None:
    facts = [sided(number, 40, -40) for number in range(6)]
    assert [item.code for item in sides_of(facts)] == ["left-right-pairs", "sides-mirrored"]
    facts[1] = sided(1, -40, 40)
    assert told(sides_of(facts))[-1] == ("warning", "sides-swapped", ("c1",))
