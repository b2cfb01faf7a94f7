"""One step: what it changes, and what a step that is skipped must not change."""

from __future__ import annotations

import pytest
import torch
from toy_training import PATCH, toy_plan

from autoseg.training.batches import Batch
from autoseg.training.learner import Learner

OVERFLOW = 2.0**120
"""A loss scale at which every gradient overflows."""

SCALE = 1024.0


@pytest.fixture
def batch() -> Batch:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((1, 1, *PATCH), generator=generator)
    return Batch(images, (images[:, 0] > 1).to(torch.int16), ("a",))


def learner(precision: str) -> Learner:
    part = toy_plan().configurations["3d_fullres"]
    return Learner(part.network, part.training, device=torch.device("cpu"), precision=precision, seed=0)


def test_a_first_step_that_the_scaler_skips_leaves_no_momentum(batch: Batch) -> None:
    """Fused SGD left uninitialised memory as momentum, from which the second step went on."""
    skipped, plain = learner("fp16"), learner("fp16")
    skipped.restore(skipped.state(), (OVERFLOW, 0))
    before = skipped.state()
    assert skipped.step(batch, 0.01, 0).is_finite
    after = skipped.state()
    assert after.keys() == before.keys(), "no momentum yet"
    assert all(torch.equal(after[name], before[name]) for name in after)
    for one in (skipped, plain):
        one.restore(one.state(), (SCALE, 0))
        assert one.step(batch, 0.01, 0).is_finite
    other = plain.state()
    assert any(name.startswith("momentum.") for name in other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in skipped.state().items())


@pytest.mark.parametrize(("precision", "is_fused"), [("fp16", False), ("bf16", True), ("fp32", True)])
def test_the_optimiser_is_fused_only_without_a_scaler(precision: str, is_fused: bool) -> None:
    assert bool(learner(precision)._optimiser.defaults["fused"]) is is_fused


def test_dropout_follows_the_seed_and_the_step_and_leaves_the_global_generator_alone(batch: Batch) -> None:
    part = toy_plan().configurations["3d_fullres"]
    network = part.network.model_copy(update={"dropout": 0.5})

    def losses(seed: int, noise: int) -> list[float]:
        one = Learner(network, part.training, device=torch.device("cpu"), precision="fp32", seed=seed)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        found = [one.step(batch, 1e-9, number).loss for number in range(3)]
        assert torch.equal(torch.get_rng_state(), before)
        return found

    first = losses(0, 1)
    assert first == losses(0, 2)
    assert len(set(first)) == 3, "every step drops others, although the weights hardly change"
    assert first != losses(1, 1)
