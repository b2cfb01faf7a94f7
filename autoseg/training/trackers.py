"""TensorBoard, MLflow and Weights & Biases behind the protocol of `loggers`.

Each library is imported when a training starts that asked for it. None of them is told to use the network: MLflow and
Weights & Biases write into the fold folder unless their own environment variables say otherwise.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autoseg.io.files import read_json, write_json
from autoseg.training.loggers import Logger, Loggers, RunFacts, scalars
from autoseg.training.records import EpochRecord, Status

PROJECT = "autoseg"
"""Experiment of MLflow and project of Weights & Biases, unless their environment variables name another."""

_TRACKING_URI = "MLFLOW_TRACKING_URI"
_LONGEST_PARAM = 500
"""Characters of a parameter's value. Source: MLflow's limit in all its stores."""


class TensorBoard:
    """Event files in logs/tensorboard."""

    def __init__(self) -> None:
        self._writer: Any = None
        self._classes: tuple[str, ...] = ()

    def start(self, run: RunFacts) -> None:
        """Open a new event file; what earlier ones say of later steps no longer counts."""
        from torch.utils.tensorboard import SummaryWriter

        self._classes = run.classes
        first = run.done[-1].step + 1 if run.done else 0
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=first)
        self._writer.add_text("run", f"```json\n{json.dumps(run.facts, indent=2)}\n```", first)
        self._writer.flush()

    def log(self, record: EpochRecord) -> None:
        """One scalar a number, over the steps."""
        for name, value in scalars(record, self._classes).items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def finish(self, status: Status) -> None:
        """Close the file."""
        del status
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """A run of MLflow, in logs/mlflow unless MLFLOW_TRACKING_URI is set; later starts go on with it."""

    def __init__(self) -> None:
        self._client: Any = None
        self._run_id = ""
        self._classes: tuple[str, ...] = ()

    def start(self, run: RunFacts) -> None:
        """Make a run, or go on with that of an earlier start."""
        # It would report its use to its makers.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Newer versions want to be asked for their store of plain files; a database takes 16 s to begin (decision 27).
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._classes = run.classes
        own = (run.folder / "mlflow").resolve().as_uri()
        self._client = MlflowClient(tracking_uri=os.environ.get(_TRACKING_URI, own))
        self._run_id = _known_id(run.folder / "mlflow.json", lambda: self._make_run(run))
        self._client.update_run(self._run_id, status="RUNNING")

    def _make_run(self, run: RunFacts) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run_id: str = self._client.create_run(experiment, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in run.facts.items()]
        self._client.log_batch(run_id, params=params)
        return run_id

    def log(self, record: EpochRecord) -> None:
        """All numbers of the epoch at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = scalars(record, self._classes).items()
        self._client.log_batch(self._run_id, metrics=[Metric(key, value, now, record.step) for key, value in values])

    def finish(self, status: Status) -> None:
        """Say how it ended."""
        if self._run_id:
            ends = {"finished": "FINISHED", "interrupted": "KILLED"}
            self._client.set_terminated(self._run_id, ends.get(status, "FAILED"))


class WeightsAndBiases:
    """A run of Weights & Biases, offline in logs/wandb unless WANDB_MODE is set."""

    def __init__(self) -> None:
        self._run: Any = None
        self._classes: tuple[str, ...] = ()

    def start(self, run: RunFacts) -> None:
        """Begin a run; later starts have the same id, so that the parts come together when they are uploaded."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._classes = run.classes
        mode = os.environ.get("WANDB_MODE", "offline")
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=_known_id(run.folder / "wandb.json", lambda: secrets.token_hex(4)),
            # Only a server can go on with a run; offline, parts with one id are put together when they are uploaded.
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(run.folder),
            config=dict(run.facts),
        )

    def log(self, record: EpochRecord) -> None:
        """All numbers of the epoch at once."""
        self._run.log(scalars(record, self._classes), step=record.step)

    def finish(self, status: Status) -> None:
        """Say how it ended."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "finished" else 1)


def _known_id(path: Path, make: Callable[[], str]) -> str:
    """The id of the run of an earlier start, or a new one that later starts will know."""
    if path.is_file():
        return str(read_json(path)["run_id"])
    run_id = make()
    write_json(path, {"run_id": run_id})
    return run_id


_KINDS: dict[str, Callable[[], Logger]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}


def trackers(names: Sequence[str]) -> Loggers:
    """Loggers of these names, which `loggers.PACKAGES` lists."""
    return Loggers({name: _KINDS[name]() for name in names})
