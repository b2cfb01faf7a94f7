"""ONNX Runtime as an engine: networks on the CPU in float32, by way of their ONNX form."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoseg.errors import ModelError
from autoseg.inference.engines.base import EngineName, KeptNetwork, Network, Precision
from autoseg.inference.engines.keeping import keep, kept_path
from autoseg.io.model import Model
from autoseg.network.export import IMAGE, ONNX_OPSET, onnx_of
from autoseg.network.unet import restore

log = logging.getLogger("autoseg")

FORM_VERSION = 1
"""Of the ONNX form; another one does not read forms that were kept."""

# How ONNX Runtime says that memory ran out; its errors are none of Python's.
_OUT_OF_MEMORY_TEXTS = ("Failed to allocate memory", "bad_alloc", "bad allocation")

_ERRORS_ONLY = 3


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    name: EngineName = "onnx"
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"
    takes_autocast = False
    has_own_threads = True
    set_up_s = 5.0  # 4 s for hippocampus's plan on one core. Source: docs/decisions/0035.
    precisions: tuple[Precision, ...] = ("fp32",)

    def runs_on(self, device: torch.device) -> bool:
        """On the CPU."""
        return device.type == "cpu"

    def network(self, model: Model, device: torch.device, precision: Precision, batch: int) -> Network:
        """The network; its ONNX form is read where it was kept, else made.

        Raises:
            ModelError: ONNX Runtime cannot take it.
        """
        del device, precision, batch
        path = kept_path(model, "onnx", f"opset{ONNX_OPSET}-{FORM_VERSION}.onnx")
        if path is not None and path.is_file():
            try:
                return _Run(path.read_bytes())
            except ModelError as problem:
                log.warning("%s is made anew: %s", path, problem.message)
                path.unlink(missing_ok=True)
        plan = model.card.settings.network
        return _Run(onnx_of(restore(plan, model.weights), plan), path)


class _Run(KeptNetwork):
    """A session, which is used again for every tile."""

    def __init__(self, form: bytes, keep_at: Path | None = None) -> None:
        started = time.perf_counter()
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait actively slow down what runs between two tiles.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with _failures("take the network"):
            self._session = runtime.InferenceSession(form, options, providers=["CPUExecutionProvider"])
        self._form, self._path = None if keep_at is None else form, keep_at
        self.set_up_again_s = time.perf_counter() - started

    def __call__(self, x: Tensor) -> Tensor:
        """Run (n, C, *patch) float32."""
        with _failures("run the network"):
            (found,) = self._session.run(None, {IMAGE: x.contiguous().numpy()})
        return torch.from_numpy(found)

    def keep(self) -> None:
        """Write the ONNX form beside the model."""
        form, self._form = self._form, None
        if form is not None:
            keep(self._path, partial(_write, form))


def _write(form: bytes, path: Path) -> None:
    path.write_bytes(form)


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """ONNX Runtime's errors, which are none of Python's, as a MemoryError or a ModelError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    try:
        yield
    except (
        state.RuntimeException,
        state.Fail,
        state.NotImplemented,
        state.InvalidGraph,
        state.InvalidProtobuf,
    ) as problem:
        text = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        if any(words in str(problem) for words in _OUT_OF_MEMORY_TEXTS):
            raise MemoryError(text) from None
        raise ModelError(f"ONNX Runtime cannot {what}: {text}", hint="Use another --engine.") from None


@cache
def _runtime() -> Any:
    import onnxruntime

    # Events for the makers, on Windows.
    onnxruntime.disable_telemetry_events()
    return onnxruntime
