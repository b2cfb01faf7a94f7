"""The optimisers: what their updates are, and that one taken up again goes on as if it had not stopped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toy_training import PATCH, toy_plan

from autoseg.training import optimisers
from autoseg.training.batches import Batch
from autoseg.training.learner import Learner
from autoseg.training.optimisers import MATCHED_RMS, MOST_ROWS, Muon, orthogonalised

KINDS = ("sgd", "adamw", "muon")


def matrix(rows: int, columns: int, condition: float = 10.0) -> Tensor:
    """A random matrix whose singular values lie between 1 and `condition`."""
    generator = torch.Generator().manual_seed(rows)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return u @ torch.diag(torch.linspace(1.0, condition, min(rows, columns))) @ v


@pytest.mark.parametrize(("rows", "columns"), [(8, 40), (40, 8), (16, 16), (1, 27)])
def test_singular_values_become_about_one_and_directions_stay(rows: int, columns: int) -> None:
    given = matrix(rows, columns)
    found = orthogonalised(given)
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() <= values.max() < 1.3
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    nearest = u @ v
    cosine = (found * nearest).sum() / (found.norm() * nearest.norm())
    assert cosine > 0.97


def test_the_size_of_the_gradient_does_not_matter_and_nothing_stays_nothing() -> None:
    given = matrix(8, 40)
    assert torch.allclose(orthogonalised(given * 1024), orthogonalised(given), atol=1e-2)
    assert torch.equal(orthogonalised(torch.zeros(4, 9)), torch.zeros(4, 9))


def test_the_first_update_of_a_kernel_has_the_stated_size_and_decays_the_weight() -> None:
    weight = nn.Parameter(torch.ones(8, 4, 3, 3))
    weight.grad = matrix(8, 36).reshape(weight.shape)
    Muon([weight], [], lr=0.1, momentum=0.9, betas=(0.9, 0.99), weight_decay=0.5).step()
    update = weight.detach() - (1 - 0.1 * 0.5)
    # Eight directions of size about 1 over 8 x 36 entries, times the learning rate and sqrt(36) x MATCHED_RMS.
    expected = 0.1 * MATCHED_RMS * 36**0.5 * (8 / (8 * 36)) ** 0.5
    assert update.square().mean().sqrt() == pytest.approx(expected, rel=0.2)
    assert (update * weight.grad).sum() < 0


def test_large_kernels_are_orthogonalised_block_by_block() -> None:
    weight = nn.Parameter(torch.zeros(MOST_ROWS + 2, 300, 1, 3))
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient.clone()
    Muon([weight], [], lr=1.0, momentum=0.0, betas=(0.9, 0.99), weight_decay=0.0).step()
    half = (MOST_ROWS + 2) // 2
    blocks = [orthogonalised(part.flatten(1)) for part in (gradient[:half], gradient[half:])]
    expected = -MATCHED_RMS * 900**0.5 * torch.cat(blocks)
    assert torch.allclose(weight.detach().flatten(1), expected, atol=1e-5)


def test_norms_biases_and_heads_are_those_of_adam() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(6), torch.randn(4, 6)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon([], [ours], lr=0.05, momentum=0.9, betas=(0.8, 0.95), weight_decay=0.3)
    adam = torch.optim.Adam([theirs], lr=0.05, betas=(0.8, 0.95), eps=optimisers.ADAM_EPS)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        adam.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_kernels_are_convolutions_that_see_more_than_one_voxel() -> None:
    part = toy_plan(optimiser="muon").configurations["3d_fullres"]
    one = learner("muon")
    groups = {group["is_matrix"]: group["params"] for group in one._optimiser.param_groups}
    names = {id(weight): name for name, weight in one.network.named_parameters()}
    kernels = {names[id(weight)] for weight in groups[True]}
    others = {names[id(weight)] for weight in groups[False]}
    assert kernels | others == set(names.values())
    assert all(weight.ndim == 5 and max(weight.shape[2:]) > 1 for weight in groups[True])
    heads = [weight for weight in groups[False] if weight.ndim == 5]
    assert {weight.shape[0] for weight in heads} == {part.network.num_classes}


def test_weight_decay_of_adamw_leaves_norms_and_biases_alone() -> None:
    decays = {
        len(weight.shape): group["weight_decay"]
        for group in learner("adamw", weight_decay=0.1)._optimiser.param_groups
        for weight in group["params"]
        if max(weight.shape[2:], default=1) > 1 or weight.ndim == 1
    }
    assert decays == {5: 0.1, 1: 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_is_bit_equal_to_not_having_stopped(kind: str) -> None:
    whole, first, second = learner(kind), learner(kind), learner(kind)
    for number in range(4):
        whole.step(batch(number), 0.01, number)
    for number in range(2):
        first.step(batch(number), 0.01, number)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()}, (None, 0))
    for number in range(2, 4):
        second.step(batch(number), 0.01, number)
    state = second.state()
    assert state.keys() == whole.state().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_one_batch_falls(kind: str) -> None:
    one = learner(kind)
    losses = [one.step(batch(0), 0.02 if kind == "muon" else 0.01, number).loss for number in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def learner(kind: str, **training: object) -> Learner:
    part = toy_plan(optimiser=kind, momentum=0.9, **training).configurations["3d_fullres"]
    return Learner(part.network, part.training, device=torch.device("cpu"), precision="fp32", seed=0)


def batch(number: int) -> Batch:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(number)
    images = torch.randn((1, 1, *PATCH), generator=generator)
    return Batch(images, (images[:, 0] > 1).to(torch.int16), ("a",))
