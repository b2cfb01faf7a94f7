"""Means of stored probabilities against the plain mean of all voxels and classes in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stored_probabilities import CLASSES, REGIONS, SHAPE, logits_of, shares, store

from autoseg.domain.dataset import LabelSchema
from autoseg.evaluation import ensemble
from autoseg.evaluation.counts import LabelTable, dice_of, mean_foreground
from autoseg.evaluation.ensemble import Decoder, Part, pair_counts, pair_labels, shares_of
from autoseg.evaluation.metrics import case_metrics
from autoseg.inference.members import probabilities

# Probabilities are stored 0.003 off at most, and two of them are added: only closer calls may fall the other way.
CLOSE = 0.02


def plain_mean(logits: list[np.ndarray], schema: LabelSchema, weight: float, temperatures: tuple[float, float]):
    first, second = (shares(item, schema, one) for item, one in zip(logits, temperatures, strict=True))
    mean = weight * first + (1 - weight) * second
    if schema.has_regions:
        codes = sum((mean[index] > 0.5).astype(np.int64) << index for index in range(len(mean)))
        return schema.decode_regions(codes), np.abs(mean - 0.5).min(0) > CLOSE
    ordered = np.sort(mean, axis=0)
    return schema.decode_table()[mean.argmax(0)], ordered[-1] - ordered[-2] > CLOSE


@pytest.mark.parametrize("schema", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize(("weight", "temperatures"), [(0.5, (1.0, 1.0)), (0.2, (1.7, 0.6)), (0.8, (0.5, 3.0))])
def test_equal_to_the_plain_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: LabelSchema, weight: float, temperatures
) -> None:
    monkeypatch.setattr(ensemble, "MOST_VALUES", 400)  # several blocks
    logits = [logits_of(seed, schema) for seed in (1, 2)]
    parts = [
        Part(store(tmp_path / str(number), item, schema), one)
        for number, (item, one) in enumerate(zip(logits, temperatures, strict=True))
    ]
    labels = pair_labels(*parts, weight, Decoder(schema))
    expected, is_clear = plain_mean(logits, schema, weight, temperatures)
    assert labels.shape == SHAPE[::-1]
    np.testing.assert_array_equal(labels.T[is_clear], expected[is_clear])
    assert is_clear.mean() > 0.8
    assert (plain_mean(logits, schema, 1.0, temperatures)[0] != labels.T).any()


@pytest.mark.parametrize("schema", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_counts_of_several_weights_are_those_of_their_label_maps(tmp_path: Path, schema: LabelSchema) -> None:
    decoder, table = Decoder(schema), LabelTable(schema)
    parts = [Part(store(tmp_path / str(seed), logits_of(seed, schema), schema)) for seed in (3, 4)]
    reference = pair_labels(*[Part(store(tmp_path / "r", logits_of(5, schema), schema))] * 2, 0.5, decoder)
    actual = table.encode_reference(np.ascontiguousarray(reference.T))
    tolerance = dict.fromkeys(schema.names, 1.0)
    for weight, counts in zip((0.3, 0.5), pair_counts(*parts, (0.3, 0.5), actual, decoder), strict=True):
        labels = pair_labels(*parts, weight, decoder)
        np.testing.assert_array_equal(counts, table.count(actual, table.encode(np.ascontiguousarray(labels.T))))
        rows = case_metrics(labels, reference, schema, (1.0, 1.0, 1.0), tolerance)
        assert dice_of(counts, schema).tolist() == pytest.approx([row.dice for row in rows])


def test_voxels_to_ignore_and_classes_that_are_not_annotated_count_nowhere() -> None:
    schema = CLASSES.model_copy(update={"ignore": 9})
    table = LabelTable(schema)
    reference = np.array([3, 3, 9, 9, 7, 0])
    prediction = np.array([3, 0, 3, 7, 7, 7])
    counts = table.count(table.encode_reference(reference), table.encode(prediction))
    assert counts.sum() == 4
    assert dice_of(counts, schema).tolist() == pytest.approx([2 / 3, 2 / 3])
    assert np.isnan(dice_of(counts, schema, ("b",))[0])
    assert mean_foreground(np.array([[1.0, np.nan], [0.5, 0.25]])) == pytest.approx((0.75 + 0.25) / 2)
    assert mean_foreground(np.full((2, 2), np.nan)) is None


@pytest.mark.parametrize("schema", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_temperatures_of_classes_are_those_of_the_networks_and_change_no_label(
    tmp_path: Path, schema: LabelSchema
) -> None:
    """The same in numpy, from codes, as in torch, from logits; and by hand."""
    logits = logits_of(0, schema)
    temperatures = (0.6, 1.5, 2.5)[: schema.num_outputs]
    codes = store(tmp_path, logits, schema).slices(0, SHAPE[0])
    found = shares_of(codes, temperatures, is_regions=schema.has_regions)
    of_torch = probabilities(torch.from_numpy(logits), is_regions=schema.has_regions, temperature=temperatures)
    np.testing.assert_allclose(found, of_torch.numpy(), atol=0.03)
    place = (3, 4, 5)
    here = logits[(slice(None), *place)]
    divisor = np.array(temperatures) if schema.has_regions else temperatures[int(here.argmax())]
    np.testing.assert_allclose(of_torch[(slice(None), *place)], shares((here / divisor), schema), atol=1e-6)
    decoder = Decoder(schema)
    np.testing.assert_array_equal(decoder.of_shares(found), decoder.of_shares(shares_of(codes, 1.0, is_regions=False)))
    swapped = probabilities(
        torch.from_numpy(logits.swapaxes(0, 2)), is_regions=schema.has_regions, temperature=temperatures, dim=2
    )
    np.testing.assert_allclose(swapped.swapaxes(0, 2), of_torch, atol=1e-12)


def test_temperature_1_changes_nothing_and_others_keep_the_winner(tmp_path: Path) -> None:
    codes = store(tmp_path, logits_of(0, CLASSES), CLASSES).slices(0, SHAPE[0])
    plain = shares_of(codes, 1.0, is_regions=False)
    warm = shares_of(codes, 2.0, is_regions=False)
    np.testing.assert_array_equal(plain.argmax(0), warm.argmax(0))
    assert warm.max(0).mean() < plain.max(0).mean()
    np.testing.assert_allclose(warm, shares(logits_of(0, CLASSES), CLASSES, 2.0), atol=0.02)
