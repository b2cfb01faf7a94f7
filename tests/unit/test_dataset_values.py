"""Labels, channels and cases: what cannot be is refused, and encoding and decoding are inverse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from autoseg.domain.dataset import IGNORE_INDEX, Case, Channel, Dataset, Fold, LabelClass, LabelSchema, Splits
from autoseg.domain.values import digest_of
from autoseg.errors import DatasetError


def schema_of(*values: int, ignore: int | None = None) -> LabelSchema:
    return LabelSchema(classes=tuple(LabelClass(name=f"c{value}", values=(value,)) for value in values), ignore=ignore)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8, unique=True), st.integers(0, 2**31))
def test_decoding_undoes_encoding_also_with_gaps(values: list[int], seed: int) -> None:
    schema = schema_of(*values)
    labels = np.random.default_rng(seed).choice([0, *values], size=(3, 4, 5))
    encoded = schema.encode(labels)
    assert encoded.dtype == np.int16
    assert set(np.unique(encoded)) <= set(range(schema.num_classes))
    table = schema.decode_table()
    assert table.dtype == (np.uint8 if max(values) < 256 else np.uint16)
    np.testing.assert_array_equal(table[encoded], labels)


def test_ignore_becomes_its_own_index() -> None:
    encoded = schema_of(2, 5, ignore=255).encode(np.array([0, 2, 5, 255]))
    np.testing.assert_array_equal(encoded, [0, 1, 2, IGNORE_INDEX])


def test_undeclared_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"undeclared label values \[3, 9\]"):
        schema_of(1, 2).encode(np.array([0, 9, 3, 1]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: LabelSchema(classes=()),
        lambda: schema_of(0),
        lambda: schema_of(1, 2, ignore=2),
        lambda: LabelSchema(classes=(LabelClass(name="a", values=(1,)), LabelClass(name="a", values=(2,)))),
        lambda: LabelSchema(classes=(LabelClass(name="a", values=(1,)), LabelClass(name="b", values=(1,)))),
        lambda: LabelClass(name="a", values=()),
        lambda: Splits(rule="", folds=(Fold(train=("a",), validation=("a",)),)),
        lambda: Dataset(name="x", channels=(), labels=schema_of(1), cases=()),
        lambda: Dataset(
            name="x",
            channels=(Channel(name="CT"),),
            labels=schema_of(1),
            cases=(Case(id="a", images=("i",)), Case(id="a", images=("j",))),
        ),
        lambda: Channel(name="CT", unknown=1),  # type: ignore[call-arg]
    ],
)
def test_impossible_values_cannot_be_built(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValidationError):
        build()


def test_values_are_frozen_and_survive_json() -> None:
    dataset = Dataset(
        name="x",
        channels=(Channel(name="CT"),),
        labels=schema_of(1, 4, ignore=7),
        cases=(Case(id="a", images=("/i.nii.gz",), labels="/l.nii.gz", patient="p"),),
        splits=Splits(rule="one", folds=(Fold(train=("a",), validation=()),)),
    )
    assert Dataset.from_json(dataset.to_json(), "here") == dataset
    with pytest.raises(ValidationError):
        dataset.name = "y"  # type: ignore[misc]
    with pytest.raises(DatasetError) as caught:
        Dataset.from_json(dataset.to_json().replace('"name": "x"', '"nome": "x"'), "here.json", DatasetError)
    assert {line.split(":")[0] for line in caught.value.problems} == {"name", "nome"}
    assert "here.json" in str(caught.value)
    assert dataset.case("a").files == ("/i.nii.gz", "/l.nii.gz")


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2.5, None]}) == digest_of({"b": [2.5, None], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        digest_of(float("nan"))
