"""Laws of the augmentations."""

from __future__ import annotations

from dataclasses import replace
from math import pi

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoseg.domain.plan import AugmentationPlan
from autoseg.training import augment
from autoseg.training.augment import IDENTITY, Augmentation

ALWAYS = AugmentationPlan(
    rotation_probability=1, scaling_probability=1, noise_probability=1, blur_probability=1, blur_channel_probability=1,
    brightness_probability=1, contrast_probability=1, low_resolution_probability=1,
    low_resolution_channel_probability=1, gamma_inverted_probability=1, gamma_probability=1,
)  # fmt: skip
NEVER = AugmentationPlan(
    rotation_probability=0, scaling_probability=0, noise_probability=0, blur_probability=0, brightness_probability=0,
    contrast_probability=0, low_resolution_probability=0, gamma_inverted_probability=0, gamma_probability=0,
    mirror_axes=(),
)  # fmt: skip
SHAPE = (9, 10, 11)


def picture(channels: int = 2, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn((1, channels, *shape), generator=torch.Generator().manual_seed(seed))


def changed(images: torch.Tensor, drawn: Augmentation) -> torch.Tensor:
    out = images.clone()
    augment.change_intensities(out, [drawn] * len(images))
    return out


@given(seed=st.integers(0, 2**32), dims=st.sampled_from((2, 3)))
def test_parameters_lie_in_their_ranges(seed: int, dims: int) -> None:
    plan = ALWAYS.model_copy(update={"mirror_axes": tuple(range(dims)), "rotation_degrees": (30.0,) * (2 * dims - 3)})
    drawn = augment.draw(plan, dims, 3, np.random.default_rng(seed))
    assert drawn.matrix is not None
    scale = np.linalg.det(drawn.matrix) ** (1 / dims)
    assert 0.7 <= scale <= 1.4
    np.testing.assert_allclose(drawn.matrix @ drawn.matrix.T, scale**2 * np.eye(dims), atol=1e-12)
    assert 0 <= drawn.noise_std <= 0.1
    for values, (low, high) in (
        (drawn.blur, plan.blur_sigma),
        (drawn.brightness, plan.brightness_range),
        (drawn.contrast, plan.contrast_range),
        (drawn.low_resolution, plan.low_resolution_scale),
        (drawn.gamma, plan.gamma_range),
        (drawn.gamma_inverted, plan.gamma_range),
    ):
        assert values is not None
        assert len(values) == 3
        assert np.all((low <= values) & (values <= high))
    assert set(drawn.flips) <= set(range(dims))


@given(seed=st.integers(0, 2**32))
def test_thick_slices_stay_in_their_plane(seed: int) -> None:
    plan = ALWAYS.model_copy(update={"dummy_2d": True, "rotation_degrees": (180.0, 0.0, 0.0)})
    matrix = augment.draw(plan, 3, 1, np.random.default_rng(seed)).matrix
    assert matrix is not None
    np.testing.assert_allclose(matrix[0], [1, 0, 0])
    np.testing.assert_allclose(matrix[:, 0], [1, 0, 0])


def test_what_is_not_drawn_does_not_happen() -> None:
    drawn = augment.draw(NEVER, 3, 1, np.random.default_rng(0))
    assert (drawn.matrix, drawn.flips) == (None, ())
    images = picture()
    assert torch.equal(changed(images, drawn), images)


def test_how_often() -> None:
    """Frequencies within four standard errors of the plan's."""
    plan, count = AugmentationPlan(), 4000
    drawn = [augment.draw(plan, 3, 1, np.random.default_rng(seed)) for seed in range(count)]
    for probability, hits in (
        (1 - 0.8 * 0.8, sum(item.matrix is not None for item in drawn)),
        (0.1, sum(item.noise_std > 0 for item in drawn)),
        (0.1, sum(item.blur is not None and bool(item.blur.any()) for item in drawn)),
        (0.15, sum(item.contrast is not None for item in drawn)),
        (0.3, sum(item.gamma is not None for item in drawn)),
        (0.5, sum(2 in item.flips for item in drawn)),
        (0.075, sum(item.brightness is not None and bool(item.brightness[0] < 1) for item in drawn)),
    ):
        assert abs(hits / count - probability) < 4 * (probability * (1 - probability) / count) ** 0.5


@given(angle=st.floats(-pi, pi), scale=st.floats(0.7, 1.4), axis=st.integers(0, 2))
def test_the_source_box_holds_every_corner(angle: float, scale: float, axis: int) -> None:
    angles = [0.0, 0.0, 0.0]
    angles[axis] = angle
    matrix = augment.rotation(angles, 3) * scale
    start, size = (3, -2, 5), (8, 9, 10)
    low, high = augment.source_box(start, size, matrix)
    half = (np.array(size) - 1) / 2
    corners = np.array(np.meshgrid(*[[-h, h] for h in half], indexing="ij")).reshape(3, -1)
    places = matrix @ corners + (np.array(start) + half)[:, None]
    assert np.all(places >= np.array(low)[:, None] - 1e-9)
    assert np.all(places <= np.array(high)[:, None] - 1 + 1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_ramp_is_rotated_exactly(dims: int) -> None:
    """Linear interpolation reproduces a ramp, so every voxel shows the place it was taken from."""
    start, size = (4, 6, 5)[:dims], (7, 6, 8)[:dims]
    angles = [0.3, -0.4, 0.5][: 2 * dims - 3]
    matrix = augment.rotation(angles, dims) * 1.2
    low, high = augment.source_box(start, size, matrix)
    grid = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"))
    weights = np.array([1.0, -2.0, 0.5][:dims])
    image = torch.from_numpy(np.tensordot(weights, grid, 1)[None].astype(np.float32))
    labels = torch.from_numpy((grid[0] % 5).astype(np.int16))
    warped, picked = augment.transform(image, labels, low, start, size, matrix)

    half = (np.array(size) - 1) / 2
    offsets = np.stack(np.meshgrid(*(np.arange(n) - h for n, h in zip(size, half, strict=True)), indexing="ij"))
    places = np.tensordot(matrix, offsets, 1) + (np.array(start) + half).reshape(-1, *(1,) * dims)
    np.testing.assert_allclose(warped[0], np.tensordot(weights, places, 1), atol=1e-4)
    away = np.abs(places[0] - np.floor(places[0]) - 0.5) > 1e-3
    np.testing.assert_array_equal(picked.numpy()[away], (np.rint(places[0]) % 5)[away])
    assert picked.dtype == torch.int16


def test_no_turn_is_the_patch_itself() -> None:
    image, labels = picture(1)[0], torch.arange(9 * 10 * 11, dtype=torch.int16).reshape(SHAPE)
    start, size = (2, 1, 3), (5, 6, 4)
    low, high = augment.source_box(start, size, np.eye(3))
    assert (low, high) == (start, (7, 7, 7))
    source = (slice(2, 7), slice(1, 7), slice(3, 7))
    warped, picked = augment.transform(image[(slice(None), *source)], labels[source], low, start, size, np.eye(3))
    torch.testing.assert_close(warped, image[(slice(None), *source)])
    assert torch.equal(picked, labels[source])


@given(gamma=st.floats(0.7, 1.5), seed=st.integers(0, 99))
def test_gamma_keeps_mean_and_deviation(gamma: float, seed: int) -> None:
    images = picture(2, seed)
    for name in ("gamma", "gamma_inverted"):
        bent = changed(images, replace(IDENTITY, **{name: np.array([gamma, 1.0])}))
        torch.testing.assert_close(bent.mean((2, 3, 4)), images.mean((2, 3, 4)), atol=1e-4, rtol=0)
        torch.testing.assert_close(bent.std((2, 3, 4)), images.std((2, 3, 4)), atol=1e-4, rtol=0)
        assert torch.equal(bent[:, 1], images[:, 1])


@given(factor=st.floats(0.75, 1.25))
def test_contrast_keeps_the_range(factor: float) -> None:
    images = picture()
    out = changed(images, replace(IDENTITY, contrast=np.array([factor, factor])))
    assert bool((out.amin((2, 3, 4)) >= images.amin((2, 3, 4))).all())
    assert bool((out.amax((2, 3, 4)) <= images.amax((2, 3, 4))).all())


def test_blur_equals_scipys() -> None:
    from scipy.ndimage import gaussian_filter

    images = picture(2)
    sigmas = np.array([[0.5, 0.8, 1.0], [0.0, 0.0, 0.0]])
    out = changed(images, replace(IDENTITY, blur=sigmas))
    # Ours cuts each axis at the radius of the largest sigma; SciPy is told the same.
    expected = gaussian_filter(images[0, 0].double().numpy(), sigmas[0], mode="mirror", radius=3)
    np.testing.assert_allclose(out[0, 0], expected, atol=2e-3)
    assert torch.equal(out[0, 1], images[0, 1])


def test_constants_stay_constant() -> None:
    images = torch.full((1, 1, *SHAPE), 2.5)
    drawn = Augmentation(
        blur=np.array([[1.0, 0.7, 0.5]]), contrast=np.array([1.2]), low_resolution=np.array([0.5]),
        gamma=np.array([0.7]), gamma_inverted=np.array([1.4]),
    )  # fmt: skip
    torch.testing.assert_close(changed(images, drawn), images, atol=1e-4, rtol=0)


def test_noise_has_its_deviation_and_its_seed() -> None:
    images = torch.zeros((1, 1, 30, 30, 30))
    drawn = replace(IDENTITY, noise_std=0.07, noise_seed=5)
    once = changed(images, drawn)
    assert float(once.std()) == pytest.approx(0.07, rel=0.03)
    assert torch.equal(once, changed(images, drawn))
    assert not torch.equal(once, changed(images, replace(drawn, noise_seed=6)))


def test_only_the_chosen_samples_change() -> None:
    images = torch.cat([picture(seed=seed) for seed in range(3)])
    out = images.clone()
    augment.change_intensities(out, [IDENTITY, replace(IDENTITY, brightness=np.array([1.1, 0.9])), IDENTITY])
    assert torch.equal(out[::2], images[::2])
    torch.testing.assert_close(out[1], images[1] * torch.tensor([1.1, 0.9])[:, None, None, None])


def test_low_resolution_of_a_linear_ramp_is_close() -> None:
    ramp = torch.linspace(0, 1, 20).expand(1, 1, 20, 20, 20).contiguous()
    out = changed(ramp, replace(IDENTITY, low_resolution=np.array([0.5])))
    assert float((out - ramp).abs().max()) < 0.06
    assert not torch.equal(out, ramp)


CALM = AugmentationPlan(warm_up_steps=100)
DRAWN_BY_STEP = 400


def test_augmentation_grows_from_nothing_to_its_plan() -> None:
    """Half way half as many patches are changed; mirroring and what is left out do not wait."""

    def changed_fields(step: int) -> dict[str, int]:
        plan = augment.at_step(CALM.model_copy(update={"channel_dropout": (0.5, 0.5)}), step)
        drawn = [augment.draw(plan, 3, 2, np.random.default_rng(seed)) for seed in range(DRAWN_BY_STEP)]
        names = ("matrix", "blur", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma")
        counts = {name: sum(getattr(one, name) is not None for one in drawn) for name in names}
        counts["noise_std"] = sum(one.noise_std > 0 for one in drawn)
        return {
            **counts,
            "flips": sum(bool(one.flips) for one in drawn),
            "dropped": sum(bool(one.dropped) for one in drawn),
        }

    first, half, whole = (changed_fields(step) for step in (0, 50, 100))
    for name in set(whole) - {"flips", "dropped"}:
        assert first[name] == 0
        assert 0 < half[name] < whole[name]
    for name in ("flips", "dropped"):
        assert min(first[name], half[name], whole[name]) > DRAWN_BY_STEP / 2
    assert sum(half.values()) - sum(first.values()) == pytest.approx(
        (sum(whole.values()) - sum(first.values())) / 2, rel=0.15
    )


def test_augmentation_stays_as_planned_after_its_beginning() -> None:
    assert augment.at_step(CALM, 100) is CALM
    assert augment.at_step(CALM, 10**6) is CALM
    assert augment.at_step(ALWAYS, 0) is ALWAYS


def test_a_quarter_of_the_beginning_gives_a_quarter_of_each_probability() -> None:
    quarter = augment.at_step(CALM, 25)
    for name, value in CALM.model_dump().items():
        assert getattr(quarter, name) == (pytest.approx(value / 4) if name in augment.WARMED_UP else value)
