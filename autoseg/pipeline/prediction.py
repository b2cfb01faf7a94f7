"""Segment new images with the models of a run, or with one model: many at a time, and none of them twice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from autoseg.domain.dataset import Case, Channel
from autoseg.domain.inference import DEFAULT_TTA, Tta
from autoseg.errors import ConfigError
from autoseg.inference.beside import paths_beside, refuse_clashes
from autoseg.inference.cases import refuse_overwriting, target
from autoseg.inference.engines.base import WantedEngine
from autoseg.inference.gather import Wanted
from autoseg.inference.inputs import find_cases
from autoseg.inference.outcome import PredictionOutcome, Tally
from autoseg.inference.settings import PredictionSettings
from autoseg.inference.statistics_table import write_table
from autoseg.io.dicom import is_dicom
from autoseg.io.dicom_seg import require_highdicom
from autoseg.pipeline.cases import SILENT
from autoseg.pipeline.devices import parse_devices, predict_on
from autoseg.pipeline.exporting import opened
from autoseg.pipeline.finished import unfinished
from autoseg.pipeline.members import choose, load_models
from autoseg.pipeline.predicting import DICOM_SEG, Predicting
from autoseg.pipeline.shards import Shard
from autoseg.runtime import Progress

__all__ = ["load_models", "predict"]

log = logging.getLogger("autoseg")

_SEG_HINT = "Predict other images in a run of their own, without --dicom-seg."


def predict(
    model_path: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    configuration: str | None = None,
    folds: str | None = None,
    tta: Tta = DEFAULT_TTA,
    overlap: float | None = None,
    skip_empty: bool = False,
    device: str = "auto",
    precision: str = "auto",
    engine: WantedEngine = "auto",
    shard: str = "1/1",
    restart: bool = False,
    dicom_seg: bool = False,
    wanted: Wanted | None = None,
    progress: Progress = SILENT,
) -> PredictionOutcome:
    """Segment images and write label maps on their own grids.

    Cases that are finished in the folder, by the same models and settings and from the same images, are skipped.

    Of a cascade the previous stage goes first, with all of its finished folds, whichever of the cascade's are chosen;
    mirroring, overlap, device and precision are those of both.

    Args:
        model_path: A run folder, an exported model (a folder or .zip), or one trained fold's folder.
        inputs: Files and folders; see `find_cases`.
        out: Folder for the label maps.
        configuration: Of a run; default as its `inference.json` says, else its plan, else the one that is trained.
        folds: Numbers separated by commas, or "all"; by default every finished fold. Their logits are averaged.
        tta: Test-time mirroring.
        overlap: Of tiles; default as the plan says.
        skip_empty: Whether only one of the tiles that show nothing is predicted.
        device: See `runtime.pick_device`; several work side by side, see `parse_devices`.
        precision: See `runtime.pick_precision`.
        engine: What runs the networks; see `Predictor`.
        shard: Which part of the cases, as in "1/4"; see `Shard`.
        restart: Do finished cases again.
        dicom_seg: Also write OUT/X.seg.dcm, a DICOM segmentation object; every input must be a DICOM series.
        wanted: What else is written beside label maps; None: nothing.
        progress: One step a case.

    Raises:
        ModelError: There is no such model.
        ConfigError: The inputs cannot be sorted into cases; or a DICOM segmentation cannot be written.
    """
    part, devices, wanted = Shard.parse(shard), parse_devices(device), wanted or Wanted()
    if dicom_seg:
        require_highdicom()
    settings = PredictionSettings(precision=precision, tta=tta, overlap=overlap, skip_empty=skip_empty, engine=engine)
    with opened(model_path) as folder:
        chosen = choose(folder, configuration, folds)
        cases = _cases(inputs, part, chosen.channels, dicom_seg=dicom_seg)
        task = Predicting(
            model=str(folder),
            configuration=configuration,
            folds=folds,
            models_digest=chosen.digest(),
            settings=settings,
            out=str(out),
            extras=(*((DICOM_SEG,) if dicom_seg else ()), *wanted.names),
        )
        return _segment(task, cases, devices, restart=restart, progress=progress)


def _cases(inputs: Sequence[Path], part: Shard, channels: Sequence[Channel], *, dicom_seg: bool) -> tuple[Case, ...]:
    optional = [number for number, channel in enumerate(channels) if channel.may_be_missing]
    cases = part.of(find_cases(inputs, len(channels), optional))
    _tell_of_missing_channels(cases, channels)
    if dicom_seg:
        _require_dicom(cases)
    return cases


def _segment(
    task: Predicting, cases: Sequence[Case], devices: Sequence[str], *, restart: bool, progress: Progress
) -> PredictionOutcome:
    """Do what is not finished, here or on several devices."""
    out, wanted = Path(task.out), Wanted.of(task.extras)
    label_maps = [target(case, out) for case in cases]
    refuse_overwriting(cases, [*label_maps, *(path for item in label_maps for path in paths_beside(item, wanted))])
    refuse_clashes(wanted, label_maps)
    todo, skipped = (cases, ()) if restart else unfinished(task.ledger(), cases, label_maps, out)
    task = task.model_copy(update={"num_cases": max(1, len(todo) // len(devices))})
    tally = Tally(todo, progress)
    try:
        if len(devices) > 1 and todo:
            predict_on(task, devices[: len(todo)], todo, tally)
        elif todo:
            task.run(todo, devices[0], tally.add)
    finally:
        # Also where it was stopped: what is finished is in the table.
        if wanted.has_table:
            write_table(out)
    return tally.outcome(skipped)


def _require_dicom(cases: Sequence[Case]) -> None:
    others = [case.images[0] for case in cases if not is_dicom(case.images[0])]
    if others:
        raise ConfigError(
            "a DICOM segmentation refers to a DICOM series, and these inputs are none", problems=others, hint=_SEG_HINT
        )


def _tell_of_missing_channels(cases: Sequence[Case], channels: Sequence[Channel]) -> None:
    for case in cases:
        if case.missing:
            names = ", ".join(f"{number} ({channels[number].name})" for number in case.missing)
            log.warning("%s: segmented without the channel %s, which is missing", case.id, names)
