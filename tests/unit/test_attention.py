from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoseg.network.attention import (
    AttentionGate,
    CrossAttention,
    NullCondition,
    SelfAttention,
    SpatialTransformer,
    attend,
)

SIZES = [(5, 4), (3, 4, 2)]
CONTEXT = 6
M = TypeVar("M", bound=nn.Module)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_random_weights(module: M) -> M:
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return module.eval()


def transformer(dims: int, channels: int = 8, context: int | None = CONTEXT, **changes: Any) -> SpatialTransformer:
    return SpatialTransformer(dims, channels, 4, 2, context, norm_groups=2, **changes)


def naive(queries: Tensor, keys: Tensor, values: Tensor, head_channels: int, mask: Tensor | None = None) -> Tensor:
    """Attention as in the paper, one head after the other, in float64."""
    out = []
    for start in range(0, queries.shape[-1], head_channels):
        head = slice(start, start + head_channels)
        q, k, v = (part[..., head].double() for part in (queries, keys, values))
        scores = q @ k.transpose(1, 2) / head_channels**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
        out.append(scores.softmax(dim=-1) @ v)
    return torch.cat(out, dim=-1)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("head_channels", [2, 3, 4, 12])
@pytest.mark.parametrize("has_mask", [False, True])
def test_attention_equals_its_formula(head_channels: int, has_mask: bool) -> None:
    queries, keys, values = randn(2, 7, 12), randn(2, 5, 12, seed=1), randn(2, 5, 12, seed=2)
    mask = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]]) if has_mask else None
    ours = attend(queries, keys, values, head_channels, mask)
    torch.testing.assert_close(ours.double(), naive(queries, keys, values, head_channels, mask), atol=1e-6, rtol=1e-5)


