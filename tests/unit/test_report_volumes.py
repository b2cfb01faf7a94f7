"""What the viewer gets: the right voxels at the right place in the world, small, and which error is where."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from chosen_run import PAIR, make_chosen_run
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from synthetic_run import SCHEMA, SHAPE

from autoseg.domain.dataset import Case
from autoseg.domain.geometry import Geometry
from autoseg.evaluation.metrics import case_metrics
from autoseg.evaluation.summaries import CaseMetrics
from autoseg.io.images import write_image, write_labels
from autoseg.io.probabilities import ProbabilityStore
from autoseg.io.run_folder import fold_name
from autoseg.io.viewing import nifti_gz
from autoseg.report.collect import CaseRow, collect
from autoseg.report.scene import MIN_MARGIN_VOX, read_scene
from autoseg.report.uncertainty import entropy_of, uncertainty_of
from autoseg.report.volumes import ADDED, CONFUSED, MAX_SIDE_VOX, MISSED, error_map, make_volumes


def opened(text: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def scene_of(folder: Path, shape: tuple[int, ...], affine: NDArray[np.float64], *places: tuple[int, int, int]):
    """A case with one voxel of the first class in the reference and one in the prediction."""
    geometry = Geometry(shape, affine)
    image = np.zeros(shape, np.float32)
    maps = [np.zeros(shape, np.uint8) for _ in range(2)]
    for labels, place in zip(maps, places, strict=True):
        labels[place] = 1
    image[places[0]] = 100.0
    names = [folder / name for name in ("image.nii.gz", "reference.nii.gz", "prediction.nii.gz")]
    write_image(names[0], image, geometry)
    for path, labels in zip(names[1:], maps, strict=True):
        write_labels(path, labels, geometry)
    uncertainty = np.full(shape, 0.25, np.float32)
    uncertainty[places[1]] = 1.0
    write_image(folder / "prediction_uncertainty.nii.gz", uncertainty, geometry)
    found = CaseMetrics(
        case="a", classes=case_metrics(maps[1], maps[0], SCHEMA, geometry.spacing_mm, {"Anterior": 1, "Posterior": 1})
    )
    case = Case(id="a", images=(str(names[0]),), labels=str(names[1]))
    return read_scene(case, [CaseRow("3d_fullres", 0, found, names[2])], SCHEMA, ["MRI"])


def affine_of(codes: str) -> NDArray[np.float64]:
    """Voxels of 1 x 2 x 3 mm along the file's axes, which run as the codes say, somewhere in the world."""
    turn = nib.orientations.inv_ornt_aff(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)), (40, 40, 40))
    return np.array([[1.0, 0, 0, 5], [0, 1, 0, -7], [0, 0, 1, 11], [0, 0, 0, 1]]) @ turn @ np.diag([1.0, 2.0, 3.0, 1.0])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "IRA"])
def test_a_voxel_keeps_its_place_in_the_world(tmp_path: Path, codes: str) -> None:
    affine, place = affine_of(codes), (20, 11, 30)
    volumes = make_volumes("a", scene_of(tmp_path, (40, 40, 40), affine, place, (21, 11, 30)), SCHEMA)
    world = affine[:3, :3] @ place + affine[:3, 3]
    for text in (volumes.reference, volumes.images["MRI"]):
        found = opened(text)
        (voxel,) = np.argwhere(np.asarray(found.dataobj) > 0.5)
        assert found.affine[:3, :3] @ voxel + found.affine[:3, 3] == pytest.approx(world, abs=1e-4)
        assert np.array_equal(io_orientation(found.affine), io_orientation(np.eye(4)))


def test_it_is_cut_to_the_labels_and_says_where_to_look(tmp_path: Path) -> None:
    volumes = make_volumes("a", scene_of(tmp_path, (40, 40, 40), np.eye(4), (20, 20, 20), (20, 20, 22)), SCHEMA)
    side = 2 * MIN_MARGIN_VOX + 1
    assert opened(volumes.reference).shape == (side, side, side + 2)
    # Nothing but the two voxels is wrong: the first of them along each axis.
    middle = (MIN_MARGIN_VOX + 0.5) / side
    assert volumes.focus["3d_fullres"] == pytest.approx((middle, middle, (MIN_MARGIN_VOX + 0.5) / (side + 2)), abs=1e-4)


