"""Named tensors in one file, whole or not at all. The format is safetensors: nothing is ever pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoseg.errors import ModelError
from autoseg.io.files import atomic_path


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device; an existing file is replaced only when the new one is whole.

    Raises:
        OSError: The folder cannot be written.
    """
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor onto the CPU.

    Raises:
        ModelError: Missing or not a whole safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as problem:
        raise ModelError(f"{path} cannot be read as safetensors: {problem}") from None
