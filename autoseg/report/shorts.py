"""Short answers to first questions: which configuration, which class is worst and why, which cases, what memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.report.collect import CaseRow, RunResults
from autoseg.report.facts import is_flat, total_training
from autoseg.report.findings import why_low
from autoseg.report.tally import rows_of, tally
from autoseg.report.wording import gigabytes, number, times

NUM_CASES = 3


@dataclass(frozen=True, slots=True)
class Short:
    """One question with its answer, and the cases that it names."""

    question: str
    answer: str
    cases: tuple[str, ...] = ()


def in_short(results: RunResults) -> tuple[Short, ...]:
    """The answers that the run has."""
    return tuple(_answers(results))


def _answers(results: RunResults) -> Iterator[Short]:
    yield _data(results)
    yield from _which_configuration(results)
    rows = rows_of(results, results.summary.best)
    classes = [item for item in tally(rows, results.plan.labels.names) if item.num_present]
    if classes:
        worst = min(classes, key=lambda item: item.mean_dice)
        reason = why_low(results, worst, classes)
        which = f"{worst.name}, mean Dice {worst.mean_dice:.3f} in {worst.num_present} cases: {reason}"
        yield Short("Which class is worst, and why?" if len(classes) > 1 else "How good is the class?", which)
        scored = [row for row in rows if row.metrics.mean_dice is not None]
        lowest = sorted(scored, key=lambda row: row.metrics.mean_dice or 0.0)[:NUM_CASES]
        told = ", ".join(f"{row.metrics.case} ({row.metrics.mean_dice:.3f})" for row in lowest)
        yield Short("Which cases to look at?", f"Those of the lowest mean Dice: {told}.", _ids(lowest))
    seconds, peak = total_training(results)
    if peak:
        minutes = f"{seconds / 60:.0f} minutes" if seconds >= 600 else f"{seconds / 60:.1f} minutes"
        yield Short(
            "How much memory and time?",
            f"Training took at most {gigabytes(peak)} GB; all folds together trained for {minutes}.",
        )


def _data(results: RunResults) -> Short:
    """Data set and plan in a sentence each."""
    fingerprint, plan = results.fingerprint, results.plan
    first, axes = (1, "Y × X") if is_flat(results) else (0, "Z × Y × X")
    rows = (fingerprint.shapes, fingerprint.spacings_mm)
    shape, spacing = (np.median(np.array(one)[:, first:], axis=0) for one in rows)
    networks = "; ".join(
        f"{name} sees patches of {times(one.network.patch_size)} voxels at {times(one.preprocess.target_spacing)} mm, "
        f"{one.training.batch_size} at a time"
        for name, one in plan.configurations.items()
    )
    channels = ", ".join(channel.name for channel in results.dataset.channels)
    return Short(
        "What are the data and the plan?",
        f"{len(results.dataset.cases)} images ({channels}), median {times(shape)} voxels of {times(spacing)} mm "
        f"({axes}). {networks}. Why: see the plan below.",
    )


def _ids(rows: Sequence[CaseRow]) -> tuple[str, ...]:
    return tuple(row.metrics.case for row in rows)


def _which_configuration(results: RunResults) -> Iterator[Short]:
    """What was chosen by cross-validation, or what scored best so far."""
    question = "Which configuration to use?"
    selection = results.summary.selection
    if selection is not None:
        reached, afterwards = (one.mean_foreground_dice for one in (selection.chosen, selection.final))
        rules = f", with its post-processing {number(afterwards)}" if selection.recipe.postprocessing else ""
        says_which = selection.reason.startswith(selection.choice)
        reason = selection.reason if says_which else f"{selection.choice}: {selection.reason}"
        answer = (
            f"{reason}. The mean foreground Dice of {selection.choice} is {number(reached)}{rules}; autoseg predict "
            "uses it without being told."
        )
        yield Short(question, answer)
        return
    scored = {
        item.name: item.summary.mean_foreground_dice
        for item in results.summary.configurations
        if item.summary is not None and item.summary.mean_foreground_dice is not None
    }
    best = results.summary.best
    if best is None or best not in scored:
        return
    others = ", ".join(f"{name} {dice:.3f}" for name, dice in scored.items() if name != best)
    against = f", against {others}" if others else ", the only one with held-out cases so far"
    yield Short(question, f"{best}: mean foreground Dice {scored[best]:.3f}{against}.")