def test_long_sides_are_reduced_to_means_and_labels_to_voxels(tmp_path: Path) -> None:
    volumes = make_volumes("a", scene_of(tmp_path, (4, 4, 400), np.eye(4), (1, 1, 2), (1, 1, 397)), SCHEMA)
    found = opened(volumes.images["MRI"])
    assert volumes.is_reduced
    assert max(found.shape) <= MAX_SIDE_VOX
    step = -(-400 // MAX_SIDE_VOX)
    assert found.header.get_zooms()[:3] == pytest.approx((1, 1, step))
    # The first block holds voxels 0 ... 3: its middle is at 1.5 mm.
    assert found.affine[:3, 3] == pytest.approx((0, 0, (step - 1) / 2))
    assert opened(volumes.reference).shape == found.shape


def test_uncertainty_beside_a_prediction_is_a_layer(tmp_path: Path) -> None:
    volumes = make_volumes("a", scene_of(tmp_path, (30, 30, 30), np.eye(4), (15, 15, 15), (15, 15, 16)), SCHEMA)
    layer = opened(volumes.predictions["3d_fullres"]["uncertainty"]).get_fdata()
    assert (layer.max(), layer.min()) == pytest.approx((1.0, 0.25), abs=0.01)
    prediction = opened(volumes.predictions["3d_fullres"]["prediction"]).get_fdata()
    assert np.argmax(layer) == np.argmax(prediction)


def test_errors_are_missed_added_or_confused() -> None:
    reference, labels = np.array([1, 1, 0, 2, 0]), np.array([1, 0, 2, 1, 0])
    assert error_map(labels, reference, labels != reference, SCHEMA).tolist() == [0, MISSED, ADDED, CONFUSED, 0]


def test_the_json_cannot_end_the_script_it_stands_in(tmp_path: Path) -> None:
    volumes = make_volumes("</script>", scene_of(tmp_path, (9, 9, 9), np.eye(4), (4, 4, 4), (4, 4, 4)), SCHEMA)
    assert "</script>" not in volumes.to_json()
    assert json.loads(volumes.to_json())["case"] == "</script>"


def test_colours_and_scales_survive_in_a_nifti_in_memory() -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (5, 4, 1, 3), dtype=np.uint8)
    affine = np.diag([2.0, -3.0, 1.0, 1.0])
    found = nib.Nifti1Image.from_bytes(gzip.decompress(nifti_gz(colours, affine)))
    assert found.affine == pytest.approx(affine)
    voxels = np.asarray(found.dataobj)
    assert np.array_equal(np.stack([voxels[name] for name in ("R", "G", "B")], axis=-1), colours)
    grey = colours[..., 0]
    scaled = nib.Nifti1Image.from_bytes(gzip.decompress(nifti_gz(grey, affine, slope=0.5, intercept=-100.0)))
    assert scaled.get_fdata() == pytest.approx(grey * 0.5 - 100)
    assert nifti_gz(grey, affine) == nifti_gz(grey, affine)


def test_entropy_is_a_part_of_the_largest_possible_one() -> None:
    rows = np.array([[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]], np.float32)
    found = entropy_of(rows.T, is_regions=False)
    assert found == pytest.approx([0, 1, 0.5], abs=1e-5)
    regions = np.array([[0.5, 1.0], [1.0, 1.0]], np.float32)
    assert entropy_of(regions, is_regions=True) == pytest.approx([0.5, 0], abs=1e-5)


def test_kept_probabilities_of_a_pair_become_one_uncertainty(tmp_path: Path) -> None:
    """The mean of a sure background and a sure class is as uncertain as two classes can be, at its voxel."""
    run = make_chosen_run(tmp_path)
    results = collect(run)
    row = next(item for item in results.cases if item.configuration == PAIR)
    assert uncertainty_of(run, results.summary, row, is_regions=False) is None
    case = results.dataset.case(row.metrics.case)
    for name in ("2d", "3d_fullres"):
        codes = np.zeros((3, *SHAPE[::-1]), np.uint8)
        codes[0] = 255
        if name == "2d":
            codes[:, 5, 20, 11] = (0, 255, 0)
        folder = run.probabilities_folder / name / fold_name(row.fold)
        ProbabilityStore(folder, "0" * 64).write(case, codes)
    found = uncertainty_of(run, results.summary, row, is_regions=False)
    assert found.shape == SHAPE
    assert found[11, 20, 5] == pytest.approx(np.log(2) / np.log(3), abs=1e-4)
    found[11, 20, 5] = 0
    assert found.max() < 1e-4
