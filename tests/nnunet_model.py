"""Copies of the tiny nnU-Net models of the golden tests, with whatever a test changes."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden" / "nnunet_models"


def copy_model(name: str, root: Path) -> Path:
    """All configurations of a model, in the folder of its data set; returns that folder."""
    data_set = root / f"Dataset900_{name}"
    for folder in (GOLDEN / name).glob("*__*__*"):
        shutil.copytree(folder, data_set / folder.name)
    return data_set


def edit(data_set: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change plans.json or dataset.json of every configuration."""
    for path in data_set.glob(f"*/{file}"):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def edit_configurations(data_set: Path, **entries: Any) -> None:
    """Set entries of every configuration that inherits from none."""

    def change(plans: dict[str, Any]) -> None:
        for configuration in plans["configurations"].values():
            if "inherits_from" not in configuration:
                configuration.update(entries)

    edit(data_set, "plans.json", change)


def export(data_set: Path, target: Path) -> Path:
    """A zip as nnU-Net's own export makes it: paths below the folder of results, and files that are of no use here."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(data_set.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(data_set.parent))
        archive.writestr(f"{data_set.name}/x__y__z/fold_0/progress.png", b"picture")
    return target
