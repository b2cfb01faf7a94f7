"""How uncertain each voxel of a case is, from the probabilities that its models gave it before they had seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import DatasetError
from autoseg.evaluation.selection import FINAL
from autoseg.io.probabilities import VALUE_OF_CODE, ProbabilityStore, StoredProbabilities, ranges
from autoseg.io.run_folder import RunFolder, fold_name
from autoseg.report.collect import CaseRow, ReportSummary

MAX_VALUES = 1 << 24
"""Probabilities that are in memory at a time, unless a slice holds more."""

_SMALLEST = 1e-12


def weights_of(summary: ReportSummary, configuration: str) -> Mapping[str, float]:
    """The networks whose probabilities a configuration averages, with their shares; a trained one is alone."""
    selection = summary.selection
    if selection is None:
        return {configuration: 1.0}
    if configuration == FINAL:
        return {member.configuration: member.weight for member in selection.recipe.members}
    for candidate in selection.candidates:
        if candidate.name == configuration:
            return {member.configuration: member.weight for member in candidate.members}
    return {configuration: 1.0}


def uncertainty_of(
    run: RunFolder, summary: ReportSummary, row: CaseRow, *, is_regions: bool
) -> NDArray[np.float32] | None:
    """The entropy of the mean probabilities, in parts of the largest possible one.

    Temperatures are left out: they change how high it is, hardly where.

    Args:
        run: Whose kept probabilities are read.
        summary: What was chosen.
        row: The case and the configuration.
        is_regions: Whether outputs are regions, each with a probability of its own; then the mean over them.

    Returns:
        float32 (I, J, K), 0 ... 1; None where the probabilities were not kept.
    """
    if summary.selection is None:
        return None  # nothing says that what lies there is of these weights
    shares = weights_of(summary, row.configuration)
    sources = []
    for name, weight in shares.items():
        store = ProbabilityStore(run.probabilities_folder / name / fold_name(row.fold), "")
        if not store.path(row.metrics.case).is_file():
            return None
        try:
            sources.append((store.open(row.metrics.case), weight))
        except DatasetError:
            return None
    if len({source.shape for source, _ in sources}) != 1:
        return None
    try:
        return _entropy(sources, is_regions=is_regions)
    except DatasetError:
        return None


def _entropy(sources: Sequence[tuple[StoredProbabilities, float]], *, is_regions: bool) -> NDArray[np.float32]:
    shape = sources[0][0].shape
    total = sum(weight for _, weight in sources)
    out = np.zeros(shape[1:], np.float32)
    for start, stop in ranges(shape, MAX_VALUES):
        mean = np.zeros((shape[0], stop - start, *shape[2:]), np.float32)
        for source, weight in sources:
            mean += np.float32(weight / total) * VALUE_OF_CODE[source.slices(start, stop)]
        out[start:stop] = entropy_of(mean, is_regions=is_regions)
    # Stored on the reversed axes of the file's grid.
    return out.transpose()


def entropy_of(probabilities: NDArray[np.float32], *, is_regions: bool) -> NDArray[np.float32]:
    """Entropy along the first axis, in parts of the largest possible one.

    Args:
        probabilities: (outputs, ...), 0 ... 1.
        is_regions: Whether each output is a question of its own; then the mean over them.
    """
    if is_regions:
        each = _surprise(probabilities) + _surprise(1 - probabilities)
        found = each.mean(axis=0) / np.log(2)
    else:
        found = _surprise(probabilities).sum(axis=0) / np.log(max(2, len(probabilities)))
    return np.asarray(found, np.float32)


def _surprise(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = -probabilities * np.log(np.maximum(probabilities, np.float32(_SMALLEST)))
    return found
