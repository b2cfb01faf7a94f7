"""OpenVINO as an engine: networks on the CPU.

Source: docs/decisions/0035.
"""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import redirect_stdout
from functools import cache
from importlib.util import find_spec
from io import StringIO
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.domain.network_plan import NetworkPlan
from autoseg.errors import ConfigError, ModelError
from autoseg.inference.engines.base import EngineName, KeptNetwork, Network, Precision, Tiles
from autoseg.inference.engines.keeping import keep, kept_path
from autoseg.inference.engines.openvino_graph import UntranslatableError, load_openvino, translated
from autoseg.io.model import Model
from autoseg.network.export import exported, without_outdated_warnings
from autoseg.network.unet import UNet, restore
from autoseg.runtime import is_out_of_memory, pick_precision

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
    has_own_threads = True
    set_up_s = 0.4  # For hippocampus's plan; 4 s where it is exported. Source: docs/decisions/0035.
    precisions: tuple[Precision, ...] = ("bf16", "fp32", "int8")

    def runs_on(self, device: torch.device) -> bool:
        """On the CPU."""
        return device.type == "cpu"

    def network(self, model: Model, device: torch.device, precision: Precision, batch: int) -> Network:
        """The network.

        Its graph is made straight from its operations where these are known; else it is read where it was kept, or made
        by way of PyTorch's export.

        Raises:
            ModelError: OpenVINO cannot take it.
        """
        del device
        started = time.perf_counter()
        _core()
        plan = model.card.settings.network
        network = restore(plan, model.weights)
        path, conversion_s, kept = None, 0.0, None
        try:
            graph = translated(network, plan)
        except UntranslatableError as problem:
            log.debug("exported for OpenVINO, which takes seconds: %s", problem)
            path = kept_path(model, "openvino", _version())
            graph = _read(path)
            if graph is None:
                conversion_started = time.perf_counter()
                graph = _convert(network, plan)
                conversion_s = time.perf_counter() - conversion_started
                kept = graph
        runs = graph
        if precision != "fp32":
            runs = graph if kept is None else graph.clone()
            _use_mean_variance(runs, plan)
        run = _Run(runs, _PRECISIONS[precision], batch, kept, path)
        run.set_up_again_s = time.perf_counter() - started - conversion_s
        return run

    def require_int8(self, model: Model) -> None:
        """Say what to install, if anything is missing.

        Raises:
            ConfigError: The network is to be made int8, and nncf is not installed.
        """
        path = _int8_path(model)
        if find_spec("nncf") is None and (path is None or not path.exists()):
            raise ConfigError(
                "networks are made int8 by nncf, which is not installed",
                hint="Install what it needs with: pip install 'autoseg-unet[int8]'",
            )

    def quantised(self, model: Model, batch: int, tiles: Tiles) -> Network:
        """The network with weights and features in 8 bit; its graph is read where it was kept, else made.

        Args:
            model: See `network`.
            batch: See `network`.
            tiles: What the ranges of its features are measured with, if it is made.

        Raises:
            ModelError: OpenVINO cannot take it.
        """
        started = time.perf_counter()
        path = _int8_path(model)
        graph, kept = _read(path), None
        if graph is None:
            # What was kept may have been damaged.
            self.require_int8(model)
            graph = kept = _quantised(model, tiles)
        making_s = 0.0 if kept is None else time.perf_counter() - started
        # What is not quantised, such as the norms.
        rest = "bf16" if pick_precision("auto", torch.device("cpu")) == "bf16" else "fp32"
        run = _Run(graph, _PRECISIONS[rest], batch, kept, path)
        run.set_up_again_s = time.perf_counter() - started - making_s
        return run


