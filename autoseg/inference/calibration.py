"""Images that a model was trained with, which show the ranges of its features, for int8.

Source: docs/decisions/0053.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from autoseg.domain.dataset import Case
from autoseg.errors import AutosegError
from autoseg.inference.sliding_window import TileGrid, middle_tiles
from autoseg.io.images import read_case
from autoseg.io.model import Model
from autoseg.io.run_folder import RunFolder
from autoseg.preprocessing.transform import Prepared

log = logging.getLogger("autoseg")

NUM_TILES = 16
"""Tiles that are shown. Source: docs/decisions/0053."""


def seen_cases(model: Model) -> tuple[Case, ...]:
    """Up to `NUM_TILES` training cases of a fold, spread over all of them; none where the model lies in no run.

    Args:
        model: Of a fold of a run: RUN/models/CONFIGURATION/fold_K.
    """
    if model.folder is None:
        return ()
    folder = model.folder.absolute()
    try:
        run = RunFolder(folder.parents[2])
        dataset, splits = run.read_dataset(), run.read_splits()
    except (AutosegError, IndexError):
        return ()
    fold = model.card.fold
    held = splits.folds[fold].validation if isinstance(fold, int) and fold < len(splits.folds) else ()
    seen = [case for case in dataset.cases if case.id not in held]
    step = max(1, len(seen) // NUM_TILES)
    return tuple(seen[::step][:NUM_TILES])


def seen_tiles(
    model: Model, num_channels: int, prepare: Callable[..., Prepared], grid_of: Callable[[Prepared], TileGrid]
) -> list[Tensor]:
    """A tile (1, C, *patch) in the middle of each of those images that can be read; the others are left out.

    Args:
        model: See `seen_cases`.
        num_channels: Of its images.
        prepare: From a volume to the image that the network sees.
        grid_of: Where the tiles of such an image lie.
    """
    tiles = []
    for case in seen_cases(model):
        if not all(Path(file).exists() for file in case.images if file):
            continue
        try:
            prepared = prepare(read_case(case, num_channels))
        except AutosegError as problem:
            log.warning("%s does not show the ranges of features for int8: %s", case.id, problem.message)
            continue
        tiles.append(middle_tiles(torch.from_numpy(prepared.image), grid_of(prepared), 1))
    return tiles
