"""From logits, slab by slab, to label values on the file's grid; see `inference.export`."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.plan import ChannelNormalization, PreprocessPlan
from autoseg.inference.export import labels_from_stream
from autoseg.preprocessing.resample import resample_image
from autoseg.preprocessing.transform import Trail, apply, invert

SHAPE = (9, 14, 11)
SPACING_MM = (1.0, 0.7, 1.3)


def prepared(target_mm: tuple[float, float, float]) -> tuple[PreprocessPlan, Trail]:
    """How a volume of `SHAPE` comes to a spacing; nothing is cropped."""
    plan = PreprocessPlan(target_spacing=target_mm, normalization=(ChannelNormalization(scheme="zscore"),))
    array = np.arange(1, 1 + np.prod(SHAPE), dtype=np.int16).reshape(1, *SHAPE)
    return plan, apply(Volume(array, Geometry(SHAPE, np.diag([*SPACING_MM, 1.0]))), plan).trail


def values_of(num_classes: int) -> LabelSchema:
    return LabelSchema(
        classes=tuple(LabelClass(name=f"class {number}", values=(number,)) for number in range(1, num_classes))
    )


def slabs_of(logits: torch.Tensor, axis: int, rows: int):
    """Consecutive slabs, each a view of something larger, as sums are."""
    for start in range(0, logits.shape[axis + 1], rows):
        slab = logits.narrow(axis + 1, start, min(rows, logits.shape[axis + 1] - start))
        yield start, start + slab.shape[axis + 1], slab


@pytest.mark.parametrize("num_classes", [3, 256, 300])
def test_the_first_of_the_largest_logits_wins(num_classes: int) -> None:
    plan, trail = prepared((1.3, 0.7, 1.0))
    assert trail.resampled_shape == trail.crop_shape
    # Whole numbers, few of them: most voxels have several largest ones.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (num_classes, *trail.crop_shape), generator=generator).to(torch.float16)
    logits[-1, 0] = 9

    found = labels_from_stream(slabs_of(logits, 0, 4), 0, trail, plan, values_of(num_classes))

    assert np.array_equal(found, invert(first_largest(logits.numpy()), trail))
    assert found.max() == num_classes - 1


def first_largest(logits: NDArray[np.floating]) -> NDArray[np.uint16]:
    return logits.argmax(axis=0).astype(np.uint16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("target_mm", [(1.3, 0.7, 1.0), (1.7, 1.1, 1.6), (1.0, 0.7, 4.5)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_axis_along_which_logits_come_changes_nothing(
    axis: int, target_mm: tuple[float, float, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoseg.inference.export._CHUNK_VOXELS", 300)
    plan, trail = prepared(target_mm)
    generator = torch.Generator().manual_seed(axis)
    logits = torch.randn((4, *trail.resampled_shape), generator=generator).to(dtype)
    before = logits.clone()

    found = labels_from_stream(slabs_of(logits, axis, 5), axis, trail, plan, values_of(4))

    whole = resample_image(
        logits.to(torch.float32).numpy(),
        trail.crop_shape,
        trail.planned_spacing_mm,
        trail.source_spacing_mm,
        order=plan.logits_order,
    )
    # float32 sums in another order may make other winners where two classes are all but equal.
    assert np.mean(found != invert(first_largest(whole), trail)) < 1e-3
    assert len(np.unique(found)) == 4
    assert torch.equal(logits, before)
