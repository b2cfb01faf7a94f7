"""`inference.json`: what it may say, and that it comes back as it was written."""

import json
from pathlib import Path

import pytest
from toy_models import SCHEMA

from autoseg.domain.inference import DropSmall, FillHoles, InferenceRecipe, KeepLargest, Member, rules_problems
from autoseg.errors import ConfigError
from autoseg.io.run_folder import RunFolder

RECIPE = InferenceRecipe(
    members=(Member(configuration="2d", folds=(0, "all"), weight=0.25), Member(configuration="3d_fullres")),
    postprocessing=(
        KeepLargest(classes=("low", "high"), joined=True),
        DropSmall(classes=("high",), min_ml=0.5, becomes=7),
        FillHoles(classes=("low",)),
    ),
    provenance={"mean_foreground_dice": 0.9},
)


def test_a_recipe_comes_back_from_its_file_and_none_is_read_where_there_is_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_inference() is None
    run.write(run.inference_file, RECIPE)
    assert run.read_inference() == RECIPE
    assert json.loads(run.inference_file.read_text())["postprocessing"][1]["kind"] == "drop_small"


def test_a_recipe_without_temperatures_by_class_is_written_as_before_there_were_any() -> None:
    plain, named = Member(configuration="2d"), Member(configuration="2d", class_temperatures={"high": 2.0})
    assert list(plain.model_dump(mode="json")) == ["configuration", "folds", "weight", "temperature"]
    assert Member.model_validate(named.model_dump(mode="json")) == named
    # Background, low, high; and where nothing differs one number.
    assert named.temperatures(SCHEMA) == (1.0, 1.0, 2.0)
    assert plain.temperatures(SCHEMA) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": []}, "at least one member"),
        ({"members": [{"configuration": "2d"}, {"configuration": "2d"}]}, "each configuration once"),
        ({"members": [{"configuration": "2d", "weight": 0}]}, "greater than 0"),
        ({"members": [{"configuration": "2d", "folds": [1, 1]}]}, "a fold counts once"),
        ({"members": [{"configuration": "2d", "class_temperatures": {"low": 0}}]}, "greater than 0"),
        ({"postprocessing": [{"kind": "keep_largest", "classes": []}]}, "at least one"),
        ({"postprocessing": [{"kind": "shrink", "classes": ["low"]}]}, "shrink"),
        ({"schema_version": 2}, "not 2"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    run = RunFolder(tmp_path)
    run.inference_file.write_text(json.dumps(RECIPE.model_dump(mode="json") | change))
    with pytest.raises(ConfigError, match=message):
        run.read_inference()


def test_rules_name_classes_and_values_of_the_labels() -> None:
    assert rules_problems(RECIPE.postprocessing, SCHEMA) == ()
    problems = rules_problems((KeepLargest(classes=("low", "liver"), becomes=5),), SCHEMA)
    assert problems == (
        "postprocessing.0 (keep_largest): there is no class 'liver'",
        "postprocessing.0 (keep_largest): becomes is 5, which is none of [0, 7, 300]",
    )
