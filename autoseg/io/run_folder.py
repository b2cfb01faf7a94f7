"""The run folder: where everything of one run lies, by fixed names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autoseg.domain.dataset import Dataset, Splits
from autoseg.domain.fingerprint import Fingerprint
from autoseg.domain.inference import InferenceRecipe
from autoseg.domain.plan import Plan
from autoseg.domain.values import Value
from autoseg.errors import ConfigError, PlanError
from autoseg.io.files import read_text, write_text

V = TypeVar("V", bound=Value)

FOLD_ALL = "all"
"""Name of the fold that trains on every case."""

_FOLD_PREFIX = "fold_"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths and values of a run.

    Attributes:
        root: The folder that `--out` named.
    """

    root: Path

    @property
    def dataset_file(self) -> Path:
        """Cases, files, channels, labels, patients, as resolved."""
        return self.root / "dataset.json"

    @property
    def fingerprint_file(self) -> Path:
        """What was measured."""
        return self.root / "fingerprint.json"

    @property
    def plan_file(self) -> Path:
        """Every configuration."""
        return self.root / "plan.json"

    @property
    def splits_file(self) -> Path:
        """The folds."""
        return self.root / "splits.json"

    @property
    def forecast_file(self) -> Path:
        """What was measured on this host."""
        return self.root / "forecast.json"

    @property
    def inference_file(self) -> Path:
        """What `predict` uses; it need not be there."""
        return self.root / "inference.json"

    @property
    def report_folder(self) -> Path:
        """The report; deleting it changes nothing else."""
        return self.root / "report"

    @property
    def crossval_folder(self) -> Path:
        """What cross-validation decided, and the predictions that it compared; `predict` needs nothing of it."""
        return self.root / "crossval"

    @property
    def selection_file(self) -> Path:
        """Candidates, comparisons, and the choice."""
        return self.crossval_folder / "selection.json"

    @property
    def probabilities_folder(self) -> Path:
        """Out-of-fold probabilities by configuration and fold: a cache, which may be deleted."""
        return self.crossval_folder / "probabilities"

    @property
    def models_folder(self) -> Path:
        """Trained folds, by configuration."""
        return self.root / "models"

    @property
    def has_models(self) -> bool:
        """Whether the training of any fold has begun."""
        return any(self.models_folder.glob(f"*/{_FOLD_PREFIX}*"))

    def cache_folder(self, configuration: str, digest: str) -> Path:
        """Preprocessed cases of one configuration and one preprocessing."""
        return self.root / "cache" / f"{configuration}-{digest}"

    def fold_folder(self, configuration: str, fold: int | str) -> Path:
        """One trained fold."""
        return self.models_folder / configuration / fold_name(fold)

    def trained_folds(self, configuration: str) -> tuple[int | str, ...]:
        """Folds of a configuration with final weights, numbers first, in order."""
        return trained_folds_in(self.models_folder / configuration)

    def trained_configurations(self) -> tuple[str, ...]:
        """Configurations with at least one trained fold, by name."""
        if not self.models_folder.is_dir():
            return ()
        names = sorted(item.name for item in self.models_folder.iterdir() if item.is_dir())
        return tuple(name for name in names if self.trained_folds(name))

    def read_dataset(self) -> Dataset:
        """The data set as resolved.

        Raises:
            ConfigError: Missing or not valid.
        """
        return self._read(self.dataset_file, Dataset)

    def read_plan(self) -> Plan:
        """The plan.

        Raises:
            ConfigError: Missing.
            PlanError: Not valid.
        """
        self._require(self.plan_file)
        return Plan.from_json(read_text(self.plan_file), self.plan_file, PlanError)

    def read_fingerprint(self) -> Fingerprint:
        """The measurements.

        Raises:
            ConfigError: Missing or not valid.
        """
        return self._read(self.fingerprint_file, Fingerprint)

    def read_splits(self) -> Splits:
        """The folds.

        Raises:
            ConfigError: Missing or not valid.
        """
        return self._read(self.splits_file, Splits)

    def read_inference(self) -> InferenceRecipe | None:
        """What `predict` uses; None where nothing was chosen.

        Raises:
            ConfigError: Not valid.
        """
        return self._read(self.inference_file, InferenceRecipe) if self.inference_file.is_file() else None

    def write(self, path: Path, value: Value) -> None:
        """Write a value as JSON, whole or not at all."""
        write_text(path, value.to_json())

    def _read(self, path: Path, kind: type[V]) -> V:
        self._require(path)
        return kind.from_json(read_text(path), path)

    def _require(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(
                f"{self.root} is not a planned run: {path.name} is missing",
                hint=f"Make it with: autoseg plan DATASET --out {self.root}",
            )


def fold_name(fold: int | str) -> str:
    """Name of a fold's folder."""
    return f"{_FOLD_PREFIX}{fold}"


def trained_folds_in(folder: Path) -> tuple[int | str, ...]:
    """Folds with final weights in the folder of a configuration, numbers first, in order."""
    if not folder.is_dir():
        return ()
    names = [item.name.removeprefix(_FOLD_PREFIX) for item in folder.glob(f"{_FOLD_PREFIX}*") if is_trained(item)]
    numbers = sorted(int(name) for name in names if name.isdigit())
    return (*numbers, *(name for name in names if name == FOLD_ALL))


def is_trained(fold_folder: Path) -> bool:
    """Whether the folder holds final weights (weights.json is written last)."""
    return (fold_folder / "weights.json").is_file()
