"""What a run's figures ask for, in words: the three things most worth doing next, and short answers to first questions.

Every finding has a gain: about how much higher the mean foreground Dice would be without the trouble it names. It only
puts the findings in order; it is a bound on what could be won, not a promise, and is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from autoseg.report.collect import Curve, RunResults
from autoseg.report.tally import ClassTally, rows_of, tally
from autoseg.report.wording import tolerance_in_words

NUM_SHOWN = 3

OUTLIER_STDS = 4.0
MIN_OUTLIER_STD = 0.02
MIN_OUTLIER_GAP = 0.1
"""A case stands out whose Dice lies this far below the median: in robust standard deviations (1.4826 times the median
absolute deviation, at least 0.02, so that near-perfect classes have no outliers by a hair), and in Dice.
Source: Leys et al. 2013, J. Exp. Soc. Psychol. 49:764 for the deviation; the limits are ours.
"""

MAD_TO_STD = 1.4826

MIN_CONFIDENCES = 5
MIN_SURE_ERRORS = 0.1
"""A case is surely wrong whose part of confident errors stands out likewise, and is at least this."""

MIN_LABEL_GAIN = 0.02
"""What a surely wrong case is worth in the order of findings: a wrong label also teaches."""

RARE_CASES = 10
RARE_FRACTION = 0.1
"""A class is rare in fewer cases than this, or in a smaller part of them."""

CLASS_GAP = 0.05
"""Dice by which a class lies below the mean of the others to be called out."""

SPACING_FACTOR = 2.0
"""A spacing is out of range that is more than this many times larger or smaller than the median along its axis."""

VOLUME_BIAS = 0.1
"""Mean relative volume error that is called out."""

BIAS_TO_DICE = 0.5
"""A volume that is wrong by a part e costs about e / 2 of the Dice: 2(1+e)/(2+e) rounded to first order."""

RISING_DICE = 0.01
RISING_PART = 0.1
MIN_EPOCHS = 20
"""A training still rises when the validation Dice of its last tenth is this much above that of the tenth before."""

MISSING_FOLDS_GAIN = 0.02
"""What finished folds are worth in the order of findings: figures over some of the cases only are the less sure."""

SMALL_RATIO = 0.25
"""A class is small whose median volume is less than this part of the median class's."""

SMALL_VOXELS = 200
"""A class is small for its voxels: one layer of its surface is then a third of it or more."""

GOOD_SURFACE = 0.9
MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth doing.

    Attributes:
        kind: "labels", "rare", "class", "detection", "spacing", "volume", "training", "folds".
        title: What to do.
        text: Why.
        cases: Ids that it is about, the worst first.
        gain: See the module.
        about: The class, or "".
    """

    kind: str
    title: str
    text: str
    cases: tuple[str, ...] = ()
    gain: float = 0.0
    about: str = ""


def find(results: RunResults) -> tuple[Finding, ...]:
    """The findings, the most worth doing first; one a class and kind of trouble."""
    names = results.plan.labels.names
    rows = rows_of(results, results.summary.best)
    classes = [item for item in tally(rows, names) if item.num_present]
    found = [*_training(results), *_folds(results)]
    if classes:
        found += [*_labels(results, classes), *_spacings(results)]
        for item in classes:
            # One finding a class: the others would mostly say the same in other words.
            own = sorted(_of_class(results, item, classes), key=lambda one: -one.gain)
            found += own[:1]
    return tuple(sorted(found, key=lambda one: -one.gain))


def outliers(item: ClassTally) -> tuple[int, ...]:
    """Places of the cases whose Dice lies far below the others', the lowest first."""
    if not len(item.dice):
        return ()
    middle = float(np.median(item.dice))
    spread = max(MIN_OUTLIER_STD, MAD_TO_STD * float(np.median(np.abs(item.dice - middle))))
    gap = middle - item.dice
    far = np.flatnonzero((gap > OUTLIER_STDS * spread) & (gap > MIN_OUTLIER_GAP))
    return tuple(int(place) for place in far[np.argsort(item.dice[far], kind="stable")])


