"""Augmentation: parameters are drawn first, one record a sample; then they are applied in batches on the device.

Nothing here draws from a global generator, and nothing is computed for samples that drew nothing.

Source of the transforms and their order: nnU-Net v2 (Isensee et al. 2021, supplement 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, cos, floor, pi, sin

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from autoseg.domain.network_plan import Ints
from autoseg.domain.plan import AugmentationPlan

BLUR_TRUNCATE = 3.0
"""Radius of the blur kernel in sigmas; less than 1 % of the weight lies beyond. Source: as nnU-Net v2."""

SMALLEST_RANGE = 1e-7
"""Smallest intensity range or deviation that is divided by; constant channels stay as they are."""

NOISE_SEED_BOUND = 2**63 - 1

WARMED_UP = (
    "rotation_probability",
    "scaling_probability",
    "noise_probability",
    "blur_probability",
    "brightness_probability",
    "contrast_probability",
    "low_resolution_probability",
    "gamma_inverted_probability",
    "gamma_probability",
)
"""Probabilities that begin at 0 where `AugmentationPlan.warm_up_steps` says so."""


@dataclass(frozen=True, slots=True, eq=False)
class Augmentation:
    """What happens to one sample; None and empty mean that it does not happen.

    Attributes:
        matrix: (dims, dims): a voxel's offset from the patch's centre to its offset in the source.
        flips: Spatial axes to reverse.
        dropped: Channels to show the patch without.
        noise_std: Standard deviation of added Gaussian noise.
        noise_seed: Seed of the noise.
        blur: (C, dims) sigmas in voxels; all 0 leaves a channel alone.
        brightness: (C,) factors.
        contrast: (C,) factors about the mean, range kept.
        low_resolution: (C,) scales; 1 leaves a channel alone.
        gamma_inverted: (C,) exponents on the negated image.
        gamma: (C,) exponents.
    """

    matrix: NDArray[np.float64] | None = None
    flips: Ints = ()
    noise_std: float = 0.0
    noise_seed: int = 0
    blur: NDArray[np.float64] | None = None
    brightness: NDArray[np.float64] | None = None
    contrast: NDArray[np.float64] | None = None
    low_resolution: NDArray[np.float64] | None = None
    gamma_inverted: NDArray[np.float64] | None = None
    gamma: NDArray[np.float64] | None = None
    dropped: Ints = ()


IDENTITY = Augmentation()


def draw(plan: AugmentationPlan, dims: int, channels: int, rng: np.random.Generator) -> Augmentation:
    """Draw what happens to one sample.

    Args:
        plan: Probabilities and ranges.
        dims: 2 or 3, the network's.
        channels: Channels of the image.
        rng: The sample's own generator.
    """

    def happens(probability: float) -> bool:
        return bool(rng.random() < probability)

    def factors(probability: float, limits: tuple[float, float]) -> NDArray[np.float64] | None:
        return _about_one(rng, limits, channels) if happens(probability) else None

    matrix = _draw_matrix(plan, dims, rng)
    # nnU-Net v2 takes what it calls the variance as the standard deviation (0.04 gives a deviation of 0.04).
    noise_std = float(rng.uniform(*plan.noise_variance)) if happens(plan.noise_probability) else 0.0
    noise_seed = int(rng.integers(NOISE_SEED_BOUND))
    blur = None
    if happens(plan.blur_probability):
        chosen = rng.random((channels, 1)) < plan.blur_channel_probability
        blur = np.where(chosen, rng.uniform(*plan.blur_sigma, (channels, dims)), 0.0)
    brightness = factors(plan.brightness_probability, plan.brightness_range)
    contrast = factors(plan.contrast_probability, plan.contrast_range)
    low_resolution = None
    if happens(plan.low_resolution_probability):
        kept = rng.random(channels) >= plan.low_resolution_channel_probability
        low_resolution = np.where(kept, 1.0, rng.uniform(*plan.low_resolution_scale, channels))
    gamma_inverted = factors(plan.gamma_inverted_probability, plan.gamma_range)
    gamma = factors(plan.gamma_probability, plan.gamma_range)
    flips = tuple(axis for axis in plan.mirror_axes if happens(0.5))
    dropped = tuple(channel for channel, probability in enumerate(plan.channel_dropout) if happens(probability))
    return Augmentation(
        matrix, flips, noise_std, noise_seed, blur, brightness, contrast, low_resolution, gamma_inverted, gamma, dropped
    )


def at_step(plan: AugmentationPlan, step: int) -> AugmentationPlan:
    """The plan with the probabilities that it has at a step.

    Args:
        plan: Probabilities and ranges of the whole training.
        step: Steps done before.

    Source: decision 49.
    """
    if step >= plan.warm_up_steps:
        return plan
    share = step / plan.warm_up_steps
    return plan.model_copy(update={name: share * getattr(plan, name) for name in WARMED_UP})


def blank_channels(image: NDArray[np.float32], dropped: Ints) -> Ints:
    """Channels that a patch is shown without: those that it lacks, and those that are dropped unless none would stay.

    A channel that is 0 all over the patch is one that it lacks: the network could not tell the two apart.

    Args:
        image: (C, *source) as prepared.
        dropped: See `Augmentation`.
    """
    lacking = [channel for channel, values in enumerate(image) if not values.any()]
    blank = sorted({*lacking, *dropped})
    return tuple(lacking if len(blank) == len(image) else blank)


def _about_one(rng: np.random.Generator, limits: tuple[float, float], count: int) -> NDArray[np.float64]:
    """Factors below and above 1 equally often, uniform on each side.

    Source: nnU-Net v2 draws brightness, contrast and gamma so (half of 4,000 draws from 0.7 ... 1.5 lie below 1).
    """
    low, high = limits
    below = rng.uniform(low, max(low, min(1.0, high)), count)
    above = rng.uniform(min(high, max(1.0, low)), high, count)
    return np.where((rng.random(count) < 0.5) & (low < 1), below, above)


def _draw_matrix(plan: AugmentationPlan, dims: int, rng: np.random.Generator) -> NDArray[np.float64] | None:
    rotates = rng.random() < plan.rotation_probability
    scales = rng.random() < plan.scaling_probability
    angles = [float(rng.uniform(-limit, limit)) * pi / 180 for limit in plan.rotation_degrees]
    scale = float(rng.uniform(*plan.scaling_range))
    if not (rotates or scales):
        return None
    matrix = rotation(angles, dims) if rotates else np.eye(dims)
    if not scales:
        return matrix
    # With few thick slices, only the plane is scaled.
    first = 1.0 if plan.dummy_2d and dims == 3 else scale
    return matrix @ np.diag([first, *[scale] * (dims - 1)])


def rotation(angles: Sequence[float], dims: int) -> NDArray[np.float64]:
    """Rotation matrix: in 2D by one angle, in 3D about the axes 0, 1 and 2 in turn.

    Args:
        angles: Radians; one in 2D, three in 3D.
        dims: 2 or 3.
    """
    if dims == 2:
        return _plane_rotation(2, 0, 1, angles[0])
    matrix = np.eye(3)
    for (first, second), angle in zip(((1, 2), (0, 2), (0, 1)), angles, strict=True):
        matrix = matrix @ _plane_rotation(3, first, second, angle)
    return matrix


def _plane_rotation(dims: int, first: int, second: int, angle: float) -> NDArray[np.float64]:
    matrix = np.eye(dims)
    matrix[first, first] = matrix[second, second] = cos(angle)
    matrix[first, second], matrix[second, first] = -sin(angle), sin(angle)
    return matrix


def source_box(start: Ints, size: Ints, matrix: NDArray[np.float64]) -> tuple[Ints, Ints]:
    """The box of source voxels that a transformed patch needs, so that its corners show real data.

    Args:
        start: First voxel of the patch.
        size: Voxels of the patch.
        matrix: As in `Augmentation`.

    Returns:
        Start and stop; both may lie outside the image.
    """
    half = (np.asarray(size) - 1) / 2
    centre = np.asarray(start) + half
    reach = np.abs(matrix) @ half
    return (
        tuple(floor(value) for value in centre - reach),
        tuple(ceil(value) + 1 for value in centre + reach),
    )


def transform(
    image: Tensor, labels: Tensor, source_start: Ints, start: Ints, size: Ints, matrix: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """Cut a rotated and scaled patch out of its source: image linear, labels nearest.

    Args:
        image: (C, *source), the box of `source_box`.
        labels: (*source), integer.
        source_start: First voxel of the source box.
        start: First voxel of the patch.
        size: Voxels of the patch.
        matrix: As in `Augmentation`.

    Returns:
        Image (C, *size) and labels (*size), the labels' dtype kept.
    """
    grid = _sampling_grid(labels.shape, source_start, start, size, matrix, image)
    return _sample(image, grid, "bilinear"), _sample(labels[None].to(image.dtype), grid, "nearest")[0].to(labels.dtype)


def transform_labels(
    labels: Tensor, source_start: Ints, start: Ints, size: Ints, matrix: NDArray[np.float64]
) -> Tensor:
    """The labels alone of `transform`, the same voxels."""
    values = labels[None].to(torch.float32)
    grid = _sampling_grid(labels.shape, source_start, start, size, matrix, values)
    return _sample(values, grid, "nearest")[0].to(labels.dtype)


def _sampling_grid(
    source_size: Sequence[int],
    source_start: Ints,
    start: Ints,
    size: Ints,
    matrix: NDArray[np.float64],
    like: Tensor,
) -> Tensor:
    """Where each voxel of the patch lies in its source; dtype and device of `like`."""
    half = (np.asarray(size, np.float64) - 1) / 2
    centre = np.asarray(start) + half - np.asarray(source_start)
    # grid_sample counts from -1 at the first voxel to 1 at the last; an axis of one voxel is at its middle anyway.
    to_unit = 2 / np.maximum(np.asarray(source_size) - 1, 1)
    linear = to_unit[:, None] * matrix * half[None, :]
    shift = to_unit * centre - 1
    theta = np.concatenate([linear[::-1, ::-1], shift[::-1, None]], axis=1)
    return functional.affine_grid(torch.from_numpy(theta).to(like)[None], [1, 1, *size], align_corners=True)


def _sample(values: Tensor, grid: Tensor, mode: str) -> Tensor:
    return functional.grid_sample(values[None], grid, mode=mode, padding_mode="border", align_corners=True)[0]


def change_intensities(images: Tensor, augmentations: Sequence[Augmentation]) -> None:
    """Apply noise, blur, brightness, contrast, low resolution and both gammas, in place.

    Args:
        images: (N, C, *spatial) float32, contiguous.
        augmentations: One a sample.
    """
    for sample, drawn in zip(images, augmentations, strict=True):
        if drawn.noise_std > 0:
            generator = torch.Generator(images.device).manual_seed(drawn.noise_seed)
            sample.add_(torch.empty_like(sample).normal_(0.0, drawn.noise_std, generator=generator))
    rows = images.flatten(0, 1)
    _change_rows(rows, [drawn.blur for drawn in augmentations], 0.0, blur)
    _change_rows(rows, [drawn.brightness for drawn in augmentations], 1.0, change_brightness)
    _change_rows(rows, [drawn.contrast for drawn in augmentations], 1.0, change_contrast)
    _change_rows(rows, [drawn.low_resolution for drawn in augmentations], 1.0, lower_resolution)
    _change_rows(rows, [drawn.gamma_inverted for drawn in augmentations], 1.0, change_gamma_inverted)
    _change_rows(rows, [drawn.gamma for drawn in augmentations], 1.0, change_gamma)


def _change_rows(
    rows: Tensor,
    drawn: Sequence[NDArray[np.float64] | None],
    neutral: float,
    operation: Callable[[Tensor, NDArray[np.float64]], Tensor],
) -> None:
    """Apply an operation to the channels that drew it, all at once.

    Args:
        rows: (N x C, *spatial), changed in place.
        drawn: By sample: (C, ...) parameters, or None.
        neutral: A parameter of this value changes nothing.
        operation: Takes rows of its own and (R, ...) parameters, gives the changed rows.
    """
    channels = len(rows) // len(drawn)
    chosen = [
        (sample * channels + channel, parameters[channel])
        for sample, parameters in enumerate(drawn)
        if parameters is not None
        for channel in range(channels)
        if np.any(parameters[channel] != neutral)
    ]
    if not chosen:
        return
    index = torch.tensor([row for row, _ in chosen], device=rows.device)
    rows[index] = operation(rows[index], np.stack([parameter for _, parameter in chosen]))


def _column(values: NDArray[np.float64], rows: Tensor) -> Tensor:
    """One value a row, shaped to multiply (R, *spatial)."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(rows).reshape(-1, *(1 for _ in rows.shape[1:]))


