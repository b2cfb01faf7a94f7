"""Which patches training sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoseg.domain.plan import AugmentationPlan
from autoseg.training.batches import BatchReader, Prefetcher, assemble
from autoseg.training.sampling import CasePool, Sampler, patch_box, read_padded

CPU = torch.device("cpu")


class MemoryCase:
    """A case whose voxels hold their own number plus one; a block of class 1 and a single voxel of class 2."""

    channels = 1

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.image = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(1, *shape)
        self.labels = np.zeros(shape, np.int16)
        self.labels[1:3, 1:4, 1:4] = 1
        self.labels[-1, -1, -1] = 2

    @property
    def foreground(self) -> Mapping[int, NDArray[np.int32]]:
        return {label: np.argwhere(self.labels == label).astype(np.int32) for label in (1, 2)}

    def read(self, start: Sequence[int], stop: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        box = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
        return self.image[(slice(None), *box)].copy(), self.labels[box].copy()


class MemoryStore:
    def __init__(self, **shapes: tuple[int, int, int]) -> None:
        self.shapes = shapes

    def open(self, case_id: str) -> MemoryCase:
        return MemoryCase(self.shapes[case_id])


STORE = MemoryStore(small=(6, 7, 5), large=(20, 22, 24))


def sampler(batch_size: int = 2, size: tuple[int, int, int] = (8, 8, 8), seed: int = 3) -> Sampler:
    return Sampler(("large", "small"), size, batch_size, 1 / 3, seed)


@pytest.mark.parametrize(("batch_size", "forced"), [(1, 0), (2, 1), (3, 1), (7, 2), (9, 3), (12, 4)])
def test_the_last_third_of_a_batch_is_forced(batch_size: int, forced: int) -> None:
    """As nnU-Net: of batch 2 the second, of batch 7 the last two."""
    marks = [sampler(batch_size).is_forced(index) for index in range(batch_size, 2 * batch_size)]
    assert marks == [False] * (batch_size - forced) + [True] * forced


def test_forced_samples_hold_their_class_and_classes_are_drawn_evenly() -> None:
    pool = CasePool(STORE)
    drawn = [sampler().draw(pool, 0, index) for index in range(1, 801, 2)]
    for spec in drawn:
        stop = [low + size for low, size in zip(spec.start, spec.size, strict=True)]
        _, labels = read_padded(pool.get(spec.case_id), spec.start, stop)
        assert spec.forced_class in labels
    counts = Counter(spec.forced_class for spec in drawn)
    assert 150 < counts[1] < 250
    assert 150 < Counter(spec.case_id for spec in drawn)["small"] < 250


def test_the_others_lie_inside_or_in_the_middle() -> None:
    pool = CasePool(STORE)
    drawn = [sampler().draw(pool, 0, index) for index in range(0, 600, 2)]
    assert {spec.start for spec in drawn if spec.case_id == "small"} == {(-1, 0, -1)}
    starts = np.array([spec.start for spec in drawn if spec.case_id == "large"])
    assert starts.min(0).tolist() == [0, 0, 0]
    assert starts.max(0).tolist() == [12, 14, 16]


def test_a_sample_depends_on_its_key_alone() -> None:
    pool = CasePool(STORE)
    once = [sampler().draw(pool, 1, index) for index in range(10)]
    again = [sampler().draw(CasePool(STORE, capacity=1), 1, index) for index in reversed(range(10))]
    assert once == again[::-1]
    assert once != [sampler().draw(pool, 2, index) for index in range(10)]
    assert once != [sampler(seed=4).draw(pool, 1, index) for index in range(10)]


def test_outside_is_zero() -> None:
    case = MemoryCase((6, 7, 5))
    image, labels = read_padded(case, (-1, 2, -2), (7, 5, 9))
    assert image.shape == (1, 8, 3, 11)
    np.testing.assert_array_equal(image[:, 1:7, :, 2:7], case.image[:, :, 2:5])
    np.testing.assert_array_equal(labels[1:7, :, 2:7], case.labels[:, 2:5])
    assert image.sum() == case.image[:, :, 2:5].sum()
    far, nothing = read_padded(case, (10, 0, 0), (12, 2, 2))
    assert far.shape == (1, 2, 2, 2)
    assert not far.any()
    assert not nothing.any()


def test_a_2d_patch_is_one_slice() -> None:
    assert patch_box((8, 10)) == (1, 8, 10)
    reader = BatchReader(sampler(4, (1, 8, 8)), CasePool(STORE), 2, AugmentationPlan(mirror_axes=(0, 1)), 250)
    batch = assemble(reader.read(0), CPU)
    assert batch.images.shape == (4, 1, 8, 8)
    assert batch.labels.shape == (4, 8, 8)


def test_reading_ahead_gives_the_same_batches() -> None:
    reader = BatchReader(sampler(3), CasePool(STORE), 3, AugmentationPlan(), 2)
    with Prefetcher(reader.read, 5, 0) as plain, Prefetcher(reader.read, 5, 2) as ahead:
        for _ in range(4):
            one, other = assemble(plain.take(), CPU), assemble(ahead.take(), CPU)
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert one.case_ids == other.case_ids


def test_the_first_step_is_only_mirrored_where_augmentation_grows() -> None:
    always = AugmentationPlan(rotation_probability=1, noise_probability=1, gamma_probability=1)
    grows = always.model_copy(update={"warm_up_steps": 10})
    whole, growing = (BatchReader(sampler(3), CasePool(STORE), 3, plan, 2) for plan in (always, grows))
    for sample in growing.read(0):
        drawn = sample.augmentation
        assert (drawn.matrix, drawn.noise_std, drawn.gamma) == (None, 0, None)
    assert all(sample.augmentation.matrix is not None for sample in whole.read(0))
    turned = [sum(sample.augmentation.matrix is not None for sample in growing.read(step)) for step in range(11)]
    assert 0 < sum(turned[:10]) < 20
    assert turned[10] == 3


def test_an_error_in_the_thread_reaches_the_caller() -> None:
    def read(step: int) -> list[object]:
        if step == 2:
            raise KeyError("case_7")
        return []

    with Prefetcher(read, 0, 1) as ahead:  # type: ignore[arg-type]
        assert ahead.take() == ahead.take() == []
        with pytest.raises(KeyError, match="case_7"):
            ahead.take()


class PartlyAnnotated(MemoryCase):
    """A case of which only the slices up to the fifth were annotated; its table 0 holds some of their voxels."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__(shape)
        self.labels[5:] = -1

    @property
    def foreground(self) -> Mapping[int, NDArray[np.int32]]:
        places = {label: np.argwhere(self.labels == label).astype(np.int32) for label in (1, 2)}
        return {0: np.argwhere(self.labels >= 0).astype(np.int32), **places}


