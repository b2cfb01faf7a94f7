"""A cascade in a made-up run: lowres folds, a cascade fold that learns from what they had not seen, prediction."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from synthetic_run import configuration, make_run
from torch import Tensor, nn
from toy_training import fill_store, toy_plan, train_toy

from autoseg.cli.app import main
from autoseg.config import Settings, TrainSettings
from autoseg.domain.dataset import Fold, Splits
from autoseg.domain.network_plan import NetworkPlan
from autoseg.domain.plan import Configuration, Plan
from autoseg.errors import ConfigError, DatasetError, ModelError, TrainingInterrupted
from autoseg.inference.cases import predict_cases
from autoseg.inference.predictor import Predictor
from autoseg.io.images import read_case, read_image, read_labels
from autoseg.io.maps import MapStore, OutOfFoldMaps
from autoseg.io.model import load_model
from autoseg.io.run_folder import RunFolder
from autoseg.io.store import CaseStore
from autoseg.pipeline import prediction, results, training
from autoseg.pipeline.cascade import out_of_fold, prepare_maps
from autoseg.report.collect import ReportSummary
from autoseg.runtime import STAGE_VALIDATE
from autoseg.training.batches import BatchReader, assemble
from autoseg.training.cascade import PreviousStage
from autoseg.training.records import TrainSettings as FoldSettings
from autoseg.training.records import read_run

LOWRES, CASCADE, FULLRES = "3d_lowres", "3d_cascade", "3d_fullres"
NUM_CASES = 6
NUM_FOLDS = 3
ONE_EPOCH = TrainSettings(epochs=1, device="cpu", precision="fp32")
AXES = (0, 1, 2)


def small(stage: str | None, spacing: tuple[float, ...], patch: tuple[int, ...]) -> Configuration:
    """A configuration of two stages and a few features; of a cascade where there is a previous stage."""
    part = configuration(3)
    network = part.network.model_dump() | {
        "in_channels": 3 if stage else 1, "patch_size": patch, "features_per_stage": (4, 6),
        "blocks_per_stage_encoder": (1, 1), "blocks_per_stage_decoder": (1,),
    }  # fmt: skip
    training_plan = part.training.model_dump() | {"steps_per_epoch": 2, "validation_steps_per_epoch": 1}
    return Configuration.model_validate(
        part.model_dump()
        | {
            "preprocess": part.preprocess.model_copy(update={"target_spacing": spacing}),
            "network": network,
            "training": training_plan,
            "previous_stage": stage,
        }
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A planned run of three folds; nothing is trained. The patch of the cascade is larger than the images."""
    run = make_run(tmp_path_factory.mktemp("cascade"), NUM_CASES, (FULLRES,))
    shutil.rmtree(run.models_folder)
    plan = run.read_plan()
    spacing = (1.5, 1.0, 1.0)
    parts = {
        FULLRES: small(None, spacing, (16, 16, 16)),
        LOWRES: small(None, (3.0, 2.5, 2.5), (12, 14, 12)),
        CASCADE: small(LOWRES, spacing, (26, 36, 32)),
    }
    run.write(run.plan_file, Plan.model_validate(plan.model_dump() | {"configurations": parts}))
    dataset = run.read_dataset()
    # Two cases of each patient are on different sides of these folds, so nobody may know the patients.
    alone = tuple(case.model_copy(update={"patient": None}) for case in dataset.cases)
    run.write(run.dataset_file, dataset.model_copy(update={"cases": alone}))
    ids = [case.id for case in dataset.cases]
    folds = [
        Fold(train=tuple(item for item in ids if item not in ids[k::NUM_FOLDS]), validation=tuple(ids[k::NUM_FOLDS]))
        for k in range(NUM_FOLDS)
    ]
    run.write(run.splits_file, Splits(rule="by hand", folds=tuple(folds)))
    return run


@pytest.fixture(scope="module")
def trained(planned: RunFolder) -> RunFolder:
    """The same with its lowres folds and fold 0 of the cascade; on the way, what is missing is named."""
    with pytest.raises(ModelError, match="3 of the 3 folds") as stopped:
        training.train(planned.root, ONE_EPOCH, configuration=CASCADE, fold="0")
    assert stopped.value.hint.endswith(f"autoseg train {planned.root} --config {LOWRES}")
    # Nothing was prepared for a training that cannot be.
    assert not (planned.root / "cache").exists()
    for fold in ("0", "2"):
        training.train(planned.root, ONE_EPOCH, configuration=LOWRES, fold=fold)
    with pytest.raises(ModelError) as stopped:
        training.train(planned.root, ONE_EPOCH, configuration=CASCADE)
    assert stopped.value.problems == ("fold 1: is not trained",)
    assert stopped.value.hint.splitlines()[1:] == [f"  autoseg train {planned.root} --config {LOWRES} --fold 1"]
    training.train(planned.root, ONE_EPOCH, configuration=LOWRES, fold="1")
    training.train(planned.root, ONE_EPOCH, configuration=CASCADE, fold="0")
    return planned


