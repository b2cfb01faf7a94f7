"""Regions: which value a voxel is written with, and that nothing of them is lost on the way."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import fingerprint_of, plan_of
from pydantic import ValidationError
from toy_training import toy_plan

from autoseg.domain import regions
from autoseg.domain.dataset import IGNORE_INDEX, LabelClass, LabelSchema
from autoseg.domain.descriptions import parse_labels
from autoseg.domain.manifests import read_json_manifest
from autoseg.domain.partial import parse_annotated
from autoseg.evaluation.metrics import case_metrics
from autoseg.io.store import foreground_locations
from autoseg.planning.overrides import apply_overrides
from autoseg.training.losses import region_targets

BRATS = {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
CROSSING = {"organ": (1, 3), "vessel": (2, 3)}


def schema_of(names: dict[str, tuple[int, ...]], **more: object) -> LabelSchema:
    classes = tuple(LabelClass(name=name, values=values) for name, values in names.items())
    return LabelSchema(classes=classes, **more)  # type: ignore[arg-type]


def code(*inside: int) -> int:
    return sum(1 << number for number in inside)


def test_nested_regions_are_written_with_the_value_of_the_innermost() -> None:
    """As nnU-Net does with the order 1, 2, 3; a core without the whole is still a core."""
    for order in (None, (1, 2, 3)):
        schema = schema_of(BRATS, regions_class_order=order)
        codes = np.array([[0, code(0), code(0, 1)], [code(0, 1, 2), code(1), code(0, 2)]])
        np.testing.assert_array_equal(schema.decode_regions(codes), [[0, 1, 2], [3, 2, 3]])
        assert schema.decode_regions(codes).dtype == np.uint8


def test_the_order_in_the_file_does_not_matter_without_one_that_is_given() -> None:
    for names in itertools.permutations(BRATS):
        schema = schema_of({name: BRATS[name] for name in names})
        places = {name: number for number, name in enumerate(names)}
        codes = np.array([code(places["whole"], places["core"]), code(*range(3)), code(places["whole"])])
        assert schema.decode_regions(codes).tolist() == [2, 3, 1]


def test_a_given_order_paints_later_regions_over_earlier_ones() -> None:
    schema = schema_of({"inner": (3,), "outer": (2, 3)}, regions_class_order=(3, 2))
    assert schema.decode_regions(np.array([code(0), code(1), code(0, 1)])).tolist() == [3, 2, 2]


def test_crossing_regions_have_the_value_of_their_overlap() -> None:
    codes = np.array([0, code(0), code(1), code(0, 1)])
    assert schema_of(CROSSING).decode_regions(codes).tolist() == [0, 1, 2, 3]
    # nnU-Net's order knows one value a region: the overlap goes to the later one.
    painted = schema_of(CROSSING, regions_class_order=(1, 2))
    assert painted.decode_regions(codes).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("names", "more", "words"),
    [
        ({"all": (1, 2), "left": (1,), "right": (2,)}, {}, r"'all' has no label value of its own.*\[1, 2\]"),
        (BRATS, {"regions_class_order": (1, 2)}, "3 of them, got 2"),
        (BRATS, {"regions_class_order": (1, 1, 3)}, r"'core' with 1, which is none of its values \[2, 3\]"),
        ({"a": (1,), "b": (2,)}, {"regions_class_order": (1, 2)}, "no class joins several"),
        ({str(n): (n, 99) for n in range(1, 64)}, {}, "at most 62"),
        (BRATS, {"ignore": 2}, "ignore value 2 is also"),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_reason(names, more, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        schema_of(names, **more)


def test_an_order_settles_what_has_no_value_of_its_own() -> None:
    schema = schema_of({"all": (1, 2), "left": (1,), "right": (2,)}, regions_class_order=(1, 1, 2))
    assert schema.decode_regions(np.array([code(0), code(0, 1), code(0, 2)])).tolist() == [1, 1, 2]


REGIONS = st.lists(st.frozensets(st.integers(1, 12), min_size=1, max_size=6), min_size=2, max_size=20)


@settings(max_examples=60)
@given(REGIONS, st.integers(0, 2**31))
def test_freely_overlapping_regions_survive_encoding_targets_and_decoding(sets, seed: int) -> None:
    """Whatever a label map says of the regions is what the map written of perfect predictions says."""
    names = {f"r{number}": tuple(sorted(values)) for number, values in enumerate(sets)}
    if all(len(values) == 1 for values in names.values()) or regions.regions_problems(
        list(names.values()), list(names), None
    ):
        return
    schema = schema_of(names, ignore=200)
    labels = np.random.default_rng(seed).choice([*schema.label_values, 200], size=(3, 4, 5))
    indices = schema.encode(labels)
    valid, inside = region_targets(torch.from_numpy(indices)[None], torch.from_numpy(schema.region_table()))
    np.testing.assert_array_equal(valid[0, 0].numpy(), labels != 200)
    for number, values in enumerate(names.values()):
        np.testing.assert_array_equal(inside[0, number].numpy(), np.isin(labels, values))
    codes = sum(inside[0, number].numpy().astype(np.int64) << number for number in range(len(names)))
    written = schema.decode_regions(codes)
    for values in names.values():
        np.testing.assert_array_equal(np.isin(written, values), np.isin(labels, values))


def test_many_regions_are_decoded_as_few_are() -> None:
    names = {f"r{number}": (number, 100) for number in range(1, 41)}
    schema = schema_of(names)
    codes = np.array([0, code(39), code(0), code(*range(40)), code(2, 3)])
    assert schema.decode_regions(codes).tolist() == [0, 40, 1, 100, 4]


def test_indices_count_values_and_outputs_count_regions() -> None:
    schema = schema_of(CROSSING, ignore=9)
    assert (schema.num_outputs, schema.num_classes, schema.num_values) == (2, 3, 4)
    assert schema.label_values == (0, 1, 2, 3)
    assert schema.region_table().tolist() == [[False, True, False, True], [False, False, True, True]]
    assert schema.encode(np.array([0, 3, 9])).tolist() == [0, 3, IGNORE_INDEX]
    plain = schema_of({"a": (5,), "b": (2,)})
    assert (plain.num_outputs, plain.num_values, plain.label_values) == (3, 3, (0, 5, 2))
    assert plain.region_table().tolist() == [[False, True, False], [False, False, True]]


def test_labels_without_an_order_have_the_digest_that_they_always_had() -> None:
    assert set(schema_of(BRATS).model_dump(mode="json")) == {"classes", "ignore"}
    ordered = schema_of(BRATS, regions_class_order=(1, 2, 3))
    assert LabelSchema.from_json(ordered.to_json(), "here") == ordered


def test_each_region_has_its_own_places_to_sample() -> None:
    labels = np.zeros((4, 4, 4), np.int16)
    labels[0], labels[1], labels[2, 0, 0] = 1, 3, 2
    found = foreground_locations(labels, 4, np.random.default_rng(0), schema_of(CROSSING).region_table())
    assert set(found) == {1, 2}
    for index, values in ((1, (1, 3)), (2, (2, 3))):
        np.testing.assert_array_equal(found[index], np.argwhere(np.isin(labels, values)))


def test_crossing_regions_are_scored_as_regions() -> None:
    reference = np.zeros((6, 6, 6), np.uint8)
    reference[:3], reference[3:5] = 1, 3
    prediction = np.where(reference == 3, 2, reference)
    organ, vessel = case_metrics(
        prediction, reference, schema_of(CROSSING), (1.0, 1.0, 1.0), {"organ": 1.0, "vessel": 1.0}
    )
    assert (organ.overlap_vox, organ.reference_vox, organ.prediction_vox) == (108, 180, 108)
    assert vessel.dice == 1.0


def test_a_plan_of_regions_has_an_output_a_region() -> None:
    data = toy_plan().model_dump()
    data["labels"] = schema_of(BRATS).model_dump()
    with pytest.raises(ValidationError, match="output of classes, the labels are regions"):
        type(toy_plan()).model_validate(data)
    data["configurations"]["3d_fullres"]["network"] |= {"output": "regions", "num_classes": 4}
    with pytest.raises(ValidationError, match="4 outputs, the labels need 3"):
        type(toy_plan()).model_validate(data)
    data["configurations"]["3d_fullres"]["network"]["num_classes"] = 3
    plan = type(toy_plan()).model_validate(data)
    assert apply_overrides(plan, (("3d_fullres.training.batch_size", 5),)).labels == plan.labels


def test_a_planned_cascade_takes_a_channel_a_label_value() -> None:
    """Memory is counted with nnU-Net's number of outputs (one a label); the network has one a region."""
    measured = fingerprint_of([(1.0, 1.0, 1.0)] * 10, [(400, 512, 512)] * 10, num_foreground=3)
    plain = LabelSchema(classes=tuple(LabelClass(name=str(value), values=(value,)) for value in (1, 2, 3)))
    of_regions, of_classes = plan_of(measured, labels=schema_of(BRATS)), plan_of(measured, labels=plain)
    for name, part in of_regions.configurations.items():
        other = of_classes.configurations[name].network
        assert (part.network.num_classes, other.num_classes) == (3, 4)
        assert part.network.patch_size == other.patch_size
        assert part.network.in_channels == other.in_channels
    crossing = fingerprint_of([(1.0, 1.0, 1.0)] * 10, [(400, 512, 512)] * 10, num_foreground=2)
    cascade = plan_of(crossing, labels=schema_of(CROSSING)).configurations["3d_cascade"]
    assert (cascade.num_previous_channels, cascade.network.in_channels, cascade.network.num_classes) == (3, 4, 2)


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "labels.md"


def test_the_labels_in_the_documentation_are_understood() -> None:
    blocks = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)]
    schemas = [parse_labels(block) for block in blocks if isinstance(block.get("labels"), dict)]
    assert [item.has_regions for item in schemas] == [True, False, False]
    assert [item.ignore for item in schemas] == [None, 2, None]
    manifests = [block for block in blocks if isinstance(block.get("labels"), list)]
    found = [
        read_json_manifest(DOCUMENT, {"channels": ["CT"], "cases": [{"id": "a", "image": "a.nii"}], **block}).labels
        for block in manifests
    ]
    assert [(item.regions_class_order, item.ignore) for item in found] == [((1, 2), None), (None, 255)]
    annotated = [block["annotated"] for block in blocks if "annotated" in block]
    assert annotated == [{"case_007": ["liver"], "case_008": ["liver", "spleen"]}, ["liver"]]
    assert parse_annotated({"annotated": annotated[0]})["case_008"] == ("liver", "spleen")
