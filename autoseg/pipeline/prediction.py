"""Segment new images with the models of a run, or with one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autoseg.errors import ConfigError, ModelError
from autoseg.inference.inputs import find_cases
from autoseg.inference.outcome import PredictionOutcome
from autoseg.inference.predictor import predict_cases
from autoseg.inference.tta import Tta
from autoseg.io.model import Model, load_model
from autoseg.io.run_folder import RunFolder, is_trained
from autoseg.pipeline.cascade import load_previous
from autoseg.pipeline.cases import SILENT
from autoseg.runtime import Progress


def predict(
    model_path: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    configuration: str | None = None,
    folds: str | None = None,
    tta: Tta = "none",
    overlap: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress = SILENT,
) -> PredictionOutcome:
    """Segment images and write label maps on their own grids.

    Of a cascade the previous stage goes first, with all of its finished folds, whichever of the cascade's are chosen;
    mirroring, overlap, device and precision are those of both.

    Args:
        model_path: A run folder, or one trained fold's folder.
        inputs: Files and folders; see `find_cases`.
        out: Folder for the label maps.
        configuration: Of a run; default as its plan says, else the one that is trained.
        folds: Numbers separated by commas, or "all"; by default every finished fold. Their logits are averaged.
        tta: Test-time mirroring.
        overlap: Of tiles; default as the plan says.
        device: See `runtime.pick_device`.
        precision: See `runtime.pick_precision`.
        progress: One step a case.

    Raises:
        ModelError: There is no such model.
        ConfigError: The inputs cannot be sorted into cases.
    """
    models = load_models(model_path, configuration, folds)
    previous = load_previous(models)
    cases = find_cases(inputs, len(models[0].card.plan.channels))
    return predict_cases(
        models,
        cases,
        out,
        device=device,
        precision=precision,
        tta=tta,
        overlap=overlap,
        previous=previous,
        progress=progress,
    )


def load_models(path: Path, configuration: str | None, folds: str | None) -> tuple[Model, ...]:
    """The models of a run or of a fold folder.

    Raises:
        ModelError: Nothing trained is there, or not what was asked for.
        ConfigError: A configuration or fold was named for a single model.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder", hint="Give a run folder, or one of its models/CONFIG/fold_K.")
    if is_trained(path):
        if configuration is not None or folds is not None:
            raise ConfigError(f"{path} is one model: --config and --fold choose among those of a run")
        return (load_model(path),)
    run_folder = RunFolder(path)
    name = _trained_configuration(run_folder, configuration)
    finished = run_folder.trained_folds(name)
    wanted = tuple(folds.split(",")) if folds else tuple(str(fold) for fold in finished)
    missing = [fold for fold in wanted if fold not in {str(item) for item in finished}]
    if missing:
        raise ModelError(
            f"{name} has no finished fold {', '.join(missing)}; finished are {', '.join(map(str, finished))}",
            hint=f"Train it with: autoseg train {path} --config {name} --fold {missing[0]}",
        )
    return tuple(load_model(run_folder.fold_folder(name, fold)) for fold in wanted)


def _trained_configuration(run_folder: RunFolder, wanted: str | None) -> str:
    trained = run_folder.trained_configurations()
    if not trained:
        raise ModelError(
            f"{run_folder.root} holds no trained model", hint=f"Train one with: autoseg train {run_folder.root}"
        )
    name = wanted or run_folder.read_plan().default_configuration
    if name in trained:
        return name
    if wanted is None and len(trained) == 1:
        return trained[0]
    raise ModelError(f"{name} is not trained; trained are {', '.join(trained)}", hint="Choose one with --config.")
