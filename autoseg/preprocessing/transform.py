"""The one way from a file's volume to the network's input, for the training cache and for prediction, and the way back.

Reorient, permute, crop, normalise, resample, in this order. What was done is the trail; `invert` follows it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from autoseg.domain.dataset import IGNORE_INDEX
from autoseg.domain.geometry import IDENTITY_ORIENTATION, Geometry, Orientation, Volume, closest_orientation
from autoseg.domain.plan import PreprocessPlan
from autoseg.errors import DatasetError
from autoseg.preprocessing.crop import Box, any_nonzero, fill_holes, nonzero_box
from autoseg.preprocessing.normalise import normalise
from autoseg.preprocessing.resample import (
    GridChange,
    Shape,
    Spacing,
    grid_change,
    output_shape,
    resample_channel,
    resample_labels,
)

PREPROCESSING_VERSION = 2
"""Raised whenever the same plan gives other arrays, so that no cache of older code is used."""

Scalar = TypeVar("Scalar", bound=np.generic)
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, eq=False)
class Trail:
    """What `apply` did, enough to undo it. Tuples are in network axis order unless they say otherwise.

    Attributes:
        geometry: Of the file.
        orientation: How file axes became canonical axes.
        axis_order: Network axis a is canonical axis ``axis_order[a]``.
        canonical_shape: Voxels before the crop.
        crop_start: First voxel of the crop.
        crop_shape: Voxels of the crop, on the file's own grid.
        resampled_shape: Voxels of the network's input.
        source_spacing_mm: Voxel size before resampling.
        planned_spacing_mm: The plan's target spacing; its axes that are not resampled keep the source's.
        target_spacing: Effective voxel size after resampling in millimetres: the crop's extent / resampled shape.
    """

    geometry: Geometry
    orientation: Orientation
    axis_order: tuple[int, int, int]
    canonical_shape: Shape
    crop_start: Shape
    crop_shape: Shape
    resampled_shape: Shape
    source_spacing_mm: Spacing
    planned_spacing_mm: Spacing
    target_spacing: Spacing

    @property
    def crop_box(self) -> Box:
        """The crop as slices of an array of `canonical_shape`."""
        slices = [slice(start, start + size) for start, size in zip(self.crop_start, self.crop_shape, strict=True)]
        return (slices[0], slices[1], slices[2])

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4) float64, voxel index of the prepared arrays (network axis order) to world millimetres, RAS+."""
        file_axes, flips = _axes_and_flips(self.orientation, self.axis_order)
        to_file = np.zeros((4, 4))
        to_file[3, 3] = 1
        for axis, (file_axis, flip) in enumerate(zip(file_axes, flips, strict=True)):
            ratio = self.crop_shape[axis] / self.resampled_shape[axis]
            # Voxel centres: prepared voxel o lies at (o + 0.5) * ratio - 0.5 of the crop.
            origin = self.crop_start[axis] + 0.5 * ratio - 0.5
            last = self.canonical_shape[axis] - 1
            to_file[file_axis, axis] = -ratio if flip else ratio
            to_file[file_axis, 3] = last - origin if flip else origin
        return np.asarray(self.geometry.affine @ to_file)

    def change_back(self, plan: PreprocessPlan) -> GridChange:
        """From the prepared grid back to the crop's own, for logits."""
        return grid_change(
            self.resampled_shape,
            self.crop_shape,
            self.planned_spacing_mm,
            self.source_spacing_mm,
            order=plan.logits_order,
            separate_axis_ratio=_chosen(plan.logits_separate_axis_ratio, plan.separate_axis_ratio),
            coarse_order=plan.logits_coarse_order,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A case as the network sees it.

    Attributes:
        image: (C, D, H, W) float32, network axis order, normalised and resampled.
        labels: (D, H, W) int16 class indices, or None.
        trail: How it came about.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.int16] | None
    trail: Trail


def apply(
    volume: Volume,
    plan: PreprocessPlan,
    labels: NDArray[np.int16] | None = None,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
) -> Prepared:
    """Prepare a volume for the network.

    Channels that the volume lacks become 0 after everything else: the mean, where intensities are standardised. They
    take no part in crop and mask.

    Args:
        volume: (C, I, J, K) as read from its file.
        plan: What to do.
        labels: (I, J, K) class indices on the same grid, or None.
        num_classes: Background included; where given, labels beyond it are refused.
        device: Where the resampling is computed. Equal bit for bit on the same device.

    Raises:
        DatasetError: The number of channels is not the plan's, a value is not finite, or the labels do not fit.
    """
    _check(volume, plan, labels, num_classes)
    array, trail = _turned(volume, plan)
    image = _prepare_image(array[(slice(None), *trail.crop_box)], volume.channels, plan, trail, device)
    prepared_labels = None if labels is None else prepare_labels(labels, trail, plan, device)
    return Prepared(image, prepared_labels, trail)


