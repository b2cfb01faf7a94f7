"""A small finished run, made up: balls in noise, predictions that are off by a little, learning curves that rise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import Case, Channel, Dataset, LabelClass, LabelSchema
from autoseg.domain.fingerprint import CaseStats, ChannelIntensity, Fingerprint
from autoseg.domain.geometry import Geometry
from autoseg.domain.plan import (
    ChannelNormalization,
    Configuration,
    Decision,
    InferencePlan,
    NetworkPlan,
    Plan,
    PreprocessPlan,
    TrainingPlan,
)
from autoseg.evaluation.crossval import FoldEvaluation, evaluate_cases
from autoseg.io.files import write_json, write_text
from autoseg.io.images import write_image, write_labels
from autoseg.io.run_folder import RunFolder
from autoseg.training.records import EpochRecord, RunRecord, write_metrics, write_run

SCHEMA = LabelSchema(classes=(LabelClass(name="Anterior", values=(1,)), LabelClass(name="Posterior", values=(2,))))
SHAPE = (30, 34, 24)
# Left, posterior, superior: no axis runs like the canonical one except the last.
AFFINE = np.array([[-1.0, 0, 0, 20], [0, -1.0, 0, 30], [0, 0, 1.5, -10], [0, 0, 0, 1]])
BAD_CASE = "case_00"


def balls(shape: tuple[int, int, int], shift: float, with_second: bool = True) -> NDArray[np.uint8]:
    """Two touching balls, moved along the first axis."""
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    out = np.zeros(shape, np.uint8)
    for value, place in ((1, 0.38), (2, 0.62)):
        if value == 2 and not with_second:
            continue
        centre = np.array([shape[0] / 2 + shift, shape[1] * place, shape[2] / 2])
        out[((grid - centre) ** 2).sum(-1) <= 36] = value
    return out


def configuration(dims: int) -> Configuration:
    patch = (16, 24, 16)[-dims:]
    return Configuration(
        preprocess=PreprocessPlan(
            target_spacing=(1.5, 1.0, 1.0)[-dims:], normalization=(ChannelNormalization(scheme="zscore"),)
        ),
        network=NetworkPlan(
            in_channels=1,
            num_classes=3,
            patch_size=patch,
            features_per_stage=(8, 16),
            strides=((1,) * dims, (2,) * dims),
            kernel_sizes=((3,) * dims, (3,) * dims),
            blocks_per_stage_encoder=(2, 2),
            blocks_per_stage_decoder=(2,),
        ),
        training=TrainingPlan(batch_size=2).model_copy(
            update={"augmentation": TrainingPlan(batch_size=2).augmentation.model_copy(update={"mirror_axes": (0, 1)})}
        ),
        inference=InferencePlan(mirror_axes=(0, 1)),
    )


def make_run(root: Path, num_cases: int = 6, configurations: tuple[str, ...] = ("2d", "3d_fullres")) -> RunFolder:
    """Write a run with two finished folds a configuration.

    The first case is predicted badly; the last one has no second class in its reference, but in its prediction.
    """
    run = RunFolder(root / "run")
    geometry = Geometry(SHAPE, AFFINE)
    rng = np.random.default_rng(0)
    cases, stats = [], []
    for index in range(num_cases):
        case_id = f"case_{index:02d}"
        labels = balls(SHAPE, 0.0, with_second=index < num_cases - 1)
        image, label_file = (root / "data" / kind / f"{case_id}.nii.gz" for kind in ("images", "labels"))
        for path in (image, label_file):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_image(image, labels * 80.0 + rng.normal(0, 10, SHAPE), geometry)
        write_labels(label_file, labels, geometry)
        cases.append(Case(id=case_id, images=(str(image),), labels=str(label_file), patient=f"patient {index // 2}"))
        voxels = tuple(int((labels == value).sum()) for value in (1, 2))
        stats.append(
            CaseStats(
                case=case_id,
                spacing_mm=(1.5, 1.0, 1.0),
                shape_original=SHAPE[::-1],
                shape=SHAPE[::-1],
                relative_size_fraction=1.0,
                class_voxels=voxels,
                intensities=(),
            )
        )
    dataset = Dataset(name="Balls <b>& noise</b>", channels=(Channel(name="MRI"),), labels=SCHEMA, cases=tuple(cases))
    fingerprint = Fingerprint(
        channels=("MRI",),
        num_classes=3,
        num_training_cases=num_cases,
        spacings_mm=((1.5, 1.0, 1.0),) * num_cases,
        shapes=(SHAPE[::-1],) * num_cases,
        median_relative_size_fraction=1.0,
        intensities=(
            ChannelIntensity(
                mean=120, median=118, std=40, minimum=40, maximum=200, percentile_00_5=50, percentile_99_5=190
            ),
        ),
        cases=tuple(stats),
    )
    plan = Plan(
        dataset=dataset.name,
        preset="default",
        vram_gb=8.0,
        fingerprint_digest=fingerprint.digest(),
        channels=dataset.channels,
        labels=SCHEMA,
        configurations={name: configuration(2 if name == "2d" else 3) for name in configurations},
        decisions=(
            Decision(
                configuration="3d_fullres",
                topic="target spacing",
                rule="The median spacing of the cases.",
                inputs="spacings 1.5 × 1 × 1",
                result="1.5 × 1 × 1 mm",
                would_change="Other spacings.",
            ),
        ),
    )
    run.write(run.dataset_file, dataset)
    run.write(run.fingerprint_file, fingerprint)
    run.write(run.plan_file, plan)
    for number, name in enumerate(configurations):
        for fold in range(2):
            _write_fold(run, plan, name, fold, cases[fold::2], shift=1.5 - number, geometry=geometry)
    return run


def _write_fold(
    run: RunFolder, plan: Plan, name: str, fold: int, cases: list[Case], shift: float, geometry: Geometry
) -> None:
    folder = run.fold_folder(name, fold)
    pairs = []
    for index, case in enumerate(cases):
        path = folder / "validation" / f"{case.id}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_labels(path, balls(SHAPE, 5.0 if case.id == BAD_CASE else shift * (1 + index / 4)), geometry)
        pairs.append((case.id, path, Path(case.labels or "")))
    evaluation = evaluate_cases(pairs, SCHEMA, 1.5)
    scored = FoldEvaluation(weights_sha256="0" * 64, predict_s=3.0, score_s=1.0, evaluation=evaluation)
    write_text(folder / "validation" / "summary.json", scored.to_json())
    epochs = tuple(
        EpochRecord(
            epoch=epoch,
            step=10 * (epoch + 1),
            seconds=15.0 * (epoch + 1),
            seconds_per_step=1.4,
            learning_rate=0.01 * (1 - epoch / 12) ** 0.9,
            train_loss=1.0 - 1.6 * (1 - np.exp(-epoch / 4)) + 0.02 * fold,
            validation_loss=1.0 - 1.5 * (1 - np.exp(-epoch / 4)),
            mean_pseudo_dice=0.9 * (1 - np.exp(-(epoch + 1) / 3)) - 0.02 * fold,
        )
        for epoch in range(12)
    )
    write_metrics(folder, epochs)
    write_run(
        folder,
        RunRecord(
            configuration=name,
            fold=fold,
            plan_digest=plan.digest(),
            seed=1,
            num_epochs=12,
            time_budget_s=None,
            device="cpu",
            precision="bf16",
            status="finished",
            num_training_cases=4,
            num_validation_cases=len(cases),
            epochs=12,
            steps=120,
            seconds=180.0,
            seconds_per_step=1.4,
            peak_memory_bytes=2_100_000_000,
        ),
    )
    write_json(folder / "weights.json", {"weights_sha256": scored.weights_sha256})
