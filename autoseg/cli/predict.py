"""`autoseg predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from autoseg.cli import options
from autoseg.domain.inference import DEFAULT_TTA, Tta


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("predict")(predict)


def predict(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL", help="A run folder, an exported model, or one trained fold's folder.")
    ],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="Images, folders, DICOM series (their folder, or a file); X_0000.ext ... X_000C.ext: channels of X.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="Folder for the label maps.", show_default=False)],
    config: options.Config = None,
    fold: Annotated[
        str | None, typer.Option("--fold", help="Folds to use: one number, several as 0,1, or all. Default: finished.")
    ] = None,
    tta: Annotated[
        Tta,
        typer.Option("--tta", help="Test-time mirroring: none, another one for each tile, or all for every tile."),
    ] = DEFAULT_TTA,
    overlap: Annotated[float | None, typer.Option("--overlap", min=0.0, max=0.9, help="Of tiles. Default 0.5.")] = None,
    skip_empty: Annotated[
        bool, typer.Option("--skip-empty", help="Predict only one of the tiles that show nothing (padding, air).")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write X_probabilities.nii.gz: one volume a class, in 8 bits.")
    ] = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty", help="Also write X_uncertainty.nii.gz (entropy, 0 to 1), and an interval for each volume."
        ),
    ] = False,
    statistics: Annotated[
        bool,
        typer.Option(
            "--statistics", help="Also write statistics.csv and .json: volumes, pieces and intensities of each class."
        ),
    ] = False,
    side_files: Annotated[
        str,
        typer.Option(
            "--side-files",
            metavar="KIND,...",
            help="Also write names and colours for viewers: slicer (.seg.nrrd, .ctbl), itksnap (.label.txt), bids.",
            show_default=False,
        ),
    ] = "",
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="auto, cpu, cuda, cuda:N or mps; several as cuda:0,cuda:1, or cuda:all: a process each, side by side.",
        ),
    ] = "auto",
    precision: options.PrecisionOfEngines = "auto",
    engine: Annotated[
        Literal["auto", "torch", "compile", "openvino", "onnx"],
        typer.Option(
            "--engine", help="What runs the networks; auto: the quickest that says what torch says in fp32, if it pays."
        ),
    ] = "auto",
    shard: Annotated[
        str,
        typer.Option("--shard", metavar="I/N", help="Segment only part I of N of the cases, as 1/4: for schedulers."),
    ] = "1/1",
    restart: Annotated[
        bool, typer.Option("--restart", help="Do finished cases again; else those that are whole are skipped.")
    ] = False,
    dicom_seg: Annotated[
        bool,
        typer.Option(
            "--dicom-seg", help="Also write X.seg.dcm, a DICOM segmentation of the series (needs the extra dicom)."
        ),
    ] = False,
) -> None:
    """Segment new images on their own grid; a failing image does not stop the others (exit 3 at the end).

    The same command goes on where it was stopped: what is finished and whole is skipped.
    """
    from autoseg.cli.output import TerminalProgress, stdout
    from autoseg.inference.gather import Wanted, parse_side_files
    from autoseg.io.dicom_seg import segmentation_path
    from autoseg.pipeline import prediction

    outcome = prediction.predict(
        model,
        inputs,
        out,
        configuration=config,
        folds=fold,
        tta=tta,
        overlap=overlap,
        skip_empty=skip_empty,
        device=device,
        precision=precision,
        engine=engine,
        shard=shard,
        restart=restart,
        dicom_seg=dicom_seg,
        wanted=Wanted(probabilities, uncertainty, statistics, parse_side_files(side_files)),
        progress=TerminalProgress(),
    )
    for path in outcome.written:
        stdout.print(str(path), markup=False, soft_wrap=True)
        if dicom_seg:
            stdout.print(str(segmentation_path(path)), markup=False, soft_wrap=True)
    outcome.raise_failures()
