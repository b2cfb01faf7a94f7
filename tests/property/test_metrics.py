"""Laws of the metrics, and equality with two other implementations."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.evaluation.metrics import ClassMetrics, case_metrics
from autoseg.evaluation.surfaces import compare, surfaces

ONE = LabelSchema(classes=(LabelClass(name="it", values=(1,)),))
NUM_ORACLE_PAIRS = 200


def blobs(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A random smooth mask, never empty: some touch the border of the image."""
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    mask = np.zeros(shape, np.bool_)
    for _ in range(int(rng.integers(1, 4))):
        centre = rng.uniform(0, np.array(shape) - 1)
        radius = rng.uniform(1.0, max(shape) / 3)
        mask |= ((grid - np.round(centre)) ** 2).sum(-1) <= radius**2
    return mask


def random_pair(seed: int, dims: int = 3) -> tuple[NDArray[np.bool_], NDArray[np.bool_], tuple[float, ...]]:
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(4, 14, size=dims))
    spacing = tuple(float(value) for value in np.round(rng.uniform(0.3, 6.0, size=dims), 3))
    return blobs(rng, shape), blobs(rng, shape), spacing


def metrics_of(prediction, reference, spacing=(1.0, 1.0, 1.0), tolerance=1.0) -> ClassMetrics:
    as_values = [np.asarray(item).astype(np.uint8) for item in (prediction, reference)]
    return case_metrics(as_values[0], as_values[1], ONE, spacing, {"it": tolerance})[0]


@pytest.mark.parametrize("dims", [2, 3])
def test_surfaces_equal_the_surface_distance_package(dims: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses scipy.ndimage.filters, which scipy deprecates
        oracle = pytest.importorskip("surface_distance.metrics")
        for seed in range(NUM_ORACLE_PAIRS):
            first, second, spacing = random_pair(seed, dims)
            tolerance = float(np.random.default_rng(seed).uniform(0, 4))
            theirs = oracle.compute_surface_distances(second, first, spacing)
            ours = compare(*surfaces(first, second, spacing), tolerance)
            assert ours.hd95_mm == pytest.approx(oracle.compute_robust_hausdorff(theirs, 95), abs=1e-4)
            nsd = oracle.compute_surface_dice_at_tolerance(theirs, tolerance)
            assert ours.surface_dice == pytest.approx(nsd, abs=1e-5)
            pooled = [
                float((theirs[f"distances_{way}"] * theirs[f"surfel_areas_{side}"]).sum())
                for way, side in (("gt_to_pred", "gt"), ("pred_to_gt", "pred"))
            ]
            area = theirs["surfel_areas_gt"].sum() + theirs["surfel_areas_pred"].sum()
            assert ours.average_mm == pytest.approx(sum(pooled) / area, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI calls its own deprecated option
def test_surface_dice_and_dice_equal_monai() -> None:
    from monai.metrics import compute_dice, compute_iou, compute_surface_dice

    for seed in range(1000, 1000 + NUM_ORACLE_PAIRS // 4):
        first, second, spacing = random_pair(seed)
        ours = metrics_of(first, second, spacing, 2.0)
        tensors = [torch.from_numpy(mask)[None, None].float() for mask in (first, second)]
        assert ours.dice == pytest.approx(float(compute_dice(*tensors)), abs=1e-6)
        assert ours.iou == pytest.approx(float(compute_iou(*tensors)), abs=1e-6)
        nsd = compute_surface_dice(*tensors, [2.0], include_background=True, spacing=spacing, use_subvoxels=True)
        assert ours.surface_dice == pytest.approx(float(nsd), abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")
def test_distances_agree_with_monais_voxel_edges_within_a_voxel_diagonal() -> None:
    """MONAI's HD95 is between border voxels and does not weigh by area: close, not equal."""
    from monai.metrics import compute_hausdorff_distance

    differences = []
    for seed in range(2000, 2020):
        first, second, spacing = random_pair(seed)
        tensors = [torch.from_numpy(mask)[None, None].float() for mask in (first, second)]
        theirs = float(compute_hausdorff_distance(*tensors, True, percentile=95, spacing=spacing))
        ours = metrics_of(first, second, spacing).hd95_mm
        assert ours is not None
        differences.append(abs(ours - theirs) / float(np.linalg.norm(spacing)))
    assert max(differences) <= 1.0


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25)
def test_symmetric(seed: int) -> None:
    first, second, spacing = random_pair(seed)
    forward, back = metrics_of(first, second, spacing), metrics_of(second, first, spacing)
    for name in ("dice", "iou", "surface_dice", "hd95_mm", "average_distance_mm"):
        assert getattr(forward, name) == pytest.approx(getattr(back, name), rel=1e-9)
    assert forward.reference_vox == back.prediction_vox


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15)
def test_equal_maps_are_perfect(seed: int) -> None:
    first, _, spacing = random_pair(seed)
    row = metrics_of(first, first, spacing, 0.0)
    assert (row.dice, row.iou, row.surface_dice, row.hd95_mm, row.average_distance_mm) == (1, 1, 1, 0, 0)


@given(seed=st.integers(0, 10_000), factor=st.sampled_from([0.25, 2.0, 8.0]))
@settings(max_examples=15)
def test_distances_scale_with_spacing_and_overlaps_do_not(seed: int, factor: float) -> None:
    first, second, spacing = random_pair(seed)
    scaled = tuple(value * factor for value in spacing)
    before, after = metrics_of(first, second, spacing, 1.5), metrics_of(first, second, scaled, 1.5 * factor)
    assert after.dice == before.dice
    assert after.surface_dice == pytest.approx(before.surface_dice, abs=1e-6)
    assert after.hd95_mm == pytest.approx(factor * before.hd95_mm, rel=1e-6)
    assert after.average_distance_mm == pytest.approx(factor * before.average_distance_mm, rel=1e-6)
    assert after.reference_mm3 == pytest.approx(before.reference_mm3 * factor**3)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=15)
def test_a_larger_tolerance_never_lowers_the_surface_dice(seed: int) -> None:
    first, second, spacing = random_pair(seed)
    values = [metrics_of(first, second, spacing, tolerance).surface_dice for tolerance in (0.0, 0.5, 2.0, 8.0, 1000.0)]
    assert values == sorted(values)
    assert values[-1] == 1.0


@given(seed=st.integers(0, 10_000), axis=st.integers(0, 2))
@settings(max_examples=15)
def test_flips_and_empty_margins_change_nothing(seed: int, axis: int) -> None:
    first, second, spacing = random_pair(seed)
    plain = metrics_of(first, second, spacing)
    moved = [np.pad(np.flip(mask, axis), ((1, 2), (0, 3), (2, 0))) for mask in (first, second)]
    other = metrics_of(*moved, spacing)
    for name in ("dice", "surface_dice", "hd95_mm", "average_distance_mm"):
        assert getattr(other, name) == pytest.approx(getattr(plain, name), abs=1e-6)


def test_surfaces_in_slabs_equal_surfaces_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from autoseg.evaluation import surfaces as module

    first, second, spacing = random_pair(7)
    whole = surfaces(first, second, spacing)
    monkeypatch.setattr(module, "_SLAB_VOXELS", 1)
    pieces = surfaces(first, second, spacing)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(one.points_mm, other.points_mm)
        np.testing.assert_array_equal(one.areas, other.areas)