def _labels(results: RunResults, classes: Sequence[ClassTally]) -> Iterator[Finding]:
    """Cases far below the others, or confidently different from their reference: suspect labels or unusual images."""
    worst, gain = _far_below(classes)
    order = sorted(worst, key=lambda case: worst[case])
    sure = _surely_wrong(results)
    doubted = _doubted(results)
    everywhere = () if sure else _outlying_everywhere(results, [case for case in order if case not in doubted])
    unsure = [case for case in order if case in doubted]
    texts = []
    if order:
        told = _listed([worst[case][1] for case in order], "; ")
        texts.append(f"Far below the others: {told}. Look whether the label, the image or the prediction is wrong.")
    if sure:
        texts.append(
            f"The models are sure of {_listed(sure)} and yet disagree with the reference: there the label is the first "
            "suspect."
        )
    if everywhere:
        texts.append(
            f"Every configuration disagrees with the reference in {_listed(everywhere)}: there the label is the first "
            "suspect."
        )
    if unsure:
        texts.append(
            f"The models are unsure themselves of {_listed(unsure)}: there the image may be unlike the others, or hard "
            "to read."
        )
    cases = tuple(dict.fromkeys((*sure, *everywhere, *order)))
    if cases:
        number = "one case" if len(cases) == 1 else f"{len(cases)} cases"
        gain = max(gain, MIN_LABEL_GAIN if sure else 0.0)
        yield Finding("labels", f"Check the labels of {number}", " ".join(texts), cases, gain)


def _far_below(classes: Sequence[ClassTally]) -> tuple[dict[str, tuple[float, str]], float]:
    """Cases far below the others of a class, with how far and in words; and what is lost by them."""
    worst: dict[str, tuple[float, str]] = {}
    gain = 0.0
    for item in classes:
        middle = float(np.median(item.dice))
        for place in outliers(item):
            if not item.prediction_mm3[place]:
                continue  # a miss is a finding of its own
            dice, case = float(item.dice[place]), item.cases[place]
            gain += (middle - dice) / item.num_present / len(classes)
            told = f"{case} ({item.name} {dice:.2f}, median {middle:.2f})"
            worst[case] = min(worst.get(case, (2.0, "")), (dice - middle, told))
    return worst, gain


def _surely_wrong(results: RunResults) -> tuple[str, ...]:
    """Cases in which voxels of high confidence disagree with the reference far more often than elsewhere."""
    selection = results.summary.selection
    found = () if selection is None else selection.confidences
    known = {item.case: item.sure_errors_fraction for item in found if item.sure_errors_fraction is not None}
    if len(known) < MIN_CONFIDENCES:
        return ()
    limit = max(MIN_SURE_ERRORS, _upper_limit(list(known.values())))
    return tuple(sorted((case for case in known if known[case] > limit), key=lambda case: (-known[case], case)))


def _doubted(results: RunResults) -> frozenset[str]:
    """Cases of which the models are far less sure than of the others."""
    selection = results.summary.selection
    found = () if selection is None else selection.confidences
    known = {item.case: item.mean_entropy for item in found if item.mean_entropy is not None}
    if len(known) < MIN_CONFIDENCES:
        return frozenset()
    limit = _upper_limit(list(known.values()))
    return frozenset(case for case, value in known.items() if value > limit)


def _upper_limit(values: Sequence[float]) -> float:
    """Above which a value stands out among the others."""
    middle = float(np.median(values))
    spread = max(MIN_OUTLIER_STD, MAD_TO_STD * float(np.median(np.abs(np.array(values) - middle))))
    return middle + OUTLIER_STDS * spread


def _outlying_everywhere(results: RunResults, cases: Sequence[str]) -> tuple[str, ...]:
    """Those of the cases that stand out in every configuration that predicted them; () with one configuration."""
    scored = [item.name for item in results.summary.configurations if item.summary is not None and item.folds]
    if len(scored) < 2:
        return ()
    standing_out = []
    for name in scored:
        found: set[str] = set()
        for item in tally(rows_of(results, name), results.plan.labels.names):
            found |= {item.cases[place] for place in outliers(item)}
        standing_out.append(found)
    return tuple(case for case in cases if all(case in found for found in standing_out))


