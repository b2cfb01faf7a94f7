"""What training sees of a cascade's previous stage: its label map, with errors as a network makes them.

The map is cut, turned and mirrored as the labels are; then classes grow, shrink or lose components. All of it happens
where samples are read, on the CPU, so that a GPU never waits for it. Parameters are drawn first, then applied.

Source of the two augmentations: nnU-Net v2 (Isensee et al. 2021, supplement 4, for its 3D cascade).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from autoseg import runtime
from autoseg.domain.plan import AugmentationPlan
from autoseg.domain.sides import Sides
from autoseg.errors import DatasetError
from autoseg.io.maps import IndexMap
from autoseg.preprocessing.previous import fits_in_bytes
from autoseg.training.augment import Augmentation, transform_labels
from autoseg.training.sampling import PatchCase, SampleSpec, inner_box, unreadable

BACKGROUND = 0


class MapCase(Protocol):
    """A label map that boxes are read from."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels in network axis order."""

    def read(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> IndexMap:
        """Class indices of a box inside the map."""


class MapSource(Protocol):
    """Where label maps are opened by case id."""

    def open(self, case_id: str) -> MapCase:
        """The map of that case."""


@dataclass(frozen=True, slots=True)
class PreviousStage:
    """What a fold of a cascade learns from besides images and labels.

    Attributes:
        configuration: Name of the previous stage.
        maps: Its out-of-fold label maps, on the grid of the cached images.
        weights: SHA-256 of the weights that predicted them, by the name of their fold.
    """

    configuration: str
    maps: MapSource
    weights: dict[str, str]


class Operation(IntEnum):
    """What happens to the shape of a class."""

    DILATE = 0
    ERODE = 1
    OPEN = 2
    CLOSE = 3


@dataclass(frozen=True, slots=True)
class Reshaping:
    """One class changed by a ball.

    Attributes:
        label: Class index.
        radius: Of the ball, in voxels.
    """

    label: int
    operation: Operation
    radius: int


@dataclass(frozen=True, slots=True)
class Removal:
    """One class loses a component.

    Attributes:
        label: Class index.
        choice: 0 ... 1: which of the components that may go, in the order in which they are found.
    """

    label: int
    choice: float


@dataclass(frozen=True, slots=True)
class PreviousAugmentation:
    """What happens to the label map of one sample, in this order.

    Attributes:
        reshapings: Classes in a random order: where two meet, the later one wins.
        removals: At most one a class.
        largest_fraction: Components larger than this part of the patch stay.
    """

    reshapings: tuple[Reshaping, ...] = ()
    removals: tuple[Removal, ...] = ()
    largest_fraction: float = 0.0


UNCHANGED = PreviousAugmentation()


def draw(plan: AugmentationPlan, num_classes: int, rng: np.random.Generator) -> PreviousAugmentation:
    """Draw what happens to the label map of one sample.

    Args:
        plan: Probabilities and ranges.
        num_classes: Background included.
        rng: The sample's own generator.
    """
    foreground = num_classes - 1
    reshapes, removes = rng.random() < plan.cascade_morphology_probability, rng.random() < plan.cascade_drop_probability
    labels = rng.permutation(foreground) + 1
    is_reshaped = rng.random(foreground) < plan.cascade_morphology_label_probability
    operations = rng.integers(len(Operation), size=foreground)
    low, high = plan.cascade_morphology_radius
    radii = rng.integers(low, high, endpoint=True, size=foreground)
    loses = rng.random(foreground) < plan.cascade_drop_label_probability
    choices = rng.random(foreground)
    return PreviousAugmentation(
        reshapings=tuple(
            Reshaping(int(label), Operation(int(operation)), int(radius))
            for label, operation, radius in zip(
                labels[is_reshaped], operations[is_reshaped], radii[is_reshaped], strict=True
            )
            if reshapes
        ),
        removals=tuple(
            Removal(int(label), float(choice))
            for label, choice in zip(labels[loses], choices[loses], strict=True)
            if removes
        ),
        largest_fraction=plan.cascade_drop_fraction,
    )


def change(labels: IndexMap, drawn: PreviousAugmentation) -> None:
    """Apply what was drawn, in place.

    Args:
        labels: (*patch) class indices.
        drawn: What happens.
    """
    for reshaping in drawn.reshapings:
        _reshape(labels, reshaping)
    for removal in drawn.removals:
        _remove(labels, removal, drawn.largest_fraction)


def _reshape(labels: IndexMap, reshaping: Reshaping) -> None:
    # Far enough out that the edge of the box is never mistaken for the edge of the patch.
    box = _class_box(labels, reshaping.label, reshaping.radius + 1)
    if box is None:
        return
    part = labels[box]
    before = part == reshaping.label
    after = reshape_mask(before, reshaping.operation, reshaping.radius)
    part[before & ~after] = BACKGROUND
    part[after] = reshaping.label


def reshape_mask(mask: NDArray[np.bool_], operation: Operation, radius: int) -> NDArray[np.bool_]:
    """Dilate, erode, open or close a mask by a ball.

    What lies beyond the array is taken neither for the class nor for its outside: nothing grows in from there, and
    nothing is eroded from there, because the patch is only a window.

    Args:
        mask: Two or three dimensions.
        operation: Which.
        radius: Voxels; the ball holds the offsets whose length is at most this.
    """
    if operation is Operation.DILATE:
        return dilate(mask, radius)
    if operation is Operation.ERODE:
        return ~dilate(~mask, radius)
    if operation is Operation.OPEN:
        return dilate(~dilate(~mask, radius), radius)
    return ~dilate(~dilate(mask, radius), radius)


def dilate(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """Voxels with a voxel of the mask at a distance of at most `radius`.

    By the squared distance, cut off at the radius and built up axis by axis: work grows with the radius, not with the
    voxels of the ball (2,109 at radius 8).

    Args:
        mask: Any dimension.
        radius: Voxels.
    """
    far = radius**2 + 1
    squared = np.where(mask, 0, far).astype(np.min_scalar_type(far + radius**2))
    for axis in range(mask.ndim):
        squared = _nearest_along(squared, axis, radius)
    nearby: NDArray[np.bool_] = squared < far
    return nearby


def _nearest_along(squared: NDArray[np.unsignedinteger], axis: int, radius: int) -> NDArray[np.unsignedinteger]:
    """At each voxel the least of the values along the axis plus the square of the distance to them."""
    nearest = squared.copy()
    length = squared.shape[axis]
    ahead, behind = np.moveaxis(nearest, axis, 0), np.moveaxis(squared, axis, 0)
    for step in range(1, min(radius, length - 1) + 1):
        moved = behind + behind.dtype.type(step**2)
        np.minimum(ahead[step:], moved[:-step], out=ahead[step:])
        np.minimum(ahead[:-step], moved[step:], out=ahead[:-step])
    return nearest


def _remove(labels: IndexMap, removal: Removal, largest_fraction: float) -> None:
    box = _class_box(labels, removal.label, 0)
    if box is None:
        return
    part = labels[box]
    # Voxels that share only a corner hang together.
    components, _ = ndimage.label(part == removal.label, np.ones((3,) * part.ndim))
    sizes = np.bincount(components.reshape(-1))[1:]
    small = np.flatnonzero(sizes <= largest_fraction * labels.size) + 1
    if len(small):
        part[components == small[int(removal.choice * len(small))]] = BACKGROUND


def _class_box(labels: IndexMap, label: int, margin: int) -> tuple[slice, ...] | None:
    """The box around a class and some voxels more, inside the array; None where the class is not there."""
    present = labels == label
    box = []
    for axis in range(labels.ndim):
        places = np.flatnonzero(present.any(axis=tuple(other for other in range(labels.ndim) if other != axis)))
        if not len(places):
            return None
        box.append(slice(max(0, int(places[0]) - margin), int(places[-1]) + 1 + margin))
    return tuple(box)


@dataclass(frozen=True, slots=True, eq=False)
class PreviousPatch:
    """The label map of one sample, as the network will see it.

    Attributes:
        labels: (*patch) class indices, as many axes as the network has.
        num_classes: Background included.
    """

    labels: IndexMap
    num_classes: int


@dataclass(frozen=True, slots=True)
class PreviousReader:
    """Reads the label map that belongs to a sample.

    Attributes:
        maps: Where they are read.
        num_classes: Background included.
        augmentation: What may happen to them; None for validation.
        seed: Seed of the run.
        sides: What mirroring from left to right does to the labels; None: nothing.
    """

    maps: MapSource
    num_classes: int
    augmentation: AugmentationPlan | None
    seed: int
    sides: Sides | None = None

    def read(
        self,
        spec: SampleSpec,
        case: PatchCase,
        box: tuple[Sequence[int], Sequence[int]],
        drawn: Augmentation,
        dims: int,
    ) -> PreviousPatch:
        """The map of a patch, turned and mirrored as the labels will be, and augmented.

        Args:
            spec: The sample.
            case: Its case.
            box: First voxel of what is read of the case and one past the last, three entries each.
            drawn: What happens to image and labels.
            dims: 2 or 3, the network's.

        Raises:
            DatasetError: The map cannot be read or is not that of the case.
        """
        skipped = 3 - dims
        source = self._read_padded(spec.case_id, case, *box)
        if self.sides is not None and self.sides.swaps(drawn.flips):
            source = self.sides.swapped(source)
        labels = torch.from_numpy(source.reshape(source.shape[skipped:]))
        if drawn.matrix is not None:
            low = tuple(box[0][skipped:])
            labels = transform_labels(labels, low, spec.start[skipped:], spec.size[skipped:], drawn.matrix)
        if drawn.flips:
            labels = labels.flip(list(drawn.flips))
        patch: IndexMap = labels.numpy()
        if self.augmentation is not None:
            rng = runtime.rng(self.seed, runtime.STAGE_PREVIOUS, spec.epoch, spec.index)
            change(patch, draw(self.augmentation, self.num_classes, rng))
        return PreviousPatch(patch, self.num_classes)

    def _read_padded(self, case_id: str, case: PatchCase, start: Sequence[int], stop: Sequence[int]) -> IndexMap:
        """Class indices of a box that may reach outside the case, where they are background."""
        try:
            whole = self.maps.open(case_id)
            if whole.shape != case.shape:
                raise DatasetError(
                    f"the label map of case {case_id} has {whole.shape} voxels, its image {case.shape}",
                    hint="Delete the cache folders of this configuration and train again: they are made anew.",
                )
            inner = inner_box(case.shape, start, stop)
            size = tuple(high - low for low, high in zip(start, stop, strict=True))
            if inner is None:
                return np.zeros(size, np.uint8) if fits_in_bytes(self.num_classes) else np.zeros(size, np.int16)
            found = whole.read(*inner)
        except (OSError, ValueError) as problem:
            raise unreadable(case_id, problem) from problem
        if found.shape == size:
            return found
        padded: IndexMap = np.zeros(size, found.dtype)
        padded[tuple(slice(a - low, b - low) for low, a, b in zip(start, *inner, strict=True))] = found
        return padded
