"""Small cases on disk, and a process that puts them into a cache: for the tests of preprocessing at scale."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from autoseg.domain.dataset import Case, LabelClass, LabelSchema
from autoseg.domain.plan import ChannelNormalization, PreprocessPlan
from autoseg.pipeline import cases as mapping
from autoseg.pipeline.cases import map_cases
from autoseg.pipeline.tasks import Done, Preparing

SCHEMA = LabelSchema(classes=(LabelClass(name="ball", values=(1,)),))
PLAN = PreprocessPlan(target_spacing=(1.0, 1.0, 1.0), normalization=(ChannelNormalization(scheme="zscore"),))
A_CASE_BYTES = 50_000_000
AFFINE = np.diag([1.25, 1.25, 1.25, 1.0])


def write_cases(folder: Path, count: int, edge: int = 24) -> tuple[Case, ...]:
    """Balls in noise: case_00 and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(write_case(folder, number, edge) for number in range(count))


def write_case(folder: Path, number: int, edge: int) -> Case:
    rng = np.random.default_rng(number)
    image = rng.normal(100, 10, (edge,) * 3).astype(np.float32)
    grid = np.indices(image.shape) - edge / 2
    labels = ((grid**2).sum(0) < (edge / 4) ** 2).astype(np.uint8)
    image[labels > 0] += 50
    paths = [folder / f"case_{number:02}_{part}.nii.gz" for part in ("image", "labels")]
    for path, values in zip(paths, (image, labels), strict=True):
        nib.save(nib.Nifti1Image(values, AFFINE), path)
    return Case(id=f"case_{number:02}", images=(str(paths[0]),), labels=str(paths[1]))


def fill(cases: Sequence[Case], folder: Path) -> int:
    """Put the cases into a cache; how many were not there."""
    task = Preparing(plan=PLAN, labels=SCHEMA, folder=str(folder))
    needs = {case.id: A_CASE_BYTES for case in cases}
    return sum(done.was_needed for done in map_cases(task, Done, cases, needs, description="filling"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def case_contents(folder: Path) -> dict[str, bytes]:
    """The cases in a cache that may be in use."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors") if not path.name.startswith(".")}


if __name__ == "__main__":
    # Source folder, number of cases, edge, cache, and "processes" or "threads".
    source, number, edge, cache, how = sys.argv[1:]
    if how == "processes":
        mapping._THREADS_FRACTION = 0.0
    found = tuple(
        Case(
            id=f"case_{index:02}",
            images=(os.path.join(source, f"case_{index:02}_image.nii.gz"),),
            labels=os.path.join(source, f"case_{index:02}_labels.nii.gz"),
        )
        for index in range(int(number))
    )
    print(fill(found, Path(cache)))