def _of_class(results: RunResults, item: ClassTally, classes: Sequence[ClassTally]) -> Iterator[Finding]:
    others = [other.mean_dice for other in classes if other is not item]
    gap = float(np.mean(others)) - item.mean_dice if others else 0.0
    num_cases = item.num_present + item.num_absent
    part = 1 / len(classes)
    if item.num_present < min(RARE_CASES, num_cases) or item.num_present < RARE_FRACTION * num_cases:
        text = (
            f"Only {item.num_present} of {num_cases} cases contain {item.name}; its mean Dice is {item.mean_dice:.3f}. "
            "A class that is seen so seldom is learned badly, and its figures are not sure."
        )
        yield Finding("rare", f"Label more cases with {item.name}", text, _lowest(item), max(gap, 0) * part, item.name)
    elif gap > CLASS_GAP:
        text = f"Its mean Dice is {item.mean_dice:.3f}, {gap:.3f} below the mean of the other classes. "
        text += _first_upper(why_low(results, item, classes))
        yield Finding("class", f"Work on {item.name}, the weakest class", text, _lowest(item), gap * part, item.name)
    if item.num_missed or item.num_spurious:
        yield _detection(item, part)
    error = item.relative_error
    if len(error) > 1 and abs(error.mean()) > max(VOLUME_BIAS, 2 * error.std(ddof=1) / np.sqrt(len(error))):
        kind = "small" if error.mean() < 0 else "large"
        text = (
            f"Volumes of {item.name} come out {abs(error.mean()):.0%} too {kind} on average. Where volumes are the "
            "aim, say so or correct them; look whether its border is drawn alike in all references."
        )
        title = f"Mind that {item.name} is predicted too {kind}"
        yield Finding("volume", title, text, (), BIAS_TO_DICE * float(abs(error.mean())) * part, item.name)


def _detection(item: ClassTally, part: float) -> Finding:
    missed = f"{item.name} was missed in {item.num_missed} of {item.num_present} cases" if item.num_missed else ""
    spurious = (
        f"{'it' if missed else item.name} was predicted in {item.num_spurious} of {item.num_absent} cases without it"
        if item.num_spurious
        else ""
    )
    text = " and ".join(text for text in (missed, spurious) if text) + ". "
    text += "Look at these cases first; the table of cases marks them."
    gain = item.num_missed / max(1, item.num_present) * max(0.0, float(np.median(item.dice))) * part
    cases = tuple(case for case, volume in zip(item.cases, item.prediction_mm3, strict=True) if not volume)
    what = " or ".join(word for word, count in (("missed", item.num_missed), ("made up", item.num_spurious)) if count)
    return Finding("detection", f"Look where {item.name} is {what}", text, cases, gain, item.name)


def why_low(results: RunResults, item: ClassTally, classes: Sequence[ClassTally]) -> str:
    """What goes with a low Dice of a class, in a sentence without its first capital."""
    reasons = []
    if item.num_missed:
        reasons.append(f"it was missed altogether in {item.num_missed} of {item.num_present} cases")
    medians = [float(np.median(other.reference_mm3)) for other in classes]
    own = float(np.median(item.reference_mm3))
    if own < SMALL_RATIO * float(np.median(medians)) or _median_voxels(results, item) < SMALL_VOXELS:
        reasons.append(
            f"it is small (median {_millilitres(own)}, {_median_voxels(results, item):.0f} voxels), so that an error "
            "of one voxel at its border costs much Dice"
        )
    surface = _metric_mean(results, item.name, "surface_dice")
    if surface is not None and surface > GOOD_SURFACE:
        within = tolerance_in_words({item.name: results.summary.tolerance_mm[item.name]})
        reasons.append(f"its errors lie along its border, {surface:.1%} of which is within {within} of the reference's")
    taken = _taken_for(results, item)
    if taken:
        reasons.append(taken)
    far = outliers(item)
    if far:
        named = _listed([item.cases[place] for place in far])
        reasons.append(f"{len(far)} of its cases {'is' if len(far) == 1 else 'are'} far below the others ({named})")
    if len(item.dice) > 1 and not reasons:
        reasons.append(f"its cases differ widely (standard deviation {item.dice.std(ddof=1):.2f})")
    return "; ".join(reasons) + "." if reasons else "no single cause stands out."


def _taken_for(results: RunResults, item: ClassTally) -> str:
    """What its voxels were predicted as, where that was wrong; needs the voxels counted."""
    best = next((one for one in results.summary.configurations if one.name == results.summary.best), None)
    pairs = () if best is None or best.summary is None else best.summary.confusions
    own = {one.prediction: one.voxels for one in pairs if one.reference == item.name}
    total = sum(own.values())
    wrong = sorted(((count, name) for name, count in own.items() if name != item.name and count), reverse=True)
    told = [
        f"{count / total:.1%} {'of its voxels were predicted ' if not place else ''}as {name}"
        for place, (count, name) in enumerate(wrong[:2])
    ]
    return ", ".join(told)


