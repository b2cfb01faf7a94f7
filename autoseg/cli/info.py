"""`autoseg info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autoseg.cli import options


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("info")(info)


def info(
    what: Annotated[
        Path | None, typer.Argument(metavar="[RUN|MODEL|IMAGE]", help="Without it: versions and devices.")
    ] = None,
    json: options.Json = None,
) -> None:
    """Versions and devices; or what a run, a model, an image is."""
    from autoseg.cli.output import emit_json, stdout

    facts = _facts(what)
    if json is not None:
        emit_json(facts, json)
    if json != "-":
        for line in _lines(facts):
            stdout.print(line, markup=False, soft_wrap=True)


def _facts(what: Path | None) -> dict[str, Any]:
    from autoseg.errors import ConfigError
    from autoseg.io.run_folder import RunFolder, is_trained

    if what is None:
        from autoseg.runtime import environment

        return environment()
    if not what.exists():
        raise ConfigError(f"{what} does not exist")
    if what.is_file():
        return _image_facts(what)
    if is_trained(what):
        return _model_facts(what)
    run = RunFolder(what)
    plan = run.read_plan()
    return {
        "run": str(what),
        "dataset": plan.dataset,
        "plan": plan.digest(),
        "preset": plan.preset,
        "configurations": {
            name: {
                "patch_size": item.network.patch_size,
                "batch_size": item.training.batch_size,
                "finished_folds": run.trained_folds(name),
            }
            for name, item in plan.configurations.items()
        },
    }


def _image_facts(path: Path) -> dict[str, Any]:
    from autoseg.domain.geometry import degrees_off_axis, orientation_code
    from autoseg.io.images import read_header

    header = read_header(path)
    affine = header.geometry.affine
    return {
        "image": str(path),
        "shape": header.geometry.shape,
        "components": header.components,
        "spacing_mm": header.geometry.spacing_mm,
        "orientation": orientation_code(affine),
        "degrees_off_axis": round(degrees_off_axis(affine), 2),
        "affine": affine.tolist(),
    }


def _model_facts(folder: Path) -> dict[str, Any]:
    from autoseg.io.model import load_model

    card = load_model(folder).card
    return {
        "model": str(folder),
        "dataset": card.plan.dataset,
        "configuration": card.configuration,
        "fold": card.fold,
        "plan": card.plan.digest(),
        "channels": [channel.name for channel in card.plan.channels],
        "classes": list(card.plan.labels.names),
        "patch_size": card.plan.configurations[card.configuration].network.patch_size,
        "versions": card.versions,
    }


def _lines(facts: dict[str, Any], indent: int = 0) -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            lines += [" " * indent + f"{key}:", *_lines(value, indent + 2)]
        else:
            lines.append(" " * indent + f"{key}: {value}")
    return lines
