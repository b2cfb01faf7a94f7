from __future__ import annotations

from math import cos, sin
from typing import Literal, TypeVar

import pytest
import torch
from torch import nn

from autoseg.network.embedding import ConditionEmbedding, EmbeddingProjection, SinusoidOrder, TimeEmbedding, sinusoid

STEPS = torch.tensor([0, 1, 17, 250, 999])
M = TypeVar("M", bound=nn.Module)


def with_random_weights(module: M) -> M:
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("order", ["cos_sin", "sin_cos"])
@pytest.mark.parametrize("channels", [2, 6, 128])
def test_sinusoids_equal_their_formula_in_float64(order: SinusoidOrder, shift: int, channels: int) -> None:
    ours = sinusoid(STEPS, channels, order=order, frequency_shift=shift)
    half = channels // 2
    first, second = (cos, sin) if order == "cos_sin" else (sin, cos)
    for row, step in enumerate(STEPS.tolist()):
        angles = [step * 10_000 ** (-index / max(half - shift, 1)) for index in range(half)]
        expected = [first(angle) for angle in angles] + [second(angle) for angle in angles]
        # An angle of 999 is known to 3e-5 in float32.
        assert ours[row].tolist() == pytest.approx(expected, abs=1e-6 + 1.5e-7 * step)


def test_the_frequency_shift_decides_about_the_last_frequency() -> None:
    time = torch.tensor([10_000.0])
    assert sinusoid(time, 8, order="sin_cos", frequency_shift=1)[0, 3].item() == pytest.approx(sin(1.0), abs=1e-5)
    assert sinusoid(time, 8, order="sin_cos", frequency_shift=0)[0, 3].item() == pytest.approx(sin(10.0), abs=1e-5)


def test_an_odd_width_ends_in_a_zero() -> None:
    odd = sinusoid(STEPS, 7)
    assert odd.shape == (5, 7)
    assert torch.equal(odd[:, :6], sinusoid(STEPS, 6))
    assert not odd[:, 6].any()


def test_every_time_has_its_own_embedding_and_close_times_are_close() -> None:
    table = sinusoid(torch.arange(1000), 64)
    distances = torch.cdist(table, table) + 100 * torch.eye(1000)
    assert distances.min() > 0.1
    assert (distances.argmin(dim=1) - torch.arange(1000)).abs().max() == 1
    half = sinusoid(torch.tensor([10.0, 10.5, 11.0]), 64)
    assert torch.linalg.norm(half[1] - half[0]) < torch.linalg.norm(half[2] - half[0])


def test_the_time_embedding_is_an_mlp_of_the_sinusoids() -> None:
    embedding = with_random_weights(TimeEmbedding(8, 12, order="sin_cos", frequency_shift=1))
    first, second = embedding.mlp.first, embedding.mlp.second
    waves = sinusoid(STEPS, 8, order="sin_cos", frequency_shift=1)
    hidden = waves @ first.weight.T + first.bias
    expected = (hidden * hidden.sigmoid()) @ second.weight.T + second.bias
    torch.testing.assert_close(embedding(STEPS), expected)
    with torch.autocast("cpu", torch.bfloat16):
        ours = embedding(STEPS)
    # Each wave is within 2^-9 of its size in bf16, also at step 999, where bf16 of the angle would be off by 4.
    assert torch.linalg.norm(ours.float() - expected) < 0.02 * torch.linalg.norm(expected)


def test_conditions_are_summed() -> None:
    embedding = with_random_weights(ConditionEmbedding(6, (3, 5), num_classes=4))
    vectors, classes = (torch.randn(2, 3), torch.randn(2, 5)), torch.tensor([3, 1])
    expected = sum(mlp(vector) for mlp, vector in zip(embedding.vectors, vectors, strict=True))
    torch.testing.assert_close(embedding(vectors, classes), expected + embedding.classes.weight[classes])


def test_absent_conditions_have_learned_stand_ins() -> None:
    embedding = with_random_weights(ConditionEmbedding(6, (3, 5), num_classes=4, has_null=True))
    vectors, classes = (torch.randn(2, 3), torch.randn(2, 5)), torch.tensor([3, 1])
    given, absent = embedding(vectors, classes), embedding()
    assert absent.shape == (1, 6)
    mixed = embedding(vectors, classes, torch.tensor([True, False]))
    torch.testing.assert_close(mixed, torch.stack((absent[0], given[1])))
    torch.testing.assert_close(embedding((None, None), None), absent)
    assert not torch.allclose(embedding((vectors[0], None), classes), given)
    absent.square().sum().backward()
    learned = {name for name, parameter in embedding.named_parameters() if parameter.grad is not None}
    assert {"null_vectors.0", "null_vectors.1", "null_class"} <= learned


def test_conditions_must_fit_the_network() -> None:
    embedding = ConditionEmbedding(6, (3,), num_classes=4)
    vector, classes = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"vectors\[0\] cannot be absent"):
        embedding((), classes)
    with pytest.raises(ValueError, match="classes cannot be absent"):
        embedding((vector,))
    with pytest.raises(ValueError, match="has_null_condition false"):
        embedding((vector,), classes, torch.tensor([True, False]))
    with pytest.raises(ValueError, match="takes 1 condition vectors, got 2"):
        embedding((vector, vector), classes)
    with pytest.raises(ValueError, match="has no classes"):
        ConditionEmbedding(6, (3,))((vector,), classes)


@pytest.mark.parametrize("size", [(4, 3), (2, 3, 2)])
@pytest.mark.parametrize("kind", ["add", "scale_shift"])
def test_a_block_takes_the_embedding_channel_by_channel(
    size: tuple[int, ...], kind: Literal["add", "scale_shift"]
) -> None:
    projection = with_random_weights(EmbeddingProjection(6, 4, kind=kind))
    x, embedding = torch.randn(2, 4, *size), torch.randn(2, 6)
    values = nn.functional.silu(embedding) @ projection.linear.weight.T + projection.linear.bias
    for sample in range(2):
        for channel in range(4):
            expected = x[sample, channel] + values[sample, channel]
            if kind == "scale_shift":
                expected = x[sample, channel] * (1 + values[sample, channel]) + values[sample, channel + 4]
            torch.testing.assert_close(projection(x, embedding)[sample, channel], expected)


@pytest.mark.parametrize("kind", ["add", "scale_shift"])
def test_a_projection_of_zeros_changes_nothing(kind: Literal["add", "scale_shift"]) -> None:
    projection = EmbeddingProjection(6, 4, kind=kind)
    for parameter in projection.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(projection(x, torch.randn(2, 6)), x)
