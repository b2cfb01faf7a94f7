"""What a cascade's network sees of its previous stage, and how training disturbs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from autoseg import runtime
from autoseg.domain.dataset import Case, LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.plan import AugmentationPlan, ChannelNormalization, PreprocessPlan
from autoseg.errors import DatasetError
from autoseg.io.cached import Source
from autoseg.io.images import write_image, write_labels
from autoseg.io.maps import MapStore, OutOfFoldMaps
from autoseg.preprocessing.previous import one_hot, prepare_previous, previous_map
from autoseg.preprocessing.transform import apply, trace
from autoseg.training import cascade
from autoseg.training.augment import IDENTITY
from autoseg.training.batches import BatchReader, RawSample, assemble
from autoseg.training.cascade import Operation, PreviousAugmentation, PreviousReader, Removal, Reshaping
from autoseg.training.sampling import CasePool, Sampler, SampleSpec

CPU = torch.device("cpu")
NUM_CLASSES = 4
ALWAYS = AugmentationPlan(
    cascade_morphology_probability=1, cascade_morphology_label_probability=1, cascade_morphology_radius=(1, 3),
    cascade_drop_probability=1, cascade_drop_label_probability=1,
)  # fmt: skip
NEVER = AugmentationPlan(cascade_morphology_probability=0, cascade_drop_probability=0)
SCHEMA = LabelSchema(classes=(LabelClass(name="low", values=(7,)), LabelClass(name="high", values=(300,))))


def blobs(seed: int, shape: tuple[int, ...] = (20, 18, 22)) -> NDArray[np.uint8]:
    """Smooth regions of every class."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.standard_normal(shape), 2.0) for _ in range(NUM_CLASSES)]
    return np.argmax(fields, axis=0).astype(np.uint8)


def ball(radius: int, dims: int) -> NDArray[np.bool_]:
    grid = np.indices((2 * radius + 1,) * dims) - radius
    return (grid**2).sum(0) <= radius**2


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("radius", [1, 2, 5, 8])
def test_morphology_equals_scipys_inside(dims: int, radius: int) -> None:
    """Far from the edge of the array, where SciPy takes the outside for background."""
    mask = np.pad(blobs(radius, (12, 10, 11)[:dims]) == 1, 2 * radius)
    structure = ball(radius, dims)
    expected = {
        Operation.DILATE: ndimage.binary_dilation(mask, structure),
        Operation.ERODE: ndimage.binary_erosion(mask, structure),
        Operation.OPEN: ndimage.binary_opening(mask, structure),
        Operation.CLOSE: ndimage.binary_closing(mask, structure),
    }
    for operation, result in expected.items():
        assert np.array_equal(cascade.reshape_mask(mask, operation, radius), result), operation


def test_nothing_grows_or_shrinks_from_the_edge_of_the_patch() -> None:
    full, empty = np.ones((9, 9, 9), bool), np.zeros((9, 9, 9), bool)
    for operation in Operation:
        assert cascade.reshape_mask(full, operation, 3).all()
        assert not cascade.reshape_mask(empty, operation, 3).any()


@given(seed=st.integers(0, 10**6), radius=st.integers(1, 4), label=st.integers(1, NUM_CLASSES - 1))
def test_morphology_changes_only_voxels_near_the_border_of_its_class(seed: int, radius: int, label: int) -> None:
    before = blobs(seed, (14, 12, 13))
    is_class = before == label
    # Distance to the nearest voxel on the other side of the class's border.
    away = np.where(is_class, ndimage.distance_transform_edt(is_class), ndimage.distance_transform_edt(~is_class))
    for operation in Operation:
        after = before.copy()
        cascade.change(after, PreviousAugmentation(reshapings=(Reshaping(label, operation, radius),)))
        changed = after != before
        assert np.all(away[changed] <= radius)
        assert np.all(after[changed & ~is_class] == label)
        assert np.all(after[changed & is_class] == 0)
        if operation in (Operation.DILATE, Operation.CLOSE):
            assert np.all(after[is_class] == label)
        else:
            assert np.all(is_class[after == label])


