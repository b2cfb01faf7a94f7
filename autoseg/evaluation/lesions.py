"""Lesions: connected components of a class, counted as found and as true.

A lesion is a set of voxels of the class that hang together by faces, edges or corners (26 neighbours in 3D, 8 in a
picture). A lesion of the reference is found where the prediction covers at least `MIN_COVERED_PERCENT` of its voxels;
a predicted lesion is true where the reference covers as much of it. One large predicted lesion may find several, and
two predicted ones may both be true by one: nothing is assigned one to one, so pieces and bridges cost nothing by
themselves. Exchanging the two maps exchanges precision and recall.

Source: Commowick et al. 2018, Scientific Reports 8:13650, for detection by the overlapping part of a lesion (10 %).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MIN_COVERED_PERCENT = 10
"""Part of a lesion that the other map has to cover. Source: Commowick et al. 2018, their threshold alpha."""

_PERCENT = 100


@dataclass(frozen=True, slots=True)
class Lesions:
    """How many lesions there are, and how many of them the other map confirms.

    Attributes:
        reference: Lesions of the reference.
        found: Those of them that the prediction covers in part.
        predicted: Lesions of the prediction.
        true: Those of them that the reference covers in part.
    """

    reference: int = 0
    found: int = 0
    predicted: int = 0
    true: int = 0

    @property
    def precision(self) -> float | None:
        """True among the predicted lesions; None where nothing is predicted."""
        return self.true / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Found among the lesions of the reference; None where it has none."""
        return self.found / self.reference if self.reference else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall; 0 where one map is empty or nothing matches, None where both are."""
        precision, recall = self.precision, self.recall
        if precision is None and recall is None:
            return None
        if not precision or not recall:
            return 0.0
        return 2 * precision * recall / (precision + recall)

    def __add__(self, other: Lesions) -> Lesions:
        """Those of several cases together."""
        return Lesions(
            self.reference + other.reference,
            self.found + other.found,
            self.predicted + other.predicted,
            self.true + other.true,
        )


def count_lesions(predicted: NDArray[np.bool_], actual: NDArray[np.bool_]) -> Lesions:
    """Count the lesions of two masks on one grid.

    Args:
        predicted: bool, any number of axes; may be empty.
        actual: The same shape.
    """
    if not predicted.size:
        return Lesions()
    num_actual, num_found = _covered(actual, predicted)
    num_predicted, num_true = _covered(predicted, actual)
    return Lesions(num_actual, num_found, num_predicted, num_true)


def _covered(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> tuple[int, int]:
    """Components of a mask, and how many of them the other mask covers enough."""
    components, count = ndimage.label(mask, np.ones((3,) * mask.ndim, np.bool_))
    if not count:
        return 0, 0
    sizes = np.bincount(components[mask], minlength=count + 1)[1:]
    covered = np.bincount(components[mask & other], minlength=count + 1)[1:]
    return count, int(np.count_nonzero(covered * _PERCENT >= sizes * MIN_COVERED_PERCENT))
