"""A batch in parts (micro-batches, processes, both) gives the loss and the gradient of the whole batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from threaded_processes import ThreadedProcesses, together
from torch import Tensor
from toy_training import toy_plan

from autoseg.compute import ALONE, Processes
from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.errors import ProcessLost
from autoseg.training.batches import Batch
from autoseg.training.learner import Learner
from autoseg.training.records import Choices, Layout

NUM = 5
SIZE = (8, 12, 8)
CLOSE = 1e-5
"""Rounding of float32, relative to the norm of a gradient."""

NOISE = 1e-2
"""Part of the whole gradient's norm below which a weight's gradient is rounding: biases in front of a norm."""

REGIONS = np.array([[False, True, True], [False, False, True]])
SKEWED = torch.tensor([[1, 1], [1, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.bool)
"""Which classes were annotated: parts differ in how many terms their Dice has."""


def batch(*, ignores: bool = False, is_partial: bool = False, dims: int = 3) -> Batch:
    """Samples that differ in how much of them is foreground and how much is ignored."""
    generator = torch.Generator().manual_seed(0)
    size = SIZE[:dims]
    images = torch.randn((NUM, 1, *size), generator=generator)
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]).view(-1, *(1,) * dims)
    labels = (images[:, 0] > levels).to(torch.int16) + (images[:, 0] > levels + 0.7).to(torch.int16)
    if ignores:
        share = torch.tensor([0.0, 0.9, 0.5, 0.1, 1.0]).view(-1, *(1,) * dims)
        labels[torch.rand(labels.shape, generator=generator) < share] = IGNORE_INDEX
    return Batch(images, labels, tuple("abcde"), SKEWED if is_partial else None)


def learner(
    *,
    processes: Processes = ALONE,
    micro_batch: int | None = None,
    regions: NDArray[np.bool_] | None = None,
    precision: str = "fp32",
    network: dict[str, object] | None = None,
    **training: object,
) -> Learner:
    part = toy_plan(batch_size=NUM, **training).configurations["3d_fullres"]
    changes = dict(network or {})
    if regions is not None:
        changes |= {"num_classes": len(regions), "output": "regions"}
    layout: Layout = "channels_last" if precision == "bf16" else "contiguous"
    return Learner(
        part.network.model_copy(update=changes),
        part.training,
        device=torch.device("cpu"),
        precision=precision,
        seed=0,
        regions=regions,
        processes=processes,
        choices=Choices(layout=layout, micro_batch=micro_batch),
    )


def share_of(whole: Batch, processes: Processes) -> Batch:
    mine = slice(processes.rank, None, processes.world_size)
    annotated = None if whole.annotated is None else whole.annotated[mine]
    return replace(
        whole,
        images=whole.images[mine],
        labels=whole.labels[mine],
        case_ids=whole.case_ids[mine],
        annotated=annotated,
    )


def gradient(one: Learner, samples: Batch) -> tuple[float, dict[str, Tensor | None]]:
    loss = one.gradients.of(samples, 0, lambda value: value)
    return float(loss), {
        name: None if weight.grad is None else weight.grad.clone() for name, weight in one.network.named_parameters()
    }


def assert_equal(
    found: tuple[float, dict[str, Tensor | None]],
    expected: tuple[float, dict[str, Tensor | None]],
    tolerance: float = CLOSE,
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    whole = torch.cat([one.flatten() for one in expected[1].values() if one is not None]).norm()
    for name, gradient in expected[1].items():
        other = found[1][name]
        if gradient is None:
            assert other is None, name
            continue
        assert other is not None, name
        assert float((other - gradient).norm()) <= tolerance * float(gradient.norm() + NOISE * whole), name


CASES: dict[str, dict[str, object]] = {
    "dice of samples": {},
    "dice of the batch": {"batch_dice": True},
    "hardest voxels": {"hard_voxel_fraction": 0.2},
    "dice of the batch, hardest voxels": {"batch_dice": True, "hard_voxel_fraction": 0.3},
}
CUTS: tuple[tuple[int, int | None], ...] = ((1, 2), (1, 1), (2, None), (3, None), (2, 1), (5, None))
"""Processes and micro-batch; 5 samples divide by neither."""


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("target", ["classes", "regions"])
@pytest.mark.parametrize("labels", ["whole", "ignored", "partial", "both"])
def test_parts_make_the_whole(kind: str, target: str, labels: str) -> None:
    regions = REGIONS if target == "regions" else None
    samples = batch(ignores=labels in ("ignored", "both"), is_partial=labels in ("partial", "both"))
    expected = gradient(learner(regions=regions, **CASES[kind]), samples)
    assert max(float(part.abs().max()) for part in expected[1].values() if part is not None) > 1e-3
    for world_size, micro_batch in CUTS:

        def work(processes: Processes, micro_batch: int | None = micro_batch) -> object:
            one = learner(processes=processes, micro_batch=micro_batch, regions=regions, **CASES[kind])
            return gradient(one, share_of(samples, processes))

        for found in together(world_size, work):
            assert isinstance(found, tuple), found
            assert_equal(found, expected)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, None)])
def test_parts_in_bf16_are_as_close_as_bf16_is(world_size: int, micro_batch: int | None) -> None:
    """Channels last, with the backward pass of our own."""
    samples = batch(ignores=True)
    exact = gradient(learner(batch_dice=True), samples)
    whole = gradient(learner(batch_dice=True, precision="bf16"), samples)

    def work(processes: Processes) -> object:
        one = learner(processes=processes, micro_batch=micro_batch, batch_dice=True, precision="bf16")
        return gradient(one, share_of(samples, processes))

    for found in together(world_size, work):
        assert isinstance(found, tuple), found
        assert found[0] == pytest.approx(whole[0], rel=1e-2)
        assert distance(found, exact) < 1.5 * distance(whole, exact) + 1e-3


def distance(found: tuple[float, dict[str, Tensor | None]], expected: tuple[float, dict[str, Tensor | None]]) -> float:
    """Of two gradients, relative."""
    rows = [torch.cat([one.flatten() for one in each[1].values() if one is not None]) for each in (found, expected)]
    return float((rows[0] - rows[1]).norm() / rows[1].norm())


def test_a_part_without_a_voxel_that_counts_has_no_say() -> None:
    samples = batch()
    samples.labels[3:] = IGNORE_INDEX
    expected = gradient(learner(batch_dice=True), samples)

    def work(processes: Processes) -> object:
        half = slice(3) if processes.is_main else slice(3, None)
        mine = replace(samples, images=samples.images[half], labels=samples.labels[half])
        return gradient(learner(processes=processes, batch_dice=True), mine)

    for found in together(2, work):
        assert isinstance(found, tuple), found
        assert_equal(found, expected)


def test_running_statistics_are_the_same_in_all_processes() -> None:
    """Batch norm sees the samples of a process; what it remembers is their mean."""
    samples = batch()

    def work(processes: Processes) -> dict[str, Tensor]:
        one = learner(processes=processes, network={"norm": "batch"})
        gradient(one, share_of(samples, processes))
        return {name: weight for name, weight in one.network.named_parameters() if not weight.requires_grad}

    both = together(2, work)
    single = []
    for rank in range(2):
        one = learner(network={"norm": "batch"})
        gradient(one, share_of(samples, ThreadedProcesses.of(rank, 2)))
        single.append(dict(one.network.named_parameters()))
    for found in both:
        assert isinstance(found, dict), found
        assert found
        for name, weight in found.items():
            torch.testing.assert_close(weight, (single[0][name] + single[1][name]) / 2)


def test_the_pass_for_sums_leaves_running_statistics_alone() -> None:
    samples = batch()
    found, expected = (
        learner(network={"norm": "batch"}, micro_batch=2, batch_dice=batch_dice) for batch_dice in (True, False)
    )
    for one in (found, expected):
        gradient(one, samples)
    others = dict(expected.network.named_parameters())
    statistics = [name for name, weight in others.items() if not weight.requires_grad]
    assert statistics
    for name, weight in found.network.named_parameters():
        if name in statistics:
            assert torch.equal(weight, others[name])


def test_processes_that_have_failed_in_their_own_work_tell_the_others() -> None:
    """Whatever it was: nobody waits for a gradient that never comes."""

    def work(processes: Processes) -> object:
        one = learner(processes=processes)
        mine = share_of(batch(), processes)
        if not processes.is_main:
            mine = replace(mine, images=mine.images[:, :0])
        return gradient(one, mine)

    first, second = together(2, work)
    assert isinstance(first, ProcessLost)
    assert isinstance(second, RuntimeError)