@given(seed=st.integers(0, 10**6), choice=st.floats(0, 1, exclude_max=True), fraction=st.sampled_from((0.02, 0.15)))
def test_a_removal_takes_one_whole_component_and_none_that_is_large(seed: int, choice: float, fraction: float) -> None:
    before = blobs(seed, (14, 12, 13))
    for label in range(1, NUM_CLASSES):
        components, count = ndimage.label(before == label, np.ones((3, 3, 3)))
        sizes = np.bincount(components.ravel())[1:]
        may_go = np.flatnonzero(sizes <= fraction * before.size) + 1
        after = before.copy()
        cascade.change(after, PreviousAugmentation(removals=(Removal(label, choice),), largest_fraction=fraction))
        gone = np.unique(components[after != before])
        assert len(gone) == min(1, len(may_go))
        assert set(gone) <= set(may_go)
        assert np.all(after[np.isin(components, gone) & (components > 0)] == 0)
        assert count == 0 or after[components == 0].tolist() == before[components == 0].tolist()


@given(seed=st.integers(0, 10**6))
def test_what_was_drawn_stays_within_the_plan(seed: int) -> None:
    drawn = cascade.draw(ALWAYS, NUM_CLASSES, np.random.default_rng(seed))
    assert sorted(item.label for item in drawn.reshapings) == [1, 2, 3]
    assert all(1 <= item.radius <= 3 for item in drawn.reshapings)
    assert sorted(item.label for item in drawn.removals) == [1, 2, 3]
    assert drawn.largest_fraction == 0.15
    again = cascade.draw(ALWAYS, NUM_CLASSES, np.random.default_rng(seed))
    assert again == drawn
    nothing = cascade.draw(NEVER, NUM_CLASSES, np.random.default_rng(seed))
    assert (nothing.reshapings, nothing.removals) == ((), ())


def test_how_often() -> None:
    """Frequencies within four standard errors of nnU-Net's."""
    plan, count = AugmentationPlan(), 3000
    drawn = [cascade.draw(plan, 3, np.random.default_rng(seed)) for seed in range(count)]
    reshapings = [item for sample in drawn for item in sample.reshapings]
    for probability, hits, total in (
        (0.4 * 0.75, sum(bool(sample.reshapings) for sample in drawn), count),
        (0.2 * 0.75, sum(bool(sample.removals) for sample in drawn), count),
        (0.4 * 0.5, sum(item.label == 2 for item in reshapings), count),
        (0.25, sum(item.operation is Operation.OPEN for item in reshapings), len(reshapings)),
        (0.125, sum(item.radius == 8 for item in reshapings), len(reshapings)),
    ):
        assert abs(hits / total - probability) < 4 * (probability * (1 - probability) / total) ** 0.5


@given(seed=st.integers(0, 10**6))
def test_channels_are_one_hot_and_background_is_none_of_them(seed: int) -> None:
    labels = blobs(seed, (10, 9, 8))
    cascade.change(labels, cascade.draw(ALWAYS, NUM_CLASSES, np.random.default_rng(seed)))
    channels = one_hot(torch.from_numpy(labels)[None], NUM_CLASSES)
    assert channels.shape == (1, 3, 10, 9, 8)
    assert channels.dtype == torch.float32
    assert torch.equal(channels.sum(1)[0], torch.from_numpy((labels > 0).astype(np.float32)))
    assert np.array_equal((channels[0] * torch.arange(1.0, 4.0)[:, None, None, None]).sum(0), labels)


# --- Samples -------------------------------------------------------------------------------------------------------


