"""Two thousand damaged headers: each file is refused by an AutosegError, or read as nibabel and SimpleITK read it.

They are read in another process of limited memory and time, so that a crash, a hang and a giant allocation are seen.
"""

import collections
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from mutated_headers import judge
from scipy.io import netcdf_file

CHILD = Path(__file__).resolve().parents[1] / "mutated_headers.py"
SHAPE = (4, 3, 5)
AFFINE = np.array([[0.0, 0, 3.0, 10], [0.5, 0, 0, -20], [0, -0.75, 0, 30], [0, 0, 0, 1]])
FAST, FULL = 140, 2000
SECONDS_EACH = 0.5


def numbered(dtype: str, *more: int) -> np.ndarray:
    return np.arange(np.prod((*SHAPE, *more))).reshape(*SHAPE, *more).astype(dtype)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small whole file of every format and kind of header."""
    folder = tmp_path_factory.mktemp("originals")
    for name, order in (("little", "<"), ("big", ">")):
        header = nib.Nifti1Header(endianness=order)
        header.set_data_dtype(np.dtype("i2").newbyteorder(order))
        header.set_qform(AFFINE, 1)
        nib.Nifti1Image(numbered("int16"), AFFINE, header).to_filename(folder / f"{name}.nii")
    scaled = nib.Nifti1Image(numbered("int16", 2), AFFINE)
    scaled.header.set_slope_inter(0.5, -3)
    scaled.to_filename(folder / "scaled.nii.gz")
    nib.Nifti2Image(numbered("float32"), AFFINE).to_filename(folder / "second.nii")
    nib.Nifti1Pair(numbered("uint8"), AFFINE).to_filename(folder / "pair.hdr")
    image = sitk.GetImageFromArray(numbered("int16").T)
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetDirection((0, 0, -1, 1, 0, 0, 0, -1, 0))
    for ending in (".nrrd", ".nhdr", ".mha", ".mhd"):
        sitk.WriteImage(image, str(folder / f"raw{ending[1]}{ending[-1]}{ending}"), useCompression=False)
        sitk.WriteImage(image, str(folder / f"packed{ending[1]}{ending[-1]}{ending}"), useCompression=True)
    for ending in (".mgh", ".mgz"):
        nib.save(nib.MGHImage(numbered("float32", 2), AFFINE), folder / f"free{ending[-1]}{ending}")
    with netcdf_file(str(folder / "first.mnc"), "w") as file:
        for name, size in zip(("zspace", "yspace", "xspace"), SHAPE, strict=True):
            file.createDimension(name, size)
            axis = file.createVariable(name, "i", ())
            axis.spacing, axis.step, axis.start = b"regular__", 0.5, 4.0
        voxels = file.createVariable("image", "b", ("zspace", "yspace", "xspace"))
        voxels.signtype, voxels.valid_range = b"unsigned", np.array([0.0, 255.0])
        voxels[:] = numbered("int8")
        for name, value in (("image-min", 0.0), ("image-max", 510.0)):
            file.createVariable(name, "d", ("zspace",))[:] = np.full(SHAPE[0], value)
    tifffile.imwrite(
        folder / "stack.tif",
        numbered("uint16").T,
        imagej=True,
        compression="zlib",
        metadata={"axes": "ZYX", "unit": "mm"},
    )
    return folder


def verdicts(originals: Path, scratch: Path, count: int, seed: int = 0) -> list[tuple[str, str]]:
    """What became of each damaged copy; fails when the process did not live to the end."""
    scratch.mkdir()
    command = [sys.executable, str(CHILD), str(originals), str(scratch), "--count", str(count), "--seed", str(seed)]
    environment = os.environ | {"PYTHONPATH": str(CHILD.parents[1])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60 + count * SECONDS_EACH, check=False, env=environment
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"exit {done.returncode} after {lines[-1:]}: {done.stderr[-2000:]}"
    said, told = lines[::2], lines[1::2]
    assert len(told) == count
    return [(item["mutation"], other["verdict"]) for item, other in zip(said, told, strict=True)]


def assert_right(results: list[tuple[str, str]]) -> None:
    wrong = [(said, verdict) for said, verdict in results if verdict not in ("error", "equal")]
    assert not wrong, f"{len(wrong)} of {len(results)}: {wrong[:10]}"
    counts = collections.Counter(verdict for _, verdict in results)
    assert min(counts["error"], counts["equal"]) > len(results) // 20  # neither all refused nor all harmless


def test_some_damaged_headers(originals: Path, tmp_path: Path) -> None:
    assert_right(verdicts(originals, tmp_path / "scratch", FAST))


@pytest.mark.slow
def test_two_thousand_damaged_headers(originals: Path, tmp_path: Path) -> None:
    assert_right(verdicts(originals, tmp_path / "scratch", FULL, seed=1))


@pytest.mark.slow
@pytest.mark.data
def test_damaged_headers_of_real_files(data_folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    for name in ("nifti", "nrrd", "other"):
        for file in (data_folder / "robustness" / name).iterdir():
            if "broken" not in file.name and "without_img" not in file.name and file.stat().st_size < 100_000:
                shutil.copy(file, real / file.name)
    assert_right(verdicts(real, tmp_path / "scratch", 500, seed=2))


def test_the_judge_sees_a_wrong_reading(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above can fail: against a reader that ignores the scaling every volume differs."""
    path = tmp_path / "scaled.nii.gz"
    shutil.copy(originals / "scaled.nii.gz", path)
    assert judge(path) == "equal"
    monkeypatch.setattr("autoseg.io.nifti._scaled", lambda stored, slope, inter: stored)
    assert judge(path) == "voxels differ"


@pytest.mark.parametrize("name", ["little.nii", "second.nii", "rawnd.nrrd", "rawma.mha", "freeh.mgh"])
def test_headers_that_promise_terabytes_are_refused_before_anything_is_allocated(
    originals: Path, tmp_path: Path, name: str
) -> None:
    content = (originals / name).read_bytes()
    if name.endswith((".nrrd", ".mha")):
        content = content.replace(b"4 3 5", b"40000 30000 50000", 1)
    elif name == "second.nii":
        content = content[:24] + struct.pack("<3q", 40_000, 30_000, 50_000) + content[48:]
    elif name == "little.nii":
        content = content[:42] + struct.pack("<3h", 30_000, 30_000, 30_000) + content[48:]
    else:
        content = content[:4] + struct.pack(">3i", 40_000, 30_000, 50_000) + content[16:]
    (tmp_path / name).write_bytes(content)
    assert judge(tmp_path / name) == "error"
