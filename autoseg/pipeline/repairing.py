"""Repair: a corrected copy of a data set."""

from __future__ import annotations

from pathlib import Path

from autoseg.checking.repair import repair_dataset
from autoseg.checking.repairs import Ledger, RepairSettings
from autoseg.pipeline.cases import SILENT
from autoseg.runtime import Progress, num_cpus


def repair(dataset_path: Path, out: Path, settings: RepairSettings, *, progress: Progress = SILENT) -> Ledger:
    """Write a corrected copy of a data set; see `repair_dataset`."""
    return repair_dataset(dataset_path, out, settings, workers=num_cpus(), progress=progress)
