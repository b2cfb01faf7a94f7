"""Cases that lack channels: declared, measured, prepared, trained on and segmented like the others."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from planning_cases import fingerprint_of, schema
from pydantic import ValidationError

from autoseg.checking.doctor import check_dataset
from autoseg.domain.dataset import Case, Channel, Dataset
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.layouts import load_dataset, resolve_dataset
from autoseg.domain.plan import AugmentationPlan, ChannelNormalization, Configuration, Plan, PreprocessPlan
from autoseg.errors import ConfigError, DatasetError
from autoseg.inference.inputs import find_cases, require_channels
from autoseg.io.images import read_case, write_image, write_labels
from autoseg.io.store import CaseStore
from autoseg.pipeline.planning import measure
from autoseg.pipeline.prediction import _tell_of_missing_channels
from autoseg.planning.overrides import apply_overrides
from autoseg.planning.planner import CHANNEL_DROPOUT, make_plan
from autoseg.planning.presets import preset_rules
from autoseg.preprocessing.measure import measure_case, merge
from autoseg.preprocessing.prepare import prepare_case
from autoseg.preprocessing.transform import apply
from autoseg.runtime import NoProgress
from autoseg.training import augment
from autoseg.training.batches import BatchReader, assemble
from autoseg.training.sampling import CasePool, Sampler

SHAPE = (7, 6, 5)
GRID = Geometry(SHAPE, np.diag([-1.0, 1.2, 2, 1]))
CHANNELS = (Channel(name="T1"), Channel(name="CT", may_be_missing=True), Channel(name="PET"))
PLAN = PreprocessPlan(
    target_spacing=(1.5, 1.0, 1.3),
    normalization=(
        ChannelNormalization(scheme="zscore", use_mask=True),
        ChannelNormalization(scheme="ct", mean=40, std=20, lower=0, upper=90),
        ChannelNormalization(scheme="zscore"),
    ),
)


def channel(number: int) -> NDArray[np.float32]:
    """A channel with a border of zeros that only channel 1 reaches into."""
    array = np.random.default_rng(number).normal(50 * number, 10, SHAPE).astype(np.float32)
    if number != 1:
        array[0], array[:, -1] = 0, 0
    return array


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases of three channels; b has no channel 1."""
    folder = tmp_path_factory.mktemp("files")
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:5, 2:4, 1:3] = 1
    for case in "abc":
        for number in range(3):
            if (case, number) != ("b", 1):
                write_image(folder / f"imagesTr/{case}_{number:04d}.nii.gz", channel(number), GRID)
        write_labels(folder / f"labelsTr/{case}.nii.gz", labels, GRID)
    return folder


@pytest.fixture
def folder(files: Path, tmp_path: Path) -> Path:
    """A copy of the files, to be described and changed."""
    return shutil.copytree(files, tmp_path / "set")


