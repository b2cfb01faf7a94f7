"""`from autoseg import Predictor`: light to import, takes images of every kind, keeps nothing of them."""

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from toy_models import SCHEMA, toy_model, toy_volume
from toy_runs import oblique_volume, toy_run

import autoseg
from autoseg import Predictor
from autoseg.domain.geometry import Volume
from autoseg.domain.inference import DropSmall, DropUnlikely, InferenceRecipe, Member, Threshold
from autoseg.errors import ConfigError, DatasetError
from autoseg.io.images import read_image, read_labels, write_image
from autoseg.pipeline.exporting import export_model
from autoseg.pipeline.prediction import predict

PAGE_BYTES = 4096
GROWTH_BYTES = 3_000_000
"""What a process may grow by for other reasons. An image, prepared and with its label map, takes 130 KB here."""


def test_importing_autoseg_imports_nothing_heavy() -> None:
    code = (
        "import sys, autoseg; heavy = {'torch', 'numpy', 'nibabel', 'pydantic'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "from autoseg import Predictor; assert 'torch' in sys.modules and Predictor.__module__.startswith('autoseg')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Predicator'"):
        _ = autoseg.Predicator  # type: ignore[attr-defined]


def test_every_kind_of_image_gives_the_same_label_map(tmp_path: Path) -> None:
    predictor = Predictor(toy_model(), device="cpu", precision="fp32")
    volume = oblique_volume()
    path = tmp_path / "image.nii.gz"
    write_image(path, volume.array[0], volume.geometry)
    expected = predictor(volume)
    assert expected.labels.shape == volume.geometry.shape
    assert len(np.unique(expected.labels)) > 1
    opened = nib.load(path)
    assert isinstance(opened, nib.Nifti1Image)
    for image, where in (
        (path, {}),
        (str(path), {}),
        ([path], {}),
        (opened, {}),
        (nib.Nifti1Image(volume.array.transpose(1, 2, 3, 0), volume.geometry.affine), {}),
        (volume.array, {"affine": volume.geometry.affine}),
        (volume.array[0], {"affine": volume.geometry.affine}),
    ):
        found = predictor(image, **where)
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.geometry.affine, volume.geometry.affine, atol=1e-5)
    plain = toy_volume()
    straight = Volume(plain.array, type(plain.geometry)(plain.geometry.shape, np.diag([1.3, 1.0, 3.0, 1.0])))
    by_spacing = predictor(plain.array[0], spacing_mm=(1.3, 1.0, 3.0))
    np.testing.assert_array_equal(by_spacing.labels, predictor(straight).labels)


def test_what_is_saved_lies_on_the_image(tmp_path: Path) -> None:
    volume = oblique_volume()
    found = Predictor(toy_model(), device="cpu", precision="fp32")(volume)
    path = found.save(tmp_path / "labels.nii.gz")
    labels, geometry = read_labels(path, volume.geometry)
    np.testing.assert_array_equal(labels, found.labels)
    image = found.to_nibabel()
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), found.labels)
    np.testing.assert_allclose(image.affine, geometry.affine, atol=1e-6)
    assert image.get_data_dtype() == found.labels.dtype
    assert found.schema == SCHEMA


def test_a_run_an_export_and_the_command_agree_rules_included(tmp_path: Path) -> None:
    run = toy_run(tmp_path / "run", {"3d_fullres": (0, 1), "2d": (0,)})
    rules = (
        Threshold(classes=("low",), min_probability=0.4),
        DropSmall(classes=("low", "high"), min_ml=0.05),
        DropUnlikely(classes=("high",), min_mean=0.5),
    )
    members = (Member(configuration="3d_fullres", temperature=0.2), Member(configuration="2d", temperature=0.3))
    run.write(run.inference_file, InferenceRecipe(members=members, postprocessing=rules))
    volume = oblique_volume()
    path = tmp_path / "image.nii.gz"
    write_image(path, volume.array[0], volume.geometry)
    (written,) = predict(run.root, [path], tmp_path / "out", device="cpu", precision="fp32").written
    expected = read_image(written).array[0]
    archive = export_model(run.root, tmp_path / "model.zip")
    for model in (run.root, str(archive)):
        np.testing.assert_array_equal(Predictor(model, device="cpu", precision="fp32")(path).labels, expected)
    alone = Predictor(run.root, configuration="3d_fullres", device="cpu", precision="fp32")
    assert not np.array_equal(alone(path).labels, expected)
    assert alone.channels == ("MR",)


def test_images_that_do_not_say_where_they_lie_are_refused() -> None:
    predictor = Predictor(toy_model(), device="cpu", precision="fp32")
    array, affine = toy_volume().array, np.eye(4)
    for arguments in ({}, {"affine": affine, "spacing_mm": (1, 1, 1)}, {"spacing_mm": (1, 1)}):
        with pytest.raises(ConfigError, match="spacing_mm"):
            predictor(array, **arguments)
    with pytest.raises(ConfigError, match="for arrays"):
        predictor(toy_volume(), affine=affine)
    with pytest.raises(ConfigError, match="shape"):
        predictor(array[0, 0], affine=affine)
    with pytest.raises(DatasetError, match="2 channels"):
        predictor(np.concatenate([array, array]), affine=affine)
    with pytest.raises(ConfigError, match="loaded"):
        Predictor(toy_model(), configuration="2d")


def test_nothing_of_an_image_is_kept_and_memory_does_not_grow() -> None:
    predictor = Predictor(toy_model(), device="cpu", precision="fp32")

    def once() -> weakref.ref[np.ndarray]:
        array = toy_volume((20, 28, 20)).array[0].copy()
        predictor(array, spacing_mm=(1.3, 1.0, 3.0))
        return weakref.ref(array)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES

    first = once()
    gc.collect()
    assert first() is None
    if not Path("/proc/self/statm").is_file():
        pytest.skip("this system does not tell how much memory a process has")
    for _ in range(10):
        once()
    before = resident_bytes()
    for _ in range(60):
        once()
    assert resident_bytes() - before < GROWTH_BYTES


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "python-api.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    toy_run(tmp_path / "RUN", {"3d_fullres": (0,)})
    volume = oblique_volume()
    write_image("image.nii.gz", volume.array[0], volume.geometry)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    expected = names["found"].labels
    assert names["voxels"] == {name: int((expected == value).sum()) for name, value in (("low", 7), ("high", 300))}
    for name in ("labels.nii.gz", "labels_by_nibabel.nii.gz"):
        np.testing.assert_array_equal(read_labels(name, volume.geometry)[0], expected)
    np.testing.assert_array_equal(names["by_array"].labels, expected)
    assert names["by_spacing"].labels.shape == expected.shape
