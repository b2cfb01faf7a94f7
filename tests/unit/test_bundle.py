"""A model as a MONAI bundle: what its files say, and that MONAI's own classes run it to the labels of `predict`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, verify_net_in_out
from monai.bundle.config_parser import ConfigParser
from monai.data.meta_tensor import MetaTensor
from toy_models import toy_model
from toy_runs import toy_run, write_images

from autoseg.cli.app import main
from autoseg.domain.dataset import Channel, LabelClass, LabelSchema
from autoseg.domain.inference import FillHoles, InferenceRecipe, KeepLargest, Member
from autoseg.errors import AutosegError, ConfigError, ModelError
from autoseg.interop.bundle import SCHEMA, inference_config, literal
from autoseg.io.files import file_digest
from autoseg.io.images import read_labels
from autoseg.io.model import load_model, save_model
from autoseg.io.run_folder import RunFolder
from autoseg.network.export import MeanOf
from autoseg.network.unet import restore
from autoseg.pipeline.bundle import BundleDataset, BundleInferer, bundle_network
from autoseg.pipeline.bundle_exporting import export_bundle
from autoseg.pipeline.exporting import opened
from autoseg.pipeline.members import choose
from autoseg.pipeline.prediction import predict

RECIPE = InferenceRecipe(
    members=(
        Member(configuration="3d_cascade", weight=2.0, temperature=0.5),
        Member(configuration="2d", folds=(1,), temperature=0.3),
    ),
    postprocessing=(KeepLargest(classes=("low", "high"), joined=True), FillHoles(classes=("low",), max_ml=2)),
)
CASCADE = {"3d_cascade": (0, 1), "3d_lowres": (0, 1), "3d_fullres": (0, 1), "2d": (0, 1)}

# Source: "required" in MONAI's meta_schema_20240725.json, and that of its "tensor".
REQUIRED = {
    "schema": str,
    "version": str,
    "monai_version": str,
    "pytorch_version": str,
    "numpy_version": str,
    "required_packages_version": dict,
    "task": str,
    "description": str,
    "authors": str,
    "copyright": str,
    "network_data_format": dict,
}
REQUIRED_OF_TENSORS = {
    "type": str,
    "format": str,
    "num_channels": int,
    "spatial_shape": list,
    "dtype": str,
    "value_range": list,
    "is_patch_data": bool,
    "channel_def": dict,
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = toy_run(tmp_path / "run", CASCADE, has_cascade=True)
    made.write(made.inference_file, RECIPE)
    return made


def predicted(model: Path, images: Path, out: Path) -> dict[str, bytes]:
    predict(model, [images], out, device="cpu", precision="fp32").raise_failures()
    return label_maps(out)


def label_maps(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.nii.gz")}


def workflow(bundle: Path, **settings: Any) -> ConfigWorkflow:
    """As `python -m monai.bundle run` makes it, without the log."""
    made = ConfigWorkflow(
        str(bundle / "configs" / "inference.json"),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(bundle),
        **{"device": "cpu", "precision": "fp32", **settings},
    )
    made.initialize()
    return made


def metadata(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "configs" / "metadata.json").read_text())
    return found


def has_types(found: Mapping[str, Any], types: Mapping[str, type]) -> bool:
    return {name: type(found[name]) for name in types} == dict(types)


def test_monai_runs_it_to_the_labels_of_predict_when_the_run_is_gone(run: RunFolder, tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 2)[0].parent
    expected = predicted(run.root, images, tmp_path / "expected")
    bundle = export_bundle(run.root, tmp_path / "bundle")
    shutil.rmtree(run.root)
    made = workflow(bundle, dataset_dir=str(images), output_dir=str(tmp_path / "out"))
    assert made.check_properties() == []
    made.run()
    assert len(expected) == 2
    assert label_maps(tmp_path / "out") == expected


def test_settings_are_those_of_predict(run: RunFolder, tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 1)[0].parent
    bundle = export_bundle(run.root, tmp_path / "bundle", "3d_fullres")
    settings: dict[str, Any] = {"tta": "full", "overlap": 0.25}
    predict(bundle, [images], tmp_path / "expected", device="cpu", precision="fp32", **settings).raise_failures()
    plain = predicted(bundle, images, tmp_path / "plain")
    workflow(bundle, dataset_dir=str(images), output_dir=str(tmp_path / "out"), **settings).run()
    assert label_maps(tmp_path / "out") == label_maps(tmp_path / "expected") != plain


def test_it_is_an_exported_model_too_folder_or_zipped(run: RunFolder, tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 1)[0].parent
    expected = predicted(run.root, images, tmp_path / "expected")
    bundle = export_bundle(run.root, tmp_path / "parent" / "bundle")
    assert predicted(bundle, images, tmp_path / "by_folder") == expected
    for number, root in enumerate((bundle, bundle.parent)):
        archive = Path(shutil.make_archive(str(tmp_path / f"zipped{number}"), "zip", root))
        with opened(archive) as inside:
            assert choose(inside).digest() == choose(bundle).digest()


def test_the_files_of_a_bundle(run: RunFolder, tmp_path: Path) -> None:
    bundle = export_bundle(run.root, tmp_path / "bundle")
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    folds = ["2d/fold_1", "3d_cascade/fold_0", "3d_cascade/fold_1", "3d_lowres/fold_0", "3d_lowres/fold_1"]
    weights = {f"models/{fold}/weights.{ending}" for fold in folds for ending in ("json", "safetensors")}
    configs = {f"configs/{name}" for name in ("inference.json", "logging.conf", "metadata.json")}
    assert files == {"LICENSE", "docs/README.md", "inference.json", *configs, *weights}
    card = (bundle / "docs" / "README.md").read_text()
    assert "python -m monai.bundle run --config_file THIS_FOLDER/configs/inference.json" in card
    assert "run bundles of people whom you trust" in card
    assert "nothing in this folder can run code" not in card
    assert (bundle / "LICENSE").read_text().startswith("Not stated.")


def test_metadata_has_what_monai_requires(run: RunFolder, tmp_path: Path) -> None:
    bundle = export_bundle(run.root, tmp_path / "bundle")
    found = metadata(bundle)
    assert has_types(found, REQUIRED)
    assert found["schema"] == SCHEMA
    assert found["name"] == "toy"
    assert list(found["required_packages_version"]) == ["autoseg-unet"]
    tensors = [tensor for group in found["network_data_format"].values() for tensor in group.values()]
    assert len(tensors) == 3
    assert all(has_types(tensor, REQUIRED_OF_TENSORS) for tensor in tensors)
    assert {name: file_digest(bundle / name) for name in found["weights_sha256"]} == found["weights_sha256"]
    assert len(found["weights_sha256"]) == 5


def test_metadata_names_channels_and_label_values(run: RunFolder, tmp_path: Path) -> None:
    format_ = metadata(export_bundle(run.root, tmp_path / "bundle"))["network_data_format"]
    image, pred, label_map = (format_[group][name] for group, name in (
        ("inputs", "image"), ("outputs", "pred"), ("post_processed_outputs", "pred"),
    ))  # fmt: skip
    assert (image["num_channels"], image["spatial_shape"], image["modality"]) == (3, [8, 8, 8], "MR")
    assert image["channel_def"] == {"0": "MR, preprocessed", "1": "low by 3d_lowres", "2": "high by 3d_lowres"}
    assert (pred["format"], pred["channel_def"]) == ("labels", {"0": "background", "1": "low", "2": "high"})
    assert label_map["channel_def"] == {"0": "background", "7": "low", "300": "high"}
    assert label_map["value_range"] == [0, 300]


def test_regions_are_classes_that_overlap_and_names_cannot_be_taken_for_expressions(tmp_path: Path) -> None:
    classes = (("$whole", (1, 2)), ("@core", (2,)), ("rim", (3,)))
    regions = LabelSchema(
        classes=tuple(LabelClass(name=name, values=values) for name, values in classes), regions_class_order=(1, 2, 3)
    )
    model = toy_model()
    network = model.card.settings.network.model_copy(update={"output": "regions"})
    settings = model.card.settings.model_copy(update={"network": network})
    changes = {"labels": regions, "channels": (Channel(name="%CT"),), "dataset": "$x"}
    plan = model.card.plan.model_copy(update={**changes, "configurations": {"3d_fullres": settings}})
    card = model.card.model_copy(update={"plan": plan, "digest": plan.digest("3d_fullres")})
    save_model(tmp_path / "fold_0", model.weights, card)
    bundle = export_bundle(tmp_path / "fold_0", tmp_path / "bundle")
    parser = ConfigParser()
    parser.read_meta(str(bundle / "configs" / "metadata.json"))
    # Evaluates every expression, looks up every reference and file that it finds.
    found = parser.get_parsed_content("_meta_")
    outputs = found["network_data_format"]["outputs"]["pred"]
    assert (outputs["format"], outputs["channel_def"]) == ("classes", {"0": "'$whole'", "1": "'@core'", "2": "rim"})
    values = found["network_data_format"]["post_processed_outputs"]["pred"]["channel_def"]
    assert values == {"0": "background", "1": "'$whole'", "2": "'$whole, @core'", "3": "rim"}
    assert found["name"] == "'$x'"


def test_plain_names_stay() -> None:
    assert [literal(name) for name in ("a $b", "%a", "")] == ["a $b", "'%a'", ""]


def test_monai_finds_the_network_to_be_as_the_metadata_say(run: RunFolder, tmp_path: Path) -> None:
    bundle = export_bundle(run.root, tmp_path / "bundle")
    configs = {name: str(bundle / "configs" / f"{name}.json") for name in ("metadata", "inference")}

    def verify(**changes: Any) -> None:
        verify_net_in_out(
            net_id="network_def",
            meta_file=configs["metadata"],
            config_file=configs["inference"],
            device="cpu",
            bundle_root=str(bundle),
            **changes,
        )

    verify()
    with pytest.raises(ValueError, match="doesn't match"):
        verify(**{"_meta_::network_data_format::outputs::pred::num_channels": 4})


def test_the_network_is_the_mean_of_the_folds(run: RunFolder, tmp_path: Path) -> None:
    bundle = export_bundle(run.root, tmp_path / "bundle", "3d_fullres")
    models = [load_model(run.fold_folder("3d_fullres", fold)) for fold in (0, 1)]
    networks = [restore(model.card.settings.network, model.weights) for model in models]
    x = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(bundle_network(bundle)(x), MeanOf(networks)(x))


def test_data_set_and_inferer_work_in_other_programs(run: RunFolder, tmp_path: Path) -> None:
    paths = write_images(tmp_path / "in", 2)
    bundle = export_bundle(run.root, tmp_path / "bundle")
    predicted(bundle, paths[0].parent, tmp_path / "out")
    made = workflow(bundle, dataset_dir=str(paths[0].parent))
    dataset, inferer = made.dataset, made.inferer
    assert isinstance(dataset, BundleDataset)
    assert isinstance(inferer, BundleInferer)
    assert [item["case"] for item in (dataset[0], dataset[1])] == ["case_00", "case_01"]
    assert len(dataset) == 2
    for number in range(2):
        image = dataset[number]["image"]
        assert image.meta["filename_or_obj"] == str(paths[number])
        found = inferer(image[None], made.network_def)
        labels, geometry = read_labels(tmp_path / "out" / paths[number].name)
        assert np.array_equal(found[0, 0].numpy(), labels)
        assert np.array_equal(found.affine.numpy(), geometry.affine)
        assert np.array_equal(image.affine.numpy(), geometry.affine)
    # As MONAI's loaders make a batch: an affine for each.
    batch = torch.stack([image.as_tensor(), image.as_tensor()])
    affines = torch.stack([image.affine, image.affine])
    both = inferer(MetaTensor(batch, affine=affines))
    assert np.array_equal(both[1, 0].numpy(), labels)


def test_what_is_no_image_of_monais_is_refused(run: RunFolder, tmp_path: Path) -> None:
    inferer = BundleInferer(export_bundle(run.root, tmp_path / "bundle"), "cpu")
    for wrong in (torch.zeros(1, 1, 8, 8, 8), MetaTensor(torch.zeros(1, 8, 8, 8))):
        with pytest.raises(ConfigError, match=r"MetaTensors of the shape \(B, C, I, J, K\), got"):
            inferer(wrong)


def test_a_failing_image_stops_no_other_and_is_named(run: RunFolder, tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", 2)
    images[0].write_bytes(b"broken")
    bundle = export_bundle(run.root, tmp_path / "bundle", "2d")
    made = workflow(bundle, dataset_dir=str(images[0].parent), output_dir=str(tmp_path / "out"))
    with pytest.raises(RuntimeError) as problem:
        made.run()
    assert isinstance(problem.value.__cause__, AutosegError)
    assert "case_00" in problem.value.__cause__.problems[0]
    assert list(label_maps(tmp_path / "out")) == ["case_01.nii.gz"]


def test_parts_that_bundles_elsewhere_name_stay() -> None:
    parts = {key: value for key, value in inference_config().items() if isinstance(value, dict)}
    module = "autoseg.pipeline.bundle"
    settings = {"device", "precision", "tta", "overlap", "skip_empty", "engine"}
    assert {key: (value["_target_"], set(value) - {"_target_"}) for key, value in parts.items()} == {
        "network_def": (f"{module}.bundle_network", {"bundle_root"}),
        "inferer": (f"{module}.BundleInferer", {"bundle_root"} | settings),
        "dataset": (f"{module}.BundleDataset", {"data", "bundle_root"}),
        "evaluator": (f"{module}.BundleEvaluator", {"dataset", "inferer", "output_dir", "restart"}),
    }


def test_the_command_writes_one_and_nothing_else_is_overwritten(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    words = ["export", str(run.root), "--out", str(out), "--format", "bundle", "--config", "2d", "--fold", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert list(metadata(out)["weights_sha256"]) == ["models/2d/fold_0/weights.safetensors"]
    assert main(words) == 2
    with pytest.raises(ConfigError, match="a bundle is a folder"):
        export_bundle(run.root, tmp_path / "bundle.zip")
    weights = run.fold_folder("2d", 1) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="do not match"):
        export_bundle(run.root, tmp_path / "other")
    assert not (tmp_path / "other").exists()