class OneCaseStore:
    def __init__(self, case: MemoryCase) -> None:
        self.case = case

    def open(self, case_id: str) -> MemoryCase:
        return self.case


def test_every_patch_of_a_partly_annotated_case_holds_annotated_voxels() -> None:
    """Its centre is one of them; forced samples still take the foreground, never ignored voxels."""
    case = PartlyAnnotated((40, 12, 12))
    pool = CasePool(OneCaseStore(case))
    rule = Sampler(("a",), (6, 6, 6), 3, 1 / 3, 0)
    drawn = [rule.draw(pool, 0, index) for index in range(300)]
    for spec in drawn:
        centre = tuple(low + size // 2 for low, size in zip(spec.start, spec.size, strict=True))
        assert case.labels[centre] >= 0 or min(spec.start) == 0
        assert spec.start[0] < 5
    assert {spec.forced_class for spec in drawn if rule.is_forced(spec.index)} == {1}, "class 2 lies beyond"
    assert {spec.forced_class for spec in drawn if not rule.is_forced(spec.index)} == {0}
    assert len({spec.start for spec in drawn if spec.forced_class == 0}) > 50


def test_a_partly_annotated_case_without_foreground_is_seen_where_it_is_annotated() -> None:
    case = PartlyAnnotated((40, 12, 12))
    case.labels[:5] = 0
    pool = CasePool(OneCaseStore(case))
    rule = Sampler(("a",), (6, 6, 6), 1, 1.0, 0)
    assert {rule.draw(pool, 0, index).forced_class for index in range(20)} == {0}


def test_samples_are_forced_on_annotated_classes_only() -> None:
    pool = CasePool(STORE)
    known = {"large": (False, True)}
    rule = Sampler(("large", "small"), (8, 8, 8), 1, 1.0, 3, annotated=known)
    drawn = [rule.draw(pool, 0, index) for index in range(200)]
    assert {spec.forced_class for spec in drawn if spec.case_id == "large"} == {2}
    assert {spec.forced_class for spec in drawn if spec.case_id == "small"} == {1, 2}
    nothing = Sampler(("large",), (8, 8, 8), 1, 1.0, 3, annotated={"large": (False, False)})
    assert nothing.draw(pool, 0, 0).forced_class is None


def test_batches_say_what_was_annotated_where_anything_was_not() -> None:
    rule = Sampler(("large", "small"), (8, 8, 8), 6, 1 / 3, 3, annotated={"small": (True, False)})
    batch = assemble(BatchReader(rule, CasePool(STORE), 3, None, 250).read(0), CPU)
    assert batch.annotated is not None
    assert batch.annotated.tolist() == [[True, case_id == "large"] for case_id in batch.case_ids]
    assert set(batch.case_ids) == {"large", "small"}
    plain = assemble(BatchReader(sampler(6), CasePool(STORE), 3, None, 250).read(0), CPU)
    assert plain.annotated is None
    assert torch.equal(plain.images, batch.images), "which patches are drawn does not change"
