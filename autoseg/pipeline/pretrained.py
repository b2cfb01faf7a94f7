"""The model that `--pretrained` names, for each fold that is trained."""

from __future__ import annotations

from pathlib import Path

import torch

from autoseg.domain.plan import Plan
from autoseg.errors import ConfigError, ModelError
from autoseg.io.model import Model, load_model
from autoseg.io.run_folder import RunFolder, is_trained
from autoseg.network.unet import UNet
from autoseg.training import transfer

FIRST_FOLD = 0
"""Taken of a run with several folds: fine-tuning begins with one model, and any of them is as good."""


def load_pretrained(path: Path, planned: Plan, configuration: str, fold: int | str, trained_folder: Path) -> Model:
    """Read the model to begin with, and check that something of it fits.

    Of a run, the configuration is that of the same name where it is trained, else the default one of that run's plan,
    else the only one. The fold is the same one where the run is of the same data set, so that no validation case is
    one that the model has seen; else fold 0, else the only one.

    Args:
        path: A fold folder, or a run.
        planned: What is to be trained.
        configuration: Which of its configurations.
        fold: Which fold.
        trained_folder: Where it is trained.

    Raises:
        ModelError: There is no finished model, or it is corrupt.
        ConfigError: It is not clear which model is meant, it is what is to be trained, or nothing of it fits.
    """
    require_there(path)
    target = trained_folder.resolve()
    if path.resolve() in (target, *target.parents):
        raise ConfigError(
            f"the pretrained model {path} is what is to be trained itself",
            hint="To begin with another configuration of the same run, give its fold folder: "
            "--pretrained RUN/models/CONFIG/fold_K",
        )
    model = load_model(path if is_trained(path) else _fold_folder(RunFolder(path), planned, configuration, fold))
    with torch.device("meta"):
        network = UNet(planned.configurations[configuration].network)
    shapes = {name: tuple(weight.shape) for name, weight in network.named_parameters()}
    transfer.fit(shapes, planned, configuration, model)
    return model


def require_there(path: Path) -> None:
    """Refuse a path that cannot be a model, before anything takes long.

    Raises:
        ModelError: It is not a folder.
    """
    if not path.is_dir():
        raise ModelError(
            f"the pretrained model {path} is not a folder",
            hint="Give a fold folder (models/CONFIG/fold_K) or a run. A training that has begun goes on without it.",
        )


def _fold_folder(run_folder: RunFolder, planned: Plan, configuration: str, fold: int | str) -> Path:
    trained = run_folder.trained_configurations()
    if not trained:
        raise ModelError(
            f"{run_folder.root} holds no finished model to begin with",
            hint="Give a fold folder (models/CONFIG/fold_K) or a run in which a fold is finished.",
        )
    theirs = run_folder.read_plan()
    named = [name for name in (configuration, theirs.default_configuration) if name in trained]
    if not named and len(trained) > 1:
        raise _unclear(run_folder, "which configuration", [f"{run_folder.models_folder / name}" for name in trained])
    name = named[0] if named else trained[0]
    folds = run_folder.trained_folds(name)
    wanted = [fold] if theirs.dataset == planned.dataset else []
    chosen = [item for item in (*wanted, FIRST_FOLD) if item in folds]
    if not chosen and len(folds) > 1:
        raise _unclear(run_folder, "which fold", [f"{run_folder.fold_folder(name, item)}" for item in folds])
    return run_folder.fold_folder(name, chosen[0] if chosen else folds[0])


def _unclear(run_folder: RunFolder, what: str, choices: list[str]) -> ConfigError:
    return ConfigError(
        f"{what} of {run_folder.root} is meant to begin with is not clear",
        problems=choices,
        hint="Give a fold folder: --pretrained RUN/models/CONFIG/fold_K",
    )
