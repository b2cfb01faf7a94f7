"""How often a volume's interval holds the reference's volume, on validation cases of trained runs.

    python scripts/bench_uncertainty.py RUN... --fold 0 --out FOLDER [--most 24] [--arms none,interleaved]

For every run, arm (test-time mirroring) and class: the share of cases whose reference volume lies in the interval that
`predict --uncertainty` writes, the interval's width over the volume, the same for an interval that takes voxels for
independent, and how the width goes with the error (rank correlation). FOLDER gets uncertainty.json and uncertainty.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from autoseg.inference.gather import Gathering, Wanted
from autoseg.inference.predictor import Predictor
from autoseg.io.files import write_json, write_text
from autoseg.io.fractions import LEVELS
from autoseg.io.images import read_case, read_labels
from autoseg.io.model import load_model
from autoseg.io.run_folder import RunFolder

HALF_WIDTH = 1.645
"""Standard deviations that hold 90 % of a normal distribution on both sides of its mean."""


def rows_of(run: RunFolder, name: str, fold: str, arm: str, most: int, scratch: Path) -> list[dict[str, Any]]:
    """One row a case and class that the reference has."""
    dataset = run.read_dataset()
    model = load_model(run.fold_folder(name, fold))
    predictor = Predictor([model], device="cpu", tta=arm, uncertainty=True)  # type: ignore[arg-type]
    schema, rows = predictor.labels, []
    for case_id in run.read_splits().folds[int(fold)].validation[:most]:
        case = dataset.case(case_id)
        volume = read_case(case, len(dataset.channels))
        reference = read_labels(case.labels or "", volume.geometry)[0]
        gathering = Gathering(volume.geometry.shape, schema, Wanted(probabilities=True, uncertainty=True), scratch)
        labels = predictor.segment(predictor.prepare(volume), gathering=gathering)
        assert gathering.levels is not None
        assert gathering.entropy is not None
        first = 0 if schema.has_regions else 1
        for number, (item, counts) in enumerate(zip(schema.classes, gathering.voxel_counts(), strict=True)):
            truth, found = (int(np.isin(array, item.values).sum()) for array in (reference, labels))
            if truth == 0:
                continue
            shares = gathering.levels.array[first + number] / LEVELS
            rows.append(
                {
                    "case": case_id,
                    "class": item.name,
                    "reference": truth,
                    "voxels": found,
                    "low": min(found, counts.low),
                    "high": max(found, counts.high),
                    "expected": counts.expected,
                    "independent_sd": float(np.sqrt((shares * (1 - shares)).sum())),
                    "entropy": float(gathering.entropy.mean() / LEVELS),
                }
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over cases and classes."""
    table = {key: np.array([row[key] for row in rows], float) for key in rows[0] if key not in ("case", "class")}
    truth, width = table["reference"], table["high"] - table["low"]
    off = np.abs(table["expected"] - truth)
    return {
        "rows": len(rows),
        "held": float(((table["low"] <= truth) & (truth <= table["high"])).mean()),
        "width": float(np.median(width / np.maximum(table["voxels"], 1))),
        "held_independent": float((off <= HALF_WIDTH * table["independent_sd"]).mean()),
        "width_independent": float(
            np.median(2 * HALF_WIDTH * table["independent_sd"] / np.maximum(table["voxels"], 1))
        ),
        "error_of_label_map": float(np.median(np.abs(table["voxels"] - truth) / truth)),
        "error_of_expected": float(np.median(off / truth)),
        "width_and_error": float(spearmanr(width / truth, np.abs(table["voxels"] - truth) / truth).statistic),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--config", default="3d_fullres")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, default=24, help="cases of a fold")
    parser.add_argument("--arms", default="none,interleaved")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    lines = [
        "| run | mirroring | rows | reference in interval | width / volume | in interval, independent voxels | "
        "its width | error of label map | of expected | width and error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for run in arguments.runs:
            for arm in arguments.arms.split(","):
                started = time.monotonic()
                rows = rows_of(RunFolder(run), arguments.config, arguments.fold, arm, arguments.most, Path(scratch))
                found = summary(rows) | {"seconds": time.monotonic() - started}
                results[f"{run.name} {arm}"] = {"summary": found, "rows": rows}
                lines.append(
                    f"| {run.name} | {arm} | {found['rows']} | {found['held']:.0%} | {found['width']:.0%} | "
                    f"{found['held_independent']:.0%} | {found['width_independent']:.0%} | "
                    f"{found['error_of_label_map']:.1%} | {found['error_of_expected']:.1%} | "
                    f"{found['width_and_error']:.2f} |"
                )
                print(lines[-1], f"{found['seconds']:.0f} s", flush=True)
    write_json(arguments.out / "uncertainty.json", results)
    write_text(arguments.out / "uncertainty.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
