"""Dice of many versions of a label map from counts: how many voxels of each reference value were given each value."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import LabelSchema

Counts = NDArray[np.int64]
"""(num_values, num_values): voxels by value index of the reference, then of the prediction; see `LabelSchema`."""

_DROPPED = -1

# Voxels at a time, so that pairs in 64 bit never exist for a whole image.
_CHUNK = 2**22


class LabelTable:
    """Label values of files to value indices, and back.

    Args:
        schema: The labels.
    """

    def __init__(self, schema: LabelSchema) -> None:
        self.num_values = schema.num_values
        largest = max(schema.declared_values)
        self._table = np.zeros(largest + 1, np.int16)
        self._table[list(schema.label_values)] = np.arange(schema.num_values)
        self._reference = self._table.copy()
        if schema.ignore is not None:
            self._reference[schema.ignore] = _DROPPED

    def encode(self, labels: NDArray[np.integer]) -> NDArray[np.int16]:
        """Value indices of a prediction, whose values are declared; the ignore value counts as background."""
        indices: NDArray[np.int16] = self._table[labels]
        return indices

    def encode_reference(self, labels: NDArray[np.integer]) -> NDArray[np.int16]:
        """The same of a reference; voxels to ignore are -1, and count nowhere."""
        indices: NDArray[np.int16] = self._reference[labels]
        return indices

    def count(self, reference: NDArray[np.int16], prediction: NDArray[np.integer]) -> Counts:
        """Count pairs of value indices.

        Args:
            reference: As `encode_reference` gives it; contiguous.
            prediction: As `encode` gives it, of the same shape and order in memory.
        """
        total = np.zeros(self.num_values**2, np.int64)
        first, second = reference.reshape(-1), prediction.reshape(-1)
        for start in range(0, len(first), _CHUNK):
            actual, found = first[start : start + _CHUNK], second[start : start + _CHUNK]
            pairs = actual.astype(np.int64) * self.num_values + found
            total += np.bincount(pairs[actual >= 0], minlength=len(total))
        return total.reshape(self.num_values, self.num_values)


def dice_of(counts: Counts, schema: LabelSchema, annotated: Collection[str] | None = None) -> NDArray[np.float64]:
    """Dice of each class or region.

    Args:
        counts: Of a case.
        schema: The labels.
        annotated: Names of the classes that the reference annotates; None: all.

    Returns:
        (classes,): NaN where the reference lacks the class, or says nothing about it.
    """
    members = schema.region_table().astype(np.int64)  # (classes, num_values)
    overlap = np.einsum("cr,rp,cp->c", members, counts, members)
    actual, predicted = members @ counts.sum(axis=1), members @ counts.sum(axis=0)
    with np.errstate(invalid="ignore"):
        dice: NDArray[np.float64] = 2.0 * overlap / (actual + predicted)
    dice[actual == 0] = np.nan
    if annotated is not None:
        dice[[name not in annotated for name in schema.names]] = np.nan
    return dice


def mean_foreground(dice: NDArray[np.float64]) -> float | None:
    """Mean over classes of the mean over the cases that contain the class; None where no case contains any.

    Args:
        dice: (cases, classes); NaN where a case lacks a class.
    """
    means = class_means(dice)
    defined = [value for value in means if value is not None]
    return float(np.mean(defined)) if defined else None


def class_means(dice: NDArray[np.float64]) -> Sequence[float | None]:
    """Mean over the cases that contain the class, for each class; None where none does."""
    columns = (column[~np.isnan(column)] for column in dice.T)
    return tuple(float(column.mean()) if len(column) else None for column in columns)
