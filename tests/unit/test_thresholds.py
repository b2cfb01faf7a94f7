"""Rules about probabilities: what they mean, the same in numpy and torch, slab by slab, by votes, and in the search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stored_probabilities import CLASSES, REGIONS, SHAPE, logits_of, shares, store
from toy_models import SCHEMA, logits_of_the_crop, toy_model, toy_volume
from toy_runs import oblique_volume, toy_run

from autoseg.domain.dataset import LabelSchema
from autoseg.domain.geometry import Geometry
from autoseg.domain.inference import (
    DropSmall,
    DropUnlikely,
    FillHoles,
    InferenceRecipe,
    Member,
    Rule,
    Threshold,
    thresholds_of,
)
from autoseg.errors import ConfigError
from autoseg.evaluation import thresholds as module
from autoseg.evaluation.components import components_of
from autoseg.evaluation.counts import LabelTable
from autoseg.evaluation.ensemble import Decoder, Part, pair_labels
from autoseg.evaluation.postprocess import apply_rules
from autoseg.evaluation.rules_search import Predicted, RuleSearch
from autoseg.evaluation.thresholds import THRESHOLDS, changes_of, likelihoods_of, outcomes, with_thresholds
from autoseg.inference.deciding import Criteria, Deciding
from autoseg.inference.gather import Gathering, Wanted
from autoseg.inference.predictor import Predictor
from autoseg.inference.segmenter import Segmenter, WeightedStages
from autoseg.inference.settings import PredictionSettings
from autoseg.inference.stages import Stages
from autoseg.io.images import write_labels
from autoseg.pipeline.members import choose
from autoseg.preprocessing.transform import invert

BOTH = pytest.mark.parametrize("schema", [CLASSES, REGIONS], ids=["classes", "regions"])


def test_a_voxel_gets_the_most_probable_class_that_reaches_its_threshold() -> None:
    found = np.array(
        # Background, a, b.
        [
            (0.3, 0.5, 0.2),  # a has less than 0.6, b less than the background
            (0.2, 0.5, 0.3),  # ... b has more
            (0.2, 0.7, 0.1),
            (0.1, 0.6, 0.3),  # exactly the threshold
            (0.6, 0.1, 0.3),
        ],
        np.float32,
    ).T
    assert outcomes(found, (0.6, None), CLASSES).tolist() == [0, 2, 1, 1, 0]
    assert outcomes(found, (0.6, 0.25), CLASSES).tolist() == [0, 2, 1, 1, 2]  # b may be where background has more
    assert outcomes(found, (None, None), CLASSES).tolist() == [1, 1, 1, 1, 0]
    regions = np.array([(0.5, 0.9), (0.51, 0.3), (0.2, 0.29)], np.float32).T
    assert outcomes(regions, (None, 0.3), REGIONS).tolist() == [0b10, 0b11, 0]


@BOTH
@pytest.mark.parametrize("thresholds", [(None, None), (0.3, None), (None, 0.7), (0.4, 0.6)])
def test_numpy_and_torch_say_the_same(schema: LabelSchema, thresholds: tuple[float | None, float | None]) -> None:
    rng = np.random.default_rng(1)
    if schema.has_regions:
        found = rng.integers(0, 11, (2, 5000)).astype(np.float32) / 10
    else:
        # Tenths, so that there are ties between classes and with thresholds.
        found = rng.multinomial(10, [0.4, 0.35, 0.25], 5000).T.astype(np.float32) / 10
    expected = outcomes(found, thresholds, schema)
    of_torch = Criteria(schema, thresholds).of_shares(torch.from_numpy(found))
    np.testing.assert_array_equal(of_torch.numpy(), expected)
    assert len(np.unique(expected)) > 2
    if thresholds == (None, None):
        np.testing.assert_array_equal(Decoder(schema).values_of(expected), Decoder(schema).of_shares(found))


def mixture_of(folder: Path, schema: LabelSchema) -> tuple[list[tuple[Part, float]], np.ndarray]:
    """Two members with temperatures on either side of 1, and the label map of their mean."""
    temperatures = ((0.5, 0.8, 0.4)[: schema.num_outputs], 2.5)
    parts = [
        Part(store(folder / str(seed), logits_of(seed, schema), schema), one)
        for seed, one in zip((1, 2), temperatures, strict=True)
    ]
    return [(parts[0], 0.3), (parts[1], 0.7)], pair_labels(*parts, 0.3, Decoder(schema))


@BOTH
def test_a_label_map_with_thresholds_is_that_of_the_mean_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: LabelSchema
) -> None:
    monkeypatch.setattr(module, "MOST_VALUES", 400)  # several blocks
    mixture, labels = mixture_of(tmp_path, schema)
    thresholds = (0.3, 0.7)
    found = with_thresholds(labels, mixture, thresholds, Decoder(schema))
    mean = np.zeros((schema.num_outputs, *SHAPE))
    for (part, weight), seed in zip(mixture, (1, 2), strict=True):
        logits, one = logits_of(seed, schema), part.temperature
        if isinstance(one, tuple):
            each = np.array(one)
            one = each[:, None, None, None] if schema.has_regions else each[logits.argmax(0)]
        mean += weight * shares(logits / one, schema)
    expected = outcomes(mean.astype(np.float32), thresholds, schema)
    values = schema.decode_regions(expected) if schema.has_regions else schema.decode_table()[expected]
    close = np.zeros(SHAPE, np.bool_)
    for index, value in enumerate(thresholds, start=0 if schema.has_regions else 1):
        close |= np.abs(mean[index] - value) < 0.03
    ordered = np.sort(mean, axis=0)
    close |= np.abs(mean - 0.5).min(0) < 0.03 if schema.has_regions else ordered[-1] - ordered[-2] < 0.03
    assert close.mean() < 0.4
    np.testing.assert_array_equal(found.T[~close], values[~close])
    assert (found != labels).mean() > 0.05
    np.testing.assert_array_equal(with_thresholds(labels, mixture, (None, None), Decoder(schema)), labels)


@BOTH
@pytest.mark.parametrize("kept", [(None, None), (0.4, None), (0.6, 0.2)])
def test_counts_with_changes_are_those_of_the_changed_label_map(
    tmp_path: Path, schema: LabelSchema, kept: tuple[float | None, float | None]
) -> None:
    """Also where the label map is another than the probabilities say, as that of a validation by logits may be."""
    mixture, labels = mixture_of(tmp_path, schema)
    rng = np.random.default_rng(0)
    elsewhere = rng.random(labels.shape) < 0.1
    labels[elsewhere] = rng.choice(schema.label_values, int(elsewhere.sum()))
    decoder, table = Decoder(schema), LabelTable(schema)
    actual = rng.integers(-1, schema.num_values, SHAPE).astype(np.int16)

    def counts(thresholds: tuple[float | None, ...]) -> np.ndarray:
        found = with_thresholds(labels, mixture, thresholds, decoder)
        return table.count(actual, table.encode(np.ascontiguousarray(found.T)))

    changes = changes_of(table.encode(labels.T), actual, mixture, kept, {0: THRESHOLDS, 1: THRESHOLDS}, decoder)
    assert len(changes) == 2 * len(THRESHOLDS)
    for (number, value), change in changes.items():
        tried = tuple(value if index == number else one for index, one in enumerate(kept))
        np.testing.assert_array_equal(change.applied(counts(kept)), counts(tried))
    assert any(len(change.voxels) for change in changes.values())


@pytest.mark.parametrize("dims", [2, 3])
def test_one_member_decides_slab_by_slab(dims: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.inference.export._CHUNK_VOXELS", 600)
    temperature = (1.5, 0.5, 0.8)
    predictor = Predictor([toy_model(dims=dims)], device="cpu", precision="fp32", temperature=temperature)
    prepared = predictor.prepare(toy_volume())
    trail, whole = prepared.trail, logits_of_the_crop(predictor, prepared)
    found = torch.from_numpy(whole / np.array(temperature)[whole.argmax(0)]).softmax(0).numpy()
    # One that changes something: in the middle of what the class has.
    value = round(float(np.median(found[1])), 2)
    rules = (Threshold(classes=("low",), min_probability=value),)
    expected = SCHEMA.decode_table()[outcomes(found.astype(np.float32), (value, None), SCHEMA)]
    criteria = Criteria.of(rules, SCHEMA)
    assert criteria is not None
    labels = predictor.segment(prepared, deciding=Deciding(criteria, prepared.trail.geometry.shape, tmp_path))
    is_clear = invert((np.abs(found[1] - value) > 1e-4).astype(np.uint8), trail).astype(bool)
    np.testing.assert_array_equal(labels[is_clear], invert(expected, trail)[is_clear])
    assert (labels != predictor.segment(prepared)).mean() > 0.02


def test_thresholds_decide_one_member_and_several_and_say_the_same(tmp_path: Path) -> None:
    """Twice the same configuration's probabilities, by votes and by slabs."""
    run = toy_run(tmp_path / "run", {"2d": (0,), "3d_fullres": (0,)})
    volume = oblique_volume()
    rules = (Threshold(classes=("high",), min_probability=0.3), Threshold(classes=("low",), min_probability=0.55))

    def labels(*members: Member, postprocessing: tuple[Threshold, ...] = rules) -> np.ndarray:
        run.write(run.inference_file, InferenceRecipe(members=members, postprocessing=postprocessing))
        segmenter = choose(run.root).load(PredictionSettings(precision="fp32"), "cpu")
        return segmenter.finish(segmenter.segment(segmenter.prepare(volume)), volume.geometry)

    first, other = Member(configuration="3d_fullres", temperature=0.3), Member(configuration="2d", weight=1e-9)
    alone, plain = labels(first), labels(first, postprocessing=())
    together = labels(first, other)
    assert (alone != plain).mean() > 0.02
    # A vote has 16 bit.
    assert (alone == together).mean() > 0.995