def trace(volume: Volume, plan: PreprocessPlan) -> Trail:
    """The trail that `apply` would leave, without the work on intensities.

    Args:
        volume: (C, I, J, K) as read from its file.
        plan: What would be done.

    Raises:
        DatasetError: The number of channels is not the plan's.
    """
    _check(volume, plan, None, None)
    return _turned(volume, plan)[1]


def prepare_labels(
    labels: NDArray[np.int16], trail: Trail, plan: PreprocessPlan, device: str | torch.device = "cpu"
) -> NDArray[np.int16]:
    """Bring class indices from the file's grid to that of the prepared image.

    Args:
        labels: (I, J, K) class indices.
        trail: Of the image.
        plan: What was done to the image.
        device: Where the resampling is computed.

    Returns:
        (D, H, W) of `trail.resampled_shape`, network axis order.
    """
    cropped = np.ascontiguousarray(to_network_axes(labels, trail)[trail.crop_box], np.int16)
    return resample_labels(
        cropped,
        trail.resampled_shape,
        trail.source_spacing_mm,
        trail.planned_spacing_mm,
        order=plan.label_order,
        separate_axis_ratio=_chosen(plan.label_separate_axis_ratio, plan.separate_axis_ratio),
        decision=plan.label_decision,
        device=device,
    )


def to_network_axes(array: NDArray[Scalar], trail: Trail) -> NDArray[Scalar]:
    """A view of an array on the file's grid with its last three axes in network order, not cropped.

    Args:
        array: (I, J, K) or (C, I, J, K).
        trail: Of the case.
    """
    return _to_network_axes(array, trail.orientation, trail.axis_order)


def to_file_axes(array: NDArray[Scalar], trail: Trail) -> NDArray[Scalar]:
    """A view of an array in network axis order with its last three axes in the file's order: undoes `to_network_axes`.

    Args:
        array: (D, H, W) or (C, D, H, W), not cropped.
        trail: Of the case.
    """
    file_axes, flips = _axes_and_flips(trail.orientation, trail.axis_order)
    leading = array.ndim - 3
    step: tuple[Any, ...] = (..., *(slice(None, None, -1 if flip else 1) for flip in flips))
    order = (*range(leading), *(leading + file_axes.index(axis) for axis in range(3)))
    turned: NDArray[Scalar] = array[step].transpose(order)
    return turned


def invert(labels: NDArray[Scalar], trail: Trail, background: int = 0) -> NDArray[Scalar]:
    """Put a map of the crop back on the file's grid.

    Args:
        labels: (D, H, W) of `trail.crop_shape`: on the file's own voxels, network axis order.
        trail: Of the case.
        background: Value outside the crop.

    Returns:
        (I, J, K), the file's voxel order, same dtype.

    Raises:
        ValueError: The map has another shape than the crop.
    """
    if labels.shape != trail.crop_shape:
        raise ValueError(f"the map must have the crop's shape {trail.crop_shape}, got {labels.shape}")
    whole: NDArray[Scalar] = np.full(trail.geometry.shape, background, labels.dtype)
    to_network_axes(whole, trail)[trail.crop_box] = labels
    return whole


