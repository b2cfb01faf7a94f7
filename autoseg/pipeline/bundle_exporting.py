"""A trained model as a MONAI bundle: an exported model, with what MONAI's tools need beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from autoseg.errors import ConfigError
from autoseg.interop.bundle import (
    CONFIGS,
    INFERENCE,
    LOGGING,
    LOGGING_CONF,
    METADATA,
    bundle_metadata,
    inference_config,
)
from autoseg.io.files import atomic_path, file_digest, write_json, write_text
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.exporting import (
    CARD,
    WEIGHTS_ENDING,
    ZIP_ENDING,
    opened,
    require_new,
    require_whole,
    write_models,
)
from autoseg.pipeline.members import choose
from autoseg.pipeline.model_card import licence, model_card

DOCS = "docs"
"""Folder of the model card."""

LICENCE = "LICENSE"
"""As MONAI's model zoo names it."""

_INTRODUCTION = (
    "A U-Net for the segmentation of images, made by autoseg, as a MONAI bundle. Weights are safetensors, everything "
    "else is JSON and text. MONAI evaluates what is in `configs/inference.json`: run bundles of people whom you trust."
)

_USE = f"""\
It needs the package that `configs/{METADATA}` names, and `fire` for MONAI's command line:

```
pip install autoseg-unet fire
python -m monai.bundle run --config_file THIS_FOLDER/configs/{INFERENCE} --bundle_root THIS_FOLDER \\
    --dataset_dir images/ --output_dir predictions/
```

The files are those that `autoseg predict THIS_FOLDER images/ --out predictions/` writes. Further settings:
`--device`, `--precision`, `--tta`, `--overlap`, `--skip_empty`, `--engine`, `--restart`, as that command has them."""


def export_bundle(path: Path, out: Path, configuration: str | None = None, folds: str | None = None) -> Path:
    """Write what predicts as a folder that `python -m monai.bundle run` runs, and `autoseg predict` too.

    Args:
        path: A run, an exported model or a fold folder.
        out: The folder to make.
        configuration: See `choose`.
        folds: See `choose`.

    Returns:
        `out`.

    Raises:
        ModelError: Nothing trained is there, or it is damaged.
        ConfigError: `out` is there already, or is named like an archive.
        OSError: It cannot be written.

    Source: docs/decisions/0047.
    """
    if out.suffix.lower() == ZIP_ENDING:
        raise ConfigError(
            f"a bundle is a folder, and {out} is named like an archive",
            hint=f"Write to {out.with_suffix('')}, and pack that folder if you need an archive.",
        )
    require_new(out)
    with opened(path) as folder:
        chosen = choose(folder, configuration, folds)
        require_whole(chosen)
        with atomic_path(out) as temporary:
            write_models(chosen, temporary)
            metadata = bundle_metadata(chosen.cards, dict(_digests(temporary)), LICENCE)
            write_json(temporary / CONFIGS / METADATA, metadata.contents())
            write_json(temporary / CONFIGS / INFERENCE, inference_config())
            write_text(temporary / CONFIGS / LOGGING, LOGGING_CONF)
            write_text(temporary / DOCS / CARD, model_card(chosen, _INTRODUCTION, _USE))
            write_text(temporary / LICENCE, licence(chosen.cards) + "\n")
    return out


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    """SHA-256 of the weight files by their place in the folder."""
    for file in sorted(RunFolder(folder).models_folder.rglob(f"*{WEIGHTS_ENDING}")):
        yield file.relative_to(folder).as_posix(), file_digest(file)