def _metric_mean(results: RunResults, class_name: str, metric: str) -> float | None:
    for configuration in results.summary.configurations:
        if configuration.name == results.summary.best and configuration.summary is not None:
            for item in configuration.summary.classes:
                if item.name == class_name:
                    return item.metric(metric).mean
    return None


def _median_voxels(results: RunResults, item: ClassTally) -> float:
    rows = rows_of(results, results.summary.best)
    counts = [row.metrics.classes[item.index].reference_vox for row in rows]
    return float(np.median([count for count in counts if count] or [0]))


def _lowest(item: ClassTally) -> tuple[str, ...]:
    order = np.argsort(item.dice, kind="stable")[:MAX_NAMED]
    return tuple(item.cases[int(place)] for place in order)


def _spacings(results: RunResults) -> Iterator[Finding]:
    """Cases whose voxels are far coarser or finer than the others'."""
    stats = results.fingerprint.cases
    if not stats:
        return
    spacings = np.array([item.spacing_mm for item in stats])
    ratio = spacings / np.median(spacings, axis=0)
    far = ((ratio > SPACING_FACTOR) | (ratio < 1 / SPACING_FACTOR)).any(axis=1)
    strange = {item.case: item.spacing_mm for item, is_far in zip(stats, far, strict=True) if is_far}
    scores = {row.metrics.case: row.metrics.mean_dice for row in rows_of(results, results.summary.best)}
    own = [score for case, score in scores.items() if case in strange and score is not None]
    rest = [score for case, score in scores.items() if case not in strange and score is not None]
    if not strange:
        return
    told = _listed([f"{case} ({' × '.join(f'{size:.3g}' for size in strange[case])} mm)" for case in strange])
    text = f"More than {SPACING_FACTOR:g} times coarser or finer than the median: {told}."
    gain = 0.0
    if own and rest:
        gain = max(0.0, float(np.mean(rest)) - float(np.mean(own))) * len(own) / (len(own) + len(rest))
        text += f" Their mean Dice is {np.mean(own):.3f}, that of the other cases {np.mean(rest):.3f}."
    yield Finding("spacing", "Check the spacing of unusual images", text, tuple(strange), gain)


def _training(results: RunResults) -> Iterator[Finding]:
    """Trainings whose validation Dice still rose when they ended."""
    gains = [gain for curve in results.curves if (gain := _rise(curve)) is not None]
    rising = [gain for gain in gains if gain > RISING_DICE]
    if rising and len(rising) * 2 > len(gains):
        text = (
            f"In {len(rising)} of {len(gains)} trainings the Dice of held-out patches still rose by "
            f"{np.mean(rising):.3f} from the last but one tenth to the last: they had not learned all they could. Give "
            "them more time (--time-budget or --epochs)."
        )
        yield Finding("training", "Train longer", text, (), float(np.mean(rising)))


def _rise(curve: Curve) -> float | None:
    """Mean validation Dice of the last tenth of a training minus that of the tenth before; None where it is short."""
    values = [item.mean_pseudo_dice for item in curve.epochs if item.mean_pseudo_dice is not None]
    if len(values) < MIN_EPOCHS:
        return None
    size = max(1, round(RISING_PART * len(values)))
    before, last = (np.mean(values[start:stop]) for start, stop in pairwise((-2 * size, -size, len(values))))
    return float(last - before)


def _folds(results: RunResults) -> Iterator[Finding]:
    """Folds of the best configuration that are not there."""
    best = next((one for one in results.summary.configurations if one.name == results.summary.best), None)
    if best is None or best.summary is None or best.summary.num_cases >= results.summary.num_cases:
        return
    text = (
        f"The figures are about {best.summary.num_cases} of {results.summary.num_cases} labelled cases: those of the "
        f"finished folds of {best.name}. With every fold each case is predicted once by a model that has not seen it, "
        "and the folds' models predict new images together."
    )
    part = 1 - best.summary.num_cases / results.summary.num_cases
    yield Finding("folds", "Train the remaining folds", text, (), MISSING_FOLDS_GAIN * part)


def _listed(names: Sequence[str], joint: str = ", ") -> str:
    shown = joint.join(names[:MAX_NAMED])
    return f"{shown} and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else shown


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _millilitres(volume_mm3: float) -> str:
    return f"{volume_mm3 / 1000:.3g} ml"
