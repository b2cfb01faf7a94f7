"""A whole cross-validation in one command, and its numbers recomputed by other libraries from the label maps.

    python scripts/bench_cross_validation.py DATA --out OUT [--minutes 4] [--limit-minutes 75] [--device cpu]
        [further options of autoseg run]

Runs `autoseg run DATA --out OUT/run --time-budget MINUTESm` (every planned configuration, every fold; what is finished
is not done again), then `autoseg predict OUT/run` on up to three images without any option. Then, from the files alone:

- Dice of every case and class by SimpleITK's overlap filter, volumes by its shape filter; mean foreground Dice, means
  by class; surface Dice and HD95 by the package surface-distance;
- the paired test of the chosen candidate against the best single configuration by SciPy, over patients;
- each held against `report/summary.json`, and the headline against the page.

Writes OUT/results.json, prints what was compared, and exits with 1 when a number differs or the limit was exceeded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from bench_lines import autoseg, markdown
from scipy import stats

SAME_DICE = 1e-9
SAME_SURFACE_DICE = 1e-5
SAME_MM = 1e-3
NUM_PREDICTED = 3

Row = dict[str, Any]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def prediction_folders(run: Path, ending: str) -> dict[str, dict[str, Path]]:
    """Label maps of every candidate by case, as they lie in the run."""
    found: dict[str, dict[str, Path]] = {}
    for configuration in sorted((run / "models").iterdir()):
        for path in sorted(configuration.glob(f"fold_*/validation/*{ending}")):
            found.setdefault(configuration.name, {})[path.name.removesuffix(ending)] = path
    for folder in sorted((run / "crossval").iterdir()):
        if folder.is_dir() and folder.name != "probabilities":
            name = folder.name.replace("+", " + ")
            found[name] = {path.name.removesuffix(ending): path for path in sorted(folder.glob(f"*{ending}"))}
    return found


def compare_case(
    prediction: Path, reference: Path, classes: Sequence[Row], tolerance: dict[str, float]
) -> Iterator[Row]:
    """Metrics of a case by other libraries."""
    import surface_distance.metrics as surface

    predicted, actual = sitk.ReadImage(str(prediction)), sitk.ReadImage(str(reference))
    actual.CopyInformation(predicted)
    arrays = [sitk.GetArrayFromImage(image) for image in (predicted, actual)]
    for item in classes:
        masks = [np.isin(array, item["values"]) for array in arrays]
        images = [sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in masks]
        for image in images:
            image.CopyInformation(predicted)
        row: Row = {"class": item["name"], "in_reference": bool(masks[1].any()), "in_prediction": bool(masks[0].any())}
        if row["in_reference"]:
            overlap = sitk.LabelOverlapMeasuresImageFilter()
            overlap.Execute(*images)
            row["dice"] = overlap.GetDiceCoefficient()
        if row["in_reference"] and row["in_prediction"]:
            distances = surface.compute_surface_distances(masks[1], masks[0], predicted.GetSpacing()[::-1])
            row["hd95_mm"] = surface.compute_robust_hausdorff(distances, 95)
            row["surface_dice"] = surface.compute_surface_dice_at_tolerance(distances, tolerance[item["name"]])
        elif row["in_reference"]:
            row["surface_dice"] = 0.0
        yield row


def recompute(run: Path) -> dict[str, dict[str, list[Row]]]:
    """By candidate and case."""
    dataset, summary = read(run / "dataset.json"), read(run / "report" / "summary.json")
    references = {case["id"]: Path(case["labels"]) for case in dataset["cases"]}
    classes, tolerance = dataset["labels"]["classes"], summary["tolerance_mm"]
    return {
        name: {
            case: list(compare_case(path, references[case], classes, tolerance)) for case, path in label_maps.items()
        }
        for name, label_maps in prediction_folders(run, dataset.get("file_ending", ".nii.gz")).items()
    }


def class_mean(cases: dict[str, list[Row]], name: str, metric: str) -> float | None:
    values = [row[metric] for rows in cases.values() for row in rows if row["class"] == name and metric in row]
    return float(np.mean(values)) if values else None


def checks(run: Path, found: dict[str, dict[str, list[Row]]]) -> list[Row]:
    """Every number of the summary beside its own recomputation."""
    summary = read(run / "report" / "summary.json")
    rows = []

    def note(what: str, ours: float | None, theirs: float | None, tolerance: float) -> None:
        same = ours is None and theirs is None if None in (ours, theirs) else abs(ours - theirs) <= tolerance
        rows.append({"what": what, "summary": ours, "recomputed": theirs, "same": bool(same)})

    for item in summary["configurations"]:
        if item["summary"] is None:
            continue
        cases = found[item["name"]]
        means = []
        for part in item["summary"]["classes"]:
            own = {metric["metric"]: metric["mean"] for metric in part["metrics"]}
            for metric, tolerance in (("dice", SAME_DICE), ("surface_dice", SAME_SURFACE_DICE), ("hd95_mm", SAME_MM)):
                theirs = class_mean(cases, part["name"], metric)
                note(f"{item['name']}, {part['name']}, {metric}", own[metric], theirs, tolerance)
            means.append(class_mean(cases, part["name"], "dice"))
        mean = float(np.mean([value for value in means if value is not None]))
        note(f"{item['name']}, mean foreground Dice", item["summary"]["mean_foreground_dice"], mean, SAME_DICE)
    selection = summary["selection"]
    for row in selection["comparisons"]:
        if row["metric"] == "dice" and row["class_name"] is None:
            p_value = paired_p(run, found[row["first"]], found[row["second"]])
            note(f"p of {row['first']} against {row['second']}", row["p_value"], p_value, SAME_DICE)
    page = (run / "report" / "index.html").read_text()
    best = next(item for item in summary["configurations"] if item["name"] == summary["best"])
    headline = f"{best['summary']['mean_foreground_dice']:.3f}"
    rows.append({"what": "headline on the page", "summary": headline, "recomputed": headline, "same": headline in page})
    return rows


def paired_p(run: Path, first: dict[str, list[Row]], second: dict[str, list[Row]]) -> float | None:
    """Wilcoxon over the means of patients, where the data set names them; else over cases."""
    patients = {case["id"]: case.get("patient") or case["id"] for case in read(run / "dataset.json")["cases"]}
    by_patient: dict[str, list[float]] = {}
    for case in sorted(set(first) & set(second)):
        pairs = [
            (one["dice"], other["dice"])
            for one, other in zip(first[case], second[case], strict=True)
            if "dice" in one and "dice" in other
        ]
        if pairs:
            means = np.mean(pairs, axis=0)
            by_patient.setdefault(patients[case], []).append(means)
    means = np.array([np.mean(values, axis=0) for values in by_patient.values()])
    differences = means[:, 0] - means[:, 1]
    differences = differences[differences != 0]
    return float(stats.wilcoxon(differences).pvalue) if len(differences) else 1.0


def seconds_of(run: Path) -> Row:
    """Where the time went, as the run's files say."""
    trained = [read(path) for path in sorted((run / "models").glob("*/fold_*/run.json"))]
    scored = [read(path) for path in sorted((run / "models").glob("*/fold_*/validation/summary.json"))]
    return {
        "training_s": sum(item["seconds"] for item in trained),
        "validation_predict_s": sum(item["predict_s"] for item in scored),
        "validation_score_s": sum(item["score_s"] for item in scored),
        "best_weights_s": sum((item.get("best") or {}).get("seconds", 0.0) for item in scored),
        "selection_s": read(run / "crossval" / "selection.json")["seconds"],
        "folds": len(trained),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--limit-minutes", type=float, default=75.0)
    parser.add_argument("--device", default="auto")
    wanted, further = parser.parse_known_args()
    warnings.simplefilter("ignore")  # surface-distance uses what SciPy deprecates
    run, results = wanted.out / "run", wanted.out / "results.json"
    budget = f"{wanted.minutes * 60:g}s"
    started = time.monotonic()
    whole_s = autoseg(
        "run", str(wanted.data), "--out", str(run), "--time-budget", budget, "--device", wanted.device, *further
    )
    images = sorted(path for path in (wanted.data / "imagesTr").iterdir() if path.is_file())[:NUM_PREDICTED]
    predict_s = autoseg(
        "predict", str(run), *map(str, images), "--out", str(wanted.out / "predictions"), "--device", wanted.device
    )
    compared = checks(run, recompute(run))
    failed = [row for row in compared if not row["same"]]
    summary = read(run / "report" / "summary.json")
    selection = summary["selection"]
    result = {
        "command": sys.argv,
        "whole_line_s": whole_s,
        "limit_s": wanted.limit_minutes * 60,
        "predict_s": predict_s,
        "recompute_s": time.monotonic() - started - whole_s - predict_s,
        "seconds": seconds_of(run),
        "choice": selection["choice"],
        "reason": selection["reason"],
        "candidates": selection["candidates"],
        "rules": read(run / "inference.json")["postprocessing"],
        "tried_rules": selection["tried_rules"],
        "temperatures": {item["configuration"]: item["temperature"] for item in selection["calibrations"]},
        "calibration_error": {
            item["configuration"]: [item["error_before"], item["error_after"]] for item in selection["calibrations"]
        },
        "chosen_dice": selection["chosen"]["mean_foreground_dice"],
        "final_dice": selection["final"]["mean_foreground_dice"],
        "compared": compared,
        "differ": len(failed),
    }
    results.write_text(json.dumps(result, indent=2) + "\n")
    table = [
        (
            item["name"],
            f"{item['summary']['mean_foreground_dice']:.4f}",
            *(f"{part['metrics'][0]['mean']:.4f}" for part in item["summary"]["classes"]),
        )
        for item in summary["configurations"]
        if item["summary"]
    ]
    names = [item["name"] for item in read(run / "dataset.json")["labels"]["classes"]]
    print(markdown(("candidate", "mean foreground Dice", *names), table))
    print(f"chosen: {selection['choice']}. {selection['reason']}")
    print(f"{len(compared)} numbers compared, {len(failed)} differ; whole line {whole_s / 60:.1f} min")
    for row in failed:
        print("DIFFERS", row)
    sys.exit(1 if failed or whole_s > wanted.limit_minutes * 60 else 0)


if __name__ == "__main__":
    main()