class MemoryCase:
    """A case whose label map is the same as its labels."""

    channels = 1

    def __init__(self, seed: int, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.labels = blobs(seed, shape)
        self.image = self.labels[None] + np.float32(0.5)

    @property
    def foreground(self) -> dict[int, NDArray[np.int32]]:
        return {label: np.argwhere(self.labels == label).astype(np.int32) for label in range(1, NUM_CLASSES)}

    def read(self, start: Sequence[int], stop: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        box = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
        return self.image[(slice(None), *box)].copy(), self.labels[box].astype(np.int16)


class MemoryMap(MemoryCase):
    def read(self, start: Sequence[int], stop: Sequence[int]) -> NDArray[np.uint8]:  # type: ignore[override]
        return super().read(start, stop)[1].astype(np.uint8)


class MemoryStore:
    """Two cases, one smaller than the patch."""

    def __init__(self, kind: type[MemoryCase]) -> None:
        self.kind = kind

    def open(self, case_id: str) -> MemoryCase:
        return self.kind(*{"small": (1, (6, 7, 5)), "large": (2, (20, 22, 24))}[case_id])


def reader(plan: AugmentationPlan | None, dims: int = 3, seed: int = 0) -> BatchReader:
    sampler = Sampler(("large", "small"), (8, 8, 8) if dims == 3 else (1, 8, 8), 4, 1 / 3, seed)
    maps = PreviousReader(MemoryStore(MemoryMap), NUM_CLASSES, plan, seed)  # type: ignore[arg-type]
    return BatchReader(sampler, CasePool(MemoryStore(MemoryCase)), dims, plan, 250, maps)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_map_is_cut_turned_and_mirrored_as_the_labels_are(dims: int) -> None:
    """A previous stage that is always right gives the one-hot labels, whatever was drawn."""
    angles = (30.0,) * (3 if dims == 3 else 1)
    turning = {"rotation_probability": 0.8, "scaling_probability": 0.8, "rotation_degrees": angles}
    plan = NEVER.model_copy(update={**turning, "mirror_axes": tuple(range(dims)), "noise_probability": 1.0})
    source = reader(plan, dims)
    for step in range(6):
        batch = assemble(source.read(step), CPU)
        assert batch.images.shape == (4, NUM_CLASSES, *(8,) * dims)
        assert torch.equal(batch.images[:, 1:], one_hot(batch.labels, NUM_CLASSES))


def test_disturbing_the_map_leaves_image_and_labels_alone() -> None:
    """Bit for bit those of a training without a previous stage."""
    plan = AugmentationPlan(cascade_morphology_probability=1, cascade_drop_probability=1)
    disturbed, quiet, alone = (
        reader(plan), reader(plan.model_copy(update=NEVER.model_dump(include={
            "cascade_morphology_probability", "cascade_drop_probability"}))), reader(plan),
    )  # fmt: skip
    alone = BatchReader(alone.sampler, alone.pool, 3, plan, 250)
    num_changed = 0
    for step in range(4):
        one, other, third = (assemble(source.read(step), CPU) for source in (disturbed, quiet, alone))
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.labels, third.labels)
        assert torch.equal(one.images[:, :1], third.images)
        num_changed += int((one.images[:, 1:] != other.images[:, 1:]).any((1, 2, 3, 4)).sum())
        assert set(one.images[:, 1:].unique().tolist()) <= {0.0, 1.0}
    assert num_changed > 4


def test_a_map_depends_on_the_sample_alone() -> None:
    first, second = reader(ALWAYS), reader(ALWAYS)
    second.read(3)
    for one, other in zip(first.read(1), second.read(1), strict=True):
        assert one.previous is not None
        assert other.previous is not None
        assert np.array_equal(one.previous.labels, other.previous.labels)


def test_validation_sees_the_map_as_it_is() -> None:
    batch = assemble(reader(None).read(0), CPU)
    assert torch.equal(batch.images[:, 1:], one_hot(batch.labels, NUM_CLASSES))


def test_a_map_of_another_grid_is_refused() -> None:
    class Swapped(MemoryStore):
        def open(self, case_id: str) -> MemoryCase:
            return super().open("small" if case_id == "large" else "large")

    maps = PreviousReader(Swapped(MemoryMap), NUM_CLASSES, None, 0)  # type: ignore[arg-type]
    source = reader(None)
    broken = BatchReader(source.sampler, source.pool, 3, None, 250, maps)
    with pytest.raises(DatasetError, match=r"the label map of case \w+ has"):
        broken.read(0)


# --- The cache -----------------------------------------------------------------------------------------------------

SPACING = (1.3, 1.0, 3.0)
PLAN = PreprocessPlan(target_spacing=(2.0, 1.5, 1.0), normalization=(ChannelNormalization(scheme="zscore"),))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """An image with a border of zeros, against the canonical axes; its prediction lies in prediction.nii.gz."""
    shape = (14, 16, 9)
    array = np.zeros(shape, np.float32)
    array[2:-1, 1:-2, 1:] = np.random.default_rng(0).normal(5, 1, (11, 13, 8))
    geometry = Geometry(shape, np.diag([-SPACING[0], SPACING[1], -SPACING[2], 1.0]))
    write_image(tmp_path / "image.nii.gz", array, geometry)
    values = np.array([0, 7, 300, 0], np.uint16)[blobs(3, shape)]
    write_labels(tmp_path / "prediction.nii.gz", values, geometry)
    return Case(id="a", images=(str(tmp_path / "image.nii.gz"),))


def prediction_of(case: Case) -> Path:
    return Path(case.images[0]).with_name("prediction.nii.gz")


def test_the_cached_map_equals_that_of_the_prediction_path(case: Case, tmp_path: Path) -> None:
    from autoseg.io.images import read_case, read_labels

    store = MapStore(tmp_path / "maps", "w1")
    assert prepare_previous(case, prediction_of(case), PLAN, SCHEMA, store)
    volume = read_case(case, 1)
    prepared = apply(volume, PLAN)
    values, _ = read_labels(prediction_of(case), volume.geometry)
    expected = previous_map(values, prepared.trail, PLAN, SCHEMA)
    stored = store.open("a")
    assert stored.shape == prepared.image.shape[1:] == expected.shape
    found = stored.read((0, 0, 0), stored.shape)
    assert found.dtype == expected.dtype == np.uint8
    assert np.array_equal(found, expected)
    assert set(np.unique(found)) == {0, 1, 2}
    assert np.array_equal(stored.read((1, 2, 0), (4, 5, 3)), expected[1:4, 2:5, 0:3])
    with pytest.raises(ValueError, match="not inside"):
        stored.read((0, 0, 0), (99, 1, 1))


def test_the_trail_without_the_work_is_the_trail(case: Case) -> None:
    from autoseg.io.images import read_case

    volume: Volume = read_case(case, 1)
    done, foreseen = apply(volume, PLAN).trail, trace(volume, PLAN)
    assert (done.crop_start, done.crop_shape, done.resampled_shape) == (
        foreseen.crop_start, foreseen.crop_shape, foreseen.resampled_shape,
    )  # fmt: skip
    assert (done.orientation, done.target_spacing) == (foreseen.orientation, foreseen.target_spacing)


def test_a_stale_map_is_never_used(case: Case, tmp_path: Path) -> None:
    folder, prediction = tmp_path / "maps", prediction_of(case)
    old = MapStore(folder, "old weights")
    assert prepare_previous(case, prediction, PLAN, SCHEMA, old)
    assert not prepare_previous(case, prediction, PLAN, SCHEMA, old)
    new = MapStore(folder, "new weights")
    with pytest.raises(DatasetError, match=r"old weights.*expected new weights"):
        new.open("a")
    assert prepare_previous(case, prediction, PLAN, SCHEMA, new)
    assert new.open("a").header.weights_sha256 == "new weights"
    # A training that still wants the old ones is told, too.
    with pytest.raises(DatasetError, match="expected old weights"):
        OutOfFoldMaps({"a": old}).open("a")
    # Another label map under the same name, by the same weights.
    values = np.zeros((14, 16, 9), np.uint16)
    values[5:9, 5:9, 3:6] = 7
    write_labels(prediction, values, Geometry(values.shape, np.diag([-SPACING[0], SPACING[1], -SPACING[2], 1.0])))
    assert prepare_previous(case, prediction, PLAN, SCHEMA, new)
    stored = new.open("a")
    assert set(np.unique(stored.read((0, 0, 0), stored.shape))) == {0, 1}


def test_a_map_cut_short_is_made_anew(case: Case, tmp_path: Path) -> None:
    store = MapStore(tmp_path / "maps", "w1")
    prepare_previous(case, prediction_of(case), PLAN, SCHEMA, store)
    whole = store.path("a").read_bytes()
    store.path("a").write_bytes(whole[:-7])
    with pytest.raises(DatasetError, match="cannot be read"):
        store.open("a")
    assert prepare_previous(case, prediction_of(case), PLAN, SCHEMA, store)
    assert store.path("a").read_bytes() == whole
    assert not list(store.folder.glob(".*"))


def test_a_prediction_with_foreign_values_names_its_file(case: Case, tmp_path: Path) -> None:
    other = LabelSchema(classes=(LabelClass(name="low", values=(7,)),))
    with pytest.raises(DatasetError, match=r"case a: undeclared label values \[300\].*prediction"):
        prepare_previous(case, prediction_of(case), PLAN, other, MapStore(tmp_path / "maps", "w1"))


def test_many_classes_do_not_overflow(tmp_path: Path) -> None:
    """Class 300 in a byte would be class 44."""
    schema = LabelSchema(classes=tuple(LabelClass(name=str(value), values=(value,)) for value in range(1, 301)))
    geometry = Geometry((6, 6, 6), np.eye(4))
    volume = Volume(np.ones((1, 6, 6, 6), np.float32), geometry)
    plan = PLAN.model_copy(update={"target_spacing": (1.0, 1.0, 1.0)})
    values = np.full((6, 6, 6), 300, np.uint16)
    labels = previous_map(values, trace(volume, plan), plan, schema)
    assert labels.dtype == np.int16
    assert int(labels.min()) == 300
    store = MapStore(tmp_path, "w")
    store.write("a", labels, [Source(path="x", size=1, stamp=(0, 0, 0), sha256="")])
    far = PreviousReader(OutOfFoldMaps({"a": store}), 301, None, 0)
    spec = SampleSpec(0, 0, "a", (4, 0, 0), (4, 4, 4), None)
    case = MemoryCase(0, (6, 6, 6))
    patch = far.read(spec, case, ((4, 0, 0), (8, 4, 4)), IDENTITY, 3)
    outside = far.read(spec, case, ((9, 0, 0), (13, 4, 4)), IDENTITY, 3)
    assert patch.labels[:2].min() == 300
    assert not patch.labels[2:].any()
    samples = [
        RawSample(spec, IDENTITY, (0, 0, 0), np.zeros((1, 4, 4, 4), np.float32), np.zeros((4, 4, 4), np.int16), item)
        for item in (patch, outside)
    ]
    images = assemble(samples, CPU).images
    assert images.shape == (2, 301, 4, 4, 4)
    assert images[0, 300].sum() == 32
    assert not images[1].any()


def test_the_streams_of_randomness_are_apart() -> None:
    stages = [value for name, value in vars(runtime).items() if name.startswith("STAGE_")]
    assert len(set(stages)) == len(stages)


def test_of_regions_a_cascade_sees_one_channel_a_label_value() -> None:
    """As in nnU-Net: regions may cross, values never do."""
    schema = LabelSchema(classes=(LabelClass(name="a", values=(1, 3)), LabelClass(name="b", values=(2, 3))))
    values = np.array([[[0, 1, 2, 3]]])
    plan = PreprocessPlan(target_spacing=(1.0, 1.0, 1.0), normalization=(ChannelNormalization(scheme="none"),))
    volume = Volume(np.ones((1, 4, 1, 1), np.float32), Geometry((4, 1, 1), np.eye(4)))
    found = previous_map(values.T, trace(volume, plan), plan, schema)
    channels = one_hot(torch.from_numpy(found)[None], schema.num_values)
    assert channels.shape[1] == 3
    assert channels.reshape(3, 4).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
