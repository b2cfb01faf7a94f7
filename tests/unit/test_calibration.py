"""Temperatures of networks that are too sure by a known factor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stored_probabilities import CLASSES, REGIONS, SHAPE, logits_of, shares, store

from autoseg.domain.dataset import LabelSchema
from autoseg.evaluation import calibration
from autoseg.evaluation.calibration import Sample, calibrate, calibration_error, draw, join, reliability
from autoseg.io.probabilities import LAST_CODE

FACTOR = 1.8
NUM = 30_000


def overconfident(schema: LabelSchema, factors: tuple[float, ...] = ()) -> Sample:
    """Truth drawn from the softmax of logits that the network then gives multiplied by `FACTOR`.

    Or by factors, one for each output: of classes by that of the winner.
    """
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((schema.num_outputs, NUM))
    fair = shares(logits, schema)
    if schema.has_regions:
        truth = rng.random(fair.shape) < fair
    else:
        drawn = (rng.random(NUM) > fair.cumsum(0)).sum(0)
        truth = np.arange(schema.num_outputs)[:, None] == drawn
    factor: np.ndarray = np.array(factors or [FACTOR] * schema.num_outputs)
    factor = factor[:, None] if schema.has_regions else factor[logits.argmax(0)]
    codes = np.round(np.arcsin(np.sqrt(shares(factor * logits, schema))) * (2 / np.pi * LAST_CODE)).astype(np.uint8)
    return Sample(codes, truth)


@pytest.mark.parametrize("schema", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_the_temperature_of_an_overconfident_network_is_found(schema: LabelSchema) -> None:
    found = calibrate(overconfident(schema), schema, "3d")
    assert found.temperature == pytest.approx(FACTOR, rel=0.04)
    assert found.loss_after < found.loss_before
    assert found.error_before > 0.04
    assert found.error_after < 0.015
    assert [item.name for item in found.classes] == list(schema.names)
    assert all(sum(one.voxels for one in item.bins_after) == NUM for item in found.classes)


@pytest.mark.parametrize(
    ("schema", "factors"), [(CLASSES, (1.2, 2.5, 0.7)), (REGIONS, (2.2, 0.8))], ids=["classes", "regions"]
)
def test_each_class_has_its_own_temperature(schema: LabelSchema, factors: tuple[float, ...]) -> None:
    found = calibrate(overconfident(schema, factors), schema, "3d")
    of_classes = factors if schema.has_regions else factors[1:]
    assert [item.temperature for item in found.classes] == pytest.approx(list(of_classes), rel=0.06)
    assert found.background_temperature == (None if schema.has_regions else pytest.approx(factors[0], rel=0.06))
    # Better than one for all, which is better than none.
    assert found.loss_common is not None
    assert found.error_common is not None
    assert found.loss_after < found.loss_common < found.loss_before
    assert found.error_after < 0.6 * found.error_common
    member = found.member((0, 1), 0.25)
    assert (member.folds, member.weight) == ((0, 1), 0.25)
    expected = [item.temperature for item in found.classes]
    assert member.temperatures(schema) == tuple(expected if schema.has_regions else [member.temperature, *expected])


def test_classes_have_temperatures_of_their_own_only_where_that_calibrates_better() -> None:
    """A few confident errors in one class: the likelihood wants it to be less sure throughout, which misses more."""
    sample = overconfident(CLASSES, (2.0, 2.0, 2.0))
    wrong = (sample.codes[-1] > 200) & (np.random.default_rng(1).random(NUM) < 0.02)
    truth = sample.truth.copy()
    truth[:, wrong] = np.arange(CLASSES.num_outputs)[:, None] == 0
    found = calibrate(Sample(sample.codes, truth), CLASSES, "3d")
    assert found.error_each is not None
    assert found.error_common is not None
    assert found.error_after == found.error_common < found.error_each
    assert found.loss_after == found.loss_common
    assert {item.temperature for item in found.classes} == {found.background_temperature} == {found.temperature}
    assert found.member((0,)).class_temperatures is None


@pytest.mark.parametrize("schema", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_a_class_of_few_voxels_has_the_temperature_of_all(schema: LabelSchema) -> None:
    sample = overconfident(schema)
    codes = sample.codes.copy()
    # The last class is never the most probable; the last region neither likely nor true.
    codes[-1] = 0 if schema.has_regions else np.minimum(codes[-1], codes[:-1].max(0))
    truth = sample.truth & (np.arange(len(codes)) < len(codes) - 1)[:, None] if schema.has_regions else sample.truth
    found = calibrate(Sample(codes, truth), schema, "3d")
    assert found.classes[-1].temperature == found.temperature
    assert found.classes[0].temperature != found.temperature


def test_equal_temperatures_are_written_as_one() -> None:
    found = calibrate(Sample(np.zeros((3, 0), np.uint8), np.zeros((3, 0), np.bool_)), CLASSES, "3d")
    member = found.member((0,))
    assert (member.temperature, member.class_temperatures) == (1.0, None)


def test_the_error_by_hand() -> None:
    bins = reliability(np.array([0.1, 0.12, 0.9, 1.0]), np.array([False, True, True, True]))
    # Two bins in use below, two above: 0.1 is in the second of 15, 0.12 too; 0.9 in the 14th, 1.0 in the last.
    assert [item.voxels for item in bins] == [2, 1, 1]
    assert calibration_error(bins) == pytest.approx((2 * abs(0.11 - 0.5) + 0.1 + 0.0) / 4)
    assert calibration_error(()) == 0.0


def test_nothing_to_fit_gives_temperature_1() -> None:
    found = calibrate(Sample(np.zeros((3, 0), np.uint8), np.zeros((3, 0), np.bool_)), CLASSES, "3d")
    assert (found.temperature, found.num_voxels, found.error_after) == (1.0, 0, 0.0)


@pytest.mark.parametrize("schema", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_a_draw_does_not_depend_on_how_the_image_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: LabelSchema
) -> None:
    stored = store(tmp_path, logits_of(0, schema), schema)
    reference = np.zeros(SHAPE, np.int16)
    reference[2:5], reference[0] = 1, -1
    whole = draw(stored, reference, schema, 4, 50)
    monkeypatch.setattr(calibration, "MOST_VALUES", 200)
    cut = draw(stored, reference, schema, 4, 50)
    np.testing.assert_array_equal(whole.codes, cut.codes)
    np.testing.assert_array_equal(whole.truth, cut.truth)
    assert whole.codes.shape[1] == 50
    assert draw(stored, reference, schema, 5, 50).codes.tolist() != whole.codes.tolist()
    everything = draw(stored, reference, schema, 4, 10_000)
    assert everything.codes.shape[1] <= (SHAPE[0] - 1) * SHAPE[1] * SHAPE[2]
    assert join([whole, everything]).truth.shape[1] == 50 + everything.truth.shape[1]
