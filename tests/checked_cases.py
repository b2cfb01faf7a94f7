"""Sets and cases to be checked: small files, and facts of cases that were never read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from autoseg.checking.facts import QUANTILES, CaseFacts, ChannelFacts, LabelFacts, Structure
from autoseg.domain.dataset import Case, Channel, Dataset, LabelClass, LabelSchema
from autoseg.domain.findings import Finding
from autoseg.domain.geometry import Geometry
from autoseg.io.images import write_image

LEVELS = np.array(QUANTILES)

SHAPE = (20, 18, 10)
GRID = Geometry(SHAPE, np.diag([1.0, 1, 2, 1]))


def image_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, SHAPE)


def labels_of(place: int = 0) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2 + place : 8 + place, 3:9, 2:7] = 1
    return labels


def set_of(folder: Path, num_cases: int = 6) -> Path:
    for number in range(num_cases):
        write_image(folder / f"imagesTr/c{number}_0000.nii.gz", image_of(number), GRID)
        write_image(folder / f"labelsTr/c{number}.nii.gz", labels_of(number), GRID)
    description = {"name": "toy", "channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def channel_of(
    case: int,
    number: int = 0,
    low: float = 0.0,
    high: float = 1000.0,
    *,
    power: float = 1.0,
    dtype: str = "int16",
    digest: bytes | None = None,
    detail: np.ndarray | None = None,
    file: str = "",
) -> ChannelFacts:
    """A channel whose values run from low to high; the power bends them to the dark side."""
    pattern = np.random.default_rng([case, number]).integers(-127, 128, 24**3).astype(np.int8)
    return ChannelFacts(
        number=number,
        file=file or f"/data/c{case}_{number:04d}.nii.gz",
        dtype=dtype,
        digest=bytes([case, number]) if digest is None else digest,
        detail=pattern if detail is None else detail,
        quantiles=low + (high - low) * LEVELS**power,
        foreground=None,
        lowest_fraction=0.0,
    )


def structure_of(
    voxels: int = 1000, pieces: int = 1, stray: int = 0, centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> Structure:
    return Structure(voxels, pieces, stray, centre_mm)


def case_of(
    case: int,
    *channels: ChannelFacts,
    structures: Mapping[str, Structure] | None = None,
    shape: tuple[int, int, int] = (100, 100, 50),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 2.0),
    digest: bytes | None = None,
    is_test: bool = False,
    is_2d: bool = False,
) -> CaseFacts:
    found = {"a": structure_of()} if structures is None else structures
    voxels = sum(item.voxels for item in found.values())
    return CaseFacts(
        case=f"c{case}",
        num_files=2,
        is_test=is_test,
        geometry=Geometry(shape, np.diag([*spacing_mm, 1.0]), is_2d),
        channels=channels or (channel_of(case),),
        labels=LabelFacts(digest or bytes([200, case]), {0: 1, 1: voxels}, voxels, found),
    )


def dataset_of(num_cases: int, classes: Sequence[str] = ("a",), channels: Sequence[str] = ("MR",)) -> Dataset:
    return Dataset(
        name="toy",
        channels=tuple(Channel(name=name) for name in channels),
        labels=LabelSchema(
            classes=tuple(LabelClass(name=name, values=(value,)) for value, name in enumerate(classes, start=1))
        ),
        cases=tuple(
            Case(id=f"c{number}", images=(f"/data/c{number}_0000.nii.gz",), labels=f"/data/c{number}.nii.gz")
            for number in range(num_cases)
        ),
    )


def told(findings: Sequence[Finding]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Severity, kind and cases of findings."""
    return [(item.severity, item.code, item.all_cases) for item in findings]