class _Run(KeptNetwork):
    """A compiled graph, whose requests are used again for all tiles.

    A batch is divided among requests that run side by side, each on its share of the threads: these wait for each other
    once a batch, not after each layer. Where it cannot be divided evenly, all threads run it together.

    Args:
        runs: The graph that is compiled.
        precision: OpenVINO's name of it.
        batch: How many tiles it mostly gets at a time.
        graph: What `keep` writes; None: nothing.
        path: Where to.

    Raises:
        ModelError: OpenVINO cannot compile it.
    """

    def __init__(self, runs: Any, precision: str, batch: int, graph: Any, path: Path | None) -> None:
        self.set_up_again_s = 0.0
        self._graph, self._path = graph, path
        self._runs, self._precision, self._num_threads = runs, precision, torch.get_num_threads()
        self._divided = self._requests(gcd(batch, self._num_threads))
        self._together = self._divided if len(self._divided) == 1 else []
        self._let_the_graph_go()

    def _requests(self, number: int) -> list[Any]:
        """Requests that run at the same time."""
        settings = {
            # Else it computes in bfloat16 wherever the CPU can.
            "INFERENCE_PRECISION_HINT": self._precision,
            "INFERENCE_NUM_THREADS": self._num_threads,
            "NUM_STREAMS": number,
        }
        try:
            compiled = _core().compile_model(self._runs, "CPU", settings)
        except RuntimeError as problem:
            raise _failure(problem) from None
        return [compiled.create_infer_request() for _ in range(number)]

    def _let_the_graph_go(self) -> None:
        """Once nothing will be compiled any more: it is as large as the weights."""
        if self._together:
            self._runs = None

    def __call__(self, x: Tensor) -> Tensor:
        """Run (n, C, *patch) float32."""
        tiles = x.contiguous().numpy()
        requests = self._divided
        if len(tiles) % len(requests):
            requests = self._together = self._together or self._requests(1)
            self._let_the_graph_go()
        number = len(tiles) // len(requests)
        started = 0
        problems: list[Exception] = []
        try:
            for index, request in enumerate(requests):
                # The tiles are read where they lie.
                request.start_async([tiles[index * number : (index + 1) * number]], share_inputs=True)
                started += 1
        finally:
            # For each of them, whatever becomes of the others: they read the tiles, and are used again.
            for request in requests[:started]:
                try:
                    request.wait()
                except (RuntimeError, MemoryError) as problem:
                    problems.append(problem)
        if problems:
            raise problems[0]
        # Copies, because the requests use their outputs again.
        return torch.from_numpy(np.concatenate([request.get_output_tensor(0).data for request in requests]))

    def keep(self) -> None:
        """Write the graph beside the model, with weights in float32."""
        graph, self._graph = self._graph, None
        if graph is None:
            return

        def write(folder: Path) -> None:
            folder.mkdir()
            load_openvino().save_model(graph, folder / _GRAPH, compress_to_fp16=False)

        try:
            keep(self._path, write)
        except RuntimeError as problem:
            log.info("the graph is not kept for the next time: %s", _first_line(problem))


@cache
def _core() -> Any:
    return load_openvino().Core()


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


def _convert(network: UNet, plan: NetworkPlan) -> Any:
    program = exported(network, plan)
    from openvino.frontend import OpConversionFailure

    try:
        with without_outdated_warnings():
            graph = load_openvino().convert_model(program)
        graph.reshape([-1, plan.in_channels, *plan.patch_size])
    except (RuntimeError, OpConversionFailure) as problem:
        raise _failure(problem) from None
    return graph


def _int8_path(model: Model) -> Path | None:
    return kept_path(model, "int8", _version())


def _version() -> str:
    return f"{load_openvino().__version__.split('-')[0]}-{GRAPH_VERSION}"


def _quantised(model: Model, tiles: Tiles) -> Any:
    """A graph in 8 bit, made by nncf: weights symmetric, features between what the tiles showed.

    Source: docs/decisions/0053.
    """
    # First, because it has nncf tell nobody that it was imported.
    load_openvino()
    import nncf

    plan = model.card.settings.network
    network = restore(plan, model.weights)
    try:
        graph = translated(network, plan)
    except UntranslatableError:
        graph = _convert(network, plan)
    _use_mean_variance(graph, plan)
    shown = [(tile if plan.dims == tile.ndim - 2 else tile.squeeze(2)).numpy() for tile in tiles(model)]
    # Not by its own function, which changes handlers that others have added.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        # It would draw bars into the output of whoever calls.
        with redirect_stdout(StringIO()):
            return nncf.quantize(
                graph, nncf.Dataset(shown), subset_size=len(shown), preset=nncf.QuantizationPreset.MIXED
            )
    except (RuntimeError, nncf.InternalError, nncf.ValidationError) as problem:
        raise _failure(problem) from None


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