def describe(folder: Path, **more: object) -> Path:
    names = {"0": "T1", "1": "CT", "2": "PET"}
    description = {"channel_names": names, "labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description | more))
    return folder


def errors_of(path: Path) -> list[tuple[str, str]]:
    return [(item.code, item.case) for item in resolve_dataset(path)[1] if item.severity == "error"]


# --- Declaring --------------------------------------------------------------------------------------------------------


def test_nnunets_layout_needs_a_declaration(folder: Path) -> None:
    assert errors_of(describe(folder)) == [("missing-channel", "b")]
    dataset = load_dataset(describe(folder, missing_channels={"b": [1]}))
    assert dataset.case("b").missing == (1,)
    assert [Path(file).name for file in dataset.case("b").images] == ["b_0000.nii.gz", "b_0002.nii.gz"]
    assert dataset.case("b").files == (*dataset.case("b").images, str(folder / "labelsTr/b.nii.gz"))
    assert dataset.case("a").missing == ()
    assert [item.may_be_missing for item in dataset.channels] == [False, True, False]
    assert Dataset.from_json(dataset.to_json(), "dataset.json") == dataset


@pytest.mark.parametrize(
    ("declared", "error"),
    [
        ({"b": [1], "a": [0]}, ("channel-not-missing", "a")),
        ({"b": [1], "x": [1]}, ("unknown-case", "x")),
        ({"b": [2]}, ("missing-channel", "b")),
        ({"b": [3]}, ("bad-description", "")),
        ({"b": [0, 1, 2]}, ("bad-description", "")),
        ({"b": 1}, ("bad-description", "")),
        ({"b": [True]}, ("bad-description", "")),
        (["b"], ("bad-description", "")),
    ],
)
def test_what_is_declared_must_be_true(folder: Path, declared: object, error: tuple[str, str]) -> None:
    assert error in errors_of(describe(folder, missing_channels=declared))


def test_null_in_a_manifest_and_an_empty_cell_in_a_table_say_it_too(folder: Path) -> None:
    rows = {case: [f"imagesTr/{case}_{number:04d}.nii.gz" for number in range(3)] for case in "abc"}
    rows["b"][1] = ""
    head = {"channels": ["T1", "CT", "PET"], "labels": [{"name": "tumour", "value": 1}]}
    cases = [
        {"id": case, "images": [file or None for file in files], "labels": f"labelsTr/{case}.nii.gz"}
        for case, files in rows.items()
    ]
    (folder / "m.json").write_text(json.dumps(head | {"cases": cases}))
    (folder / "t.json").write_text(json.dumps(head))
    lines = [f"{case},{','.join(files)},labelsTr/{case}.nii.gz" for case, files in rows.items()]
    (folder / "t.csv").write_text("\n".join(["id,image_0,image_1,image_2,label", *lines]))
    from_json, from_csv = load_dataset(folder / "m.json"), load_dataset(folder / "t.csv")
    declared = load_dataset(describe(folder, missing_channels={"b": [1]}))
    for dataset in (from_json, from_csv):
        assert dataset.cases == declared.cases
        assert dataset.channels == declared.channels
    cases[1]["images"] = [None, None, None]
    (folder / "m.json").write_text(json.dumps(head | {"cases": cases}))
    with pytest.raises(DatasetError, match="case 'b' lacks every channel"):
        load_dataset(folder / "m.json")
    cases[1]["images"] = ["imagesTr/b_0000.nii.gz", None]
    (folder / "m.json").write_text(json.dumps(head | {"cases": cases}))
    with pytest.raises(DatasetError, match="1 image files, 1 declared as missing for 3 channels"):
        load_dataset(folder / "m.json")


def test_a_channel_that_only_new_images_may_lack_is_declared_by_itself(folder: Path) -> None:
    head = {"channels": ["T1", "CT", {"name": "PET", "may_be_missing": True}]}
    images = [f"imagesTr/a_{number:04d}.nii.gz" for number in range(3)]
    cases = [{"id": "a", "images": images, "labels": "labelsTr/a.nii.gz"}]
    manifest = head | {"labels": [{"name": "tumour", "value": 1}], "cases": cases}
    (folder / "m.json").write_text(json.dumps(manifest))
    assert [item.may_be_missing for item in load_dataset(folder / "m.json").channels] == [False, False, True]


def test_a_data_set_whose_cases_lack_other_channels_is_refused() -> None:
    for missing in ((0,), (3,)):
        with pytest.raises(ValidationError, match="not one that may be missing"):
            Dataset(name="x", channels=CHANNELS, labels=schema(), cases=(Case(id="a", images=("f",), missing=missing),))
    with pytest.raises(ValidationError, match="ascending"):
        Case(id="a", images=("f",), missing=(2, 1))


def test_check_notes_what_is_declared_and_reports_no_error(folder: Path) -> None:
    report = check_dataset(describe(folder, missing_channels={"b": [1]}), workers=1, progress=NoProgress())
    assert not report.stops_training
    notes = {item.code: item.message for item in report.findings if item.severity == "note"}
    assert notes["missing-channel"] == "1 of 3 cases lack the channel 1 (CT), as declared"
    assert report.num_files == 11


def test_what_may_be_missing_is_known_without_any_file(tmp_path: Path) -> None:
    """Planning from a fingerprint needs no images, and the plan must not forget what they lack."""
    raw = load_dataset(describe(tmp_path, missing_channels={"b": [1]}), need_files=False)
    assert [item.may_be_missing for item in raw.channels] == [False, True, False]
    head = {"channels": ["T1", "CT"], "labels": [{"name": "tumour", "value": 1}]}
    cases = [{"id": "a", "images": [None, "a_ct.nii"], "labels": "a.nii"}]
    (tmp_path / "m.json").write_text(json.dumps(head | {"cases": cases}))
    manifest = load_dataset(tmp_path / "m.json", need_files=False)
    assert [item.may_be_missing for item in manifest.channels] == [True, False]


# --- Reading, measuring, preparing ------------------------------------------------------------------------------------


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    return load_dataset(describe(folder, missing_channels={"b": [1]}))


def test_the_volume_holds_what_is_there(dataset: Dataset) -> None:
    volume = read_case(dataset.case("b"), 3)
    assert volume.missing == (1,)
    assert volume.channels == (0, 2)
    assert volume.num_channels == 3
    np.testing.assert_array_equal(volume.array, np.stack([channel(0), channel(2)]))
    only_one = Case(id="b", images=dataset.case("b").images[1:], missing=(0, 1))
    np.testing.assert_array_equal(read_case(only_one, 3).array, channel(2)[None])
    with pytest.raises(DatasetError, match="got 1 image files and 1 missing channels, expected 3"):
        read_case(Case(id="b", images=dataset.case("b").images[1:], missing=(0,)), 3)


def test_missing_channels_are_zero_after_normalisation_and_change_nothing_else(dataset: Dataset) -> None:
    prepared = apply(read_case(dataset.case("b"), 3), PLAN)
    assert not prepared.image[1].any()
    others = PLAN.model_copy(update={"normalization": (PLAN.normalization[0], PLAN.normalization[2])})
    alone = apply(Volume(np.stack([channel(0), channel(2)]), GRID), others)
    np.testing.assert_array_equal(prepared.image[[0, 2]], alone.image)
    # Channel 1 alone reaches into the border: without it the border is cut away.
    assert prepared.trail.crop_shape == alone.trail.crop_shape == (5, 5, 6)
    assert apply(read_case(dataset.case("a"), 3), PLAN).trail.crop_shape == (5, 6, 7)


def test_they_take_no_part_in_the_fingerprint(dataset: Dataset) -> None:
    with_b = measure(dataset)
    without_b = measure(dataset.model_copy(update={"cases": (dataset.case("a"), dataset.case("c"))}))
    assert with_b.intensities[1] == without_b.intensities[1]
    stats = {case.case: case for case in with_b.cases}
    assert [item is None for item in stats["b"].intensities] == [False, True, False]
    assert (stats["a"].shape, stats["b"].shape) == ((5, 6, 7), (5, 5, 6))
    lacking = Volume(np.stack([channel(0), channel(1)]), GRID, missing=(2,))
    labels = np.ones(SHAPE, np.int16)
    nobody = [measure_case(lacking, labels, case, 2) for case in "ab"]
    assert [item is None for item in nobody[0].intensities] == [False, False, True]
    with pytest.raises(DatasetError, match=r"no case with labelled voxels has the channel 2 \(PET\)"):
        merge(nobody, ["T1", "CT", "PET"], 2)


def test_cached_arrays_equal_those_of_prediction_bit_for_bit(dataset: Dataset, tmp_path: Path) -> None:
    store = CaseStore(tmp_path / "cache")
    case = dataset.case("b")
    assert prepare_case(case, PLAN, dataset.labels, store)
    assert not prepare_case(case, PLAN, dataset.labels, store)
    stored = store.open("b")
    assert stored.channels == 3
    predicted = apply(read_case(case.model_copy(update={"labels": None}), 3), PLAN)
    assert np.array_equal(stored.read((0, 0, 0), stored.shape)[0], predicted.image)


def test_the_same_files_as_other_channels_are_another_case(dataset: Dataset, tmp_path: Path) -> None:
    """The cache knew a case by its files alone, and kept one whose channels had been declared wrongly."""
    store, case = CaseStore(tmp_path / "cache"), dataset.case("b")
    prepare_case(case, PLAN, dataset.labels, store)
    corrected = case.model_copy(update={"missing": (2,)})
    assert prepare_case(corrected, PLAN, dataset.labels, store)
    assert not store.open("b").read((0, 0, 0), (1, 1, 1))[0][2].any()
    prepare_case(dataset.case("a"), PLAN, dataset.labels, store)
    # The files of whole cases are the same bytes as ever.
    assert [b"missing" in store.path(name).read_bytes() for name in "ab"] == [False, True]


# --- The plan ---------------------------------------------------------------------------------------------------------


def planned(channels: Sequence[Channel] = CHANNELS) -> Plan:
    fingerprint = fingerprint_of([(1.0,) * 3] * 5, [(40,) * 3] * 5, channels=[item.name for item in channels])
    return make_plan(fingerprint, "test", schema(), tuple(channels), preset_rules("default"))


def test_what_may_be_missing_is_dropped_in_training_and_travels_with_the_plan() -> None:
    plan = planned()
    for part in plan.configurations.values():
        assert part.training.augmentation.channel_dropout == (0.0, CHANNEL_DROPOUT, 0.0)
    reasons = [item for item in plan.decisions if item.topic == "missing channels"]
    assert [item.configuration for item in reasons] == [""]
    assert "CT" in reasons[0].inputs
    assert Plan.model_validate_json(plan.to_json()).channels[1].may_be_missing
    changed = apply_overrides(plan, [("training.augmentation.channel_dropout", [0, 0.5, 0])])
    assert changed.configurations["2d"].training.augmentation.channel_dropout == (0, 0.5, 0)


def test_where_nothing_is_missing_a_plan_says_nothing_of_it() -> None:
    text = planned([Channel(name="T1"), Channel(name="CT"), Channel(name="PET")]).to_json()
    assert "channel_dropout" not in text
    assert "may_be_missing" not in text
    assert "missing channels" not in text


@pytest.mark.parametrize("wrong", [(0.1,), (0.1, 0.1, 1.0), (0.1, -0.1, 0.0)])
def test_dropout_that_does_not_fit_is_refused(wrong: tuple[float, ...]) -> None:
    data = planned().configurations["2d"].model_dump()
    data["training"]["augmentation"]["channel_dropout"] = wrong
    with pytest.raises(ValidationError, match="channel_dropout"):
        Configuration.model_validate(data)


# --- Training ---------------------------------------------------------------------------------------------------------

EVERYTHING = AugmentationPlan().model_copy(
    update={name: 1.0 for name in AugmentationPlan.model_fields if name.endswith("_probability")}
    | {"noise_variance": (0.1, 0.2)}
)


class MadeUpCase:
    """Noise in the channels that are there, 0 in the others."""

    shape = (9, 9, 9)
    channels = 3

    def __init__(self, missing: Sequence[int]) -> None:
        self.missing = list(missing)

    @property
    def foreground(self) -> dict[int, NDArray[np.int32]]:
        return {1: np.array([[4, 4, 4]], np.int32)}

    def read(self, start: Sequence[int], stop: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        size = [high - low for low, high in zip(start, stop, strict=True)]
        image = np.random.default_rng(0).normal(size=(3, *size)).astype(np.float32)
        image[self.missing] = 0
        return image, np.zeros(size, np.int16)


class Store:
    def open(self, case_id: str) -> MadeUpCase:
        return MadeUpCase([int(number) for number in case_id.split("-")[1:]])


def shown(case_ids: tuple[str, ...], dropout: tuple[float, ...], steps: int = 30) -> NDArray[np.bool_]:
    """Which channels hold anything, (samples, channels), with every augmentation at work."""
    plan = EVERYTHING.model_copy(update={"channel_dropout": dropout})
    reader = BatchReader(Sampler(case_ids, (6, 6, 6), 4, 1 / 3, 7), CasePool(Store()), 3, plan, 250)
    batches = [assemble(reader.read(step), torch.device("cpu")) for step in range(steps)]
    return np.concatenate([batch.images.flatten(2).any(2).numpy() for batch in batches])


def test_a_missing_channel_stays_empty_whatever_is_done_to_the_others() -> None:
    """Noise on a channel that is not there would show the network what no new image shows."""
    seen = shown(("case-1",), (0.0, 0.2, 0.0))
    assert not seen[:, 1].any()
    assert seen[:, [0, 2]].all()


def test_channels_are_dropped_as_often_as_planned() -> None:
    seen = shown(("case",), (0.0, 0.3, 0.0), steps=100)
    assert seen[:, [0, 2]].all()
    assert 0.2 < 1 - seen[:, 1].mean() < 0.4


def test_a_patch_never_loses_its_last_channel() -> None:
    assert shown(("case-1", "case"), (0.8, 0.8, 0.8)).any(axis=1).all()
    image = np.ones((3, 2, 2, 2), np.float32)
    assert augment.blank_channels(image, (0, 2)) == (0, 2)
    assert augment.blank_channels(image, (0, 1, 2)) == ()
    image[1] = 0
    assert augment.blank_channels(image, (0, 2)) == (1,)
    assert augment.blank_channels(np.zeros_like(image), (0,)) == (0, 1, 2)


def test_dropout_leaves_all_other_random_numbers_as_they_are() -> None:
    """Trainings without it are the same, bit for bit, as before there was any."""
    for seed in range(5):
        with_it = EVERYTHING.model_copy(update={"channel_dropout": (0.9, 0.9)})
        one = augment.draw(EVERYTHING, 3, 2, np.random.default_rng(seed))
        other = augment.draw(with_it, 3, 2, np.random.default_rng(seed))
        assert one.dropped == ()
        for name in augment.Augmentation.__slots__:
            if name != "dropped":
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# --- Prediction -------------------------------------------------------------------------------------------------------


def test_new_cases_may_lack_what_the_plan_says(folder: Path) -> None:
    inputs = [folder / "imagesTr"]
    with pytest.raises(ConfigError) as caught:
        find_cases(inputs, 3)
    assert caught.value.problems == ("case b lacks the channels 0001",)
    with pytest.raises(ConfigError):
        find_cases(inputs, 3, optional=(2,))
    cases = {case.id: case for case in find_cases(inputs, 3, optional=(1, 2))}
    assert [Path(file).name for file in cases["b"].images] == ["b_0000.nii.gz", "b_0002.nii.gz"]
    assert {case.id: case.missing for case in cases.values()} == {"a": (), "b": (1,), "c": ()}


def test_a_first_channel_may_be_the_missing_one(folder: Path) -> None:
    (folder / "imagesTr/c_0000.nii.gz").unlink()
    (folder / "imagesTr/b_0002.nii.gz").unlink()
    cases = {case.id: case.missing for case in find_cases([folder / "imagesTr"], 3, optional=(0, 1, 2))}
    assert cases == {"a": (), "b": (1, 2), "c": (0,)}


def test_a_lone_file_that_holds_every_channel_is_whole(tmp_path: Path) -> None:
    write_image(tmp_path / "x_0000.nii.gz", np.stack([channel(number) for number in range(3)]), GRID)
    (case,) = find_cases([tmp_path], 3, optional=(1, 2))
    assert case.missing == ()


def test_what_was_missing_is_told(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "autoseg"):
        _tell_of_missing_channels(dataset.cases, CHANNELS)
    assert [item.getMessage() for item in caplog.records] == [
        "b: segmented without the channel 1 (CT), which is missing"
    ]


def test_a_volume_that_lacks_more_is_refused(dataset: Dataset) -> None:
    volume = read_case(dataset.case("b"), 3)
    require_channels(volume, CHANNELS)
    with pytest.raises(DatasetError, match=r"the channel 1 \(CT\) is missing, and the model has not learned"):
        require_channels(volume, [Channel(name=item.name) for item in CHANNELS])