def test_a_sample_that_may_attend_to_nothing_gets_zeros_and_finite_gradients() -> None:
    queries, keys, values = (randn(2, 3, 4, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out = attend(queries, keys, values, 4, mask)
    assert not out[1].any()
    assert out[0].abs().min() > 0
    out.square().sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in (queries, keys, values))


@pytest.mark.parametrize("size", SIZES)
def test_attention_permutes_with_the_voxels(size: tuple[int, ...]) -> None:
    x, context = randn(2, 8, *size), randn(2, 5, CONTEXT, seed=1)
    order = torch.randperm(x[0, 0].numel(), generator=torch.Generator().manual_seed(3))
    attention = with_random_weights(SelfAttention(8, 4, norm_groups=2))
    layers = with_random_weights(transformer(len(size)))
    permuted = x.flatten(2)[..., order].view_as(x)
    for module, conditions in ((attention, ()), (layers, (context,))):
        expected = module(x, *conditions).flatten(2)[..., order].view_as(x)
        torch.testing.assert_close(module(permuted, *conditions), expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(module(x, *conditions), x, atol=0.1)


def test_every_voxel_sees_every_other() -> None:
    attention = with_random_weights(SelfAttention(4, 2, norm_groups=1))
    x = randn(1, 4, 3, 2, 2).requires_grad_()
    for index in range(12):
        (gradient,) = torch.autograd.grad(attention(x)[0, 0].flatten()[index], x, retain_graph=True)
        assert (gradient[0].abs().sum(dim=0) > 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_masked_condition_tokens_do_not_matter(size: tuple[int, ...]) -> None:
    layers = with_random_weights(transformer(len(size)))
    x, context, noise = randn(2, 8, *size), randn(2, 5, CONTEXT, seed=1), 10 * randn(2, 5, CONTEXT, seed=2)
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    expected = layers(x, context, mask)
    torch.testing.assert_close(layers(x, torch.where(mask[..., None], context, noise), mask), expected)
    torch.testing.assert_close(layers(x[1:], context[1:, :1]), expected[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(layers(x, torch.where(mask[..., None], noise, context), mask), expected, atol=0.01)


@pytest.mark.parametrize("is_linear", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_with_the_start_weights_the_feature_map_comes_out_as_it_went_in(size: tuple[int, ...], is_linear: bool) -> None:
    x = randn(2, 8, *size)
    generator = torch.Generator().manual_seed(0)
    attention = SelfAttention(8, 4, norm_groups=2)
    layers = transformer(len(size), has_linear_projection=is_linear)
    for module, last, conditions in (
        (attention, attention.attention.proj, ()),
        (layers, layers.proj_out, (randn(2, 5, CONTEXT),)),
    ):
        nn.init.zeros_(last.bias)
        assert not torch.equal(module(x, *conditions), x)
        module.start(generator)
        assert torch.equal(module(x, *conditions), x)


@pytest.mark.parametrize("dims", [2, 3])
def test_linear_and_convolutional_projections_are_the_same_numbers(dims: int) -> None:
    convolutional = with_random_weights(transformer(dims))
    linear = transformer(dims, has_linear_projection=True).eval()
    expected = linear.state_dict()
    weights = {name: value.reshape(expected[name].shape) for name, value in convolutional.state_dict().items()}
    linear.load_state_dict(weights)
    x, context = randn(1, 8, *(3,) * dims), randn(1, 2, CONTEXT)
    torch.testing.assert_close(linear(x, context), convolutional(x, context), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_channels_last_stays_channels_last_and_gives_the_same(size: tuple[int, ...]) -> None:
    layout = torch.channels_last_3d if len(size) == 3 else torch.channels_last
    x, context = randn(2, 8, *size), randn(2, 5, CONTEXT)
    attention = with_random_weights(SelfAttention(8, 4, norm_groups=2))
    layers = with_random_weights(transformer(len(size)))
    for module, conditions in ((attention, ()), (layers, (context,))):
        expected = module(x, *conditions)
        ours = module(x.contiguous(memory_format=layout), *conditions)
        assert expected.is_contiguous()
        assert ours.is_contiguous(memory_format=layout)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("channels", "head_channels"), [(16, 8), (12, 3)])
def test_no_tensor_is_as_large_as_the_pairs_of_voxels(channels: int, head_channels: int) -> None:
    size = (16, 16, 4)
    voxels = 16 * 16 * 4
    x = randn(1, channels, *size).requires_grad_()
    attention = with_random_weights(SelfAttention(channels, head_channels, norm_groups=1))
    layers = with_random_weights(SpatialTransformer(3, channels, head_channels, 1, CONTEXT, norm_groups=1))
    mask = torch.tensor([[True, True, False]])
    with LargestTensor() as largest:
        y = layers(attention(x), randn(1, 3, CONTEXT), mask)
        y.square().sum().backward()
    assert largest.numel <= voxels * 8 * max(channels, 16)  # the feed-forward layer's and its padded heads'
    assert largest.numel < voxels**2 / 4
    with LargestTensor() as largest:
        tokens = x.flatten(2).transpose(1, 2)
        naive(tokens, tokens, tokens, head_channels)
    assert largest.numel >= voxels**2


def test_saved_activations_grow_with_the_voxels_and_not_with_their_square() -> None:
    attention = with_random_weights(SelfAttention(8, 8, norm_groups=1)).train()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        totals = []
        for edge in (8, 16):
            saved.clear()
            attention(randn(1, 8, edge, edge).requires_grad_())
            totals.append(sum(saved))
    assert totals[1] < 4.01 * totals[0]


@pytest.mark.parametrize("size", SIZES)
def test_gradient_reaches_every_weight_and_the_condition(size: tuple[int, ...]) -> None:
    x, context = randn(2, 8, *size).requires_grad_(), randn(2, 3, CONTEXT).requires_grad_()
    attention = with_random_weights(SelfAttention(8, 4, norm_groups=2))
    layers = with_random_weights(transformer(len(size), dropout=0.1)).train()
    layers(attention(x), context).square().sum().backward()
    leaves = {"x": x, "context": context, **dict(layers.named_parameters()), **dict(attention.named_parameters())}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
        assert leaf.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("size", SIZES)
def test_bf16_autocast_is_close_to_float32(size: tuple[int, ...]) -> None:
    x, context = randn(2, 8, *size), randn(2, 3, CONTEXT)
    attention = with_random_weights(SelfAttention(8, 4, norm_groups=2))
    layers = with_random_weights(transformer(len(size)))
    for module, conditions in ((attention, ()), (layers, (context,))):
        expected = module(x, *conditions)
        with torch.autocast("cpu", torch.bfloat16):
            ours = module(x, *conditions)
        assert torch.linalg.norm(ours.float() - expected) < 0.02 * torch.linalg.norm(expected)
        ours.float().square().sum().backward()


def test_condition_and_network_must_fit() -> None:
    x = randn(1, 8, 4, 4)
    with pytest.raises(ValueError, match="no channels, the network was built for 6"):
        transformer(2)(x)
    with pytest.raises(ValueError, match="has 5 channels, the network was built for 6"):
        transformer(2)(x, randn(1, 2, 5))
    with pytest.raises(ValueError, match="has 6 channels, the network was built for no channels"):
        transformer(2, context=None)(x, randn(1, 2, 6))
    with pytest.raises(ValueError, match="heads of 3 channels do not divide the 8 channels"):
        SelfAttention(8, 3, norm_groups=2)
    with pytest.raises(ValueError, match="heads of 0 channels"):
        CrossAttention(8, 0, 4)


def test_the_null_condition_stands_in_for_samples_without_one() -> None:
    null = with_random_weights(NullCondition(CONTEXT))
    layers = with_random_weights(transformer(2))
    x, context = randn(3, 8, 3, 3), randn(3, 4, CONTEXT, seed=1)
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    absent = layers(x, *null(None, None, 3))
    dropped = layers(x, *null(context, mask, 3, torch.tensor([False, True, False])))
    torch.testing.assert_close(dropped[0], layers(x, context, mask)[0])
    torch.testing.assert_close(dropped[1:], absent[1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dropped[0], absent[0], atol=0.01)
    unmasked = layers(x, *null(context, None, 3, torch.tensor([True, False, True])))
    torch.testing.assert_close(unmasked[::2], absent[::2], atol=1e-5, rtol=1e-5)
    same, none = null(context, None, 3)
    assert same is context
    assert none is None


def test_the_null_condition_learns_only_where_it_stands_in() -> None:
    null = NullCondition(CONTEXT)
    context, _ = null(randn(2, 4, CONTEXT), None, 2, torch.tensor([True, False]))
    context[1].sum().backward(retain_graph=True)
    assert null.token.grad is not None
    assert not null.token.grad.any()
    context[0].sum().backward()
    torch.testing.assert_close(null.token.grad, torch.full((CONTEXT,), 4.0))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_attention_gate_weighs_each_voxel_between_nothing_and_all(dims: int) -> None:
    gate = with_random_weights(AttentionGate(dims, 4, 6, 2))
    skip, coarse = randn(2, 4, *(6,) * dims), randn(2, 6, *(3,) * dims, seed=1)
    weights = gate(skip, coarse) / skip
    assert (weights > 0).all()
    assert (weights < 1).all()
    torch.testing.assert_close(weights, weights[:, :1].expand_as(weights), atol=1e-4, rtol=1e-4)
    assert weights.std() > 0.01
    nn.init.zeros_(gate.weight.weight)
    for bias, factor in ((20.0, 1.0), (-20.0, 0.0), (0.0, 0.5)):
        nn.init.constant_(gate.weight.bias, bias)
        torch.testing.assert_close(gate(skip, coarse), factor * skip, atol=1e-6, rtol=1e-6)


def test_the_attention_gate_listens_to_the_decoder_at_the_same_place() -> None:
    gate = with_random_weights(AttentionGate(2, 4, 6, 8))
    skip, fine = randn(1, 4, 6, 6), randn(1, 6, 6, 6, seed=1)
    changed = fine.clone()
    changed[..., 2, 3] += 1
    difference = (gate(skip, changed) - gate(skip, fine)).abs().amax(dim=(0, 1)) > 0
    assert difference.nonzero().tolist() == [[2, 3]]
