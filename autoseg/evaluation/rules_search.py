"""Rules of post-processing, searched on out-of-fold predictions and kept only where they surely help.

In rounds: first thresholds of probability, class by class, where probabilities are known; then all classes joined (the
largest component of all foreground), then each class (components), last its holes. Components of classes that exclude
each other are searched in one round, because what leaves one becomes background and changes no other; regions, and
thresholds and holes once a rule is kept, one after the other. Of each kind of rule and each class the best variant is
shown; it is kept if

- the mean foreground Dice rises, and so does its 95 % bootstrap interval over patients: the lower end is above 0;
- the mean Dice of no class falls.

Source: Isensee et al. 2021, Nature Methods 18, for the search on cross-validation; docs/decisions/0043 for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.inference import (
    DropSmall,
    DropUnlikely,
    FillHoles,
    KeepLargest,
    Rule,
    Threshold,
    Thresholds,
    thresholds_of,
)
from autoseg.evaluation.components import Components, components_of, without_holes
from autoseg.evaluation.counts import Counts, class_means, dice_of, mean_foreground
from autoseg.evaluation.ensemble import Decoder
from autoseg.evaluation.postprocess import Likelihoods, apply_rules
from autoseg.evaluation.selection import TriedRule
from autoseg.evaluation.statistics import MIN_PATIENTS, Bootstrap, Interval, interval_of, mean_of_means
from autoseg.evaluation.thresholds import THRESHOLDS, Changes, Mixture, changes_of, likelihoods_of, with_thresholds
from autoseg.io.images import read_labels
from autoseg.runtime import NoProgress, Progress

KEEP_COUNTS = (1, 2, 3)
"""How many components of a class are tried to be kept."""

DROP_QUANTILES = (0.25, 0.5, 0.75, 0.9, 1.0)
"""Smallest volumes and mean probabilities that are tried lie just above these quantiles of the components that are not
the largest, or the most probable, of their case."""

_MM3_PER_ML = 1000.0
_JUST_ABOVE = 1.01
_DIGITS = 3
# Means of thousands of cases are equal to about this.
_ROUNDING = 1e-12

Group = tuple[str, ...]
"""Classes whose components are looked at together; one, as a rule."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """A case with its out-of-fold prediction.

    Attributes:
        case: Its id.
        prediction: Label map.
        reference: Label map.
        annotated: Names of the classes that the reference annotates; None: all.
        mixture: Opens the probabilities from which the prediction was decided; None: they are not known, and rules
            about them are not tried.
    """

    case: str
    prediction: Path
    reference: Path
    annotated: tuple[str, ...] | None = None
    mixture: Callable[[], Mixture] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """What one round needs of a case."""

    voxel_ml: float
    counts: Counts
    components: Mapping[Group, Components] = field(default_factory=dict)
    filled: Mapping[Group, Counts] = field(default_factory=dict)
    changes: Mapping[tuple[int, float], Changes] = field(default_factory=dict)


_Kind = Literal["thresholds", "components", "holes"]


@dataclass(frozen=True, slots=True)
class _Round:
    groups: tuple[Group, ...]
    kind: _Kind


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a search.

    Attributes:
        rules: Those that are kept, in order.
        tried: The best of each kind and class.
    """

    rules: tuple[Rule, ...]
    tried: tuple[TriedRule, ...]