def blur(rows: Tensor, sigmas: NDArray[np.float64]) -> Tensor:
    """Gaussian blur of (R, *spatial), mirrored at the border.

    Args:
        rows: Channels.
        sigmas: (R, dims) in voxels, above 0.
    """
    for axis in range(1, rows.ndim):
        length = rows.shape[axis]
        sigma = sigmas[:, axis - 1]
        radius = min(ceil(BLUR_TRUNCATE * float(sigma.max())), length - 1)
        if radius < 1:
            continue
        taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma[:, None]) ** 2)
        taps /= taps.sum(1, keepdims=True)
        positions = torch.arange(-radius, length + radius, device=rows.device).abs()
        mirrored = torch.where(positions < length, positions, 2 * (length - 1) - positions)
        padded = rows.index_select(axis, mirrored)
        rows = padded.narrow(axis, 0, length) * _column(taps[:, 0], rows)
        for shift in range(1, 2 * radius + 1):
            rows.addcmul_(padded.narrow(axis, shift, length), _column(taps[:, shift], rows))
    return rows


def change_brightness(rows: Tensor, factors: NDArray[np.float64]) -> Tensor:
    """Multiply (R, *spatial) by (R,) factors."""
    return rows * _column(factors, rows)


def change_contrast(rows: Tensor, factors: NDArray[np.float64]) -> Tensor:
    """Stretch (R, *spatial) about each row's mean by (R,) factors; the range stays what it was."""
    axes = tuple(range(1, rows.ndim))
    mean = rows.mean(axes, keepdim=True)
    low, high = rows.amin(axes, keepdim=True), rows.amax(axes, keepdim=True)
    return ((rows - mean).mul_(_column(factors, rows)).add_(mean)).clamp_(low, high)


