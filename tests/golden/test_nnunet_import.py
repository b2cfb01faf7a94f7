"""Imported models against nnU-Net 2.8.1's own predictions with tiny checkpoints (scripts/nnunet_import_golden.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from autoseg.domain.dataset import Case
from autoseg.inference.inputs import find_cases
from autoseg.inference.predictor import Predictor
from autoseg.inference.tta import with_mirroring
from autoseg.interop.nnunet import Imported, import_nnunet
from autoseg.io.images import read_case, read_labels
from autoseg.pipeline.cascade import load_previous
from autoseg.pipeline.prediction import load_models, predict

MODELS = Path(__file__).parent / "nnunet_models"
# Model, configuration by nnU-Net's name and by ours.
TRAINED = [
    ("anisotropic", "3d_fullres", "3d_fullres"),
    ("regions", "3d_fullres", "3d_fullres"),
    ("slices", "2d", "2d"),
    ("cascade", "3d_lowres", "3d_lowres"),
    ("cascade", "3d_cascade_fullres", "3d_cascade"),
]
KEPT = (slice(None), *(slice(None, None, 3),) * 3)
LOGITS_TOLERANCE = 1e-3
"""Of logits that span about 10. Source: issue, "whole-volume logits within 1e-3"."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Imported]:
    """Each model imported from the folder of its data set."""
    root = tmp_path_factory.mktemp("imported")
    return {name: import_nnunet(MODELS / name, root / name) for name in {name for name, _, _ in TRAINED}}


def the_case(model: str, num_channels: int) -> Case:
    files = sorted((MODELS / model).glob("case_*.nii.gz"))
    return find_cases(files, num_channels)[0]


@pytest.mark.parametrize(("model", "theirs", "ours"), TRAINED)
@pytest.mark.parametrize("tta", ["none", "full"])
def test_logits_and_labels_are_nnunets(
    model: str, theirs: str, ours: str, tta: str, runs: dict[str, Imported], tmp_path: Path
) -> None:
    run = runs[model].run
    predictor = Predictor(load_models(run, ours, None), device="cpu", engine="torch")
    if tta == "full":
        predictor._forward = with_mirroring(predictor._forward, predictor.settings)
    case = the_case(model, predictor.num_channels)
    volume = read_case(case, predictor.num_channels)
    prepared = predictor.prepare(volume)
    previous = None
    if predictor.settings.previous_stage is not None:
        # The very label map that nnU-Net's cascade was given.
        values, _ = read_labels(MODELS / model / "3d_lowres_none.nii.gz", volume.geometry)
        previous = predictor.previous_map(values, prepared)
    with np.load(MODELS / model / f"{theirs}.npz", allow_pickle=False) as stored:
        assert prepared.image.shape[1:] == tuple(stored["shape"])
        expected = stored[f"logits_{tta}"]
    with torch.inference_mode():
        axis, stream = predictor.logits(prepared, previous)
        logits = torch.cat([slab.clone() for _, _, slab in stream], dim=axis + 1).numpy()
    np.testing.assert_allclose(logits[KEPT], expected, atol=LOGITS_TOLERANCE, rtol=0)
    found = predictor.segment(prepared, previous)
    labels, geometry = read_labels(MODELS / model / f"{theirs}_{tta}.nii.gz")
    assert geometry.shape == volume.geometry.shape
    assert len(np.unique(labels)) > 1
    assert np.array_equal(found, labels)


@pytest.mark.parametrize("model", ["anisotropic", "regions", "slices"])
def test_predict_writes_nnunets_label_map_on_the_images_grid(
    model: str, runs: dict[str, Imported], tmp_path: Path
) -> None:
    files = sorted((MODELS / model).glob("case_*.nii.gz"))
    outcome = predict(runs[model].run, files, tmp_path / "out", device="cpu", tta="full", engine="torch")
    outcome.raise_failures()
    expected, reference = read_labels(next((MODELS / model).glob("*_full.nii.gz")))
    found, _ = read_labels(tmp_path / "out" / "case.nii.gz", reference)
    assert np.array_equal(found, expected)


def test_a_cascade_goes_the_whole_way_by_itself(runs: dict[str, Imported], tmp_path: Path) -> None:
    models = load_models(runs["cascade"].run, "3d_cascade", None)
    assert [model.card.configuration for model in load_previous(models) or ()] == ["3d_lowres"]
    image = MODELS / "cascade" / "case_0000.nii.gz"
    predict(
        runs["cascade"].run, [image], tmp_path, configuration="3d_cascade", tta="none", device="cpu", engine="torch"
    ).raise_failures()
    found, _ = read_labels(tmp_path / "case.nii.gz")
    expected, _ = read_labels(MODELS / "cascade" / "3d_cascade_fullres_none.nii.gz")
    assert np.array_equal(found, expected)


def test_imported_models_say_where_they_come_from(runs: dict[str, Imported]) -> None:
    assert runs["anisotropic"].folds == {"3d_fullres": (0, 1)}
    assert runs["slices"].folds == {"2d": ("all",)}
    assert runs["cascade"].folds == {"3d_lowres": (0,), "3d_cascade": (0,)}
    card = load_models(runs["regions"].run, None, None)[0].card
    assert card.provenance["imported_from"] == "nnU-Net v2"
    assert card.provenance["trainer"] == "nnUNetTrainer_onlyMirror01"
    assert card.provenance["licence"] == "of the model regions"
    assert card.settings.inference.mirror_axes == (1,)
    assert card.settings.inference.precision == "fp32"
    assert card.plan.labels.ignore == 4


def test_imported_models_predict_in_fp32_unless_asked_otherwise(runs: dict[str, Imported]) -> None:
    models = load_models(runs["slices"].run, None, None)
    assert Predictor(models, device="cpu").precision == "fp32"
    assert Predictor(models, device="cpu", precision="bf16").precision == "bf16"
