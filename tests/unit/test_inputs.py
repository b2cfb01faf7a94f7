from pathlib import Path

import numpy as np
import pytest

from autoseg.domain.dataset import Case
from autoseg.domain.geometry import Geometry
from autoseg.errors import ConfigError
from autoseg.inference.inputs import find_cases, output_ending
from autoseg.io.images import write_image


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def found(inputs: list[Path], num_channels: int) -> dict[str, list[str]]:
    return {case.id: [Path(file).name for file in case.images] for case in find_cases(inputs, num_channels)}


def test_numbered_files_are_the_channels_of_a_case(tmp_path: Path) -> None:
    touch(tmp_path, "b_0001.nii.gz", "b_0000.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz", "notes.txt", ".hidden.nii.gz")
    assert found([tmp_path], 2) == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
    }


def test_channels_beyond_the_models_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz")
    assert found([tmp_path], 1) == {"a": ["a_0000.nii.gz"]}
    assert "a_0001.nii.gz" in caplog.text


def test_for_one_channel_each_other_file_is_a_case(tmp_path: Path) -> None:
    names = touch(tmp_path, "x.nii", "sub.01.nrrd", "patient_0001.mha", "patient_0002.mha", "y_0000.nii.gz")
    assert found(names, 1) == {
        "x": ["x.nii"],
        "sub.01": ["sub.01.nrrd"],
        "patient_0001": ["patient_0001.mha"],
        "patient_0002": ["patient_0002.mha"],
        "y": ["y_0000.nii.gz"],
    }


def write(folder: Path, name: str, channels: int) -> Path:
    array = np.ones((channels, 4, 5, 1), np.uint8)
    array[:, 0] = np.arange(channels, dtype=np.uint8)[:, None, None]
    write_image(folder / name, array, Geometry((4, 5, 1), np.eye(4), is_2d=True))
    return folder / name


def test_files_that_hold_every_channel_are_cases_of_their_own(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{name}.png", 3) for name in "abc"]
    assert found(files, 3) == {"a": ["a.png"], "b": ["b.png"], "c": ["c.png"]}
    assert found([write(tmp_path, "d_0000.png", 3)], 3) == {"d": ["d_0000.png"]}


def test_exactly_as_many_files_as_channels_are_one_case_in_the_order_given(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{name}.png", 1) for name in ("t2", "t1", "flair")]
    assert found(files, 3) == {"t2": ["t2.png", "t1.png", "flair.png"]}
    with pytest.raises(ConfigError, match="2 files without channel numbers, expected exactly 3"):
        find_cases(files[:2], 3)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "a_0000.nii.gz", "a_0002.nii.gz", "notes.txt")
    inputs = [tmp_path, tmp_path / "empty", tmp_path / "missing.nii.gz", tmp_path / "notes.txt"]
    with pytest.raises(ConfigError) as caught:
        find_cases(inputs, 3)
    text = str(caught.value)
    for part in ("holds no image files", "missing.nii.gz does not exist", "notes.txt is not an image", "lacks"):
        assert part in text
    assert "0001" in text


def test_two_inputs_with_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several inputs give the case x"):
        find_cases(touch(tmp_path, "x.nii.gz", "x.nrrd"), 1)
    with pytest.raises(ConfigError, match="no inputs"):
        find_cases([], 1)


@pytest.mark.parametrize(
    ("image", "ending"),
    [("a.nii.gz", ".nii.gz"), ("a.nii", ".nii"), ("a.nrrd", ".nrrd"), ("a.jpg", ".png"), ("a.TIF", ".png")],
)
def test_outputs_keep_the_ending_and_pictures_become_png(image: str, ending: str) -> None:
    assert output_ending(Case(id="a", images=(image,))) == ending
