"""DICOM series: right voxels at the right place, or a refusal that says why."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import (
    MR,
    SPACING,
    STRAIGHT,
    base,
    expected_affine,
    rotation,
    stored_numbers,
    uid,
    write_enhanced,
    write_series,
)
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.dataset import FileDataset
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from autoseg.errors import DatasetError, GeometryError
from autoseg.io.cached import Source
from autoseg.io.dicom import find_series, read_dicom
from autoseg.io.images import read_header, read_image


def by_itk(folder: Path, series: str = "T1") -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Voxels (I, J, K) and RAS+ affine as SimpleITK reads the series."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), uid(series)))
    image = reader.Execute()
    return sitk.GetArrayFromImage(image).transpose(), itk_affine(image)


def itk_affine(image: sitk.Image) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


# --- What is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", ["int16", "uint16", "uint8"])
def test_series_in_any_direction_and_order_are_read_as_itk_does(tmp_path: Path, seed: int, dtype: str) -> None:
    array, axes = stored_numbers(dtype=dtype, seed=seed), rotation(seed)
    write_series(tmp_path, array, axes)
    volume = read_image(tmp_path)
    np.testing.assert_array_equal(volume.array[0], array)
    assert volume.array.dtype == dtype
    np.testing.assert_allclose(volume.geometry.affine, expected_affine(axes), atol=1e-6)
    voxels, affine = by_itk(tmp_path)
    np.testing.assert_array_equal(volume.array[0], voxels)
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-5)
    assert read_header(tmp_path).geometry.shape == array.shape
    assert read_header(tmp_path).dtype == dtype


def test_slices_that_run_against_their_normal_keep_their_place(tmp_path: Path) -> None:
    array = stored_numbers()
    axes = rotation(1) * [1, 1, -1]
    write_series(tmp_path, array, axes)
    volume = read_image(tmp_path)
    np.testing.assert_array_equal(volume.array[0], array[:, :, ::-1])
    marked = [2, 3, 1, 1]
    same = [2, 3, array.shape[2] - 2, 1]
    np.testing.assert_allclose(volume.geometry.affine @ same, expected_affine(axes) @ marked, atol=1e-6)


def test_the_distance_of_slices_comes_from_their_positions_not_from_their_thickness(tmp_path: Path) -> None:
    write_series(tmp_path, stored_numbers())
    assert read_header(tmp_path).geometry.spacing_mm == pytest.approx(SPACING)


def test_each_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    def scale(out: FileDataset, index: int) -> None:
        out.RescaleSlope, out.RescaleIntercept = f"{0.5 + index}", f"{-index}"

    array = stored_numbers()
    write_series(tmp_path, array, change=scale)
    volume = read_image(tmp_path)
    assert volume.array.dtype == np.float32
    expected = array * (0.5 + np.arange(5)) - np.arange(5)
    np.testing.assert_array_equal(volume.array[0], expected.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "bits", "expected"),
    [("uint16", 12, "int16"), ("uint16", 16, "int32"), ("int16", 12, "int16"), ("int16", 16, "int32")],
)
def test_whole_intercepts_keep_integers(tmp_path: Path, dtype: str, bits: int, expected: str) -> None:
    def shift(out: FileDataset, _: int) -> None:
        out.RescaleSlope, out.RescaleIntercept, out.BitsStored, out.HighBit = "1", "-1024", bits, bits - 1

    array = stored_numbers(dtype=dtype)
    write_series(tmp_path, array, change=shift)
    volume = read_image(tmp_path)
    assert volume.array.dtype == expected
    np.testing.assert_array_equal(volume.array[0], array.astype(np.int32) - 1024)
    np.testing.assert_array_equal(volume.array[0], by_itk(tmp_path)[0])


@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_bits_beside_the_stored_ones_do_not_count(tmp_path: Path, dtype: str) -> None:
    array = stored_numbers(dtype=dtype)
    dirty = ((array.astype(np.int32) & 0x0FFF) | 0x5000).astype("uint16").view(dtype)

    def twelve(out: FileDataset, _: int) -> None:
        out.BitsStored, out.HighBit = 12, 11

    write_series(tmp_path, dirty, change=twelve)
    np.testing.assert_array_equal(read_image(tmp_path).array[0], array)


def test_big_endian_and_run_lengths_are_unpacked(tmp_path: Path) -> None:
    array = stored_numbers()

    write_series(tmp_path / "rle", array, change=lambda out, _: out.compress(RLELossless))
    np.testing.assert_array_equal(read_image(tmp_path / "rle").array[0], array)

    (file,) = write_series(tmp_path / "big", array[:, :, :1])
    out = base(array, uid("big"), "big", is_little=False)
    out.PixelSpacing, out.Modality = ["1", "1"], "OT"
    out.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    out.PixelData = array[:, :, 0].T.astype(">i2").tobytes()
    dcmwrite(file, out, enforce_file_format=True)
    np.testing.assert_array_equal(read_image(file).array[0, :, :, 0], array[:, :, 0])


def pack(out: FileDataset, stored: NDArray[Any], folder: Path, compressor: str) -> None:
    """Replace the pixels (columns, rows) of a file by packed ones; GDCM packs what pydicom cannot."""
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(folder / "packed.dcm"))
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    writer.Execute(sitk.GetImageFromArray(np.ascontiguousarray(stored.T)[np.newaxis]))
    packed = dcmread(folder / "packed.dcm")
    out.file_meta.TransferSyntaxUID, out.PixelData = packed.file_meta.TransferSyntaxUID, packed.PixelData
    out["PixelData"].is_undefined_length = True


@pytest.mark.parametrize(("compressor", "syntax"), [("JPEG", JPEGLosslessSV1), ("JPEG2000", JPEG2000Lossless)])
def test_packed_slices_are_unpacked(tmp_path: Path, compressor: str, syntax: str) -> None:
    """JPEG lossless, the most common packing of archives, needs a decoder that pydicom has not."""
    array = stored_numbers((64, 64, 3))

    def change(out: FileDataset, index: int) -> None:
        out.RescaleSlope, out.RescaleIntercept = "1", "-1024"
        pack(out, array[:, :, index], tmp_path, compressor)
        assert out.file_meta.TransferSyntaxUID == syntax

    write_series(tmp_path / "series", array, change=change)
    np.testing.assert_array_equal(read_image(tmp_path / "series").array[0], array.astype(np.int32) - 1024)


def test_packed_numbers_that_do_not_fit_their_header_are_refused(tmp_path: Path) -> None:
    array = stored_numbers((64, 64, 3), "uint16")
    array[2, 3, 1] = 65535

    def lie(out: FileDataset, index: int) -> None:
        out.RescaleSlope, out.RescaleIntercept, out.BitsStored, out.HighBit = "1", "-1024", 12, 11
        pack(out, array[:, :, index], tmp_path, "JPEG2000")

    write_series(tmp_path / "series", array, change=lie)
    with pytest.raises(DatasetError, match=r"its values, -1024 to 64511, do not fit"):
        read_image(tmp_path / "series")


def test_a_packing_that_nothing_unpacks_is_named(tmp_path: Path) -> None:
    def claim(out: FileDataset, _: int) -> None:
        out.compress(RLELossless)
        out.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"

    write_series(tmp_path, stored_numbers(), change=claim)
    with pytest.raises(DatasetError, match=r"High-Throughput JPEG 2000 .*\(1\.2\.840\.10008\.1\.2\.4\.201\)") as caught:
        read_image(tmp_path)
    assert "pip install pylibjpeg" in caught.value.hint


def test_enhanced_files_are_read_by_the_place_of_each_frame(tmp_path: Path) -> None:
    array, order = stored_numbers(), [3, 0, 4, 1, 2]
    slopes = [1.0, 2.0, 0.5, 1.0, 4.0]
    write_enhanced(tmp_path / "a" / "x.dcm", array, order, slopes=slopes)
    for path in (tmp_path / "a", tmp_path / "a" / "x.dcm"):
        volume = read_image(path)
        np.testing.assert_array_equal(volume.array[0], (array * np.array(slopes)).astype(np.float32))
        np.testing.assert_allclose(volume.geometry.affine, expected_affine(rotation(3)), atol=1e-6)
    write_enhanced(tmp_path / "b" / "x.dcm", array, range(5))
    image = sitk.ReadImage(str(tmp_path / "b" / "x.dcm"))
    np.testing.assert_array_equal(read_image(tmp_path / "b").array[0], sitk.GetArrayFromImage(image).transpose())


def test_enhanced_files_of_two_echoes_are_two_volumes(tmp_path: Path) -> None:
    array = stored_numbers()
    write_enhanced(tmp_path / "x.dcm", array, range(5), echoes=(10.0, 30.0))
    with pytest.raises(DatasetError, match=r"10 slices lie at 5 positions: it holds 2 volumes: echo time = 10\.0 ms"):
        read_image(tmp_path)
    volume, _ = read_dicom(tmp_path, volume="echo time = 30.0 ms")
    np.testing.assert_array_equal(volume[0], array + 30)


def test_a_lone_slice_is_a_volume_of_one(tmp_path: Path) -> None:
    array = stored_numbers((7, 6, 1))
    write_series(tmp_path, array, rotation(2))
    volume = read_image(tmp_path)
    np.testing.assert_array_equal(volume.array[0], array)
    assert volume.geometry.spacing_mm == pytest.approx((*SPACING[:2], 9))
    assert not volume.geometry.is_2d


def test_projections_are_pictures_in_which_bright_means_the_same(tmp_path: Path) -> None:
    array = stored_numbers((7, 6, 1), "uint16")
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        out = base(array, uid(kind), kind)
        out.Modality, out.PhotometricInterpretation = "DX", kind
        out.ImagerPixelSpacing, out.BitsStored, out.HighBit = ["0.2", "0.1"], 12, 11
        out.PixelData = array[:, :, 0].T.tobytes()
        out.save_as(tmp_path / f"{kind}.dcm", enforce_file_format=True)
    upright, turned = (read_image(tmp_path / f"MONOCHROME{number}.dcm") for number in (2, 1))
    np.testing.assert_array_equal(upright.array, array[None])
    np.testing.assert_array_equal(turned.array, 4095 - array[None])
    assert upright.geometry.is_2d
    assert upright.geometry.spacing_mm == pytest.approx((0.1, 0.2, 1))


def test_the_numbers_of_a_stack_stay_whichever_end_is_shown_white(tmp_path: Path) -> None:
    array = stored_numbers()
    write_series(tmp_path, array, change=lambda out, _: setattr(out, "PhotometricInterpretation", "MONOCHROME1"))
    np.testing.assert_array_equal(read_image(tmp_path).array[0], array)


# --- What lies around -----------------------------------------------------------------------------------------------


def test_strangers_are_set_apart(tmp_path: Path) -> None:
    array = stored_numbers()
    files = write_series(tmp_path / "a" / "b", array)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "DICOMDIR").write_bytes(files[0].read_bytes())
    (tmp_path / ".hidden").write_bytes(files[0].read_bytes())
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes to it

    def localizer(out: FileDataset, _: int) -> None:
        out.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    write_series(tmp_path / "scout", array[:, :, :2], series="scout", change=localizer)
    write_series(tmp_path, array[:, :, :1], series="seg", change=lambda out, _: setattr(out, "Modality", "SEG"))
    found = find_series(tmp_path)
    assert [item.name for item in found.series] == ["T1"]
    assert found.set_apart_in_words == "2 localizer, 1 segmentation, 3 other files"
    np.testing.assert_array_equal(read_image(tmp_path).array[0], array)
    with pytest.raises(DatasetError, match="it is a DICOM localizer, not an image to segment"):
        read_image(next((tmp_path / "scout").iterdir()))


def test_several_series_are_told_apart_and_named(tmp_path: Path) -> None:
    first, second, third = (stored_numbers(seed=seed) for seed in (1, 2, 3))
    files = write_series(tmp_path, first, series="T1", prefix="a")
    others = write_series(tmp_path, second, series="T2", prefix="b")
    # One UID, two directions: scanners do that with localizers, and workstations with reformatted slices.
    write_series(tmp_path, third, rotation(5), series="T2", prefix="c")
    with pytest.raises(DatasetError, match=r"holds 3 series: 'T1' .*; 'T2' .*; 'T2' ") as caught:
        read_image(tmp_path)
    assert "a file of the series" in caught.value.hint
    np.testing.assert_array_equal(read_image(files[2]).array[0], first)
    np.testing.assert_array_equal(read_image(others[0]).array[0], second)


def test_series_without_identifiers_belong_together_by_folder(tmp_path: Path) -> None:
    def anonymous(out: FileDataset, _: int) -> None:
        out.SeriesInstanceUID = out.StudyInstanceUID = out.SOPInstanceUID = ""

    first, second = stored_numbers(seed=1), stored_numbers(seed=2)
    write_series(tmp_path / "a", first, change=anonymous)
    write_series(tmp_path / "b", second, change=anonymous)
    assert len(find_series(tmp_path).series) == 2
    np.testing.assert_array_equal(read_image(tmp_path / "b").array[0], second)


def test_folders_without_dicom_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("no")
    with pytest.raises(DatasetError, match=r"is a folder without DICOM images; it holds 1 other file\n"):
        read_image(tmp_path)
    (tmp_path / "y.dcm").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(DatasetError, match="no DICOM mark; it is a Git LFS pointer"):
        read_image(tmp_path / "y.dcm")
    with pytest.raises(DatasetError, match="No such file"):
        read_image(tmp_path / "z.dcm")


# --- What is refused ------------------------------------------------------------------------------------------------


def test_missing_slices_are_counted_and_placed(tmp_path: Path) -> None:
    files = write_series(tmp_path, stored_numbers((7, 6, 12)), rotation(1))
    names = [file.name for file in files]
    for index in (3, 7, 8):
        files[index].unlink()
    with pytest.raises(DatasetError, match=r"3 slices are missing: 5 mm between") as caught:
        read_image(tmp_path)
    assert f"5 mm between {names[2]} and {names[4]}, where others are 2.5 mm apart" in caught.value.message
    assert f"7.5 mm between {names[6]} and {names[9]}" in caught.value.message
    with pytest.raises(DatasetError, match="missing"):
        read_header(tmp_path)


@pytest.mark.parametrize("places", [[0, 2, 4, 6, 9], [0, 1, 2, 4.5, 7], [0, 2.5, 5.5, 7.5, 10]])
def test_uneven_gaps_are_refused(tmp_path: Path, places: list[float]) -> None:
    write_series(tmp_path, stored_numbers(), places=places)
    with pytest.raises(GeometryError, match=r"not evenly spaced: gaps from .* to .* mm"):
        read_image(tmp_path)


def test_positions_rounded_to_a_digit_are_even(tmp_path: Path) -> None:
    write_series(tmp_path, stored_numbers(), places=[0, 1.2, 2.5, 3.8, 5.0])
    assert read_header(tmp_path).geometry.spacing_mm[2] == pytest.approx(1.25)


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    axes = STRAIGHT.copy()
    axes[:, 2] = [0, np.sin(np.radians(12)), np.cos(np.radians(12))]
    write_series(tmp_path, stored_numbers(), axes)
    with pytest.raises(GeometryError, match=r"stacked 12\.0 degrees off their normal"):
        read_image(tmp_path)


def test_a_slice_beside_the_others_is_refused(tmp_path: Path) -> None:
    def push(out: FileDataset, index: int) -> None:
        if index == 2:
            out.ImagePositionPatient[0] += 3

    write_series(tmp_path, stored_numbers(), change=push)
    with pytest.raises(GeometryError, match=r"lies 3 mm beside the line of the others"):
        read_image(tmp_path)


def test_copies_of_a_slice_are_refused(tmp_path: Path) -> None:
    files = write_series(tmp_path, stored_numbers())
    (tmp_path / "copy").write_bytes(files[2].read_bytes())
    with pytest.raises(DatasetError, match=r"6 slices lie at 5 positions, 1 of them .*copies of one image"):
        read_image(tmp_path)


def test_volumes_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    for prefix in "ab":
        write_series(tmp_path, stored_numbers(), prefix=prefix)
    with pytest.raises(DatasetError, match=r"10 slices lie at 5 positions, 5 of them .*differ in nothing"):
        read_image(tmp_path)


def trait(kind: str, number: int) -> Any:
    def change(out: FileDataset, index: int) -> None:
        out.AcquisitionTime = f"12{index:02d}{number:02d}"  # differs from slice to slice and explains nothing
        if kind == "echo":
            out.EchoTime = str(10 * (number + 1))
        elif kind == "siemens":
            out.private_block(0x19, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", str(number * 400))
        elif kind == "ge":
            block = out.private_block(0x43, "GEMS_PARM_01", create=True)
            block.add_new(0x39, "IS", [str(1_000_000_000 + number * 400), "8", "0", "0"])
        elif kind == "standard":
            out.DiffusionBValue = float(number * 400)
        elif kind == "pair":
            out.EchoTime, out.ImageType = str(10 * (number // 2 + 1)), ["ORIGINAL", "PRIMARY", "MP"[number % 2]]

    return change


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("echo", ["echo time = 10 ms", "echo time = 20 ms", "echo time = 30 ms", "echo time = 40 ms"]),
        ("siemens", ["b = 0", "b = 400", "b = 800", "b = 1200"]),
        ("ge", ["b = 0", "b = 400", "b = 800", "b = 1200"]),
        ("standard", ["b = 0", "b = 400", "b = 800", "b = 1200"]),
        (
            "pair",
            [
                f"echo time = {echo} ms, image type = ORIGINAL\\PRIMARY\\{letter}"
                for echo in (10, 20)
                for letter in "MP"
            ],
        ),
    ],
)
def test_volumes_of_one_series_are_named_and_chosen(tmp_path: Path, kind: str, names: list[str]) -> None:
    arrays = [stored_numbers(seed=number) for number in range(4)]
    files = [
        write_series(tmp_path, array, rotation(1), prefix=str(number), change=trait(kind, number))
        for number, array in enumerate(arrays)
    ]
    with pytest.raises(DatasetError, match=r"20 slices lie at 5 positions: it holds 4 volumes: ") as caught:
        read_image(tmp_path)
    for name in names:
        assert f"{name} (5 slices, such as " in caught.value.message
    for number, name in enumerate(names):
        np.testing.assert_array_equal(read_dicom(tmp_path, volume=name)[0][0], arrays[number])
        np.testing.assert_array_equal(read_image(files[number][3]).array[0], arrays[number])
    with pytest.raises(DatasetError, match="there is no volume 'b = 5'"):
        read_dicom(tmp_path, volume="b = 5")


def test_an_incomplete_volume_of_several_is_refused_when_chosen(tmp_path: Path) -> None:
    files = [
        write_series(tmp_path, stored_numbers(), prefix=str(number), change=trait("echo", number))
        for number in range(2)
    ]
    files[1][2].unlink()
    assert read_image(files[0][0]).array.shape == (1, 7, 6, 5)
    with pytest.raises(DatasetError, match="1 slice is missing"):
        read_image(files[1][0])


REFUSED = {
    "no position": ({"ImagePositionPatient": None}, "ImagePositionPatient is missing"),
    "no direction": ({"ImageOrientationPatient": None}, "ImageOrientationPatient is missing"),
    "no spacing": ({"PixelSpacing": None}, "PixelSpacing is missing"),
    "two numbers": ({"ImagePositionPatient": ["1", "2"]}, "expected 3 finite numbers"),
    "zero spacing": ({"PixelSpacing": ["0", "1"]}, "must be above 0"),
    "skewed": ({"ImageOrientationPatient": ["1", "0", "0", "0.5", "0.5", "0"]}, "no two directions at a right angle"),
    "colour": ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "a colour image .RGB, 3 numbers a pixel"),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "a colour image"),
    "one bit": ({"BitsAllocated": 1, "BitsStored": 1}, "pixels of 1 bits in 1 are not supported"),
    "no rows": ({"Rows": None}, "Rows is missing"),
    "many frames": ({"NumberOfFrames": 4}, "holds 4 frames and does not say where each of them lies"),
    "mosaic": ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "it is a mosaic, many slices side by side"),
    "large": ({"Rows": 65535, "Columns": 65535}, "promises 8,589,672,450 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_headers_lack_is_said(tmp_path: Path, name: str) -> None:
    values, message = REFUSED[name]

    def change(out: FileDataset, _: int) -> None:
        for keyword, value in values.items():
            if value is None:
                delattr(out, keyword)
            else:
                setattr(out, keyword, value)

    write_series(tmp_path, stored_numbers(), change=change)
    for read in (read_image, read_header):
        with pytest.raises(DatasetError, match=message) as caught:
            read(tmp_path)
        assert str(tmp_path) in caught.value.message


def test_one_bad_slice_is_named(tmp_path: Path) -> None:
    def change(out: FileDataset, index: int) -> None:
        if index == 3:
            del out.PixelSpacing

    files = write_series(tmp_path, stored_numbers(), change=change)
    with pytest.raises(DatasetError, match=f"1 of 5 slices cannot be used: {files[3].name}: PixelSpacing is missing"):
        read_image(tmp_path)


def test_truncated_pixels_are_named(tmp_path: Path) -> None:
    files = write_series(tmp_path, stored_numbers((64, 60, 5)))
    content = files[2].read_bytes()
    files[2].write_bytes(content[:-500])
    with pytest.raises(DatasetError, match=f"{files[2].name}: the file is truncated: it holds 7,180 of 7,680 bytes"):
        read_image(tmp_path)
    files[2].write_bytes(content[:5000])
    with pytest.raises(DatasetError, match=f"{files[2].name}: .*cannot hold them"):
        read_header(tmp_path)


def test_a_broken_header_is_named_and_the_others_say_what_is_lost(tmp_path: Path) -> None:
    files = write_series(tmp_path, stored_numbers())
    files[2].rename(tmp_path / "broken.dcm")
    (tmp_path / "broken.dcm").write_bytes(b"\0" * 4000)
    with pytest.raises(DatasetError, match=r"1 file cannot be read \(broken\.dcm: .*of the others 1 slice is missing"):
        read_image(tmp_path)
    (tmp_path / "broken.dcm").unlink()
    files[0].rename(tmp_path / "cut.dcm")
    (tmp_path / "cut.dcm").write_bytes(b"")
    write_series(tmp_path, stored_numbers())
    with pytest.raises(DatasetError, match="the other 5 slices lie evenly"):
        read_image(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_series_give_a_volume_or_a_clear_error(tmp_path: Path, seed: int) -> None:
    array = stored_numbers((4, 3, 3))
    files = write_series(tmp_path, array)
    whole = files[1].read_bytes()
    rng = np.random.default_rng(seed)
    refused = kept = 0
    for _ in range(60):
        content = bytearray(whole)
        for where in rng.integers(132, len(content), rng.integers(1, 5)):
            content[where] = rng.integers(256)
        files[1].write_bytes(content)
        try:
            assert read_image(tmp_path).array.shape[1:] == (4, 3, 3)
        except DatasetError as problem:
            refused += str(tmp_path) in problem.message
            continue
        kept += 1
    assert refused + kept == 60
    assert refused > 5


# --- The cache ------------------------------------------------------------------------------------------------------


def test_a_cached_series_is_current_until_a_slice_changes(tmp_path: Path) -> None:
    files = write_series(tmp_path, stored_numbers())
    for path in (tmp_path, files[0]):
        source = Source.of(path)
        assert source.is_current(path)
        content = files[3].read_bytes()
        files[3].rename(tmp_path / "other")
        assert source.is_current(path)  # the content is what counts
        (tmp_path / "other").write_bytes(content[:-1] + b"\x77")
        assert not source.is_current(path)
        (tmp_path / "other").unlink()
        assert not source.is_current(path)
        files[3].write_bytes(content)
        assert source.is_current(path)
    read_image(tmp_path)
    files[1].unlink()
    with pytest.raises(DatasetError, match="missing"):  # headers that are remembered are not those of before
        read_image(tmp_path)
    assert MR in str(files[0].read_bytes())
