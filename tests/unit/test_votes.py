"""Several members vote on the image's grid: held against all probabilities at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_models import SCHEMA, logits_of_the_crop
from toy_runs import SPACINGS, oblique_volume, toy_run

from autoseg.domain.dataset import LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry
from autoseg.domain.inference import DropSmall, InferenceRecipe, Member
from autoseg.domain.plan import PreprocessPlan
from autoseg.errors import ConfigError, ModelError
from autoseg.evaluation.postprocess import apply_rules
from autoseg.inference.columns import whole_column
from autoseg.inference.settings import PredictionSettings
from autoseg.inference.stages import Stages
from autoseg.inference.votes import CERTAIN, Ballot, Votes
from autoseg.io.run_folder import RunFolder
from autoseg.pipeline.members import choose
from autoseg.preprocessing.transform import Trail, invert

SETTINGS = PredictionSettings(precision="fp32")
MEMBERS = (
    Member(configuration="2d", weight=1.0, temperature=0.5),
    Member(configuration="3d_fullres", folds=(0,), weight=2.0, temperature=0.2, class_temperatures={"low": 0.6}),
    Member(configuration="3d_lowres", weight=1.5, temperature=0.4),
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = toy_run(tmp_path / "run", {"2d": (0, 1), "3d_fullres": (0, 1), "3d_lowres": (0,)})
    made.write(made.inference_file, InferenceRecipe(members=MEMBERS))
    return made


def probabilities(stages: Stages, member: Member) -> np.ndarray:
    """(K, I, J, K) on the file's grid, all at once; background outside the crop."""
    predictor = stages.last
    prepared = predictor.prepare(oblique_volume())
    trail, whole = prepared.trail, logits_of_the_crop(predictor, prepared)
    named = member.class_temperatures or {}
    of_each = np.array([member.temperature, *(named.get(name, member.temperature) for name in SCHEMA.names)])
    shares = torch.from_numpy(whole / of_each[whole.argmax(0)]).softmax(0).numpy()
    return np.stack([invert(share, trail, background=int(index == 0)) for index, share in enumerate(shares)])


