"""A run with trained models of several configurations, small enough to predict in a moment, and images for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from toy_models import SCHEMA, toy_model, toy_volume

from autoseg.domain.dataset import Channel
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.plan import Configuration, Plan
from autoseg.io.images import write_image
from autoseg.io.model import ModelCard, save_model
from autoseg.io.run_folder import RunFolder
from autoseg.network.unet import build

SPACINGS = {"3d_fullres": (2.0, 1.5, 1.0), "3d_lowres": (3.0, 2.5, 2.0), "2d": (1.0, 1.2, 0.9)}


def toy_configurations(has_cascade: bool = False) -> dict[str, Configuration]:
    """Configurations that share nothing: other spacings, one of them of slices."""
    found = {
        name: toy_model(dims=2 if name == "2d" else 3, spacing=spacing).card.settings
        for name, spacing in SPACINGS.items()
    }
    if has_cascade:
        first = found["3d_fullres"]
        network = first.network.model_copy(update={"in_channels": 3})
        found["3d_cascade"] = first.model_copy(update={"network": network, "previous_stage": "3d_lowres"})
    return found


def toy_run(root: Path, folds: dict[str, tuple[int, ...]], has_cascade: bool = False) -> RunFolder:
    """Write a run with random weights for the folds of each configuration."""
    run = RunFolder(root)
    plan = Plan(
        dataset="toy",
        preset="default",
        vram_gb=8,
        fingerprint_digest="0" * 12,
        channels=(Channel(name="MR"),),
        labels=SCHEMA,
        configurations=toy_configurations(has_cascade),
    )
    run.write(run.plan_file, plan)
    for name, numbers in folds.items():
        for fold in numbers:
            write_fold(run, name, fold, seed=10 * fold + len(name))
    return run


def write_fold(run: RunFolder, name: str, fold: int, seed: int) -> None:
    """(Re)place the weights of one fold."""
    plan = run.read_plan()
    weights = build(plan.configurations[name].network, seed=seed).state_dict()
    save_model(
        run.fold_folder(name, fold), weights, ModelCard(plan=plan, configuration=name, fold=fold, digest=plan.digest())
    )


def write_images(folder: Path, count: int) -> list[Path]:
    """Volumes that differ a little."""
    paths = []
    for number in range(count):
        volume = toy_volume((13 + number % 3, 18, 9))
        array = volume.array[0] + np.float32(0.01 * number)
        path = folder / f"case_{number:02d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, array, volume.geometry)
        paths.append(path)
    return paths


def oblique_volume(shape: tuple[int, int, int] = (17, 20, 12)) -> Volume:
    """An image against the canonical axes, on a grid that a file keeps to the last bit."""
    affine = np.array([[0, -1.125, 0, 3], [0, 0, 1.375, -2], [-2.625, 0, 0, 8], [0, 0, 0, 1.0]])
    return Volume(toy_volume(shape).array, Geometry(shape, affine))
