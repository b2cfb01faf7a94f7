"""A trained model as an ONNX file."""

from __future__ import annotations

from pathlib import Path

from autoseg.interop.onnx import export_onnx
from autoseg.pipeline.exporting import opened
from autoseg.pipeline.members import load_models


def export_onnx_file(path: Path, out: Path, configuration: str | None = None, folds: str | None = None) -> Path:
    """Write the models of one configuration as one ONNX file, and its card beside it.

    Args:
        path: A run, an exported model or a fold folder.
        out: The file to make; ends in .onnx.
        configuration: See `load_models`.
        folds: See `load_models`; their logits are averaged.

    Returns:
        `out`.

    Raises:
        ModelError: Nothing trained is there, or it has no ONNX form.
        ConfigError: A package is missing, or `out` has another ending.
    """
    with opened(path) as folder:
        export_onnx(load_models(folder, configuration, folds), out)
    return out