def test_the_temperature_of_one_member_counts_where_a_rule_asks_for_probabilities(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", {"3d_fullres": (0,)})

    def digest(temperature: float, *rules: Threshold | DropSmall) -> str:
        member = Member(configuration="3d_fullres", temperature=temperature)
        run.write(run.inference_file, InferenceRecipe(members=(member,), postprocessing=rules))
        return choose(run.root).digest()

    components, threshold = DropSmall(classes=("low",), min_ml=1.0), Threshold(classes=("low",), min_probability=0.6)
    assert digest(1.0, components) == digest(2.0, components)
    assert digest(1.0, threshold) != digest(2.0, threshold)


def test_thresholds_come_first_and_once_for_a_class() -> None:
    member, rule = Member(configuration="2d"), Threshold(classes=("low",), min_probability=0.4)
    components = DropSmall(classes=("low",), min_ml=1.0)
    with pytest.raises(ValueError, match="come before"):
        InferenceRecipe(members=(member,), postprocessing=(components, rule))
    with pytest.raises(ValueError, match="at most one threshold"):
        InferenceRecipe(members=(member,), postprocessing=(rule, rule))
    assert thresholds_of((rule, components), SCHEMA) == (0.4, None)
    assert thresholds_of((components,), SCHEMA) is None
    assert Criteria.of((components,), SCHEMA) is None
    labels = np.full((3, 3, 3), 7, np.uint8)
    np.testing.assert_array_equal(apply_rules(labels, (rule,), SCHEMA, (1.0, 1.0, 1.0)), labels)


@pytest.mark.parametrize(("rim", "expected"), [(0.55, 0.6), (0.45, 0.4)], ids=["too large", "too small"])
def test_the_threshold_that_mends_a_class_is_found(tmp_path: Path, rim: float, expected: float) -> None:
    """The rim of a box has another probability than its inside: the class is drawn too large, or too small."""
    grid, cases = Geometry(SHAPE[::-1], np.eye(4)), []
    for number in range(8):
        inner, outer = (np.zeros(SHAPE, np.bool_) for _ in range(2))
        inner[3:6, 3:5, 3:5] = outer[2 : 7 + number % 2, 2:6, 2:6] = True
        is_true = inner if rim > 0.5 else outer
        of_a = np.where(inner, 0.95, np.where(outer, rim, 0.02))
        probable = np.stack([0.99 - of_a, of_a, np.full(SHAPE, 0.01)])
        stored = store(tmp_path / str(number), np.log(probable), CLASSES)
        paths = [tmp_path / f"{number}_{kind}.nii.gz" for kind in ("predicted", "true")]
        for path, there in zip(paths, (of_a > 0.5, is_true), strict=True):
            write_labels(path, np.where(there, 3, 0).astype(np.uint8).T, grid)
        cases.append(Predicted(f"case_{number}", *paths, None, lambda stored=stored: [(Part(stored), 1.0)]))
    found = RuleSearch(cases, CLASSES, {}).run()
    assert found.rules == (Threshold(classes=("a",), min_probability=expected),)
    (kept,) = (item for item in found.tried if item.is_kept)
    assert kept.dice_before < 0.9
    assert kept.dice_after == 1.0
    # Without probabilities no threshold is tried.
    blind = [Predicted(case.case, case.prediction, case.reference) for case in cases]
    assert RuleSearch(blind, CLASSES, {}).run().rules == ()


# --- Mean probability of components ---------------------------------------------------------------------------------


def test_unlikely_components_go_and_what_was_added_does_not_count() -> None:
    labels = np.zeros((7, 5, 1), np.uint8)
    labels[0:2, 0:2] = labels[4:6, 1:4] = 7
    levels = np.zeros(labels.shape, np.uint8)
    levels[0:2, 0:2] = 153  # 0.6
    levels[4:6, 1:4] = 204  # 0.8
    levels[0, 0] = 151  # ... with a mean just below it

    def found(limit: float, *before: Rule) -> np.ndarray:
        rules = (*before, DropUnlikely(classes=("low",), min_mean=limit))
        return apply_rules(labels, rules, SCHEMA, (1.0, 1.0, 1.0), {"low": levels, "high": levels})

    np.testing.assert_array_equal(found(0.59), labels)
    np.testing.assert_array_equal(np.unique(np.nonzero(found(0.6))[0]), [4, 5])
    np.testing.assert_array_equal(np.unique(np.nonzero(found(0.8))[0]), [4, 5])  # exactly the limit stays
    assert not found(0.81).any()
    # The voxel in the middle has no probability of the class: a hole that was filled.
    labels[4:7, 1:4] = 7
    levels[4:7, 1:4] = 204
    labels[5, 2] = levels[5, 2] = 0
    assert found(0.8, FillHoles(classes=("low",)))[5, 2] == 7
    with pytest.raises(ConfigError, match="needs these"):
        apply_rules(labels, (DropUnlikely(classes=("low",), min_mean=0.5),), SCHEMA, (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="joined"):
        DropUnlikely(classes=("low", "high"), min_mean=0.5, joined=True)


@BOTH
@pytest.mark.parametrize("number", [0, 1])
def test_counts_without_unlikely_components_are_those_of_the_applied_rule(
    tmp_path: Path, schema: LabelSchema, number: int
) -> None:
    mixture, labels = mixture_of(tmp_path, schema)
    decoder, table = Decoder(schema), LabelTable(schema)
    likelihoods = likelihoods_of(labels, mixture, decoder)
    actual = np.random.default_rng(0).integers(-1, schema.num_values, labels.shape).astype(np.int16)
    name = schema.names[number]
    components = components_of((name,), labels, actual, schema, table, likelihoods[name])
    assert components.means is not None
    limit = round(float(np.quantile(components.means, 0.6)), 3)
    rule = DropUnlikely(classes=(name,), min_mean=limit)
    after = apply_rules(labels, (rule,), schema, (1.0, 1.0, 1.0), likelihoods)
    before = table.count(actual, table.encode(np.ascontiguousarray(labels)))
    expected = table.count(actual, table.encode(np.ascontiguousarray(after)))
    np.testing.assert_array_equal(components.without(components.leaving(rule, 1.0), before), expected)
    assert (after != labels).any() == (components.means < limit).any()


@pytest.mark.parametrize("spacing", [(2.0, 1.5, 1.0), (9.0, 1.5, 1.0)])
def test_the_map_says_how_probable_the_labels_are(
    tmp_path: Path, spacing: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the probabilities that are written; by slabs, and by votes."""
    monkeypatch.setattr("autoseg.inference.export._CHUNK_VOXELS", 600)
    rules = (DropUnlikely(classes=("high",), min_mean=0.4),)
    stages = Stages(Predictor([toy_model(spacing=spacing)], device="cpu", precision="fp32"))
    for members in ((WeightedStages(stages),), (WeightedStages(stages), WeightedStages(stages))):
        segmenter = Segmenter(members, rules, tmp_path)
        ready = segmenter.prepare(toy_volume())
        gathering = Gathering(ready.geometry.shape, SCHEMA, Wanted(probabilities=True), tmp_path)
        deciding = segmenter.deciding(ready.geometry)
        labels = segmenter.segment(ready, gathering, deciding)
        assert deciding is not None
        assert deciding.likelihoods is not None
        assert gathering.levels is not None
        written = gathering.levels.array.transpose(0, 3, 2, 1)
        for number, name in enumerate(SCHEMA.names, start=1):
            there = labels == SCHEMA.classes[number - 1].values[0]
            assert there.any()
            if name == "high":
                np.testing.assert_array_equal(deciding.likelihoods[name][there], written[number][there])
        plain = Segmenter(members, (), tmp_path)
        assert plain.deciding(ready.geometry) is None
        assert (plain.segment(ready) == labels).mean() > 0.999
        finished = segmenter.finish(labels, ready.geometry, deciding)
        expected = apply_rules(labels, rules, SCHEMA, ready.geometry.spacing_mm, {"high": written[2]})
        np.testing.assert_array_equal(finished, expected)


def test_every_region_with_a_rule_has_a_map_of_its_own(tmp_path: Path) -> None:
    found = torch.tensor([[0.9, 0.6, 0.2], [0.7, 0.1, 0.55]]).reshape(2, 1, 1, 3)
    criteria = Criteria.of((DropUnlikely(classes=("core", "whole"), min_mean=0.5),), REGIONS)
    assert criteria is not None
    deciding = Deciding(criteria, (3, 1, 1), tmp_path)
    assert deciding.take(slice(0, 1), found).ravel().tolist() == [0b11, 0b01, 0b10]
    assert deciding.likelihoods is not None
    levels = {name: array.ravel().tolist() for name, array in deciding.likelihoods.items()}
    assert levels == {"whole": [230, 153, 51], "core": [178, 26, 140]}
    one = Criteria.of((DropUnlikely(classes=("core",), min_mean=0.5),), REGIONS)
    assert one is not None
    assert one.num_maps == 1
    alone = Deciding(one, (3, 1, 1), tmp_path)
    alone.take(slice(0, 1), found)
    assert alone.likelihoods is not None
    assert {name: array.ravel().tolist() for name, array in alone.likelihoods.items()} == {"core": [178, 26, 140]}


def test_islands_of_low_probability_are_found(tmp_path: Path) -> None:
    """Two lesions belong there, and a larger island that the network believes in less: no size tells them apart."""
    grid, cases = Geometry(SHAPE[::-1], np.eye(4)), []
    for number in range(8):
        is_true, island = (np.zeros(SHAPE, np.bool_) for _ in range(2))
        is_true[0:3, 0 : 3 - number % 2, 0:2] = is_true[6:9, 0:3, 5:7] = True
        island[5:9, 6:8, 0:3] = True
        of_a = np.where(is_true, 0.93, np.where(island, 0.85, 0.02))
        stored = store(tmp_path / str(number), np.log(np.stack([0.99 - of_a, of_a, np.full(SHAPE, 0.01)])), CLASSES)
        paths = [tmp_path / f"{number}_{kind}.nii.gz" for kind in ("predicted", "true")]
        for path, there in zip(paths, (of_a > 0.5, is_true), strict=True):
            write_labels(path, np.where(there, 3, 0).astype(np.uint8).T, grid)
        cases.append(Predicted(f"case_{number}", *paths, None, lambda stored=stored: [(Part(stored), 1.0)]))
    found = RuleSearch(cases, CLASSES, {}).run()
    (rule,) = found.rules
    assert isinstance(rule, DropUnlikely)
    assert 0.85 < rule.min_mean < 0.93
    (kept,) = (item for item in found.tried if item.is_kept)
    assert kept.dice_after == 1.0
