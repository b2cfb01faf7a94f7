"""How sure a mean is, and whether two configurations differ.

Everything is by patients, because cases of one patient are not independent. Intervals are percentile bootstrap
intervals: patients are drawn with replacement, all cases of a drawn patient count as often as it was drawn, and the
figure is computed anew. Two configurations are compared on the same cases by the Wilcoxon signed-rank test over
patients, with the matched-pairs rank-biserial correlation as effect size.

Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile intervals); Davison and
Hinkley 1997, section 3.8 (resampling groups as wholes); Kerby 2014, Comprehensive Psychology 3:11.IT.3.1 (rank-biserial
correlation); Holm 1979, Scandinavian Journal of Statistics 6:65 (several tests).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.values import Value
from autoseg.runtime import STAGE_BOOTSTRAP, rng

CONFIDENCE = 0.95
"""Of every interval."""

NUM_RESAMPLES = 2000
"""Enough for the ends of an interval. Source: Efron and Tibshirani 1993, section 14.3 (at least 1,000)."""

SEED = 0
"""Of the draws: the same cases always give the same interval."""

MIN_PATIENTS = 2
"""Of fewer there is no interval."""

# Resamples whose means are computed together: bounds the memory with many patients.
_CHUNK = 256

_Figures = NDArray[np.float64]


class Interval(Value):
    """A 95 % confidence interval.

    Attributes:
        low: Its lower end.
        high: Its upper end.
    """

    low: float
    high: float


class StatisticsRecord(Value):
    """How intervals and tests were made, for whoever reads the numbers.

    Attributes:
        unit: What was drawn and paired.
        num_patients: How many there are; a case whose patient is not known is one of its own.
        confidence: Of the intervals.
        num_resamples: Of the bootstrap.
        seed: Of the draws.
        interval: Its kind.
        test: Of two configurations.
        effect_size: That goes with it.
        adjustment: Of the p values of several pairs.
    """

    unit: str = "patient"
    num_patients: int
    confidence: float = CONFIDENCE
    num_resamples: int = NUM_RESAMPLES
    seed: int = SEED
    interval: str = "percentile bootstrap over patients"
    test: str = "Wilcoxon signed-rank, two-sided, patients without a difference left out"
    effect_size: str = "matched-pairs rank-biserial correlation"
    adjustment: str = "Holm, over the pairs of configurations, for each metric and class"


@dataclass(frozen=True, slots=True, eq=False)
class Bootstrap:
    """How often each patient counts in each resample.

    Attributes:
        patient_of: int (cases,): the patient of each case, by number.
        counts: int32 (resamples, patients).
    """

    patient_of: NDArray[np.intp]
    counts: NDArray[np.int32]

    @classmethod
    def of(cls, case_ids: Sequence[str], patients: Mapping[str, str], seed: int = SEED) -> Bootstrap:
        """Draw resamples of the patients of some cases.

        Args:
            case_ids: The cases, in the order of the values that will be asked about.
            patients: By case id; a case that is not in it is a patient of its own.
            seed: Of the draws.
        """
        patient_of = patient_numbers(case_ids, patients)
        num = int(patient_of.max(initial=-1)) + 1
        if not num:
            return cls(patient_of, np.zeros((NUM_RESAMPLES, 0), np.int32))
        drawn = rng(seed, STAGE_BOOTSTRAP).multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)
        return cls(patient_of, drawn.astype(np.int32))

    @property
    def num_patients(self) -> int:
        """Patients of the cases."""
        return int(self.counts.shape[1])

    def means(self, values: _Figures) -> _Figures:
        """Means over the cases in every resample.

        Args:
            values: (cases, figures); NaN where a case has none, which then does not count.

        Returns:
            (resamples, figures); NaN where no drawn patient has the figure.
        """
        defined = ~np.isnan(values)
        sums, counts = (
            _by_patient(part, self.patient_of, self.num_patients)
            for part in (np.where(defined, values, 0.0), defined.astype(np.float64))
        )
        means = np.empty((len(self.counts), values.shape[1]))
        with np.errstate(invalid="ignore"):
            for start in range(0, len(self.counts), _CHUNK):
                weights = self.counts[start : start + _CHUNK].astype(np.float64)
                means[start : start + _CHUNK] = (weights @ sums) / (weights @ counts)
        return means

    def intervals(self, values: _Figures) -> tuple[Interval | None, ...]:
        """Of the mean of each figure; see `means`. None where fewer than two patients have it."""
        found = self.means(values)
        return tuple(
            interval_of(found[:, index]) if num >= MIN_PATIENTS else None
            for index, num in enumerate(self._num_with(values))
        )

    def _num_with(self, values: _Figures) -> list[int]:
        has = _by_patient((~np.isnan(values)).astype(np.float64), self.patient_of, self.num_patients)
        return [int(np.count_nonzero(column)) for column in has.T]


def patient_numbers(case_ids: Sequence[str], patients: Mapping[str, str]) -> NDArray[np.intp]:
    """The patient of each case, numbered as they first appear; a case without one is one of its own."""
    # Two kinds of names, which must never be taken for each other.
    names = [("patient", patients[case_id]) if case_id in patients else ("case", case_id) for case_id in case_ids]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.intp)


def _by_patient(values: _Figures, patient_of: NDArray[np.intp], num_patients: int) -> _Figures:
    sums = np.zeros((num_patients, values.shape[1]))
    np.add.at(sums, patient_of, values)
    return sums


def interval_of(samples: _Figures) -> Interval | None:
    """The percentile interval of a figure over resamples; None where no resample has it."""
    finite = samples[np.isfinite(samples)]
    if not len(finite):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high))


def mean_of_means(means: _Figures) -> _Figures:
    """Mean foreground figures: over the classes that have one. (resamples, classes) to (resamples,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample in which no class is
        mean: _Figures = np.nanmean(means, axis=1)
    return mean


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Whether paired values differ.

    Attributes:
        p_value: Two-sided; 1 where no pair differs; None without pairs.
        rank_biserial: From -1 (the second is always higher) to 1 (the first is); 0 where no pair differs.
        num_pairs: That were compared.
    """

    p_value: float | None
    rank_biserial: float | None
    num_pairs: int


def paired_test(first: _Figures, second: _Figures) -> PairedTest:
    """Compare values of the same patients; pairs with a NaN are left out.

    Args:
        first: (patients,).
        second: (patients,).
    """
    differences = first - second
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return PairedTest(None, None, 0)
    changed = differences[differences != 0]
    if not len(changed):
        return PairedTest(1.0, 0.0, len(differences))
    # Slow to load, and nobody who predicts needs it.
    from scipy import stats

    ranks = stats.rankdata(np.abs(changed))
    up, down = float(ranks[changed > 0].sum()), float(ranks[changed < 0].sum())
    p_value = float(stats.wilcoxon(changed).pvalue)
    return PairedTest(p_value, (up - down) / (up + down), len(differences))


def patient_means(values: _Figures, patient_of: NDArray[np.intp]) -> _Figures:
    """The mean of each patient's cases; NaN where none of them has the figure.

    Args:
        values: (cases,); NaN where a case has none.
        patient_of: (cases,), from 0.
    """
    num = int(patient_of.max(initial=-1)) + 1
    defined = ~np.isnan(values)
    sums = np.bincount(patient_of, np.where(defined, values, 0.0), minlength=num)
    counts = np.bincount(patient_of, defined.astype(np.float64), minlength=num)
    with np.errstate(invalid="ignore"):
        means: _Figures = sums / counts
    return means


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P values of several tests, adjusted so that the chance of any false alarm stays what one test has."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)
