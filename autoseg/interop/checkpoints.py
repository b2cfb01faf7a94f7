"""Checkpoints of other programs, read without running anything that they say.

A `.pth` file is a pickle: a program that is run to get its content. It is read by torch's restricted reader, which
knows tensors and plain containers. The names of NumPy's numbers and arrays, which nnU-Net's logs hold, stand for values
of our own here, so that nothing of NumPy runs either. Any other name is refused.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from autoseg.errors import ModelError

_MOST_NAMED = 8

_FORMATS = {"f2": "<e", "f4": "<f", "f8": "<d", "i4": "<i", "i8": "<q"}
"""How the numbers in nnU-Net's logs are stored, by NumPy's name of their type."""


class _NumberType:
    """Stands for a NumPy type; knows only its name."""

    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and what else a NumPy type keeps: not needed."""


class _Array:
    """Stands for a NumPy array, which no weights are: its content is dropped."""

    def __setstate__(self, state: object) -> None:
        """Shape, type and values."""


def _array(*_: object) -> _Array:
    return _Array()


def _number(kind: _NumberType, raw: bytes | None = None) -> float | None:
    """A single number; None where it is of another type than those that logs hold."""
    layout = _FORMATS.get(kind.name) if isinstance(kind, _NumberType) else None
    if layout is None or not isinstance(raw, bytes) or len(raw) != struct.calcsize(layout):
        return None
    value: float = struct.unpack(layout, raw)[0]
    return value


# torch asks for pairs of what a name stands for and the name; NumPy 2 renamed a module.
_ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    (_Array, "numpy.ndarray"),
    (_array, "numpy.core.multiarray._reconstruct"),
    (_array, "numpy._core.multiarray._reconstruct"),
]
_ALLOWED_NAMES = {item[1] for item in _ALLOWED if isinstance(item, tuple)}

_DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)
"""What readers make of bytes that are no checkpoint."""

_NAMED_IN_MESSAGE = re.compile(r"GLOBAL (\S+)")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: containers of numbers, text and tensors.

    Args:
        path: The file.

    Returns:
        Its entries. Tensors are on the CPU, and their values are read from the file when they are used: it must stay
        until then.

    Raises:
        ModelError: It cannot be read, names anything else than such content, or its entries have no names.
    """
    try:
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            _require_stored(path)
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused anyway
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except UnpicklingError as problem:
        raise _refusal(path, problem) from None
    except _DAMAGE as problem:
        reason = (str(problem).splitlines() or [""])[0] if isinstance(problem, OSError | RuntimeError) else ""
        reason = reason or "it is not a file that torch has written, or it is damaged"
        raise ModelError(
            f"{path} cannot be read as a checkpoint: {reason}",
            hint="The file may be damaged or truncated; copy it again.",
        ) from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ModelError(f"{path} is no checkpoint: it must hold named entries, got {type(found).__name__}")
    return found


def require_plain_tensors(weights: dict[str, Tensor], path: Path) -> None:
    """Refuse tensors that are no plain arrays of real numbers, or claim more values than are stored for them.

    Raises:
        ModelError: Names them.
    """
    problems = []
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            problems.append(f"{name}: expected an array of real numbers")
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            problems.append(f"{name}: {tensor.numel():,} values are claimed, fewer are stored")
    if problems:
        raise ModelError(f"{path} holds weights that cannot be used", problems=problems[:_MOST_NAMED])


def _require_stored(path: Path) -> None:
    """A checkpoint's parts are stored as they are; packed ones could unpack to any size."""
    with zipfile.ZipFile(path) as archive:
        packed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ModelError(
            f"{path} is no checkpoint of torch: its part {packed[0]} is compressed, and torch stores its parts as they "
            "are",
            hint="A zip that nnU-Net exported is given as it is: autoseg import nnunet MODEL.zip --out RUN",
        )


def _refusal(path: Path, problem: UnpicklingError) -> ModelError:
    names = _NAMED_IN_MESSAGE.findall(str(problem))
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) or names
    except (UnpicklingError, *_DAMAGE):
        pass  # an older format, of which only the first name is known
    names = [name for name in names if name not in _ALLOWED_NAMES]
    if not names:
        return ModelError(
            f"{path} is refused: it is not what a checkpoint is, tensors, numbers and text in plain containers"
        )
    return ModelError(
        f"{path} is refused: reading it would run {', '.join(names[:_MOST_NAMED])}, which no checkpoint needs",
        hint="A file that names programs can do anything with this computer. If its origin is beyond doubt, have it "
        "saved anew by those who made it, with tensors, numbers and text only.",
    )
