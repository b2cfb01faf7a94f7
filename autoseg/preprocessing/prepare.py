"""One case from its files into the cache."""

from __future__ import annotations

from zlib import crc32

import torch

from autoseg import runtime
from autoseg.domain.dataset import Case, LabelSchema
from autoseg.domain.plan import PreprocessPlan
from autoseg.domain.values import digest_of
from autoseg.errors import DatasetError
from autoseg.io.cached import Source
from autoseg.io.files import Lock
from autoseg.io.images import read_case, read_labels
from autoseg.io.store import STORE_VERSION, CaseStore, foreground_locations
from autoseg.preprocessing.transform import PREPROCESSING_VERSION, apply

_LOCATIONS_SEED = 0
"""The cache belongs to every run that shares it, so it does not depend on a run's seed."""


def cache_digest(plan: PreprocessPlan, schema: LabelSchema) -> str:
    """Name of everything that decides what a cached case holds, besides its source files."""
    return digest_of(
        {
            "preprocess": plan.model_dump(mode="json"),
            # Which labels are pairs of sides does not change what they are.
            "labels": schema.model_dump(mode="json", exclude={"pairs"}),
            "preprocessing_version": PREPROCESSING_VERSION,
            "store_version": STORE_VERSION,
        }
    )


def prepare_case(
    case: Case, plan: PreprocessPlan, schema: LabelSchema, store: CaseStore, device: str | torch.device = "cpu"
) -> bool:
    """Put a labelled case into the cache, unless it is there and its files are unchanged.

    The same files and plan give the same bytes, in whatever process and order. Of several processes that want the same
    case one does the work and the others wait for it.

    Args:
        case: With labels.
        plan: What to do.
        schema: What label values mean.
        store: Where to put it.
        device: Where the resampling is computed.

    Returns:
        Whether anything had to be done.

    Raises:
        DatasetError: Names the case: a file is missing or unreadable, grids differ, a label value is undeclared, a
            value is not finite.
    """
    if case.labels is None:
        raise DatasetError(f"case {case.id}: there is no label file to train on")
    if store.is_current(case.id, case.files, case.missing):
        return False
    cached = store.path(case.id)
    # A name that begins with a dot is none of a case.
    with Lock(cached.with_name(f".lock-{cached.name}"), what=f"case {case.id}", wait=True):
        if store.is_current(case.id, case.files, case.missing):
            return False
        _fill(case, case.labels, plan, schema, store, device)
    return True


def _fill(
    case: Case,
    labels_file: str,
    plan: PreprocessPlan,
    schema: LabelSchema,
    store: CaseStore,
    device: str | torch.device,
) -> None:
    try:
        sources = [Source.of(file) for file in case.files]
    except OSError as problem:
        raise DatasetError(f"case {case.id}: {problem}") from None
    volume = read_case(case, len(plan.normalization))
    values, _ = read_labels(labels_file, volume.geometry)
    try:
        indices = schema.encode(values)
        prepared = apply(volume, plan, indices, schema.num_values, device)
    except ValueError as problem:
        raise DatasetError(f"case {case.id}: {problem} (in {labels_file})") from None
    except DatasetError as problem:
        raise DatasetError(f"case {case.id}: {problem.message}", hint=problem.hint) from None
    assert prepared.labels is not None
    regions = schema.region_table() if schema.has_regions else None
    draws = runtime.rng(_LOCATIONS_SEED, runtime.STAGE_SAMPLE, crc32(case.id.encode()))
    store.write(
        case.id,
        prepared.image,
        prepared.labels,
        foreground_locations(prepared.labels, schema.num_values, draws, regions),
        spacing_mm=prepared.trail.target_spacing,
        sources=sources,
        missing=case.missing,
    )
