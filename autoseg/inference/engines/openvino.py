"""OpenVINO as an engine: networks on the CPU, converted from PyTorch's own export.

Source: docs/decisions/0035.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.domain.network_plan import NetworkPlan
from autoseg.errors import ModelError
from autoseg.inference.engines.base import EngineName, KeptNetwork, Network, Precision
from autoseg.inference.engines.keeping import keep, kept_path
from autoseg.io.model import Model
from autoseg.network.export import exported, without_outdated_warnings
from autoseg.network.unet import restore
from autoseg.runtime import is_out_of_memory

log = logging.getLogger("autoseg")

GRAPH_VERSION = 1
"""Of the way in which graphs are made; another one does not read graphs that were kept."""

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}

_GRAPH = "graph.xml"


class OpenVino:
    """OpenVINO on the CPU."""

    name: EngineName = "openvino"
    packages: tuple[str, ...] = ("openvino",)
    extra = "openvino"
    takes_autocast = False
    set_up_s = 4.0  # 3.7 s for hippocampus's plan on one core. Source: docs/decisions/0035.
    precisions: tuple[Precision, ...] = ("bf16", "fp32")

    def runs_on(self, device: torch.device) -> bool:
        """On the CPU."""
        return device.type == "cpu"

    def network(self, model: Model, device: torch.device, precision: Precision, batch: int) -> Network:
        """The network; its graph is read where it was kept, else made.

        Raises:
            ModelError: OpenVINO cannot take it.
        """
        del device, batch
        started = time.perf_counter()
        _core()
        import_s = time.perf_counter() - started
        path = kept_path(model, "openvino", f"{_openvino().__version__.split('-')[0]}-{GRAPH_VERSION}")
        graph = _read(path)
        is_new = graph is None
        if graph is None:
            graph = _convert(model)
        runs = graph
        if precision != "fp32":
            runs = graph.clone()
            _use_mean_variance(runs, model.card.settings.network)
        settings = {
            # Else it computes in bfloat16 wherever the CPU can.
            "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        started = time.perf_counter()
        try:
            compiled = _core().compile_model(runs, "CPU", settings)
        except RuntimeError as problem:
            raise _failure(problem) from None
        set_up_again_s = import_s + time.perf_counter() - started
        return _Run(compiled, graph if is_new else None, path, set_up_again_s)


class _Run(KeptNetwork):
    """A compiled graph with one request, which is used again for every tile."""

    def __init__(self, compiled: Any, graph: Any, path: Path | None, set_up_again_s: float) -> None:
        self.set_up_again_s = set_up_again_s
        self._request = compiled.create_infer_request()
        self._graph, self._path = graph, path

    def __call__(self, x: Tensor) -> Tensor:
        """Run (n, C, *patch) float32."""
        # The input is read where it lies; the output is a copy, because the request uses its own again.
        found = self._request.infer([x.contiguous().numpy()], share_inputs=True)
        return torch.from_numpy(found[0])

    def keep(self) -> None:
        """Write the graph beside the model, with weights in float32."""
        graph, self._graph = self._graph, None
        if graph is None:
            return

        def write(folder: Path) -> None:
            folder.mkdir()
            _openvino().save_model(graph, folder / _GRAPH, compress_to_fp16=False)

        try:
            keep(self._path, write)
        except RuntimeError as problem:
            log.info("the graph is not kept for the next time: %s", _first_line(problem))


@cache
def _openvino() -> Any:
    # Importing it would tell its makers so over the network, by this package: it does without where there is none.
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@cache
def _core() -> Any:
    return _openvino().Core()


def _read(path: Path | None) -> Any:
    """A graph that was kept; None where there is none that can be read."""
    if path is None or not path.is_dir():
        return None
    try:
        return _core().read_model(path / _GRAPH)
    except RuntimeError as problem:
        log.warning("%s is made anew: %s", path, _first_line(problem))
        shutil.rmtree(path, ignore_errors=True)
        return None


def _convert(model: Model) -> Any:
    plan = model.card.settings.network
    program = exported(restore(plan, model.weights), plan)
    from openvino.frontend import OpConversionFailure

    try:
        with without_outdated_warnings():
            graph = _openvino().convert_model(program)
        graph.reshape([-1, plan.in_channels, *plan.patch_size])
    except (RuntimeError, OpConversionFailure) as problem:
        raise _failure(problem) from None
    return graph


def _use_mean_variance(graph: Any, plan: NetworkPlan) -> None:
    """Replace group norms with one channel a group, which instance norms are, by the operation that is quick.

    It sums over all voxels in one go: in float32 it is too far off, in less nothing is lost.

    Source: docs/decisions/0035: 0.077 instead of 0.092 s a patch in bfloat16.
    """
    from openvino import opset12

    axes = np.arange(2, 2 + plan.dims, dtype=np.int64)
    per_channel = np.array([1, -1, *(1,) * plan.dims], np.int64)
    for operation in graph.get_ordered_ops():
        if operation.get_type_name() != "GroupNormalization":
            continue
        data, scale, shift = (operation.input_value(index) for index in range(3))
        attributes = operation.get_attributes()
        if attributes["num_groups"] != scale.get_partial_shape()[0].get_length():
            continue
        normal = opset12.mvn(data, axes, True, attributes["epsilon"], "INSIDE_SQRT")
        scaled = opset12.multiply(normal, opset12.reshape(scale, per_channel, False))
        shifted = opset12.add(scaled, opset12.reshape(shift, per_channel, False))
        operation.output(0).replace(shifted.output(0))
    graph.validate_nodes_and_infer_types()


def _failure(problem: Exception) -> Exception:
    if isinstance(problem, RuntimeError) and is_out_of_memory(problem):
        return problem
    return ModelError(f"OpenVINO cannot take the network: {_first_line(problem)}", hint="Use another --engine.")


def _first_line(problem: Exception) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
