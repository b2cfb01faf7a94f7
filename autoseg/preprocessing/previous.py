"""The label map of a cascade's previous stage on its way into the network, the same for training and prediction.

It comes on the file's grid, is brought to the grid of the prepared image as labels are, and becomes one channel a
foreground class (of regions: a label value, as in nnU-Net) when a patch has been cut.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoseg.domain.dataset import Case, LabelSchema
from autoseg.domain.plan import PreprocessPlan
from autoseg.errors import DatasetError
from autoseg.io.cached import Source
from autoseg.io.files import Lock
from autoseg.io.images import read_case, read_labels
from autoseg.io.maps import IndexMap, MapStore
from autoseg.preprocessing.transform import Trail, prepare_labels, trace


def previous_map(values: NDArray[np.integer], trail: Trail, plan: PreprocessPlan, schema: LabelSchema) -> IndexMap:
    """Bring a predicted label map to the grid of the prepared image.

    Args:
        values: (I, J, K) label values on the file's grid.
        trail: Of the image as the cascade sees it.
        plan: The cascade's preprocessing.
        schema: What label values mean.

    Returns:
        (D, H, W) value indices, uint8 where all fit, else int16.

    Raises:
        ValueError: A value is not declared.
    """
    indices = prepare_labels(schema.encode(values), trail, plan)
    return indices.astype(np.uint8) if fits_in_bytes(schema.num_values) else indices


def fits_in_bytes(num_classes: int) -> bool:
    """Whether the map is of bytes; else of int16."""
    return num_classes <= np.iinfo(np.uint8).max + 1


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """The channels that a network sees of the previous stage.

    Args:
        labels: (N, *spatial) class indices, any dtype.
        num_classes: Background included, which has no channel: it is where all others are 0.

    Returns:
        (N, num_classes - 1, *spatial) float32, 0 or 1.
    """
    classes = torch.arange(1, num_classes, dtype=labels.dtype, device=labels.device)
    return (labels[:, None] == classes.reshape(-1, *(1 for _ in labels.shape[1:]))).to(torch.float32)


def prepare_previous(
    case: Case, map_file: Path, plan: PreprocessPlan, schema: LabelSchema, store: MapStore, *, wait: bool = True
) -> bool:
    """Put the label map of a case into the cache, unless it is there and its files and weights are unchanged.

    Of several processes that want the same map one does the work; the others wait for it, or do something else.

    Args:
        case: Its images say how the cascade crops and resamples.
        map_file: What the previous stage predicted, on the file's grid.
        plan: The cascade's preprocessing.
        schema: What label values mean.
        store: Where to put it.
        wait: Whether to wait while another process is at it.

    Returns:
        Whether anything had to be done.

    Raises:
        LockHeld: Another process is at it.
        DatasetError: Names the case: a file is missing or unreadable, grids differ, or a value is undeclared.
    """
    files = (*case.images, str(map_file))
    if store.is_current(case.id, files):
        return False
    cached = store.path(case.id)
    # A name that begins with a dot is none of a case.
    with Lock(cached.with_name(f".lock-{cached.name}"), what=f"the label map of case {case.id}", wait=wait):
        if store.is_current(case.id, files):
            return False
        _fill(case, files, plan, schema, store)
    return True


def _fill(case: Case, files: tuple[str, ...], plan: PreprocessPlan, schema: LabelSchema, store: MapStore) -> None:
    try:
        sources = [Source.of(file) for file in files]
        volume = read_case(case, len(plan.normalization))
        values, _ = read_labels(files[-1], volume.geometry)
        labels = previous_map(values, trace(volume, plan), plan, schema)
    except (OSError, ValueError) as problem:
        raise DatasetError(f"case {case.id}: {problem} (in {files[-1]})") from None
    except DatasetError as problem:
        raise DatasetError(f"case {case.id}: {problem.message}", hint=problem.hint) from None
    store.write(case.id, labels, sources, in_slices=plan.is_in_slices)
