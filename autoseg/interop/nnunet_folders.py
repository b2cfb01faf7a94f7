"""Where the parts of trained nnU-Net v2 models lie: a folder a configuration, in it a folder a fold.

`nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_K/checkpoint_final.pth`, with `plans.json`, `dataset.json`
and as a rule `dataset_fingerprint.json` beside the folds.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from autoseg.errors import ConfigError, ModelError

log = logging.getLogger("autoseg")

PLANS, DATASET, FINGERPRINT = "plans.json", "dataset.json", "dataset_fingerprint.json"
FINAL_CHECKPOINT = "checkpoint_final.pth"
"""What nnU-Net predicts with unless told otherwise."""

VALIDATION_SUMMARY = "validation/summary.json"
"""Scores of a fold's validation cases, below the folder of the fold."""

FoldName = int | Literal["all"]

_FOLD = re.compile(r"fold_(\d+|all)")
_LICENCE = re.compile(r"licen[cs]e(\.\w+)?", re.IGNORECASE)
_DEEPEST = 4
"""Folders below the one that is given: results, data set, configuration."""

_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A trained configuration.

    Attributes:
        path: The folder.
        checkpoints: Of each fold, numbers first, in order.
    """

    path: Path
    checkpoints: dict[FoldName, Path]

    @property
    def origin(self) -> tuple[str, str, str]:
        """Data set, trainer and plans, by the names of the folders: what configurations that belong together share."""
        parts = self.path.name.split("__")
        trainer, plans = (parts[0], parts[1]) if len(parts) == 3 else ("", "")
        return (self.path.parent.name, trainer, plans)

    def sibling(self, configuration: str) -> Path:
        """The folder of another configuration of the same data set, trainer and plans."""
        _, trainer, plans = self.origin
        return self.path.with_name(f"{trainer}__{plans}__{configuration}")

    def licence_files(self) -> list[Path]:
        """Files that are called like a licence, here and in the folders above as far as the data set's."""
        folders = (self.path, self.path.parent)
        return [
            file
            for folder in folders
            for file in sorted(folder.iterdir())
            if file.is_file() and _LICENCE.fullmatch(file.name)
        ]


def is_part_of_model(name: PurePosixPath, checkpoint: str) -> bool:
    """Whether a file of an archive is of use: descriptions, licences, and the checkpoint of each fold."""
    if name.name in (PLANS, DATASET, FINGERPRINT) or _LICENCE.fullmatch(name.name):
        return True
    is_score = name.match(f"fold_*/{VALIDATION_SUMMARY}")
    return is_score or (name.name == checkpoint and _FOLD.fullmatch(name.parent.name) is not None)


def find_models(root: Path, checkpoint: str) -> list[ModelFolder]:
    """The trained configurations in a folder: itself one, or those of a data set.

    Args:
        root: Their folder, or one above.
        checkpoint: Name of the checkpoint in each fold.

    Raises:
        ModelError: There is none, or no fold has such a checkpoint.
        ConfigError: Models of several data sets, trainers or plans are there.
    """
    folders = [folder for folder in _with_depth(root) if (folder / PLANS).is_file() and _folds(folder)]
    if not folders:
        raise ModelError(
            f"{root} holds no trained nnU-Net model: no folder in it has {PLANS} and folds (fold_0, ...)",
            hint="Give a folder such as nnUNet_results/Dataset004_X/nnUNetTrainer__nnUNetPlans__3d_fullres, the "
            "folder of the data set, or a zip that nnU-Net exported.",
        )
    models = [model for folder in folders if (model := _model(folder, checkpoint)) is not None]
    if not models:
        raise _no_checkpoint(folders, checkpoint)
    origins = {model.origin for model in models}
    if len(origins) > 1:
        raise ConfigError(
            f"{root} holds models of different data sets, trainers or plans; a run holds those of one",
            problems=[str(model.path.relative_to(root)) for model in models][:_MOST_NAMED],
            hint="Give one of these folders, and each its own --out. Of a cascade, the folder of its previous stage "
            "is found beside it.",
        )
    return models


def model_at(folder: Path, checkpoint: str) -> ModelFolder | None:
    """The model in a folder itself; None where there is none with such a checkpoint."""
    return _model(folder, checkpoint) if (folder / PLANS).is_file() else None


def _model(folder: Path, checkpoint: str) -> ModelFolder | None:
    found = {name: path / checkpoint for name, path in _folds(folder).items()}
    whole = {name: path for name, path in found.items() if path.is_file()}
    for name in found.keys() - whole.keys():
        log.warning("%s: fold_%s has no %s and is left out", folder.name, name, checkpoint)
    return ModelFolder(folder, whole) if whole else None


def _folds(folder: Path) -> dict[FoldName, Path]:
    found: dict[FoldName, Path] = {}
    for item in folder.iterdir():
        match = _FOLD.fullmatch(item.name)
        if match and item.is_dir():
            found["all" if match[1] == "all" else int(match[1])] = item
    return dict(sorted(found.items(), key=lambda item: (item[0] == "all", item[0])))


def _no_checkpoint(folders: Sequence[Path], checkpoint: str) -> ModelError:
    there = sorted({file.name for folder in folders for file in folder.glob("fold_*/checkpoint_*.pth")})
    hint = f"There is {', '.join(there)}: choose it with --checkpoint {there[-1]}." if there else ""
    return ModelError(
        f"no fold has a {checkpoint}: the training is not finished, or the file was not copied",
        problems=[str(folder) for folder in folders][:_MOST_NAMED],
        hint=hint,
    )


def _with_depth(root: Path) -> Iterator[Path]:
    """The folder and those below, but for what lies in the folds, in order."""
    for place, folders, _ in os.walk(root):
        path = Path(place)
        depth = len(path.relative_to(root).parts)
        folders[:] = sorted(name for name in folders if depth < _DEEPEST and not _FOLD.fullmatch(name))
        yield path
