from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from autoseg.domain.dataset import Case
from autoseg.domain.geometry import Geometry
from autoseg.errors import ConfigError, DatasetError
from autoseg.inference.inputs import find_cases, output_ending
from autoseg.io.images import read_case, write_image


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


def test_channels_beyond_the_models_are_refused_not_silently_dropped(tmp_path: Path) -> None:
    frames = touch(tmp_path, *(f"frame_000{number}.png" for number in range(4)))
    with pytest.raises(ConfigError, match="inputs do not make cases for a model with 1 channel") as caught:
        find_cases(frames, 1)
    (problem,) = caught.value.problems
    assert "frame_0001.png, frame_0002.png, frame_0003.png would be left out" in problem
    assert "imagesTr/*_0000.nii.gz" in caught.value.hint
    assert "rename" in caught.value.hint
    assert found(frames[:1], 1) == {"frame": ["frame_0000.png"]}


def test_for_one_channel_each_other_file_is_a_case(tmp_path: Path) -> None:
    names = touch(tmp_path, "x.nii", "sub.01.nrrd", "patient_0001.mha", "patient_0002.mha", "y_0000.nii.gz")
    assert found(names, 1) == {
        "x": ["x.nii"],
        "sub.01": ["sub.01.nrrd"],
        "patient_0001": ["patient_0001.mha"],
        "patient_0002": ["patient_0002.mha"],
        "y": ["y_0000.nii.gz"],
    }


def test_two_files_for_one_channel_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_cases(touch(tmp_path, "a_0000.nii.gz", "a_0001.nrrd", "a_0001.mha"), 2)
    assert "case a: a_0001.nrrd and a_0001.mha claim to be one channel" in str(caught.value)


def write(folder: Path, name: str, channels: int) -> Path:
    pixels = np.full((5, 4, channels), 255, np.uint8)
    pixels[:, 0] = np.arange(channels, dtype=np.uint8)
    pixels[..., -1] = 255 if channels in (2, 4) else pixels[..., -1]
    Image.fromarray(pixels.squeeze()).save(folder / name)
    return folder / name


def test_files_that_hold_every_channel_are_cases_of_their_own(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{name}.png", 3) for name in "abc"]
    assert found(files, 3) == {"a": ["a.png"], "b": ["b.png"], "c": ["c.png"]}
    assert found([write(tmp_path, "d_0000.png", 3)], 3) == {"d": ["d_0000.png"]}


@pytest.mark.parametrize("count", [1, 3, 5])
def test_pictures_with_an_alpha_are_cases_of_their_own_not_channels(tmp_path: Path, count: int) -> None:
    """Three RGBA pictures became one case of three channels, five were refused."""
    files = [write(tmp_path, f"{name}.png", 4) for name in "abcde"[:count]]
    cases = find_cases(files, 3)
    assert [case.id for case in cases] == list("abcde"[:count])
    assert all(read_case(case, 3).array.shape == (3, 4, 5, 1) for case in cases)


def test_files_of_several_components_are_never_merged(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{name}.png", 3) for name in "ab"]
    with pytest.raises(ConfigError, match=r"2 files without .* they hold 3 components"):
        find_cases(files, 2)
    affine = np.eye(4)
    for name in "cde":
        write_image(tmp_path / f"{name}.nii.gz", np.ones((4, 3, 4, 5), np.float32), Geometry((3, 4, 5), affine))
    # The fourth number of a voxel is an alpha in pictures only.
    with pytest.raises(ConfigError, match=r"3 files without .* they hold 4 components"):
        find_cases([tmp_path / f"{name}.nii.gz" for name in "cde"], 3)


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_one_unreadable_file_among_many_fails_alone(tmp_path: Path, content: bytes) -> None:
    """Sorting read every header, and one broken file stopped the whole prediction."""
    files = [write(tmp_path, f"{name}.png", 3) for name in "abcd"]
    files[1].write_bytes(content)
    assert found(files, 3) == {name: [f"{name}.png"] for name in "abcd"}
    assert found(files[1:2], 3) == {"b": ["b.png"]}
    with pytest.raises(DatasetError, match=r"b\.png"):
        read_case(find_cases(files, 3)[1], 3)


def test_an_unreadable_channel_fails_with_its_case(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{name}.png", 1) for name in ("t2", "t1", "flair")]
    files[2].write_bytes(b"no picture")
    (case,) = find_cases(files, 3)
    assert case.id == "t2"
    with pytest.raises(DatasetError, match=r"flair\.png"):
        read_case(case, 3)


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
