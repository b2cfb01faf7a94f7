"""Segment new images with the models of a run, or with one model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from autoseg import __version__
from autoseg.domain.dataset import Case, Channel
from autoseg.errors import ConfigError, ModelError
from autoseg.inference.export import LabelMap
from autoseg.inference.inputs import find_cases
from autoseg.inference.outcome import PredictionOutcome
from autoseg.inference.predictor import WriteBeside, predict_cases
from autoseg.inference.tta import Tta
from autoseg.io.dicom import is_dicom
from autoseg.io.dicom_seg import Algorithm, require_highdicom, segmentation_path, write_segmentation
from autoseg.io.model import Model, load_model
from autoseg.io.run_folder import RunFolder, is_trained
from autoseg.pipeline.cascade import load_previous
from autoseg.pipeline.cases import SILENT
from autoseg.runtime import Progress

log = logging.getLogger("autoseg")

_DIGEST_LENGTH = 16
"""Of each model's weights: enough to tell models apart, and a number of several folds stays readable."""

_SEG_HINT = "Predict other images in a run of their own, without --dicom-seg."


def predict(
    model_path: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    configuration: str | None = None,
    folds: str | None = None,
    tta: Tta = "none",
    overlap: float | None = None,
    skip_empty: bool = False,
    device: str = "auto",
    precision: str = "auto",
    dicom_seg: bool = False,
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
        skip_empty: Whether only one of the tiles that show nothing is predicted.
        device: See `runtime.pick_device`.
        precision: See `runtime.pick_precision`.
        dicom_seg: Also write OUT/X.seg.dcm, a DICOM segmentation object; every input must be a DICOM series.
        progress: One step a case.

    Raises:
        ModelError: There is no such model.
        ConfigError: The inputs cannot be sorted into cases; or a DICOM segmentation cannot be written.
    """
    if dicom_seg:
        require_highdicom()
    models = load_models(model_path, configuration, folds)
    previous = load_previous(models)
    channels = models[0].card.plan.channels
    optional = [number for number, channel in enumerate(channels) if channel.may_be_missing]
    cases = find_cases(inputs, len(channels), optional)
    _tell_of_missing_channels(cases, channels)
    if dicom_seg:
        _require_dicom(cases)
    return predict_cases(
        models,
        cases,
        out,
        device=device,
        precision=precision,
        tta=tta,
        overlap=overlap,
        skip_empty=skip_empty,
        previous=previous,
        write_beside=_segmentation_writer(models) if dicom_seg else None,
        progress=progress,
    )


def _require_dicom(cases: Sequence[Case]) -> None:
    others = [case.images[0] for case in cases if not is_dicom(case.images[0])]
    if others:
        raise ConfigError(
            "a DICOM segmentation refers to a DICOM series, and these inputs are none", problems=others, hint=_SEG_HINT
        )


def _segmentation_writer(models: Sequence[Model]) -> WriteBeside:
    """Writes each label map as a DICOM segmentation too; of several series, it refers to that of the first channel."""
    cards = [model.card for model in models]
    algorithm = Algorithm(
        "autoseg",
        __version__,
        {
            "model": "+".join(card.weights_sha256[:_DIGEST_LENGTH] for card in cards),
            "plan": cards[0].digest,
            "configuration": cards[0].configuration,
            "folds": "+".join(str(card.fold) for card in cards),
            "dataset": cards[0].plan.dataset,
        },
    )

    def write(case: Case, label_map: Path, labels: LabelMap) -> None:
        write_segmentation(segmentation_path(label_map), labels, case.images[0], cards[0].plan.labels, algorithm)

    return write


def _tell_of_missing_channels(cases: Sequence[Case], channels: Sequence[Channel]) -> None:
    for case in cases:
        if case.missing:
            names = ", ".join(f"{number} ({channels[number].name})" for number in case.missing)
            log.warning("%s: segmented without the channel %s, which is missing", case.id, names)


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