@pytest.fixture
def copy(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """The trained run, to be changed."""
    shutil.copytree(trained.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def weights(run: RunFolder, name: str, fold: int | str) -> str:
    return load_model(run.fold_folder(name, fold)).card.weights_sha256


class Copying(nn.Module):
    """A network by hand: its logits are the channels of the previous stage. Keeps what it saw."""

    seen: ClassVar[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.cat([torch.full_like(x[:, :1], 0.5), x[:, 1:]], 1)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every cascade network is a copying one; gives the inputs that it sees."""
    from autoseg.inference import resident

    restore = resident.restore

    def build(plan: NetworkPlan, tensors: dict[str, Tensor]) -> nn.Module:
        return restore(plan, tensors) if plan.in_channels == 1 else Copying()

    monkeypatch.setattr(resident, "restore", build)
    Copying.seen.clear()
    yield Copying.seen
    Copying.seen.clear()


def test_a_cascade_of_three_stages_is_no_plan(planned: RunFolder) -> None:
    data = planned.read_plan().model_dump()
    data["configurations"]["more"] = data["configurations"][CASCADE] | {"previous_stage": CASCADE}
    with pytest.raises(ValidationError, match="a cascade has two stages"):
        Plan.model_validate(data)


def test_a_fold_learns_from_what_the_previous_stage_had_not_seen(trained: RunFolder) -> None:
    splits, dataset = trained.read_splits().folds, trained.read_dataset()
    for number, members in enumerate(splits):
        found = out_of_fold(trained, dataset, LOWRES, [(number, members)])[number]
        assert set(found) == {case.id for case in dataset.cases}
        for case_id, item in found.items():
            assert case_id in splits[item.fold].validation
            assert case_id not in splits[item.fold].train
            assert item.label_map == trained.fold_folder(LOWRES, item.fold) / "validation" / f"{case_id}.nii.gz"
            assert item.weights_sha256 == weights(trained, LOWRES, item.fold)
        assert all(found[case_id].fold == number for case_id in members.validation)


def test_what_a_cascade_fold_leaves(trained: RunFolder) -> None:
    record = read_run(trained.fold_folder(CASCADE, 0))
    assert record is not None
    expected = {f"fold_{fold}": weights(trained, LOWRES, fold) for fold in range(NUM_FOLDS)}
    assert record.previous_weights == expected
    assert load_model(trained.fold_folder(CASCADE, 0)).card.provenance["previous_weights"] == expected
    names = sorted(folder.name.rpartition("-")[0] for folder in (trained.root / "cache").iterdir())
    # The cascade preprocesses as fullres does: one copy on disk.
    assert names == ["3d_cascade-previous", FULLRES, LOWRES]
    maps = next((trained.root / "cache").glob("3d_cascade-previous-*"))
    assert {path.relative_to(maps).parts for path in maps.rglob("*.safetensors")} == {
        (f"fold_{index % NUM_FOLDS}", f"case_{index:02d}.safetensors") for index in range(NUM_CASES)
    }
    summary = json.loads((trained.fold_folder(CASCADE, 0) / "validation" / "summary.json").read_text())
    assert [item["case"] for item in summary["evaluation"]["cases"]] == ["case_00", "case_03"]


def test_training_and_prediction_see_the_same_channels(trained: RunFolder, copying: list[Tensor]) -> None:
    """Bit for bit, image and map: the patch is larger than the image, so a tile and a sample are the whole case."""
    plan, dataset = trained.read_plan(), trained.read_dataset()
    part, members = plan.configurations[CASCADE], trained.read_splits().folds[0]
    found = out_of_fold(trained, dataset, LOWRES, [(0, members)])[0]
    previous = prepare_maps(trained, dataset, CASCADE, part, found)
    store = training.prepare(trained, dataset, plan, CASCADE)
    case = dataset.case(members.validation[0])
    reader = BatchReader.of(part, store, (case.id,), 0, STAGE_VALIDATE, previous)
    in_training = assemble(reader.read(0), torch.device("cpu")).images[0]

    cascade = Predictor([load_model(trained.fold_folder(CASCADE, 0))], device="cpu", precision="fp32")
    # Its validation cases were predicted so.
    lowres = Predictor([load_model(trained.fold_folder(LOWRES, 0))], device="cpu", precision="fp32", tta="interleaved")
    volume = read_case(case, 1)
    prepared = cascade.prepare(volume)
    cascade.segment(prepared, cascade.previous_map(lowres(volume), prepared))
    assert len(copying) == 1
    assert torch.equal(copying[0][0], in_training)
    assert in_training[1:].any()


@pytest.mark.parametrize("tta", ["none", "full"])
def test_a_network_that_copies_the_map_gives_the_lowres_result(
    trained: RunFolder, copying: list[Tensor], tmp_path: Path, tta: Literal["none", "full"]
) -> None:
    """On the file's own grid, tile by tile and mirrored; so the map is where and what it should be."""
    case = trained.read_dataset().cases[1]
    image = Path(case.images[0])
    for name in (LOWRES, CASCADE):
        prediction.predict(
            trained.root, [image], tmp_path / name, configuration=name, tta=tta, device="cpu", precision="fp32"
        )
    low, out = (read_image(tmp_path / name / image.name).array[0] for name in (LOWRES, CASCADE))
    assert low.any()
    assert np.array_equal(out, low)
    assert sum(len(tiles) for tiles in copying) == (4 if tta == "full" else 1)

    whole = load_model(trained.fold_folder(CASCADE, 0))
    data = whole.card.plan.model_dump()
    data["configurations"][CASCADE]["network"]["patch_size"] = (8, 12, 10)
    plan = Plan.model_validate(data)
    card = whole.card.model_copy(update={"plan": plan, "digest": plan.digest()})
    tiled = Predictor([replace(whole, card=card)], device="cpu", precision="fp32", tta=tta, tile_batch=3)
    prepared = tiled.prepare(read_image(image))
    reference = read_labels(case.labels or "")[0]
    assert set(np.unique(reference)) == {0, 1, 2}
    assert np.array_equal(tiled.segment(prepared, tiled.previous_map(reference, prepared)), reference)
    assert len(copying) > 20


def test_a_run_predicts_lowres_folds_first_then_the_cascade(trained: RunFolder, tmp_path: Path) -> None:
    dataset = trained.read_dataset()
    paths = [str(case.images[0]) for case in dataset.cases[:2]]
    options = ["--device", "cpu", "--precision", "fp32"]
    words = ["predict", str(trained.root), *paths, "--config", CASCADE, "--out", str(tmp_path / "run"), *options]
    assert main(words) == 0
    fold = trained.fold_folder(CASCADE, 0)
    assert main(["predict", str(fold), *paths, "--out", str(tmp_path / "fold"), *options]) == 0
    lowres = Predictor(
        [load_model(trained.fold_folder(LOWRES, k)) for k in range(NUM_FOLDS)],
        device="cpu",
        precision="fp32",
        tta="interleaved",
    )
    cascade = Predictor([load_model(fold)], device="cpu", precision="fp32", tta="interleaved")
    for case in dataset.cases[:2]:
        volume = read_case(case, 1)
        prepared = cascade.prepare(volume)
        expected = cascade.segment(prepared, cascade.previous_map(lowres(volume), prepared))
        for name in ("run", "fold"):
            assert np.array_equal(read_image(tmp_path / name / Path(case.images[0]).name).array[0], expected)


def test_a_cascade_without_its_previous_stage_says_what_it_needs(trained: RunFolder, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "models" / CASCADE / "fold_0"
    shutil.copytree(trained.fold_folder(CASCADE, 0), alone)
    image = Path(trained.read_dataset().cases[0].images[0])
    with pytest.raises(ModelError, match=rf"also needs {LOWRES}.*elsewhere/models/{LOWRES}"):
        prediction.predict(alone, [image], tmp_path / "out")
    shutil.copytree(trained.fold_folder(LOWRES, 1), alone.parent.parent / LOWRES / "fold_1")
    assert prediction.predict(alone, [image], tmp_path / "out", device="cpu").failures == ()
    model = load_model(alone)
    case = trained.read_dataset().cases[0]
    with pytest.raises(ModelError, match=f"needs {LOWRES}"):
        predict_cases([model], [case], tmp_path / "out", device="cpu")
    with pytest.raises(ModelError, match=f"label map of {LOWRES}"):
        Predictor([model], device="cpu")(read_case(case, 1))
    lowres = load_model(trained.fold_folder(LOWRES, 0))
    with pytest.raises(ModelError, match="sees images alone"):
        predict_cases([lowres], [case], tmp_path / "out", device="cpu", previous=[lowres])


def test_a_lowres_stage_that_fails_on_one_case_fails_that_case(
    trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = trained.read_dataset()
    segment = Predictor.segment
    calls: list[str | None] = []

    def fail_once(self: Predictor, *arguments: object) -> object:
        calls.append(self.settings.previous_stage)
        if calls == [None, LOWRES, None]:
            raise DatasetError("no lowres today")
        return segment(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "segment", fail_once)
    inputs = [Path(case.images[0]) for case in dataset.cases[:3]]
    outcome = prediction.predict(trained.root, inputs, tmp_path, configuration=CASCADE, device="cpu")
    assert [path.name for path in outcome.written] == ["case_00.nii.gz", "case_02.nii.gz"]
    assert outcome.failures == ("case_01: no lowres today",)


def test_a_retrained_previous_stage_stops_the_cascade_until_it_is_restarted(
    copy: RunFolder, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    before = weights(copy, LOWRES, 1)
    other = ONE_EPOCH.model_copy(update={"seed": 5})
    training.train(copy.root, other, configuration=LOWRES, fold="1", restart=True)
    assert weights(copy, LOWRES, 1) != before
    for epochs in (1, 2):  # finished, and to be gone on with
        more = ONE_EPOCH.model_copy(update={"epochs": epochs})
        with pytest.raises(ConfigError, match="other weights of fold_1") as stopped:
            training.train(copy.root, more, configuration=CASCADE, fold="0")
        assert "--restart" in stopped.value.hint
    image = Path(copy.read_dataset().cases[0].images[0])
    prediction.predict(copy.root, [image], tmp_path / "out", configuration=CASCADE, device="cpu")
    assert f"other weights of {LOWRES} than there are now (fold_1)" in caplog.text
    training.train(copy.root, ONE_EPOCH, configuration=CASCADE, fold="0", restart=True)
    record = read_run(copy.fold_folder(CASCADE, 0))
    assert record is not None
    assert record.previous_weights["fold_1"] == weights(copy, LOWRES, 1)
    maps = next((copy.root / "cache").glob("3d_cascade-previous-*"))
    stored = MapStore(maps / "fold_1", weights(copy, LOWRES, 1)).open("case_01")
    assert stored.header.weights_sha256 != before


def test_previous_folds_that_cannot_be_trusted_are_named(copy: RunFolder) -> None:
    dataset, splits = copy.read_dataset(), copy.read_splits()
    (copy.fold_folder(LOWRES, 0) / "validation" / "summary.json").unlink()
    (copy.fold_folder(LOWRES, 1) / "validation" / "case_04.nii.gz").unlink()
    moved = splits.folds[2].validation[0]
    changed = Fold(train=(*splits.folds[2].train, moved), validation=splits.folds[2].validation[1:])
    first = splits.folds[0]
    train = tuple(case_id for case_id in first.train if case_id != moved)
    given = Fold(train=train, validation=(*first.validation, moved))
    copy.write(copy.splits_file, Splits(rule="edited", folds=(given, splits.folds[1], changed)))
    folds = list(enumerate(copy.read_splits().folds))
    with pytest.raises(ModelError) as stopped:
        out_of_fold(copy, dataset, LOWRES, folds)
    problems = stopped.value.problems
    assert [problem[:6] for problem in problems] == ["fold 0", "fold 1", "fold 2"]
    # Fold 0 of lowres learned from the case that it is now said to hold out.
    assert "other cases" in problems[0]
    assert "case_04.nii.gz is missing" in problems[1]
    assert "other cases" in problems[2]
    copy.write(copy.splits_file, splits)
    with pytest.raises(ModelError) as stopped:
        out_of_fold(copy, dataset, LOWRES, list(enumerate(splits.folds)))
    assert stopped.value.problems[0] == "fold 0: has not predicted its validation cases with its final weights"
    assert len(stopped.value.problems) == 2
    copy.write(copy.splits_file, Splits(rule="edited", folds=(splits.folds[0],)))
    with pytest.raises(ConfigError, match="4 cases are a validation case of no fold"):
        training.train(copy.root, ONE_EPOCH, configuration=CASCADE, fold="0")


def test_fold_all_learns_out_of_fold_too(copy: RunFolder) -> None:
    (outcome,) = training.train(copy.root, ONE_EPOCH, configuration=CASCADE, fold="all")
    assert outcome.num_validation == 0
    record = read_run(copy.fold_folder(CASCADE, "all"))
    assert record is not None
    assert sorted(record.previous_weights) == ["fold_0", "fold_1", "fold_2"]


def test_report_and_info_know_every_configuration(trained: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(trained.root)]) == 0
    summary = ReportSummary.model_validate_json((trained.report_folder / "summary.json").read_text())
    assert {item.name: len(item.folds) for item in summary.configurations} == {LOWRES: 3, CASCADE: 1}
    assert main(["info", str(trained.root)]) == 0
    assert main(["info", str(trained.fold_folder(CASCADE, 0))]) == 0
    assert CASCADE in capsys.readouterr().out


def test_run_trains_the_previous_stage_first(
    planned: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[object, object]] = []

    class Clean:
        stops_training = False

    def note(*_: object, configuration: str | None = None, fold: str = "each", **__: object) -> None:
        calls.append((configuration, fold))

    monkeypatch.setattr(results, "check", lambda *_, **__: Clean())
    monkeypatch.setattr(results, "plan", lambda *_, **__: planned.read_plan())
    monkeypatch.setattr(results, "train", note)
    monkeypatch.setattr(results, "report", lambda *_, **__: tmp_path)
    results.run(tmp_path, tmp_path, Settings(), configuration=CASCADE, fold="0")
    results.run(tmp_path, tmp_path, Settings())
    first, rest = calls[:2], calls[2:]
    assert first == [(LOWRES, "each"), (CASCADE, "0")]
    assert sorted(rest, key=str) == sorted(((name, "each") for name in planned.read_plan().configurations), key=str)
    assert rest.index((LOWRES, "each")) < rest.index((CASCADE, "each"))


# --- The same bits, whatever happens on the way --------------------------------------------------------------------


class InterruptAfter:
    """Asks for a stop after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def start(self, description: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, step: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, note: str = "") -> None:
        """Ignore."""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[CaseStore, PreviousStage, Plan]:
    """Cases whose previous stage was nearly right, and a cascade's plan that disturbs its maps often."""
    folder = tmp_path_factory.mktemp("toys")
    store, maps = fill_store(folder / "cases"), MapStore(folder / "maps", "w" * 64)
    for case_id in store.ids():
        case = store.open(case_id)
        maps.write(case_id, np.roll(case.read((0, 0, 0), case.shape)[1], 1, 0).astype(np.uint8), ())
    plan = toy_plan(steps_per_epoch=3, batch_size=2)
    alone = plan.configurations[FULLRES]
    part = alone.model_copy(
        update={"previous_stage": LOWRES, "network": alone.network.model_copy(update={"in_channels": 3})}
    )
    previous = PreviousStage(LOWRES, OutOfFoldMaps(dict.fromkeys(store.ids(), maps)), {"fold_1": "w" * 64})
    return store, previous, plan.model_copy(update={"configurations": {FULLRES: part, LOWRES: alone}})


def test_reading_ahead_and_stops_change_nothing(toys: tuple[CaseStore, PreviousStage, Plan], tmp_path: Path) -> None:
    store, previous, plan = toys
    whole = FoldSettings(num_epochs=2, device="cpu", precision="fp32")
    train_toy(tmp_path / "whole", store, whole, plan, previous=previous)
    expected = (tmp_path / "whole" / "weights.safetensors").read_bytes()
    no_thread = FoldSettings(num_epochs=2, device="cpu", precision="fp32", prefetch=0)
    train_toy(tmp_path / "no_thread", store, no_thread, plan, previous=previous)
    assert (tmp_path / "no_thread" / "weights.safetensors").read_bytes() == expected
    with pytest.raises(TrainingInterrupted):
        train_toy(tmp_path / "stopped", store, whole, plan, previous=previous, progress=InterruptAfter(5))
    train_toy(tmp_path / "stopped", store, whole, plan, previous=previous)
    assert (tmp_path / "stopped" / "weights.safetensors").read_bytes() == expected


def test_a_cascade_is_not_trained_without_its_maps(toys: tuple[CaseStore, PreviousStage, Plan], tmp_path: Path) -> None:
    store, previous, plan = toys
    one = FoldSettings(num_epochs=1, device="cpu", precision="fp32")
    with pytest.raises(ConfigError, match=f"previous stage is {LOWRES}"):
        train_toy(tmp_path, store, one, plan)
    with pytest.raises(ConfigError, match="previous stage is None"):
        train_toy(tmp_path, store, one, toy_plan(), previous=previous)
