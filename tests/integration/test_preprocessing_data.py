"""Preprocessing of real images: against scikit-image, through the cache, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.transform import resize

from autoseg.domain.layouts import load_dataset
from autoseg.domain.plan import ChannelNormalization, PreprocessPlan
from autoseg.io.images import read_case, read_labels
from autoseg.io.store import CaseStore
from autoseg.preprocessing.prepare import prepare_case
from autoseg.preprocessing.transform import apply, invert, to_network_axes

pytestmark = pytest.mark.data


def oracle(channel: NDArray[np.float32], shape: tuple[int, int, int], is_apart: bool) -> NDArray[np.float64]:
    def whole(image: NDArray[np.floating], size: tuple[int, ...], order: int) -> NDArray[np.float64]:
        return np.asarray(
            resize(image.astype(np.float64), size, order=order, mode="edge", anti_aliasing=False, clip=True)
        )

    if not is_apart:
        return whole(channel, shape, 3)
    return whole(np.stack([whole(plane, shape[1:], 3) for plane in channel]), shape, 0)


@pytest.mark.parametrize(
    ("name", "target", "is_apart"),
    [("sarcoma", (2.0, 1.3, 1.3), True), ("hippocampus", (1.3, 0.8, 0.9), False)],
)
def test_real_cases(data_folder: Path, tmp_path: Path, name: str, target: tuple[float, ...], is_apart: bool) -> None:
    dataset = load_dataset(data_folder / name)
    rules = (ChannelNormalization(scheme="zscore"),) * len(dataset.channels)
    plan = PreprocessPlan(target_spacing=target, normalization=rules)
    store = CaseStore(tmp_path)
    for case in dataset.cases[:2]:
        assert prepare_case(case, plan, dataset.labels, store)
        volume = read_case(case, len(dataset.channels))
        assert case.labels is not None
        indices = dataset.labels.encode(read_labels(case.labels, volume.geometry)[0])
        prepared = apply(volume, plan, indices, dataset.labels.num_classes)
        trail = prepared.trail
        stored = store.open(case.id)
        image, labels = stored.read((0, 0, 0), stored.shape)
        assert np.array_equal(image, prepared.image)
        assert np.array_equal(labels, prepared.labels)
        assert set(np.unique(labels)) == set(np.unique(indices))

        as_read = apply(volume, plan.model_copy(update={"target_spacing": trail.source_spacing_mm}))
        assert as_read.trail.resampled_shape == trail.crop_shape
        for channel, result in zip(as_read.image, prepared.image, strict=True):
            expected = oracle(channel, trail.resampled_shape, is_apart)
            assert np.abs(result - expected).max() <= 1e-4 * channel.std()

        crop = to_network_axes(indices, trail)[trail.crop_box]
        outside = invert(np.zeros_like(crop), trail, background=1).astype(bool)
        assert np.array_equal(invert(crop, trail)[~outside], indices[~outside])
