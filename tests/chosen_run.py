"""A made-up run of which cross-validation has chosen a pair: `synthetic_run` with all that a selection adds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from synthetic_run import AFFINE, BAD_CASE, SCHEMA, SHAPE, balls, make_run

from autoseg.domain.geometry import Geometry
from autoseg.domain.inference import InferenceRecipe, KeepLargest, Member
from autoseg.evaluation.crossval import evaluate_cases
from autoseg.evaluation.selection import (
    COMPARED_METRICS,
    FINAL,
    Calibration,
    Candidate,
    CandidateComparison,
    CaseConfidence,
    ClassCalibration,
    ReliabilityBin,
    Selection,
    TriedRule,
    folder_name,
    inputs_digest,
)
from autoseg.evaluation.statistics import Interval, StatisticsRecord
from autoseg.evaluation.summaries import Evaluation
from autoseg.io.files import write_text
from autoseg.io.images import write_image, write_labels
from autoseg.io.run_folder import RunFolder

PAIR = "2d + 3d_fullres"
SURE_CASE = "case_01"
"""The models are sure of it and yet disagree with its reference."""


def make_chosen_run(root: Path, num_cases: int = 6) -> RunFolder:
    """The run, with label maps of the pair and of the recipe, and uncertainty beside the maps of the pair."""
    run = make_run(root, num_cases)
    chosen, final = (_evaluate(run, name, shift) for name, shift in ((PAIR, 0.8), (FINAL, 0.6)))
    interval = Interval(low=0.7, high=0.95)
    members = (Member(configuration="2d", temperature=1.4), Member(configuration="3d_fullres", temperature=1.2))
    rule = KeepLargest(classes=("Posterior",))
    dice = chosen.summary.mean_foreground_dice or 0.0
    selection = Selection(
        inputs_digest=inputs_digest({name: dict.fromkeys(("0", "1"), "0" * 64) for name in ("2d", "3d_fullres")}),
        statistics=StatisticsRecord(num_patients=num_cases // 2),
        num_cases=num_cases,
        candidates=tuple(
            Candidate(name=name, members=parts, mean_foreground_dice=value, interval=interval, seconds_per_case=1.5)
            for name, parts, value in (
                (PAIR, members, dice),
                ("3d_fullres", members[1:], 0.81),
                ("2d", members[:1], 0.78),
            )
        ),
        comparisons=tuple(
            CandidateComparison(
                first=PAIR,
                second="3d_fullres",
                metric=metric,
                class_name=name,
                num_patients=num_cases // 2,
                mean_first=0.85,
                mean_second=0.81,
                difference=0.04,
                interval=Interval(low=0.01, high=0.07),
                p_value=0.0004,
                p_adjusted=0.0012,
                rank_biserial=0.9,
            )
            for metric in COMPARED_METRICS
            for name in (None, "Anterior")
        ),
        choice=PAIR,
        reason="its mean foreground Dice is the highest",
        recipe=InferenceRecipe(members=members, postprocessing=(rule,)),
        tried_rules=(
            TriedRule(
                rule=rule,
                dice_before=0.85,
                dice_after=0.86,
                interval=Interval(low=0.002, high=0.02),
                class_gains={"Posterior": 0.02},
                is_kept=True,
                reason="better beyond its interval",
            ),
        ),
        calibrations=tuple(_calibration(member) for member in members),
        chosen=chosen.summary,
        final=final.summary,
        confidences=tuple(
            CaseConfidence(
                case=case.case,
                mean_entropy=0.3 if case.case == BAD_CASE else 0.05 + 0.01 * place,
                expected_dice={"Anterior": 0.9, "Posterior": None},
                sure_errors_fraction=0.4 if case.case == SURE_CASE else 0.01,
            )
            for place, case in enumerate(chosen.cases)
        ),
    )
    run.write(run.selection_file, selection)
    return run


def _evaluate(run: RunFolder, name: str, shift: float) -> Evaluation:
    folder = run.crossval_folder / folder_name(name)
    geometry = Geometry(SHAPE, AFFINE)
    pairs = []
    for case in run.read_dataset().cases:
        path = folder / f"{case.id}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = balls(SHAPE, 5.0 if case.id == BAD_CASE else shift)
        write_labels(path, labels, geometry)
        if name == PAIR:
            write_image(path.with_name(f"{case.id}_uncertainty.nii.gz"), (labels == 1) * np.float32(0.7), geometry)
        pairs.append((case.id, path, Path(case.labels or "")))
    evaluation = evaluate_cases(pairs, SCHEMA, 1.5)
    write_text(folder / "summary.json", evaluation.to_json())
    return evaluation


def _calibration(member: Member) -> Calibration:
    before, after = (
        tuple(ReliabilityBin(confidence=x, frequency=x**power, voxels=1000) for x in (0.05, 0.35, 0.65, 0.95))
        for power in (1.8, 1.05)
    )
    classes = tuple(
        ClassCalibration(
            name=name, error_before=0.08, error_after=0.01, bins_before=before, bins_after=after, temperature=1.5
        )
        for name in SCHEMA.names
    )
    return Calibration(
        configuration=member.configuration,
        temperature=member.temperature,
        num_voxels=4000,
        loss_before=0.4,
        loss_after=0.3,
        error_before=0.08,
        error_after=0.01,
        classes=classes,
    )