def test_the_weighted_mean_of_probabilities_decides(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.inference.export._CHUNK_VOXELS", 600)
    chosen = choose(run.root)
    assert [[model.card.fold for model in member.models] for member in chosen.members] == [[0, 1], [0], [0]]
    segmenter = chosen.load(SETTINGS, "cpu")
    found = segmenter.segment(segmenter.prepare(oblique_volume()))
    total = sum(
        member.weight / 4.5 * probabilities(item.stages, member)
        for member, item in zip(MEMBERS, segmenter._members, strict=True)
    )
    expected = SCHEMA.decode_table()[np.asarray(total).argmax(0)]
    assert found.dtype == expected.dtype
    ordered = np.sort(total, axis=0)
    # Sixteen bit and float32: only where two classes are all but equal may the other one win.
    is_clear = ordered[-1] - ordered[-2] > 1e-3
    assert is_clear.mean() > 0.9
    np.testing.assert_array_equal(found[is_clear], expected[is_clear])
    assert len(np.unique(found)) > 1
    # No member alone says the same: the mean is taken.
    alone = [
        member.stages.segment(ready)
        for member, ready in zip(segmenter._members, segmenter.prepare(oblique_volume()).members, strict=True)
    ]
    assert all(np.mean(labels != found) > 0.01 for labels in alone)


def test_votes_in_a_file_are_those_in_memory_and_leave_nothing_behind(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = choose(run.root).load(SETTINGS, "cpu", tmp_path / "scratch")
    ready = segmenter.prepare(oblique_volume())
    in_memory = segmenter.segment(ready)
    monkeypatch.setattr("autoseg.inference.votes.MOST_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr("autoseg.inference.votes._MOST_WORK_VALUES", 1)
    np.testing.assert_array_equal(segmenter.segment(ready), in_memory)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_rules_are_applied_to_what_the_members_say(run: RunFolder) -> None:
    plain = choose(run.root).load(SETTINGS, "cpu")
    volume = oblique_volume()
    before = plain.segment(plain.prepare(volume))
    rules = (DropSmall(classes=("low", "high"), min_ml=0.05),)
    run.write(run.inference_file, InferenceRecipe(members=MEMBERS, postprocessing=rules))
    segmenter = choose(run.root).load(SETTINGS, "cpu")
    after = segmenter.finish(segmenter.segment(segmenter.prepare(volume)), volume.geometry)
    expected = apply_rules(before, rules, SCHEMA, volume.geometry.spacing_mm)
    assert not np.array_equal(before, expected)
    np.testing.assert_array_equal(after, expected)


def trivial_ballot(shape: tuple[int, int, int], weight: float) -> tuple[Ballot, Trail]:
    from autoseg.domain.geometry import Volume
    from autoseg.preprocessing.transform import trace

    plan = PreprocessPlan(
        target_spacing=(1.0, 1.0, 1.0),
        normalization=({"scheme": "zscore"},),
        crop_to_nonzero=False,  # type: ignore[arg-type]
    )
    trail = trace(Volume(np.ones((1, *shape), np.float32), Geometry(shape, np.eye(4))), plan)
    return Ballot(trail, plan, weight, 1.0), trail


@pytest.mark.parametrize("count", [2, 7, 500])
def test_certain_members_never_overflow_and_equal_votes_go_to_the_earlier_class(tmp_path: Path, count: int) -> None:
    """0.5 of 65,535 rounds up twice: one more than 16 bit hold."""
    shape = (3, 4, 5)
    ballot, trail = trivial_ballot(shape, 1 / count)
    logits = torch.zeros(3, *trail.resampled_shape)
    logits[2] = 1e4
    with (tmp_path / "votes").open("w+b") as file:
        votes = Votes(SCHEMA, shape, file)
        for _ in range(count):
            votes.add(whole_column(trail.change_back(ballot.plan)), 0, iter([(0, 5, logits)]), ballot)
        assert abs(int(votes._votes[1].max()) - CERTAIN) <= count / 2
        assert (votes.labels() == 300).all()
        even = Votes(SCHEMA, shape, file)
        even.add(whole_column(trail.change_back(ballot.plan)), 0, iter([(0, 5, logits * 0)]), ballot)
        assert not even.labels().any()


def test_regions_vote_each_for_themselves(tmp_path: Path) -> None:
    schema = LabelSchema(classes=(LabelClass(name="whole", values=(1, 2)), LabelClass(name="core", values=(2,))))
    shape = (3, 4, 5)
    with (tmp_path / "votes").open("w+b") as file:
        votes = Votes(schema, shape, file)
        for whole, core, weight in ((4.0, 0.3, 0.5), (-1.0, 0.3, 0.25), (0.5, -9.0, 0.25)):
            ballot, trail = trivial_ballot(shape, weight)
            logits = torch.stack([torch.full(trail.resampled_shape, value) for value in (whole, core)])
            votes.add(whole_column(trail.change_back(ballot.plan)), 0, iter([(0, 5, logits)]), ballot)
        # 0.5 * 0.98 + 0.25 * 0.27 + 0.25 * 0.62 = 0.71 and 0.75 * 0.574 + 0 = 0.43.
        np.testing.assert_array_equal(votes.labels(), np.ones(shape, np.uint8))


def test_named_configurations_leave_the_file_aside(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "autoseg"):
        chosen = choose(run.root, "3d_lowres", None)
    assert [member.member.configuration for member in chosen.members] == ["3d_lowres"]
    assert "inference.json is not used" in caplog.text
    run.inference_file.unlink()
    (member,) = choose(run.root).members
    assert (member.member.configuration, len(member.models)) == ("3d_fullres", 2)
    assert set(SPACINGS) >= {"2d", "3d_fullres"}


@pytest.mark.parametrize(
    ("recipe", "kind", "message"),
    [
        ({"members": [{"configuration": "3d_huge"}]}, ModelError, "3d_huge has no finished fold"),
        ({"members": [{"configuration": "2d", "folds": [0, 3]}]}, ModelError, "no finished fold 3; finished are 0, 1"),
        (
            {"members": [{"configuration": "2d"}], "postprocessing": [{"kind": "fill_holes", "classes": ["liver"]}]},
            ConfigError,
            "do not fit the labels",
        ),
        (
            {"members": [{"configuration": "2d", "class_temperatures": {"liver": 2.0}}]},
            ConfigError,
            "do not fit the labels",
        ),
    ],
)
def test_members_and_rules_that_are_not_there_are_named(
    run: RunFolder, recipe: dict[str, object], kind: type[Exception], message: str
) -> None:
    run.write(run.inference_file, InferenceRecipe.model_validate(recipe))
    with pytest.raises(kind, match=message) as caught:
        choose(run.root)
    if kind is ConfigError:
        assert "liver" in str(caught.value.problems)  # type: ignore[attr-defined]


def test_the_digest_names_weights_rules_and_models_and_nothing_else(run: RunFolder) -> None:
    def digest(**changes: object) -> str:
        recipe = InferenceRecipe(members=MEMBERS).model_copy(update=changes)
        run.write(run.inference_file, recipe)
        return choose(run.root).digest()

    first = digest()
    heavier = tuple(member.model_copy(update={"weight": 2 * member.weight}) for member in MEMBERS)
    assert digest(members=heavier) == first
    assert digest(provenance={"why": "it was best"}) == first
    others = {
        digest(members=MEMBERS[:2]),
        digest(members=(MEMBERS[0].model_copy(update={"temperature": 3.0}), *MEMBERS[1:])),
        digest(members=(MEMBERS[0].model_copy(update={"weight": 3.0}), *MEMBERS[1:])),
        digest(members=(MEMBERS[0].model_copy(update={"class_temperatures": {"high": 0.4}}), *MEMBERS[1:])),
        digest(postprocessing=(DropSmall(classes=("low",), min_ml=1.0),)),
    }
    assert len(others | {first}) == 6
    # As it is written for people does not matter.
    assert digest(members=(MEMBERS[0].model_copy(update={"class_temperatures": {"high": 0.5}}), *MEMBERS[1:])) == first
