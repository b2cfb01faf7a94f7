"""The figures that findings and charts share: what each class and each case of one configuration came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.evaluation.metrics import ClassMetrics
from autoseg.report.collect import CaseRow, ConfigurationResult, RunResults

LIMITS_IN_STDS = 1.96
"""Limits of agreement: mean ± 1.96 standard deviations. Source: Bland and Altman 1986, Lancet 327:307."""


@dataclass(frozen=True, slots=True, eq=False)
class ClassTally:
    """One class over the cases of a configuration whose reference contains it.

    Attributes:
        name: The class.
        index: Its place in the schema.
        cases: Ids, as many as values.
        dice: Of each case.
        reference_mm3: Of each case.
        prediction_mm3: Of each case.
        num_missed: Cases where nothing of it was predicted.
        num_absent: Cases without it.
        num_spurious: Those of them where it was predicted.
    """

    name: str
    index: int
    cases: tuple[str, ...]
    dice: NDArray[np.float64]
    reference_mm3: NDArray[np.float64]
    prediction_mm3: NDArray[np.float64]
    num_missed: int
    num_absent: int
    num_spurious: int

    @property
    def num_present(self) -> int:
        """Cases that contain it."""
        return len(self.cases)

    @property
    def mean_dice(self) -> float:
        """Over the cases that contain it; NaN without any."""
        return float(self.dice.mean()) if len(self.dice) else float("nan")

    @property
    def relative_error(self) -> NDArray[np.float64]:
        """Predicted minus reference volume, divided by the reference volume, of each case where it was found."""
        found = self.prediction_mm3 > 0
        out: NDArray[np.float64] = self.prediction_mm3[found] / self.reference_mm3[found] - 1
        return out


@dataclass(frozen=True, slots=True)
class Agreement:
    """Bland and Altman's figures of one class, in mm3.

    Attributes:
        name: The class.
        bias: Mean of predicted minus reference volume.
        low: Lower limit of agreement.
        high: Upper limit of agreement.
        relative_bias: Mean of the relative error.
    """

    name: str
    bias: float
    low: float
    high: float
    relative_bias: float


def rows_of(results: RunResults, configuration: str | None) -> tuple[CaseRow, ...]:
    """The rows of one configuration."""
    return tuple(row for row in results.cases if row.configuration == configuration)


def tally(rows: Sequence[CaseRow], names: Sequence[str]) -> tuple[ClassTally, ...]:
    """Every class over the rows of one configuration."""
    return tuple(_tally_class(rows, name, index) for index, name in enumerate(names))


def _tally_class(rows: Sequence[CaseRow], name: str, index: int) -> ClassTally:
    known = [(row, row.metrics.classes[index]) for row in rows]
    known = [(row, item) for row, item in known if item.presence != "unannotated"]
    present = [(row, item) for row, item in known if item.reference_vox > 0]
    return ClassTally(
        name=name,
        index=index,
        cases=tuple(row.metrics.case for row, _ in present),
        dice=_values([item for _, item in present], "dice"),
        reference_mm3=_values([item for _, item in present], "reference_mm3"),
        prediction_mm3=_values([item for _, item in present], "prediction_mm3"),
        num_missed=sum(item.presence == "missed" for _, item in known),
        num_absent=len(known) - len(present),
        num_spurious=sum(item.presence == "spurious" for _, item in known),
    )


def _values(items: Sequence[ClassMetrics], name: str) -> NDArray[np.float64]:
    return np.array([getattr(item, name) for item in items], np.float64)


def agreement(item: ClassTally) -> Agreement | None:
    """Of the volumes of a class; None with fewer than two cases."""
    if item.num_present < 2:
        return None
    error = item.prediction_mm3 - item.reference_mm3
    bias, spread = float(error.mean()), LIMITS_IN_STDS * float(error.std(ddof=1))
    relative = item.relative_error
    return Agreement(item.name, bias, bias - spread, bias + spread, float(relative.mean()) if len(relative) else -1.0)


@dataclass(frozen=True, slots=True)
class FoldRow:
    """The held-out cases of one fold, by one configuration or a mean of several.

    Attributes:
        configuration: Its name.
        fold: Whose networks had not seen the cases.
        num_cases: That were scored.
        mean_foreground_dice: Mean over classes of the mean over the cases that contain it; None without any.
        class_dice: The latter, by class.
    """

    configuration: str
    fold: int | str
    num_cases: int
    mean_foreground_dice: float | None
    class_dice: dict[str, float | None]


def fold_rows(results: RunResults, configurations: Sequence[ConfigurationResult]) -> list[FoldRow]:
    """Every fold of every configuration that has held-out cases."""
    found = []
    for item in configurations:
        rows = rows_of(results, item.name)
        for fold in sorted({row.fold for row in rows}, key=str):
            own = [row for row in rows if row.fold == fold]
            classes = tally(own, results.plan.labels.names)
            dice = {one.name: one.mean_dice if one.num_present else None for one in classes}
            known = [value for value in dice.values() if value is not None]
            mean = float(np.mean(known)) if known else None
            found.append(FoldRow(item.name, fold, len(own), mean, dice))
    return found