def _axes_and_flips(
    orientation: Orientation, axis_order: tuple[int, int, int]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """For each network axis, the file axis it is and whether it runs against it."""
    axes = tuple(orientation.axes[canonical] for canonical in axis_order)
    return axes, tuple(orientation.flips[canonical] for canonical in axis_order)


def _to_network_axes(
    array: NDArray[Scalar], orientation: Orientation, axis_order: tuple[int, int, int]
) -> NDArray[Scalar]:
    file_axes, flips = _axes_and_flips(orientation, axis_order)
    leading = array.ndim - 3
    step: tuple[Any, ...] = (..., *(slice(None, None, -1 if flip else 1) for flip in flips))
    turned: NDArray[Scalar] = array.transpose(*range(leading), *(leading + axis for axis in file_axes))[step]
    return turned


def _chosen(own: float | None, common: float) -> float:
    return common if own is None else own


def _triple(values: Iterable[Item]) -> tuple[Item, Item, Item]:
    first, second, third = values
    return (first, second, third)


def _turned(volume: Volume, plan: PreprocessPlan) -> tuple[NDArray[np.generic], Trail]:
    """A view of the image with its axes in network order, not cropped, and what will be done to it."""
    orientation = closest_orientation(volume.geometry.affine) if plan.orientation == "RAS" else IDENTITY_ORIENTATION
    array = _to_network_axes(volume.array, orientation, plan.axis_order)
    return array, _make_trail(volume.geometry, orientation, plan, array)


def _make_trail(
    geometry: Geometry, orientation: Orientation, plan: PreprocessPlan, array: NDArray[np.generic]
) -> Trail:
    """Decide crop and new shape; `array` is (C, D, H, W) in network axis order."""
    canonical_shape: Shape = _triple(array.shape[1:])
    whole = _triple(slice(0, size) for size in canonical_shape)
    box = nonzero_box(any_nonzero(array)) if plan.crop_to_nonzero else whole
    crop_shape: Shape = _triple(part.stop - part.start for part in box)
    file_axes, _ = _axes_and_flips(orientation, plan.axis_order)
    spacing = geometry.spacing_mm if plan.trusts_tiff_spacing else geometry.spacing_beside_mm
    source: Spacing = _triple(spacing[axis] for axis in file_axes)
    # Two entries: slices are not resampled across their plane.
    planned: Spacing = _triple((source[:1] if len(plan.target_spacing) == 2 else ()) + plan.target_spacing)
    resampled = output_shape(crop_shape, source, planned) if plan.resamples else crop_shape
    effective = _triple(mm * old / new for mm, old, new in zip(source, crop_shape, resampled, strict=True))
    return Trail(
        geometry=geometry,
        orientation=orientation,
        axis_order=plan.axis_order,
        canonical_shape=canonical_shape,
        crop_start=_triple(part.start for part in box),
        crop_shape=crop_shape,
        resampled_shape=resampled,
        source_spacing_mm=source,
        planned_spacing_mm=planned,
        target_spacing=effective,
    )


def _prepare_image(
    cropped: NDArray[np.generic],
    channels: tuple[int, ...],
    plan: PreprocessPlan,
    trail: Trail,
    device: str | torch.device,
) -> NDArray[np.float32]:
    """Normalise and resample channel by channel, so that one at a time exists twice; missing ones are 0."""
    needs_mask = any(rule.use_mask for rule in plan.normalization)
    mask = fill_holes(any_nonzero(cropped)) if needs_mask else None
    change = grid_change(
        trail.crop_shape,
        trail.resampled_shape,
        trail.source_spacing_mm,
        trail.planned_spacing_mm,
        order=plan.image_order,
        separate_axis_ratio=plan.separate_axis_ratio,
        coarse_order=plan.image_coarse_order,
    )
    image = np.empty((len(plan.normalization), *trail.resampled_shape), np.float32)
    image[[number for number in range(len(image)) if number not in channels]] = 0
    for number, values in zip(channels, cropped, strict=True):
        rule = plan.normalization[number]
        # Where nothing is resampled the channel is normalised in its final place.
        channel = image[number] if change.is_identity else np.empty(trail.crop_shape, np.float32)
        np.copyto(channel, values, casting="unsafe")
        _check_finite(channel, number)
        normalise(channel, rule, mask)
        if not change.is_identity:
            resample_channel(channel, image[number], change, device)
    return image


def _check(volume: Volume, plan: PreprocessPlan, labels: NDArray[np.int16] | None, num_classes: int | None) -> None:
    if volume.num_channels != len(plan.normalization):
        raise DatasetError(f"the image has {volume.num_channels} channels, the plan is for {len(plan.normalization)}")
    if labels is None:
        return
    if labels.shape != volume.geometry.shape:
        raise DatasetError(f"the labels have shape {labels.shape}, the image {volume.geometry.shape}")
    low, high = int(labels.min()), int(labels.max())
    if low < IGNORE_INDEX or (num_classes is not None and high >= num_classes):
        raise DatasetError(f"class indices must lie between {IGNORE_INDEX} and {num_classes}, got {low} to {high}")


def _check_finite(channel: NDArray[np.float32], number: int) -> None:
    """One value that is not finite would spread over the whole image when it is scaled and resampled."""
    # The sum is finite only if every value is; a count is taken only where it is not.
    if np.isfinite(channel.sum(dtype=np.float64)):
        return
    count = int(channel.size - np.isfinite(channel).sum())
    raise DatasetError(
        f"channel {number} holds {count} values that are not finite (NaN or infinity)",
        hint="`autoseg check` lists the files with such values; repair them before training or predicting.",
    )
