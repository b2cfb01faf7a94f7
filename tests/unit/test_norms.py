"""Norms and activations equal PyTorch's, in training and evaluation."""

from __future__ import annotations

import pytest
import torch
from network_family import image, member
from torch import Tensor, nn
from torch.nn import functional

from autoseg.network.channels_last import NO_ACTIVATION, is_meant_for, norm_leaky_relu, to_channels_last
from autoseg.network.norms import BatchNorm, GroupNorm, LayerNorm, Norm, activation, normalisation
from autoseg.network.unet import build, restore


def drawn(norm: Norm) -> Norm:
    generator = torch.Generator().manual_seed(4)
    nn.init.uniform_(norm.weight, generator=generator)
    nn.init.uniform_(norm.bias, generator=generator)
    return norm


def features(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 5


def test_group_norm_equals_pytorchs() -> None:
    norm, x = drawn(GroupNorm(6, 1e-6, 3)), features(2, 6, 3, 4)
    torch.testing.assert_close(norm(x), functional.group_norm(x, 3, norm.weight, norm.bias, 1e-6))


def test_layer_norm_is_over_the_channels_of_a_voxel() -> None:
    norm, x = drawn(LayerNorm(6, 1e-6)), features(2, 6, 3, 4, 5)
    voxel = functional.layer_norm(x[1, :, 2, 0, 3], (6,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(norm(x)[1, :, 2, 0, 3], voxel)


def test_batch_norm_equals_pytorchs_and_keeps_its_statistics_with_the_weights() -> None:
    norm, theirs = drawn(BatchNorm(3, 1e-5)), nn.BatchNorm3d(3)
    theirs.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)
    for step in range(3):
        x = features(2, 3, 4, 4, 2) + step
        torch.testing.assert_close(norm(x), theirs(x))
    torch.testing.assert_close(norm.running_mean, theirs.running_mean)
    torch.testing.assert_close(norm.running_var, theirs.running_var)
    norm.eval()
    theirs.eval()
    torch.testing.assert_close(norm(x), theirs(x))
    assert not norm.running_mean.requires_grad
    assert {"running_mean", "running_var"} <= {name for name, _ in norm.named_parameters()}


def test_batch_norm_of_a_single_value_is_its_shift_and_teaches_nothing() -> None:
    norm = drawn(BatchNorm(3, 1e-5))
    assert torch.equal(norm(torch.full((1, 3, 1, 1), 7.0)).flatten(), norm.bias)
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_no_norm_is_the_identity() -> None:
    x = features(1, 4, 2, 2)
    assert torch.equal(normalisation(member("2015"), 4)(x), x)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("relu", functional.relu),
        ("leaky_relu", functional.leaky_relu),
        ("gelu", functional.gelu),
        ("silu", functional.silu),
        ("prelu", lambda x: functional.prelu(x, torch.tensor([0.25]))),
    ],
)
@pytest.mark.parametrize("overwrites", [True, False])
def test_activations_equal_pytorchs(kind: str, expected: object, overwrites: bool) -> None:
    assert callable(expected)
    x = features(1, 4, 3, 3) - 5
    before = x.clone()
    layer = activation(member("nnunet", activation=kind), 4, overwrites=overwrites)
    torch.testing.assert_close(layer(x), expected(before))
    assert overwrites or torch.equal(x, before)


@pytest.mark.parametrize("slope", [0.0, NO_ACTIVATION])
def test_the_quick_norm_takes_a_relu_and_no_activation(slope: float) -> None:
    """ReLU is slope 0; in front of a residual sum there is none, and the sum may overwrite the result."""
    generator = torch.Generator().manual_seed(0)
    x = to_channels_last(torch.randn(2, 8, 6, 5, 4, generator=generator)).to(torch.bfloat16).requires_grad_()
    weight, bias = torch.rand(8, generator=generator).requires_grad_(), torch.randn(8, generator=generator)
    gradient = torch.randn(x.shape, generator=generator)
    y = norm_leaky_relu(x, weight, bias, 1e-5, slope)
    if slope == NO_ACTIVATION:
        y = y.add_(1)
    y.backward(gradient.to(torch.bfloat16))
    exact = [part.detach().double().contiguous().requires_grad_() for part in (x, weight)]
    normed = functional.instance_norm(exact[0], None, None, exact[1], bias.double())
    expected = normed + 1 if slope == NO_ACTIVATION else functional.relu(normed)
    expected.backward(gradient.double())
    assert (y.double() - expected).abs().max() < 0.03 * expected.abs().max()
    for ours, theirs in zip((x, weight), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < 0.015


def test_residual_blocks_train_in_bf16_channels_last_as_well_as_contiguous() -> None:
    network = build(member("resenc", patch_size=(8, 16, 16)), seed=1).train()
    # A fresh residual branch adds nothing: wake it.
    for name, weight in network.named_parameters():
        if name.endswith("norm2.weight"):
            nn.init.ones_(weight)
    x = image(network.plan, batch=2)
    seen: list[bool] = []
    network.encoder[1].get_submodule("0.conv2").register_forward_hook(
        lambda layer, given, out: seen.append(is_meant_for(out))
    )

    def gradient(images: Tensor, is_bf16: bool) -> Tensor:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            outputs = network(images)
        torch.stack([out.float().square().mean() for out in outputs]).sum().backward()
        return torch.cat([w.grad.flatten() for w in network.parameters() if w.grad is not None])

    exact = gradient(x, False)
    contiguous, quick = ((gradient(images, True) - exact).norm() for images in (x, to_channels_last(x)))
    assert seen == [False, False, True]
    # The two round differently; over seeds neither is better.
    assert 0 < quick < 1.5 * contiguous < 0.2 * exact.norm()


def test_the_parameters_of_a_batch_norm_network_are_all_it_needs() -> None:
    plan = member("2016", 2)
    network = build(plan, seed=1).train()
    for seed in range(3):
        network(image(plan, batch=2, seed=seed))
    kept = {name: weight.detach() for name, weight in network.named_parameters()}
    x = image(plan, seed=9)
    with torch.inference_mode():
        assert torch.equal(restore(plan, kept)(x), network.eval()(x))
