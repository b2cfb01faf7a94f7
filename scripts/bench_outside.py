"""How often an unusual input is told: of held-out cases of the same set, of changed ones, of other sets.

    python scripts/bench_outside.py DATA --out FOLDER

DATA holds data sets, each a folder with a dataset.json (`sarcoma` is taken with MR alone, and of every set the first
channel). Each case is read and measured once; FOLDER/measured keeps that, so that another limit costs seconds. No
network is needed. FOLDER gets outside.json and outside.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.domain import outside as rules
from autoseg.domain.dataset import Channel
from autoseg.domain.fingerprint import CaseStats, ChannelLook, Fingerprint
from autoseg.domain.layouts import load_dataset
from autoseg.domain.outside import outside
from autoseg.domain.preprocess_plan import ChannelNormalization, PreprocessPlan
from autoseg.domain.trained_on import summarise
from autoseg.io.files import write_json, write_text
from autoseg.pipeline.tasks import Measuring
from autoseg.planning.normalization import choose_normalization
from autoseg.planning.presets import preset_rules
from autoseg.preprocessing.measure import merge

SETS = {
    "hippocampus": "hippocampus",
    "headneck_ct": "headneck_ct",
    "sarcoma (MR)": "sarcoma/dataset_mr_only.json",
    "fetal_brain": "fetal_brain",
    "mouse_brain": "mouse_brain",
    "membrane": "membrane",
    "nuclei": "nuclei",
    "axon_sem": "axon_sem",
}
NUM_FOLDS = 5
SEED = 0
UNSCALED_CT = 1024.0
"""What a CT lies off when its rescale intercept was left out."""


def measured(data: Path, kept: Path, name: str) -> Fingerprint:
    """The fingerprint of a set, with its first channel alone."""
    path = kept / f"{name}.json"
    if path.is_file():
        return Fingerprint.from_json(path.read_text(), path)
    dataset = load_dataset(data / SETS[name])
    task = Measuring(labels=dataset.labels, num_channels=len(dataset.channels))
    cases = [first_channel(task.run(case)) for case in dataset.cases]
    found = merge(cases, [dataset.channels[0].name], dataset.labels.num_classes)
    write_text(path, found.to_json())
    return found


def first_channel(case: CaseStats) -> CaseStats:
    """A case as if it had one channel."""
    assert case.look is not None
    look = case.look.model_copy(update={"channels": case.look.channels[:1]})
    return case.model_copy(update={"look": look, "intensities": case.intensities[:1]})


def rule_of(fingerprint: Fingerprint) -> tuple[ChannelNormalization, ...]:
    """How the default plan scales the first channel."""
    channels = [Channel(name=name) for name in fingerprint.channels]
    return choose_normalization(fingerprint, channels, preset_rules("default"))


def warnings(train: Fingerprint, cases: Sequence[CaseStats]) -> list[tuple[str, ...]]:
    """What each case is warned of by a model of a set."""
    scaling = rule_of(train)
    known = summarise(train, scaling)
    assert known is not None
    plan = PreprocessPlan(target_spacing=(1.0, 1.0, 1.0), normalization=scaling)
    return [tuple(item.what for item in outside(known, case, plan, train.channels)) for case in cases]


def held_out(found: Fingerprint, change: Callable[[CaseStats], CaseStats] | None = None) -> list[tuple[str, ...]]:
    """The same for cases that were left out, changed or as they are."""
    order = np.random.default_rng(SEED).permutation(len(found.cases))
    result = []
    for part in np.array_split(order, NUM_FOLDS):
        train = [case for number, case in enumerate(found.cases) if number not in part]
        test = [found.cases[number] for number in part]
        model = merge(train, found.channels, found.num_classes)
        result += warnings(model, [case if change is None else change(case) for case in test])
    return result


def _with_look(case: CaseStats, change: Callable[[ChannelLook], ChannelLook]) -> CaseStats:
    assert case.look is not None
    channels = tuple(None if item is None else change(item) for item in case.look.channels)
    return case.model_copy(update={"look": case.look.model_copy(update={"channels": channels})})


def _shifted(look: ChannelLook) -> ChannelLook:
    moved = {name: getattr(look, name) + UNSCALED_CT for name in ("mean", "minimum", "maximum")}
    return look.model_copy(update=moved | {"quantiles": tuple(value + UNSCALED_CT for value in look.quantiles)})


def _inverted(look: ChannelLook) -> ChannelLook:
    top = look.maximum + look.minimum
    quantiles = tuple(top - value for value in reversed(look.quantiles))
    return look.model_copy(update={"mean": top - look.mean, "quantiles": quantiles})


def _scaled_lengths(case: CaseStats, factor: float) -> CaseStats:
    spacing = case.spacing_mm if case.is_2d else tuple(factor * length for length in case.spacing_mm)
    return case.model_copy(update={"spacing_mm": spacing})


def _cropped(case: CaseStats) -> CaseStats:
    first, *rest = case.shape
    shape = (first if case.is_2d else max(1, first // 2), *(max(1, size // 2) for size in rest))
    return case.model_copy(update={"shape": shape})


CHANGES: dict[str, Callable[[CaseStats], CaseStats]] = {
    "intensities + 1024": lambda case: _with_look(case, _shifted),
    "intensities inverted": lambda case: _with_look(case, _inverted),
    "voxels twice as long": lambda case: _scaled_lengths(case, 2.0),
    "cropped to half along each axis": _cropped,
}


def share(found: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Cases, warned ones, and of what."""
    warned = [item for item in found if item]
    return {"cases": len(found), "warned": len(warned), "of": dict(Counter(what for item in warned for what in item))}


def cell(found: dict[str, Any]) -> str:
    """As "38/39 spacing, size"."""
    return f"{found['warned']}/{found['cases']} {', '.join(found['of'])}".strip()


def table(rows: dict[str, dict[str, Any]], corner: str) -> str:
    """A table in Markdown."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {corner} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(cell(row[column]) for column in columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=rules.LIMIT)
    arguments = parser.parse_args()
    rules.LIMIT = arguments.limit
    found = {name: measured(arguments.data, arguments.out / "measured", name) for name in SETS}
    own: dict[str, dict[str, Any]] = {
        name: {"held out": share(held_out(item))}
        | {what: share(held_out(item, change)) for what, change in CHANGES.items()}
        for name, item in found.items()
    }
    others = {
        name: {other: share(warnings(item, found[other].cases)) for other in SETS} for name, item in found.items()
    }
    write_json(arguments.out / "outside.json", {"limit": rules.LIMIT, "own": own, "others": others})
    text = (
        f"Limit {rules.LIMIT:g}. Warned cases / cases, and of what.\n\nCases left out of the training:\n\n"
        f"{table(own, 'set')}\n\nAll cases of other sets (columns), models of the sets in rows:\n\n"
        f"{table(others, 'model')}\n"
    )
    write_text(arguments.out / "outside.md", text)
    print(text)
    print(json.dumps({name: row["held out"] for name, row in own.items()}))


if __name__ == "__main__":
    main()
