"""What removing components of a class would do to the counts of a case, told without making a new label map.

One pass over a case gives, for each of its components, its size and how many of its voxels the reference gives each
value; any number of rules about components can then be tried by adding and subtracting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import DropSmall, DropUnlikely, KeepLargest
from autoseg.evaluation.counts import Counts, LabelTable
from autoseg.evaluation.postprocess import mean_likelihoods

_BACKGROUND = 0


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """The components of some classes together in one case, connected by faces, edges or corners.

    Attributes:
        sizes: Voxels of each.
        owner: Of each entry: which component it is about, from 0.
        actual: Of each entry: a value index of the reference.
        predicted: Of each entry: a value index of the prediction.
        voxels: Of each entry: how many voxels of the component have that pair.
        means: Mean probability of each; None: not known.
    """

    sizes: NDArray[np.int64]
    owner: NDArray[np.int64]
    actual: NDArray[np.int64]
    predicted: NDArray[np.int64]
    voxels: NDArray[np.int64]
    means: NDArray[np.float64] | None = None

    def without(self, leaving: NDArray[np.bool_], counts: Counts) -> Counts:
        """The counts of the case if some components became background.

        Args:
            leaving: One entry a component.
            counts: As they are.
        """
        out = counts.copy()
        goes = leaving[self.owner]
        np.subtract.at(out, (self.actual[goes], self.predicted[goes]), self.voxels[goes])
        np.add.at(out, (self.actual[goes], np.full(int(goes.sum()), _BACKGROUND)), self.voxels[goes])
        return out

    def leaving(self, rule: KeepLargest | DropSmall | DropUnlikely, voxel_ml: float) -> NDArray[np.bool_]:
        """Which components a rule takes away; as `apply_rules` does."""
        if isinstance(rule, DropSmall):
            small: NDArray[np.bool_] = self.sizes * voxel_ml < rule.min_ml
            return small
        if isinstance(rule, DropUnlikely):
            assert self.means is not None, "tried only where probabilities are known"
            unlikely: NDArray[np.bool_] = self.means < rule.min_mean
            return unlikely
        goes = np.ones(len(self.sizes), np.bool_)
        goes[np.argsort(-self.sizes, kind="stable")[: rule.count]] = False
        return goes


def components_of(
    names: Sequence[str],
    labels: NDArray[np.integer],
    reference: NDArray[np.int16],
    schema: LabelSchema,
    table: LabelTable,
    likelihood: NDArray[np.uint8] | None = None,
) -> Components:
    """Find the components of some classes together.

    Args:
        names: Of the classes.
        labels: Label values of the prediction.
        reference: Value indices of the same shape, -1 where nobody annotated.
        schema: The labels.
        table: Of them.
        likelihood: Of one class: its probability in 255ths, at least where it is predicted; None: not known.
    """
    values = sorted({value for item in schema.classes if item.name in names for value in item.values})
    flat, actual = labels.squeeze(), reference.squeeze()
    mask = np.isin(flat, values)
    box = next(iter(ndimage.find_objects(mask.view(np.uint8))), None) if mask.ndim else None
    if box is None:
        nothing = np.zeros(0, np.int64)
        means = None if likelihood is None else np.zeros(0)
        return Components(nothing, nothing, nothing, nothing, nothing, means)
    mask = mask[box]
    numbers, count = ndimage.label(mask, np.ones((3,) * mask.ndim, np.bool_))
    owner = numbers[mask].astype(np.int64) - 1
    sizes = np.bincount(owner, minlength=count)
    means = None if likelihood is None else mean_likelihoods(owner, likelihood.squeeze()[box][mask], count)
    known = actual[box][mask] >= 0
    num = table.num_values
    predicted = table.encode(flat[box][mask][known]).astype(np.int64)
    pairs = (owner[known] * num + actual[box][mask][known]) * num + predicted
    found, voxels = np.unique(pairs, return_counts=True)
    return Components(sizes, found // (num * num), found // num % num, found % num, voxels.astype(np.int64), means)


def without_holes(
    labels: NDArray[np.integer],
    filled: NDArray[np.integer],
    reference: NDArray[np.int16],
    counts: Counts,
    table: LabelTable,
) -> Counts:
    """The counts of a case if its label map were another that differs in few voxels.

    Args:
        labels: Label values as they are.
        filled: As they would be.
        reference: Value indices, -1 where nobody annotated.
        counts: Of `labels`.
        table: Of the labels.
    """
    changed = (labels != filled) & (reference >= 0)
    actual = reference[changed]
    return (
        counts - table.count(actual, table.encode(labels[changed])) + table.count(actual, table.encode(filled[changed]))
    )
