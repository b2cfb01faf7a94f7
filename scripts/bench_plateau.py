"""For which of nnU-Net's published learning curves the rule of `training/plateau.py` ends a training, and at what cost.

    python scripts/bench_plateau.py --out docs/benchmarks/plateau.json

Each curve is the pseudo-Dice of one fold of a task of the Medical Segmentation Decathlon at nine epochs of 1000
(nnU-Net v2, 3d_fullres, as AutoNNUnet's runs recorded it), straight lines over the logarithm of the epoch between them.
Noise of the given standard deviation is added to every epoch, independent or with the given correlation from one epoch
to the next. The cost is the difference between the curve at epoch 1000 and where the training would end, as if the
early decay of the learning rate brought nothing at all: more than it can be.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.training import plateau
from autoseg.training.schedule import Schedule

NUM_EPOCHS = 1000
EPOCHS = (10, 25, 50, 100, 150, 250, 500, 750, 1000)
CURVES = {
    "Hippocampus": (0.845, 0.876, 0.885, 0.885, 0.885, 0.885, 0.885, 0.884, 0.884),
    "Heart": (0.884, 0.916, 0.927, 0.931, 0.932, 0.934, 0.935, 0.935, 0.936),
    "Brain": (0.703, 0.757, 0.788, 0.796, 0.799, 0.799, 0.803, 0.804, 0.806),
    "Prostate": (0.557, 0.656, 0.699, 0.712, 0.715, 0.730, 0.738, 0.736, 0.736),
    "Spleen": (0.719, 0.850, 0.896, 0.922, 0.930, 0.937, 0.949, 0.961, 0.969),
    "Liver": (0.514, 0.653, 0.739, 0.778, 0.797, 0.803, 0.815, 0.844, 0.869),
    "Lung": (0.345, 0.513, 0.587, 0.633, 0.637, 0.670, 0.701, 0.706, 0.753),
    "Pancreas": (0.162, 0.395, 0.516, 0.572, 0.592, 0.625, 0.639, 0.658, 0.668),
    "HepaticVessel": (0.264, 0.519, 0.644, 0.697, 0.701, 0.720, 0.729, 0.743, 0.762),
    "Colon": (0.246, 0.433, 0.512, 0.564, 0.588, 0.616, 0.642, 0.651, 0.688),
}
NOISES = ((0.003, 0.0), (0.003, 0.8), (0.01, 0.0), (0.01, 0.8), (0.03, 0.0), (0.03, 0.8))
"""Standard deviation of an epoch's pseudo-Dice, and its correlation with that of the epoch before."""

REPEATS = 200


@dataclass(frozen=True)
class Firing:
    """After how many epochs the rule fires, and where the training then ends."""

    epoch: int
    end: int


def curve(name: str) -> NDArray[np.float64]:
    """Pseudo-Dice after each of the epochs."""
    epochs = np.arange(1, NUM_EPOCHS + 1)
    return np.interp(np.log(epochs), np.log((1, *EPOCHS)), (0.0, *CURVES[name]))


def noise(deviation: float, correlation: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """One value an epoch; autoregressive of the first order."""
    fresh = rng.standard_normal(NUM_EPOCHS)
    values = np.empty(NUM_EPOCHS)
    last = fresh[0]
    for index, step in enumerate(fresh):
        last = correlation * last + (1 - correlation**2) ** 0.5 * step
        values[index] = last
    return deviation * values


def fires(measures: NDArray[np.float64]) -> Firing | None:
    """The rule of `plateau.shortened`, for a whole curve at once."""
    total = np.concatenate([[0.0], np.cumsum(measures)])
    for epoch in range(plateau.LEAST_EPOCHS, NUM_EPOCHS):
        end = epoch + int(np.ceil(plateau.FALL_FRACTION * epoch))
        if end > plateau.LARGEST_END * NUM_EPOCHS:
            return None
        length = epoch // plateau.PART // plateau.BLOCKS
        edges = epoch - length * np.arange(2 * plateau.BLOCKS, -1, -1)
        blocks = np.diff(total[edges]) / length
        before, newest = blocks[: plateau.BLOCKS], blocks[plateau.BLOCKS :]
        error = float(np.sqrt((before.var(ddof=1) + newest.var(ddof=1)) / plateau.BLOCKS))
        if plateau.Rise(float(newest.mean() - before.mean()), error, 0).is_plateau:
            return Firing(epoch, end)
    return None


def require_same_rule(measures: NDArray[np.float64]) -> None:
    """Whether `fires` is what a training would do."""
    found = fires(measures)
    schedule = Schedule(0.01, 0.9, steps_per_epoch=250, num_epochs=NUM_EPOCHS)
    for epoch in range(1, NUM_EPOCHS):
        seen = [float(value) for value in measures[:epoch]]
        shortened = plateau.shortened(schedule, "epochs", seen, 250 * epoch, 0.0, epoch / NUM_EPOCHS)
        if shortened is not None:
            assert found == Firing(epoch, round(shortened[0].end or 0))
            return
    assert found is None


def simulate(name: str, deviation: float, correlation: float) -> dict[str, object]:
    """How often, when, and at what cost."""
    rng = np.random.default_rng([len(name), round(1000 * deviation), round(10 * correlation)])
    values = curve(name)
    found = [fires(values + noise(deviation, correlation, rng)) for _ in range(REPEATS)]
    epochs = [item.epoch for item in found if item is not None]
    ends = np.array([item.end for item in found if item is not None])
    costs = values[-1] - values[ends - 1] if len(ends) else np.array([])
    return {
        "task": name,
        "noise": deviation,
        "correlation": correlation,
        "fires": len(ends) / REPEATS,
        "fires_after_median": float(np.median(epochs)) if epochs else None,
        "ends_after_median": float(np.median(ends)) if len(ends) else None,
        "cost_median": round(float(np.median(costs)), 4) if len(ends) else None,
        "cost_largest": round(float(costs.max()), 4) if len(ends) else None,
    }


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: one row a task, one column a noise."""
    heads = [f"{deviation:g}" + (f", {correlation:g}" if correlation else "") for deviation, correlation in NOISES]
    lines = ["| task | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name in CURVES:
        cells = []
        for row in (row for row in rows if row["task"] == name):
            fired = f"{row['fires']:.1%}".replace(".0%", "%")
            if row["fires"]:
                fired += f" → {row['ends_after_median']:.0f} ({row['cost_median']:.3f}, {row['cost_largest']:.3f})"
            cells.append(fired)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rng = np.random.default_rng(0)
    for name, (deviation, correlation) in (("Heart", NOISES[0]), ("Hippocampus", NOISES[2]), ("Colon", NOISES[4])):
        require_same_rule(curve(name) + noise(deviation, correlation, rng))
    rows = [simulate(name, *kind) for name in CURVES for kind in NOISES]
    out.write_text(json.dumps({"repeats": REPEATS, "epochs": EPOCHS, "curves": CURVES, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
