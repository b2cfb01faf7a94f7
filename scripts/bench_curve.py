"""The learning curve of a fold against nnU-Net's, over seconds of training on the same machine.

    python scripts/bench_curve.py RUN/models/3d_fullres/fold_0 NNUNET.json --seconds-per-step 4.5 --out OUT.json

NNUNET.json is what `scripts/nnunet_oracle.py train` wrote: its steps and pseudo-Dice by epoch, and the Dice of its
final weights; or the history alone, which it writes after each epoch, of a training that has not ended. nnU-Net's
seconds are its steps times the seconds of one of its steps, measured while nothing else ran
(`scripts/bench_step_vs_nnunet.py`), because its own clock counts whatever else the machine was doing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

POINTS_S = (60, 120, 180, 300, 480, 720, 960, 1200, 1440, 1500)
TOLERANCE_S = 5.0
LONGEST_GAP_S = 100.0


def our_curve(fold: Path) -> list[tuple[float, int, float]]:
    """(seconds, steps, mean pseudo-Dice) of the epochs that were looked at."""
    records = [json.loads(line) for line in (fold / "metrics.jsonl").read_text().splitlines()]
    return [
        (item["seconds"], item["step"], item["mean_pseudo_dice"])
        for item in records
        if item["mean_pseudo_dice"] is not None
    ]


def their_curve(result: dict[str, Any], seconds_per_step: float) -> list[tuple[float, int, float]]:
    """The same of nnU-Net."""
    return [
        (item["steps"] * seconds_per_step, item["steps"], sum(item["pseudo_dice"]) / len(item["pseudo_dice"]))
        for item in result["history"]
    ]


def at(curve: list[tuple[float, int, float]], seconds: float) -> tuple[int, float] | None:
    """Steps and pseudo-Dice of the last point at or before that time."""
    past = [(steps, dice) for when, steps, dice in curve if when <= seconds + TOLERANCE_S]
    has_ended = bool(curve) and curve[-1][0] < seconds - LONGEST_GAP_S
    return past[-1] if past and not has_ended else None


def final_dice(fold: Path) -> float:
    """Mean foreground Dice of the fold's validation cases by the final weights."""
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    return float(summary["evaluation"]["summary"]["mean_foreground_dice"])


def main() -> None:
    """Write OUT.json and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fold", type=Path)
    parser.add_argument("nnunet", type=Path)
    parser.add_argument("--seconds-per-step", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = json.loads(arguments.nnunet.read_text())
    if isinstance(result, list):
        result = {"history": result, "validation": [{"mean_dice": None}]}
    ours, theirs = our_curve(arguments.fold), their_curve(result, arguments.seconds_per_step)
    lines = ["| seconds | autoseg: steps | pseudo-Dice | nnU-Net: steps | pseudo-Dice |", "|---|---|---|---|---|"]
    for seconds in POINTS_S:
        cells = [at(curve, seconds) for curve in (ours, theirs)]
        shown = [f"{cell[0]} | {cell[1]:.3f}" if cell else "- | -" for cell in cells]
        lines.append(f"| {seconds} | {shown[0]} | {shown[1]} |")
    record = {
        "ours": {"curve": ours, "final_dice": final_dice(arguments.fold)},
        "nnunet": {"curve": theirs, "final_dice": result["validation"][0]["mean_dice"]},
        "nnunet_seconds_per_step": arguments.seconds_per_step,
        "run": json.loads((arguments.fold / "run.json").read_text()),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print("\n".join(lines))
    print(f"\nFinal weights, whole validation cases: autoseg {record['ours']['final_dice']:.4f}", end="")
    print(f", nnU-Net {record['nnunet']['final_dice']}")


if __name__ == "__main__":
    main()