class RuleSearch:
    """One search.

    Args:
        cases: With their predictions.
        schema: The labels.
        patients: By case id; a case that is not in it is a patient of its own.
        workers: Threads; at most so many cases are in memory.
        progress: One step a case and round.
    """

    def __init__(
        self,
        cases: Sequence[Predicted],
        schema: LabelSchema,
        patients: Mapping[str, str],
        workers: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self._cases = tuple(cases)
        self._schema = schema
        self._decoder = Decoder(schema)
        self._table = self._decoder.table
        self._workers = max(1, workers)
        self._progress = progress or NoProgress()
        self._bootstrap = Bootstrap.of([case.case for case in cases], patients)
        self._are_probable = bool(self._cases) and all(case.mixture is not None for case in self._cases)
        self._rules: list[Rule] = []
        self._tried: list[TriedRule] = []

    def run(self) -> Found:
        """Search, round by round.

        Raises:
            DatasetError: A label map cannot be read.
        """
        for one in _rounds(self._schema, with_thresholds=self._are_probable):
            self._round(one)
        return Found(tuple(self._rules), tuple(self._tried))

    def _round(self, one: _Round) -> None:
        seen = self._see(one)
        counts = [item.counts for item in seen]
        for number, group in enumerate(one.groups):
            num_kept = len(self._rules)
            # Components that a rule of this group has taken away already.
            gone: list[NDArray[np.bool_] | None] = [None] * len(seen)
            for variants in self._variants(group, one, seen):
                counts = self._try(variants, seen, counts, group, gone)
            if one.kind != "components" and len(self._rules) > num_kept and one.groups[number + 1 :]:
                # A hole may lie in another one, and a voxel that one class may not have goes to another: what was seen
                # of the others holds no longer.
                self._round(_Round(one.groups[number + 1 :], one.kind))
                return

    def _see(self, one: _Round) -> list[_Seen]:
        """Look at every case."""
        self._progress.start(f"Post-processing: {one.kind}", len(self._cases))
        seen = []
        with ThreadPoolExecutor(self._workers) as pool:
            for item in pool.map(lambda case: self._look(case, one), self._cases):
                seen.append(item)
                self._progress.advance()
        self._progress.finish()
        return seen

    def _look(self, case: Predicted, one: _Round) -> _Seen:
        """Read a case, apply what is kept so far, and find what the round asks for."""
        reference, geometry = read_labels(case.reference, None)
        decided, _ = read_labels(case.prediction, geometry)
        spacing = geometry.spacing_mm
        thresholds = thresholds_of(self._rules, self._schema)
        labels = decided
        if thresholds is not None:
            labels = with_thresholds(decided, _mixture(case), thresholds, self._decoder)
        likelihoods: Likelihoods | None = None
        asks = any(isinstance(rule, DropUnlikely) for rule in self._rules)
        if self._are_probable and (asks or one.kind == "components"):
            likelihoods = likelihoods_of(labels, _mixture(case), self._decoder)
        if self._rules:
            labels = apply_rules(labels, self._rules, self._schema, spacing, likelihoods)
        # Counted as they lie in memory: files are read in Fortran order.
        actual = self._table.encode_reference(np.ascontiguousarray(reference.T))
        counts = self._table.count(actual, self._table.encode(np.ascontiguousarray(labels.T)))
        voxel_ml = prod(spacing) / _MM3_PER_ML
        if one.kind == "thresholds":
            return _Seen(voxel_ml, counts, changes=self._changes(case, decided, actual, thresholds, one))
        if one.kind == "components":
            # On the file's own axes: of equal components the first one counts as the largest.
            found = {
                group: components_of(
                    group,
                    labels,
                    actual.T,
                    self._schema,
                    self._table,
                    None if likelihoods is None or len(group) > 1 else likelihoods[group[0]],
                )
                for group in one.groups
            }
            return _Seen(voxel_ml, counts, found)
        filled = {}
        for group in one.groups:
            new = apply_rules(labels, (FillHoles(classes=group),), self._schema, spacing)
            filled[group] = without_holes(labels, new, actual.T, counts, self._table)
        return _Seen(voxel_ml, counts, {}, filled)

    def _changes(
        self,
        case: Predicted,
        decided: NDArray[np.integer],
        actual: NDArray[np.int16],
        kept: Thresholds | None,
        one: _Round,
    ) -> Mapping[tuple[int, float], Changes]:
        return changes_of(
            self._table.encode(decided.T),
            actual,
            _mixture(case),
            kept or (None,) * len(self._schema.classes),
            dict.fromkeys((self._schema.names.index(name) for (name,) in one.groups), THRESHOLDS),
            self._decoder,
        )

    def _variants(self, group: Group, one: _Round, seen: Sequence[_Seen]) -> Iterator[tuple[Rule, ...]]:
        """Rules of one kind each, of which the best is looked for."""
        if one.kind == "thresholds":
            yield tuple(Threshold(classes=group, min_probability=value) for value in THRESHOLDS)
            return
        if one.kind == "holes":
            yield (FillHoles(classes=group),)
            return
        is_joined = len(group) > 1
        yield tuple(
            KeepLargest(classes=group, joined=is_joined, count=count)
            for count in (KEEP_COUNTS[:1] if is_joined else KEEP_COUNTS)
        )
        if not is_joined:
            yield tuple(DropSmall(classes=group, min_ml=value) for value in _volumes_ml(group, seen))
            yield tuple(DropUnlikely(classes=group, min_mean=value) for value in _means(group, seen))

    def _try(
        self,
        variants: Sequence[Rule],
        seen: Sequence[_Seen],
        counts: list[Counts],
        group: Group,
        gone: list[NDArray[np.bool_] | None],
    ) -> list[Counts]:
        """Try rules of a kind, keep the best if it surely helps; returns the counts from now on."""
        if not variants:
            return counts
        before = self._dice(counts)
        results = [(rule, self._with(rule, seen, counts, group, gone)) for rule in variants]
        judged = [(new, self._judge(rule, before, self._dice(new))) for rule, new in results]
        new, best = max(judged, key=lambda item: (item[1].is_kept, item[1].dice_after))
        if not any(best.class_gains.values()):
            return counts  # nothing to do anywhere: not worth a line
        self._tried.append(best)
        if not best.is_kept:
            return counts
        self._rules.append(best.rule)
        if not isinstance(best.rule, FillHoles | Threshold):
            gone[:] = [item.components[group].leaving(best.rule, item.voxel_ml) for item in seen]
        return new

    def _with(
        self,
        rule: Rule,
        seen: Sequence[_Seen],
        counts: Sequence[Counts],
        group: Group,
        gone: Sequence[NDArray[np.bool_] | None],
    ) -> list[Counts]:
        """The counts of every case with a rule."""
        # Nothing else has been filled, and no other threshold kept, since these cases were looked at.
        if isinstance(rule, FillHoles):
            return [item.filled[group] for item in seen]
        if isinstance(rule, Threshold):
            key = self._schema.names.index(group[0]), rule.min_probability
            return [item.changes[key].applied(now) for item, now in zip(seen, counts, strict=True)]
        out = []
        for item, now, before in zip(seen, counts, gone, strict=True):
            components = item.components[group]
            leaving = components.leaving(rule, item.voxel_ml)
            if before is not None:
                leaving &= ~before
            out.append(components.without(leaving, now) if leaving.any() else now)
        return out

    def _dice(self, counts: Sequence[Counts]) -> NDArray[np.float64]:
        return np.array(
            [dice_of(item, self._schema, case.annotated) for item, case in zip(counts, self._cases, strict=True)]
        ).reshape(len(self._cases), len(self._schema.classes))

    def _judge(self, rule: Rule, before: NDArray[np.float64], after: NDArray[np.float64]) -> TriedRule:
        names = self._schema.names
        dice_before, dice_after = mean_foreground(before) or 0.0, mean_foreground(after) or 0.0
        gains = {
            name: None if new is None or old is None else new - old
            for name, old, new in zip(names, class_means(before), class_means(after), strict=True)
        }
        interval: Interval | None = None
        if self._bootstrap.num_patients >= MIN_PATIENTS:
            drawn, drawn_after = (mean_of_means(self._bootstrap.means(item)) for item in (before, after))
            interval = interval_of(drawn_after - drawn)
        reason = _against(dice_after - dice_before, interval, gains)
        return TriedRule(
            rule=rule,
            dice_before=dice_before,
            dice_after=dice_after,
            interval=interval,
            class_gains=gains,
            is_kept=not reason,
            reason=reason or "the 95 % interval of the gain lies above 0, and no class loses",
        )


def _against(gain: float, interval: Interval | None, class_gains: Mapping[str, float | None]) -> str:
    """Why a rule is not kept; empty if it is."""
    losing = [name for name, value in class_gains.items() if value is not None and value < -_ROUNDING]
    if gain <= _ROUNDING:
        return "the mean foreground Dice does not rise"
    if losing:
        return f"the Dice of {', '.join(losing)} falls"
    if interval is None:
        return "there are too few patients for an interval"
    if interval.low <= 0:
        return "the 95 % interval of the gain reaches 0"
    return ""


def _mixture(case: Predicted) -> Mixture:
    assert case.mixture is not None, "tried only where the probabilities of every case are known"
    return case.mixture()


def _rounds(schema: LabelSchema, *, with_thresholds: bool) -> Iterator[_Round]:
    singles: tuple[Group, ...] = tuple((name,) for name in schema.names)
    if with_thresholds:
        yield _Round(singles, "thresholds")
    if schema.has_regions:
        yield from (_Round((group,), "components") for group in singles)
        yield from (_Round((group,), "holes") for group in singles)
        return
    if len(singles) > 1:
        yield _Round((schema.names,), "components")
    yield _Round(singles, "components")
    yield _Round(singles, "holes")


def _volumes_ml(group: Group, seen: Sequence[_Seen]) -> tuple[float, ...]:
    """Smallest volumes worth trying, ascending."""
    others = [np.sort(item.components[group].sizes)[:-1] * item.voxel_ml for item in seen]
    pooled = np.concatenate(others) if others else np.zeros(0)
    if not len(pooled):
        return ()
    return _just_above(pooled)


def _means(group: Group, seen: Sequence[_Seen]) -> tuple[float, ...]:
    """Smallest mean probabilities worth trying, ascending."""
    means = (item.components[group].means for item in seen)
    others = [np.sort(values)[:-1] for values in means if values is not None]
    pooled = np.concatenate([np.zeros(0), *others])
    return tuple(value for value in _just_above(pooled) if value < 1) if len(pooled) else ()


def _just_above(values: NDArray[np.float64]) -> tuple[float, ...]:
    quantiles = (float(value) * _JUST_ABOVE for value in np.quantile(values, DROP_QUANTILES, method="higher"))
    return tuple(dict.fromkeys(float(f"{value:.{_DIGITS}g}") for value in quantiles))
