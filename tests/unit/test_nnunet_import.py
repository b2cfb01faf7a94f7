"""Import of nnU-Net models: what is refused and how, formats of plans, archives. Parity is in tests/golden."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_model import GOLDEN, copy_model, edit, edit_configurations, export

from autoseg.cli.app import main
from autoseg.domain.plan import PreprocessPlan
from autoseg.errors import ConfigError, ModelError
from autoseg.interop.archives import extract
from autoseg.interop.checkpoints import read_checkpoint, require_plain_tensors
from autoseg.interop.nnunet import import_nnunet
from autoseg.interop.nnunet_folders import find_models
from autoseg.interop.nnunet_plans import read_plans
from autoseg.io.model import load_model, read_card
from autoseg.io.run_folder import RunFolder
from autoseg.preprocessing.transform import trace

SLICES = GOLDEN / "slices" / "nnUNetTrainerNoMirroring__nnUNetPlans__2d"


class Marker:
    """Pickled, it is a program that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_a_program_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    data_set = copy_model("slices", tmp_path)
    path = next(data_set.glob("*/fold_all/checkpoint_final.pth"))
    content = torch.load(path, weights_only=False)
    torch.save(content | {"logging": Marker(marker)}, path)
    with pytest.raises(ModelError, match=r"posix\.system") as caught:
        import_nnunet(data_set, tmp_path / "run")
    assert "is refused" in caught.value.message
    assert not marker.exists()
    assert not (tmp_path / "run").exists()
    torch.load(path, weights_only=False)  # the file would have done it
    assert marker.exists()


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ModelError, match="is not what a checkpoint is"):
        read_checkpoint(path)
    path.write_bytes((SLICES / "fold_all" / "checkpoint_final.pth").read_bytes()[:-2000])
    with pytest.raises(ModelError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="must hold named entries, got list"):
        read_checkpoint(path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_checkpoint(tmp_path / "nothing.pth")


def test_numbers_of_numpy_are_read_without_numpy() -> None:
    content = read_checkpoint(SLICES / "fold_all" / "checkpoint_final.pth")
    assert content["_best_ema"] == 0.25
    assert content["logging"]["train_losses"] == [1.5]
    assert content["inference_allowed_mirroring_axes"] is None


def test_what_else_numpy_leaves_in_logs_is_dropped_unread(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    logged = [np.float64(0.5), np.int64(3), np.bool_(True), np.arange(3), np.array([object()])]
    torch.save({"logging": logged, "weights": torch.ones(2)}, path)
    with pytest.raises(ModelError, match="is refused"):
        read_checkpoint(path)
    torch.save({"logging": logged[:-1], "weights": torch.ones(2)}, path)
    content = read_checkpoint(path)
    assert content["logging"][:3] == [0.5, 3, None]
    assert not isinstance(content["logging"][3], np.ndarray)
    assert torch.equal(content["weights"], torch.ones(2))


def test_packed_parts_are_refused_because_they_could_be_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    source = SLICES / "fold_all" / "checkpoint_final.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ModelError, match="is compressed"):
        read_checkpoint(path)


def test_tensors_that_claim_more_values_than_are_stored_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    torch.save(
        {"network_weights": {"huge": torch.zeros(1).expand(10**12), "whole": torch.zeros(3, dtype=torch.int8)}}, path
    )
    with pytest.raises(ModelError) as caught:
        require_plain_tensors(read_checkpoint(path)["network_weights"], path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["huge", "whole"]


def test_names_that_torchs_wrappers_make_longer_are_understood(tmp_path: Path) -> None:
    data_set = copy_model("slices", tmp_path)
    path = next(data_set.glob("*/fold_all/checkpoint_final.pth"))
    content = torch.load(path, weights_only=False)
    wrapped = {f"module._orig_mod.{name}": tensor.half() for name, tensor in content["network_weights"].items()}
    torch.save(content | {"network_weights": wrapped}, path)
    run = import_nnunet(data_set, tmp_path / "run").run
    weights = load_model(RunFolder(run).fold_folder("2d", "all")).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_batch_norm_is_told_by_the_weights(tmp_path: Path) -> None:
    """nnU-Net's trainer with batch norm leaves plans that say instance norm."""
    data_set = copy_model("slices", tmp_path)
    path = next(data_set.glob("*/fold_all/checkpoint_final.pth"))
    content = torch.load(path, weights_only=False)
    weights = content["network_weights"]
    for name in [name for name in weights if name.endswith("norm.weight")]:
        stem = name.removesuffix("weight")
        weights[stem + "running_mean"] = torch.full_like(weights[name], 0.5)
        weights[stem + "running_var"] = torch.full_like(weights[name], 2.0)
        weights[stem + "num_batches_tracked"] = torch.tensor(7)
    torch.save(content, path)
    model = load_model(RunFolder(import_nnunet(data_set, tmp_path / "run").run).fold_folder("2d", "all"))
    assert model.card.settings.network.norm == "batch"
    assert torch.equal(model.weights["encoder.0.0.norm.running_var"], torch.full((4,), 2.0))


# --- Archives ---------------------------------------------------------------------------------------------------------


def test_an_exported_zip_gives_the_same_run_as_its_folder(tmp_path: Path) -> None:
    data_set = copy_model("anisotropic", tmp_path / "results")
    by_zip = import_nnunet(export(data_set, tmp_path / "model.zip"), tmp_path / "a")
    by_folder = import_nnunet(data_set, tmp_path / "b")
    assert by_zip.folds == by_folder.folds
    for fold in (0, 1):
        cards = [read_card(RunFolder(item.run).fold_folder("3d_fullres", fold)) for item in (by_zip, by_folder)]
        assert cards[0] == cards[1]
    assert not list(tmp_path.glob(".tmp*"))


def link_entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = 0o120777 << 16
    return entry


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("../plans.json", "leads out"),
        ("a/../../plans.json", "leads out"),
        ("a\\..\\..\\plans.json", "leads out"),
        ("/tmp/plans.json", "absolute"),
        ("C:\\plans.json", "absolute"),
        (link_entry("a/plans.json"), "is a link"),
        (link_entry("unwanted"), "is a link"),
    ],
)
def test_archives_that_reach_outside_are_refused_whole(entry: Any, reason: str, tmp_path: Path) -> None:
    archive = export(copy_model("slices", tmp_path / "results"), tmp_path / "model.zip")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(entry, "/etc/passwd")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ModelError, match="refused, nothing was unpacked") as caught:
        import_nnunet(archive, tmp_path / "run")
    assert len(caught.value.problems) == 1
    assert reason in caught.value.problems[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a/plans.json", b"\0" * (1 << 24))
        opened.writestr("a/unwanted", b"\0" * (1 << 24))
    with pytest.raises(ModelError) as caught:
        extract(archive, tmp_path / "out", lambda name: name.name == "plans.json")
    assert [problem.split()[0] for problem in caught.value.problems] == ["'a/plans.json'"]
    assert not list((tmp_path / "out").iterdir())


def test_doubled_and_damaged_archives_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("plans.json", "{}")
        with pytest.warns(UserWarning, match="Duplicate"):
            opened.writestr("plans.json", "[]")
    with pytest.raises(ModelError) as caught:
        extract(archive, tmp_path / "out", lambda _: True)
    assert "occurs twice" in caught.value.problems[0]
    archive.write_bytes(b"PK nothing")
    with pytest.raises(ModelError, match="cannot be read as a zip archive"):
        extract(archive, tmp_path / "out", lambda _: True)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_single_configuration_and_a_folder_of_several_are_found(tmp_path: Path) -> None:
    data_set = copy_model("cascade", tmp_path)
    assert len(find_models(tmp_path, "checkpoint_final.pth")) == 2
    lowres = next(data_set.glob("*lowres"))
    assert [model.path for model in find_models(lowres, "checkpoint_final.pth")] == [lowres]


def test_the_previous_stage_of_a_cascade_is_found_beside_it_or_asked_for(tmp_path: Path) -> None:
    data_set = copy_model("cascade", tmp_path)
    cascade, lowres = next(data_set.glob("*cascade*")), next(data_set.glob("*lowres"))
    assert list(import_nnunet(cascade, tmp_path / "run").folds) == ["3d_lowres", "3d_cascade"]
    shutil.rmtree(lowres)
    with pytest.raises(ModelError, match="it also needs 3d_lowres"):
        import_nnunet(cascade, tmp_path / "another")


def test_models_of_different_origins_are_not_mixed(tmp_path: Path) -> None:
    copy_model("slices", tmp_path)
    copy_model("regions", tmp_path)
    with pytest.raises(ConfigError, match="different data sets, trainers or plans") as caught:
        import_nnunet(tmp_path, tmp_path / "run")
    assert len(caught.value.problems) == 2


def test_another_checkpoint_is_taken_by_name(tmp_path: Path) -> None:
    data_set = copy_model("slices", tmp_path)
    path = next(data_set.glob("*/fold_all/checkpoint_final.pth"))
    path.rename(path.with_name("checkpoint_best.pth"))
    with pytest.raises(ModelError, match=r"no fold has a checkpoint_final\.pth") as caught:
        import_nnunet(data_set, tmp_path / "run")
    assert "--checkpoint checkpoint_best.pth" in caught.value.hint
    run = import_nnunet(data_set, tmp_path / "run", "checkpoint_best.pth").run
    card = read_card(RunFolder(run).fold_folder("2d", "all"))
    assert card.provenance["checkpoint"] == "checkpoint_best.pth"


def test_nothing_is_overwritten_and_a_failed_import_leaves_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").touch()
    with pytest.raises(ConfigError, match="exists already"):
        import_nnunet(GOLDEN / "slices", run)
    data_set = copy_model("anisotropic", tmp_path / "results")
    shutil.copy(SLICES / "fold_all" / "checkpoint_final.pth", next(data_set.glob("*/fold_1")) / "checkpoint_final.pth")
    with pytest.raises(ModelError, match="needs what autoseg does not have"):
        import_nnunet(data_set, tmp_path / "another")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["results", "run"]


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    data_set = copy_model("slices", tmp_path)

    def wider(plans: dict[str, Any]) -> None:
        plans["configurations"]["2d"]["unet_max_num_features"] = 16

    edit(data_set, "plans.json", wider)
    with pytest.raises(ModelError, match="are not those of the network in the plans") as caught:
        import_nnunet(data_set, tmp_path / "run")
    assert any("encoder.2" in problem for problem in caught.value.problems)
    assert "nnUNetTrainerNoMirroring" in caught.value.hint


def test_weights_without_a_fingerprint_predict_all_the_same_and_licence_files_are_kept(tmp_path: Path) -> None:
    data_set = copy_model("slices", tmp_path)
    (next(data_set.glob("*__*")) / "LICENSE.txt").write_text("For research only.\n")
    scores = next(data_set.glob("*/fold_all")) / "validation" / "summary.json"
    scores.parent.mkdir()
    scores.write_text(json.dumps({"foreground_mean": {"Dice": 0.75}}))
    imported = import_nnunet(data_set, tmp_path / "run")
    assert read_card(RunFolder(imported.run).fold_folder("2d", "all")).provenance["validation_mean_dice"] == 0.75
    assert not RunFolder(imported.run).fingerprint_file.exists()
    assert imported.licence == "of the model slices\n\nFor research only.\n"


# --- Plans ------------------------------------------------------------------------------------------------------------


def test_everything_that_cannot_be_represented_is_told_at_once(tmp_path: Path) -> None:
    data_set = copy_model("anisotropic", tmp_path)
    edit_configurations(
        data_set,
        preprocessor_name="MyPreprocessor",
        normalization_schemes=["MyNormalization", "CTNormalization"],
        resampling_fn_data="my_resampling",
        resampling_fn_probabilities_kwargs={"is_seg": False, "order": 3, "sharpen": True},
    )

    def change(plans: dict[str, Any]) -> None:
        plans["image_reader_writer"] = "MyReader"
        plans["label_manager"] = "MyLabels"
        del plans["foreground_intensity_properties_per_channel"]["1"]["std"]
        arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        arguments |= {"nonlin_first": True, "my_argument": 3}

    edit(data_set, "plans.json", change)
    edit(data_set, "dataset.json", lambda meta: meta["labels"].update({"b": 3}))
    with pytest.raises(ModelError) as caught:
        import_nnunet(data_set, tmp_path / "run")
    told = "\n".join(caught.value.problems)
    for name in ("MyPreprocessor", "MyNormalization", "my_resampling", "'sharpen'", "order 3", "MyReader", "MyLabels"):
        assert name in told
    assert "needs std" in told
    assert "my_argument" in told
    assert "without gaps" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"network_class_name": "x.ResidualUNet"}, "ResidualUNet"),
        ({"arch_kwargs": {"nonlin": "torch.nn.ELU"}}, "torch.nn.ELU"),
        ({"arch_kwargs": {"nonlin_kwargs": {"negative_slope": 0.2}}}, "slope 0.2"),
        ({"arch_kwargs": {"nonlin_first": True}}, "nonlin_first"),
        ({"arch_kwargs": {"norm_op": "torch.nn.GroupNorm"}}, "GroupNorm"),
        ({"arch_kwargs": {"norm_op_kwargs": {"eps": 1e-5, "affine": False}}}, "affine"),
        ({"arch_kwargs": {"block": "x.BottleneckD"}}, "BottleneckD"),
        ({"arch_kwargs": {"conv_op": "torch.nn.Conv2d"}}, "Conv2d"),
        ({"arch_kwargs": {"strides": [[2, 2, 2], [1, 2, 2], [2, 2, 2]]}}, "first stage"),
    ],
)
def test_other_networks_are_refused_by_name(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    data_set = copy_model("anisotropic", tmp_path)

    def edit_network(plans: dict[str, Any]) -> None:
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        architecture["arch_kwargs"] |= change.get("arch_kwargs", {})
        architecture["network_class_name"] = change.get("network_class_name", architecture["network_class_name"])

    edit(data_set, "plans.json", edit_network)
    with pytest.raises(ModelError) as caught:
        import_nnunet(data_set, tmp_path / "run")
    assert told in "\n".join(caught.value.problems)


def test_one_number_may_stand_for_all_stages_and_axes(tmp_path: Path) -> None:
    data_set = copy_model("cascade", tmp_path)

    def shorten(plans: dict[str, Any]) -> None:
        arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        arguments |= {"kernel_sizes": 3, "strides": [1, 2]}

    before = import_nnunet(data_set, tmp_path / "a").run
    edit(data_set, "plans.json", shorten)
    after = import_nnunet(data_set, tmp_path / "b").run
    assert RunFolder(before).read_plan().configurations == RunFolder(after).read_plan().configurations


def test_the_older_format_of_plans_gives_the_network_that_nnunet_makes_of_it() -> None:
    plans = read_plans(SLICES / "plans.json")
    assert plans.intensities["0"]["mean"] == 210.0  # "by_modality" in older files
    network = plans.configuration("2d", SLICES / "plans.json").architecture
    assert network.kind == "PlainConvUNet"
    assert network.arguments["features_per_stage"] == [4, 8, 8]
    assert network.arguments["norm_op"] == "torch.nn.modules.instancenorm.InstanceNorm2d"


def test_plans_that_inherit_in_a_circle_or_from_nothing_are_refused(tmp_path: Path) -> None:
    data_set = copy_model("cascade", tmp_path)
    edit(data_set, "plans.json", lambda plans: plans["configurations"]["3d_fullres"].update(inherits_from="3d_lowres"))
    with pytest.raises(ModelError, match="inherits from itself"):
        import_nnunet(data_set, tmp_path / "run")
    edit(data_set, "plans.json", lambda plans: plans["configurations"]["3d_fullres"].update(inherits_from="nowhere"))
    with pytest.raises(ModelError, match="no configuration 'nowhere'"):
        read_plans(next(data_set.glob("*lowres")) / "plans.json").configuration("3d_lowres", Path("plans.json"))


def test_folds_that_were_trained_otherwise_are_not_averaged(tmp_path: Path) -> None:
    data_set = copy_model("anisotropic", tmp_path)
    path = next(data_set.glob("*/fold_1/checkpoint_final.pth"))
    torch.save(torch.load(path, weights_only=False) | {"inference_allowed_mirroring_axes": (0,)}, path)
    with pytest.raises(ModelError) as caught:
        import_nnunet(data_set, tmp_path / "run")
    assert "differ in mirror_axes (fold_0: (0, 1, 2), fold_1: (0,))" in caught.value.problems[0]


def test_models_of_the_first_nnunet_are_told_from_those_of_the_second(tmp_path: Path) -> None:
    data_set = copy_model("slices", tmp_path)
    torch.save({"state_dict": {}, "epoch": 3}, next(data_set.glob("*/fold_all/checkpoint_final.pth")))
    with pytest.raises(ModelError, match="no checkpoint of nnU-Net v2") as caught:
        import_nnunet(data_set, tmp_path / "run")
    assert "nnU-Net v1" in caught.value.hint


def imported_preprocessing(tmp_path: Path, **entries: Any) -> PreprocessPlan:
    data_set = copy_model("anisotropic", tmp_path)
    edit_configurations(data_set, **entries)
    run = import_nnunet(data_set, tmp_path / "run").run
    return RunFolder(run).read_plan().configurations["3d_fullres"].preprocess


def test_arguments_of_resampling_are_honoured(tmp_path: Path) -> None:
    plan = imported_preprocessing(
        tmp_path,
        resampling_fn_data_kwargs={"is_seg": False, "order": 1, "order_z": 3, "force_separate_z": True},
        resampling_fn_probabilities_kwargs={"is_seg": False, "order": 0, "force_separate_z": False},
        resampling_fn_seg_kwargs={"is_seg": True, "order": 0, "separate_z_anisotropy_threshold": 2},
    )
    assert (plan.image_order, plan.image_coarse_order, plan.separate_axis_ratio) == (1, 3, 0.0)
    # Where force_separate_z is left out nnU-Net never resamples an axis on its own, whatever the threshold.
    assert (plan.label_order, plan.label_decision, plan.label_separate_axis_ratio) == (0, "half", 1e9)
    assert (plan.logits_order, plan.logits_coarse_order, plan.logits_separate_axis_ratio) == (0, 0, 1e9)


def test_labels_go_to_the_class_that_fills_most_where_there_is_a_choice(tmp_path: Path) -> None:
    assert imported_preprocessing(tmp_path).label_decision == "largest"


def test_the_fields_of_resampling_are_left_out_of_the_digest_where_nothing_is_special(tmp_path: Path) -> None:
    plan = imported_preprocessing(tmp_path)
    assert set(plan.model_dump()) == {
        "orientation",
        "axis_order",
        "target_spacing",
        "normalization",
        "crop_to_nonzero",
        "image_order",
        "label_order",
        "label_decision",
        "logits_order",
        "separate_axis_ratio",
    }
    assert json.loads(plan.to_json())["separate_axis_ratio"] == 3.0


@pytest.mark.parametrize(
    ("images", "logits", "is_possible"),
    [("spline", "none", False), ("none", "spline", True), ("none", "none", True)],
)
def test_unresampled_images(images: str, logits: str, is_possible: bool, tmp_path: Path) -> None:
    entries: dict[str, Any] = {}
    for name, function in (("data", images), ("probabilities", logits)):
        if function == "none":
            entries |= {f"resampling_fn_{name}": "no_resampling_hack", f"resampling_fn_{name}_kwargs": {}}
    if not is_possible:
        with pytest.raises(ModelError) as caught:
            imported_preprocessing(tmp_path, **entries)
        assert "predictions would not fit" in caught.value.problems[0]
        return
    plan = imported_preprocessing(tmp_path, **entries)
    volume = volume_of(np.ones((2, 7, 8, 9), np.float32), (2.0, 3.0, 4.0))
    assert trace(volume, plan).resampled_shape == trace(volume, plan).crop_shape


def volume_of(array: Any, spacing: tuple[float, float, float], **more: Any) -> Any:
    from autoseg.domain.geometry import Geometry, Volume

    return Volume(array, Geometry(array.shape[1:], np.diag([*spacing, 1.0]), **more))


def test_voxel_sizes_inside_tiff_stacks_do_not_count_where_nnunet_does_not_read_them(tmp_path: Path) -> None:
    data_set = copy_model("anisotropic", tmp_path)
    edit(data_set, "plans.json", lambda plans: plans.update(image_reader_writer="Tiff3DIO"))
    run = import_nnunet(data_set, tmp_path / "run").run
    plan = RunFolder(run).read_plan().configurations["3d_fullres"].preprocess
    array = np.ones((2, 6, 6, 6), np.float32)
    for more, expected in (
        ({"stated": "spacing"}, (1.0, 1.0, 1.0)),
        ({"stated": "spacing", "is_stated_beside": True}, (0.5, 0.3, 0.2)),
        ({"stated": "place"}, (0.5, 0.3, 0.2)),
    ):
        found = trace(volume_of(array, (0.2, 0.5, 0.3), **more), plan).source_spacing_mm
        assert found == pytest.approx(expected)


# --- The command line -------------------------------------------------------------------------------------------------


def test_import_and_info_show_origin_and_licence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "nnunet", str(GOLDEN / "slices"), "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "2d: fold all" in told
    assert "of the model slices" in told
    assert main(["info", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "trainer: nnUNetTrainerNoMirroring" in told
    assert "licence: of the model slices" in told


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda root: root / "nothing", 2),
        (lambda root: root, 5),
        (lambda root: Path(__file__), 5),
    ],
)
def test_exit_codes(make: Callable[[Path], Path], code: int, tmp_path: Path) -> None:
    assert main(["import", "nnunet", str(make(tmp_path)), "--out", str(tmp_path / "run")]) == code
    assert not (tmp_path / "run").exists()