def lower_resolution(rows: Tensor, scales: NDArray[np.float64]) -> Tensor:
    """Take (R, *spatial) to fewer voxels (nearest) and back (linear), each row by its own scale."""
    size = tuple(rows.shape[1:])
    mode = "bilinear" if len(size) == 2 else "trilinear"
    for row, scale in zip(rows, scales, strict=True):
        small = tuple(max(1, round(length * float(scale))) for length in size)
        reduced = functional.interpolate(row[None, None], small, mode="nearest-exact")
        row.copy_(functional.interpolate(reduced, size, mode=mode, align_corners=False)[0, 0])
    return rows


def change_gamma(rows: Tensor, exponents: NDArray[np.float64]) -> Tensor:
    """Bend the intensities of (R, *spatial) by (R,) exponents; each row keeps its mean and standard deviation."""
    axes = tuple(range(1, rows.ndim))
    std, mean = torch.std_mean(rows, axes, keepdim=True)
    low = rows.amin(axes, keepdim=True)
    extent = (rows.amax(axes, keepdim=True) - low).clamp_min_(SMALLEST_RANGE)
    # The way back to the old range is swallowed by the way back to the old mean and deviation.
    bent = ((rows - low) / extent).pow_(_column(exponents, rows))
    bent_std, bent_mean = torch.std_mean(bent, axes, keepdim=True)
    return bent.sub_(bent_mean).mul_(std / bent_std.clamp_min_(SMALLEST_RANGE)).add_(mean)


def change_gamma_inverted(rows: Tensor, exponents: NDArray[np.float64]) -> Tensor:
    """`change_gamma` on the negated image."""
    return change_gamma(-rows, exponents).neg_()
