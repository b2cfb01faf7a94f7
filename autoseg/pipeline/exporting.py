"""A trained model as one folder or zip that `predict` takes anywhere, and such a folder or zip opened again."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from autoseg.domain.inference import InferenceRecipe
from autoseg.errors import ConfigError, ModelError
from autoseg.interop.archives import extract
from autoseg.io.files import atomic_path, temporary_folder, write_text
from autoseg.io.model import WEIGHTS, is_whole
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.members import Chosen, ChosenModel, choose
from autoseg.pipeline.model_card import model_card

CARD = "README.md"
"""The model card: named so that sites that show folders show it."""

ZIP_ENDING = ".zip"

WEIGHTS_ENDING = ".safetensors"
"""Of the weight files."""

_FILES = (f"{WEIGHTS}.json", f"{WEIGHTS}{WEIGHTS_ENDING}")
_WANTED = re.compile(
    rf"([^/]+/)?(inference\.json|{re.escape(CARD)}|models/[^/]+/fold_[^/]+/{WEIGHTS}\.(json|safetensors))"
)
"""Files of an archive; whoever zips the folder itself puts its name before everything."""


def export_model(path: Path, out: Path, configuration: str | None = None, folds: str | None = None) -> Path:
    """Write what predicts, and nothing else of a run: weights, plans, `inference.json`, a model card.

    Args:
        path: A run, an exported model or a fold folder.
        out: The folder to make, or the archive if it ends in .zip.
        configuration: See `choose`.
        folds: See `choose`.

    Returns:
        `out`.

    Raises:
        ModelError: Nothing trained is there, or it is damaged.
        ConfigError: `out` is there already.
        OSError: It cannot be written.
    """
    require_new(out)
    with opened(path) as folder:
        chosen = choose(folder, configuration, folds)
        require_whole(chosen)
        if out.suffix.lower() == ZIP_ENDING:
            with atomic_path(out) as temporary, temporary_folder(out) as staged:
                _write(chosen, staged)
                _pack(staged, temporary)
        else:
            with atomic_path(out) as temporary:
                _write(chosen, temporary)
    return out


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder of a model; an exported zip is unpacked into a temporary one for as long as the context lasts.

    Raises:
        ModelError: The zip holds no exported model, is damaged, or could do harm.
    """
    if not path.is_file():
        yield path
        return
    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"{path} is neither a folder nor a zip archive",
            hint="Give a run folder, one of its models/CONFIG/fold_K, or what `autoseg export` has made.",
        )
    with tempfile.TemporaryDirectory(prefix="autoseg-model-") as temporary:
        folder = Path(temporary)
        extract(path, folder, lambda name: _WANTED.fullmatch(str(PurePosixPath(name))) is not None)
        found = (*folder.glob("inference.json"), *folder.glob("*/inference.json"))
        # A bundle has a file of that name in its folder `configs` too.
        roots = [file.parent for file in found if RunFolder(file.parent).has_models]
        if len(roots) != 1:
            raise ModelError(
                f"{path} holds no model of autoseg's: inference.json is missing",
                hint="Make one with: autoseg export RUN --out model.zip. A model of nnU-Net's becomes a run with: "
                "autoseg import nnunet ZIP --out RUN",
            )
        yield roots[0]


def _models(chosen: Chosen) -> tuple[ChosenModel, ...]:
    """Everything that predicts, each once: the previous stage of two cascades is the same."""
    found = [model for member in chosen.members for model in (*member.models, *member.previous)]
    return tuple({(model.card.configuration, model.card.fold): model for model in found}.values())


def require_new(out: Path) -> None:
    """Refuse to write over something.

    Raises:
        ConfigError: `out` is a file, or a folder that holds something.
    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already", hint="Choose another name for --out, or delete it first.")


def require_whole(chosen: Chosen) -> None:
    """Refuse to pass on weights that are damaged.

    Raises:
        ModelError: Names the models.
    """
    broken = [str(model.folder) for model in _models(chosen) if not is_whole(model.folder)]
    if broken:
        raise ModelError("weights do not match their cards", problems=broken, hint="Train or copy these models again.")


def _write(chosen: Chosen, folder: Path) -> None:
    write_models(chosen, folder)
    write_text(folder / CARD, model_card(chosen))


def write_models(chosen: Chosen, folder: Path) -> None:
    """Write all that predicts: the models of every member and of a previous stage, and `inference.json`.

    Args:
        chosen: The members.
        folder: Of the model; made when missing.
    """
    run = RunFolder(folder)
    for model in _models(chosen):
        target = run.fold_folder(model.card.configuration, model.card.fold)
        target.mkdir(parents=True)
        for name in _FILES:
            shutil.copyfile(model.folder / name, target / name)
    members = tuple(
        item.member.model_copy(update={"folds": tuple(model.card.fold for model in item.models)})
        for item in chosen.members
    )
    recipe: InferenceRecipe = chosen.recipe.model_copy(update={"members": members})
    run.write(run.inference_file, recipe)


def _pack(folder: Path, archive: Path) -> None:
    """Zip a folder; weights, which hardly shrink, as they are."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                kind = zipfile.ZIP_STORED if file.suffix == WEIGHTS_ENDING else zipfile.ZIP_DEFLATED
                packed.write(file, file.relative_to(folder).as_posix(), kind)
