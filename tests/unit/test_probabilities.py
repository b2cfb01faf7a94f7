"""Probabilities in 8 bit: how far off they are, where they lie, and when they count as stale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_models import SCHEMA, toy_model, toy_volume

from autoseg.domain.dataset import Case
from autoseg.errors import DatasetError
from autoseg.inference.keeping import Keeper, to_codes
from autoseg.inference.predictor import Predictor
from autoseg.io.probabilities import LAST_CODE, VALUE_OF_CODE, ProbabilityStore, ranges


def test_codes_are_close_and_closest_near_0_and_1() -> None:
    shares = np.linspace(0, 1, 20_001)
    codes = to_codes(torch.logit(torch.from_numpy(shares))[None].float(), is_regions=True)[0].numpy()
    errors = np.abs(VALUE_OF_CODE[codes] - shares)
    assert errors.max() < 0.0031
    assert errors[(shares < 0.001) | (shares > 0.999)].max() < 0.0003
    assert (codes[0], codes[-1]) == (0, LAST_CODE)
    assert (np.diff(codes.astype(int)) >= 0).all()


@pytest.mark.parametrize("spacing", [(1.3, 1.0, 3.0), (2.0, 1.5, 1.0)])
def test_the_largest_probability_is_the_predicted_label(tmp_path: Path, spacing: tuple[float, ...]) -> None:
    """On the file's grid, crop and flipped axes included; equal codes are no contradiction."""
    predictor = Predictor([toy_model()], device="cpu", precision="fp32")
    prepared = predictor.prepare(toy_volume(spacing=spacing))
    labels = predictor.segment(prepared)
    keeper = Keeper(prepared.trail, predictor.settings.preprocess, predictor.labels, tmp_path)
    predictor.each_column(prepared, keeper.add)
    codes = keeper.codes.transpose(0, 3, 2, 1)
    assert codes.shape == (3, *labels.shape)
    place = np.argmax(np.stack([labels == value for value in SCHEMA.label_values]), axis=0)
    chosen = np.take_along_axis(codes, place[None], axis=0)[0]
    assert (chosen == codes.max(axis=0)).all()
    assert len(np.unique(labels)) > 1
    total = VALUE_OF_CODE[codes].sum(axis=0)
    assert np.abs(total - 1).max() < 0.01


def test_what_is_stored_comes_back_and_goes_stale(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"some image")
    case = Case(id="one", images=(str(image),))
    codes = np.random.default_rng(0).integers(0, 256, (3, 40, 33, 5), dtype=np.uint8)
    store = ProbabilityStore(tmp_path / "kept", "a" * 64)
    assert not store.is_current(case)
    store.write(case, codes)
    assert store.is_current(case)
    stored = store.open("one")
    parts = [stored.slices(start, stop) for start, stop in ranges(stored.shape, 3 * 33 * 5 * 7)]
    assert len(parts) == 6
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), codes)
    assert not ProbabilityStore(tmp_path / "kept", "b" * 64).is_current(case)
    assert not ProbabilityStore(tmp_path / "kept", "a" * 64, "interleaved").is_current(case)
    image.write_bytes(b"other image")
    assert not store.is_current(case)
    with pytest.raises(DatasetError, match="out-of-fold"):
        store.open("two")
