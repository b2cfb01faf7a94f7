"""Networks in the form that an engine needs, kept beside the model: conversions take seconds, reading them does not.

They are copies: whatever lies in `FOLDER` may be deleted at any time.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from autoseg.domain.values import digest_of
from autoseg.io.files import atomic_path
from autoseg.io.model import Model

log = logging.getLogger("autoseg")

FOLDER = "engines"
"""In a model's folder."""

_DIGEST_LENGTH = 16
"""Of the weights: enough to tell models apart."""


def kept_path(model: Model, engine: str, version: str) -> Path | None:
    """Where the form of a model for an engine lies, or would lie; None for a model that never was on disk.

    Args:
        model: Named by its weights and its network with the patch: others in the same folder never find it.
        engine: Begins the name.
        version: Of the engine, and of the way in which the form is made.
    """
    digest = model.card.weights_sha256
    if model.folder is None or not digest:
        return None
    network = digest_of(model.card.settings.network.model_dump(mode="json"))
    return model.folder / FOLDER / f"{engine}-{digest[:_DIGEST_LENGTH]}-{network}-{version}"


def keep(path: Path | None, write: Callable[[Path], None]) -> None:
    """Write such a form, whole or not at all, in the place of older ones of its engine; a warning where it fails.

    Args:
        path: From `kept_path`.
        write: Gets the path of a file or folder to make.
    """
    # A model that was unpacked for a moment has no folder any more.
    if path is None or path.exists() or not path.parent.parent.is_dir():
        return
    try:
        with atomic_path(path) as temporary:
            write(temporary)
        for older in path.parent.glob(f"{path.name.partition('-')[0]}-*"):
            if older != path:
                shutil.rmtree(older, ignore_errors=True) if older.is_dir() else older.unlink(missing_ok=True)
    except OSError as problem:
        log.info("%s is not kept for the next time: %s", path.name, problem.strerror or problem)
