"""Every format gives the voxels, the grid and the codes that were written, or says clearly why not."""

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from autoseg.domain.dataset import Case
from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError, GeometryError
from autoseg.io.images import (
    read_case,
    read_header,
    read_image,
    read_labels,
    split_ending,
    write_image,
    write_labels,
)

OBLIQUE = np.array([[0.5, 0.1, -0.3, 10.0], [-0.1, 0.8, 0.2, -20.0], [0.1, -0.2, 2.9, 30.0], [0, 0, 0, 1]])
ORTHOGONAL = np.array([[0, 0, -3.0, 7], [0.6, -0.8, 0, 8], [0.8, 0.6, 0, 9], [0, 0, 0, 1]])
VOLUME_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
SHAPE = (3, 4, 5)
MHD_WITHOUT_DATA = (
    b"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = no.raw\n"
)


def numbered(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a/case_0000.nii.gz", ("case_0000", ".nii.gz")),
        ("sub.01.nii.gz", ("sub.01", ".nii.gz")),
        ("X.NII.GZ", ("X", ".NII.GZ")),
        ("x.png", ("x", ".png")),
        ("x.txt", ("x", ".txt")),
        ("x", ("x", "")),
        (".nii.gz", (".nii", ".gz")),
    ],
)
def test_endings(path: str, parts: tuple[str, str]) -> None:
    assert split_ending(path) == parts


@pytest.mark.parametrize("ending", VOLUME_ENDINGS)
@pytest.mark.parametrize("affine", [OBLIQUE, ORTHOGONAL, np.diag([-1.0, 1, 1, 1])], ids=["sheared", "rotated", "LAS"])
def test_labels_come_back_on_their_grid(tmp_path: Path, ending: str, affine: np.ndarray) -> None:
    if ending not in (".nii", ".nii.gz") and affine is OBLIQUE:
        affine = ORTHOGONAL @ np.diag([1, 1, -1.0, 1])  # ITK's grids have right angles
    labels = numbered(SHAPE, "uint16")
    geometry = Geometry(SHAPE, affine)
    write_labels(tmp_path / f"x{ending}", labels, geometry)
    again, grid = read_labels(tmp_path / f"x{ending}", geometry)
    np.testing.assert_array_equal(again, labels)
    np.testing.assert_allclose(grid.affine, affine, atol=1e-5)
    assert not list(tmp_path.glob(".tmp*"))
    assert read_header(tmp_path / f"x{ending}").shape == SHAPE


@pytest.mark.parametrize("ending", VOLUME_ENDINGS)
def test_channels_are_read_only_where_the_data_set_names_them(tmp_path: Path, ending: str) -> None:
    array = numbered((2, *SHAPE)).astype(np.float32)
    path = tmp_path / f"x{ending}"
    write_image(path, array, Geometry(SHAPE, ORTHOGONAL))
    volume = read_image(path, 2)
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.geometry.affine, ORTHOGONAL, atol=1e-5)
    assert read_header(path).components == 2
    for channels in (None, 1, 3):
        with pytest.raises(DatasetError, match=r"expected \d channels? in this file, got 2"):
            read_image(path, channels)


def test_itk_and_nibabel_agree_on_where_a_voxel_lies(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(numbered(SHAPE).transpose())
    image.SetSpacing((0.6, 1.0, 3.0))
    direction = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    image.SetDirection(direction.flatten().tolist())
    image.SetOrigin((4.0, -5.0, 6.0))
    for ending in (".nrrd", ".mha", ".nii.gz"):
        sitk.WriteImage(image, str(tmp_path / f"x{ending}"))
    first, second, third = (read_image(tmp_path / f"x{ending}") for ending in (".nrrd", ".mha", ".nii.gz"))
    for other in (second, third):
        np.testing.assert_array_equal(first.array, other.array)
        np.testing.assert_allclose(first.geometry.affine, other.geometry.affine, atol=1e-5)
    point = image.TransformIndexToPhysicalPoint((2, 1, 3))
    np.testing.assert_allclose(first.geometry.affine @ [2, 1, 3, 1], [-point[0], -point[1], point[2], 1], atol=1e-6)


def test_four_axis_metaimage_is_channels(tmp_path: Path) -> None:
    image = sitk.JoinSeries([sitk.GetImageFromArray(numbered((2, 3, 4)) + offset) for offset in (0, 100)])
    sitk.WriteImage(image, str(tmp_path / "x.mha"))
    volume = read_image(tmp_path / "x.mha", 2)
    np.testing.assert_array_equal(volume.array, np.stack([numbered((2, 3, 4)).T, numbered((2, 3, 4)).T + 100]))


@pytest.mark.parametrize(("sform", "qform"), [(2, 0), (0, 1), (1, 2), (0, 0)])
def test_nifti_keeps_both_affines_and_their_codes(tmp_path: Path, sform: int, qform: int) -> None:
    image = nib.Nifti1Image(numbered(SHAPE), None)
    image.header.set_zooms((0.7, 0.8, 2.5))
    second = ORTHOGONAL + np.array([[0, 0, 0, 1], [0] * 4, [0] * 4, [0] * 4])
    image.header.set_sform(ORTHOGONAL if sform else None, sform)
    image.header.set_qform(second if qform else None, qform)
    path, out = tmp_path / "in.nii.gz", tmp_path / "out.nii.gz"
    image.to_filename(path)
    geometry = read_image(path).geometry
    write_labels(out, numbered(SHAPE), geometry)
    before, after = nib.load(path), nib.load(out)
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == (sform, qform)
    np.testing.assert_array_equal(before.affine, after.affine)
    if qform:
        np.testing.assert_allclose(before.header.get_qform(), after.header.get_qform(), atol=1e-6)
    assert after.header.get_intent()[0] == "label"
    assert after.dataobj.slope == 1
    assert after.get_data_dtype() == np.uint8


def test_labels_are_written_as_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / name, numbered(SHAPE), Geometry(SHAPE, OBLIQUE))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize("code", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "i8", "f4", "f8"])
def test_byte_order_and_types(tmp_path: Path, code: str, dtype: str) -> None:
    data = numbered(SHAPE, dtype)
    header = nib.Nifti1Header(endianness=code)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(code))
    nib.Nifti1Image(data, np.eye(4), header).to_filename(tmp_path / "x.nii")
    volume = read_image(tmp_path / "x.nii")
    np.testing.assert_array_equal(volume.array[0], data)
    assert volume.array.dtype.isnative
    assert volume.array.dtype == (np.float32 if dtype[0] == "f" else np.dtype(dtype))
    assert volume.array.flags.writeable


def test_scaling_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(numbered(SHAPE, "int16"), np.eye(4))
    image.header.set_slope_inter(0.001, 5)
    image.to_filename(tmp_path / "x.nii.gz")
    path = tmp_path / "x.nii.gz"
    volume = read_image(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array[0], nib.load(path).get_fdata(), rtol=1e-6)


def test_colour_voxels_of_nifti_are_three_channels(tmp_path: Path) -> None:
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    for offset, name in enumerate("RGB"):
        rgb[name] = numbered(SHAPE) + 60 * offset
    nib.Nifti1Image(rgb, np.eye(4)).to_filename(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(
        read_image(tmp_path / "x.nii.gz", 3).array, np.stack([numbered(SHAPE) + 60 * offset for offset in range(3)])
    )


def test_flat_nifti_is_one_slice_and_stays_flat(tmp_path: Path) -> None:
    image = nib.Nifti1Image(numbered((3, 4)), None)
    image.header.set_sform(np.diag([2.0, 2, 0, 1]), 1)
    image.to_filename(tmp_path / "x.nii.gz")
    volume = read_image(tmp_path / "x.nii.gz")
    assert volume.geometry.is_2d
    assert volume.geometry.spacing_mm == (2.0, 2.0, 1.0)
    np.testing.assert_array_equal(volume.array[0, :, :, 0], numbered((3, 4)))
    write_labels(tmp_path / "y.nii.gz", numbered((3, 4, 1)), volume.geometry)
    assert nib.load(tmp_path / "y.nii.gz").shape == (3, 4)


def test_axes_of_length_one_are_squeezed(tmp_path: Path) -> None:
    nib.Nifti1Image(numbered((3, 4, 5, 1)), np.eye(4)).to_filename(tmp_path / "x.nii.gz")
    assert read_image(tmp_path / "x.nii.gz").array.shape == (1, 3, 4, 5)
    nib.Nifti1Image(numbered((3, 4, 5, 1, 2)), np.eye(4)).to_filename(tmp_path / "y.nii.gz")
    assert read_image(tmp_path / "y.nii.gz", 2).array.shape == (2, 3, 4, 5)
    nib.Nifti1Image(numbered((3, 4, 5, 2, 2)), np.eye(4)).to_filename(tmp_path / "z.nii.gz")
    with pytest.raises(DatasetError, match="5 axes"):
        read_image(tmp_path / "z.nii.gz", 4)


# --- Pictures -------------------------------------------------------------------------------------------------------


def test_picture_axes_are_column_row_and_one_slice(tmp_path: Path) -> None:
    pixels = numbered((2, 3))  # 2 rows, 3 columns
    Image.fromarray(pixels).save(tmp_path / "x.png")
    volume = read_image(tmp_path / "x.png")
    assert volume.array.shape == (1, 3, 2, 1)
    assert volume.geometry.is_2d
    assert volume.array[0, 2, 1, 0] == pixels[1, 2]
    np.testing.assert_array_equal(volume.geometry.affine, np.eye(4))


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_picture_labels_come_back(tmp_path: Path, ending: str, dtype: str) -> None:
    labels = numbered((4, 3, 1), dtype) * (1 if dtype == "uint8" else 300)
    geometry = Geometry((4, 3, 1), np.eye(4), is_2d=True)
    if ending == ".bmp" and dtype == "uint16":
        with pytest.raises(DatasetError, match="cannot hold uint16"):
            write_labels(tmp_path / "x.bmp", labels, geometry)
        return
    write_labels(tmp_path / f"x{ending}", labels, geometry)
    again, grid = read_labels(tmp_path / f"x{ending}", geometry)
    np.testing.assert_array_equal(again, labels)
    assert again.dtype == dtype
    assert grid.is_2d


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_colour_and_alpha(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    rgba = np.dstack([numbered((5, 4)), numbered((5, 4)) + 1, numbered((5, 4)) + 2, np.full((5, 4), 255, np.uint8)])

    def save(pixels: np.ndarray) -> None:
        if ending == ".png":
            Image.fromarray(pixels).save(path)
        else:
            kind = "rgb" if pixels.shape[2] > 2 else "minisblack"
            tifffile.imwrite(path, pixels, photometric=kind, planarconfig="contig", extrasamples=["unassalpha"])

    save(rgba)
    np.testing.assert_array_equal(read_image(path, 3).array[..., 0], rgba[..., :3].transpose(2, 1, 0))
    assert read_image(path, 4).array.shape == (4, 4, 5, 1)
    with pytest.raises(DatasetError, match="expected 1 channel in this file, got colour"):
        read_image(path, 1)
    save(np.dstack([rgba[..., 0]] * 3 + [rgba[..., 3]]))
    np.testing.assert_array_equal(read_image(path, 1).array[0, ..., 0], rgba[..., 0].T)
    rgba[0, 0, 3] = 0
    save(rgba)
    with pytest.raises(DatasetError, match="varying alpha"):
        read_image(path, 3)
    save(rgba[..., [0, 3]])
    with pytest.raises(DatasetError, match="got grey and a varying alpha"):
        read_image(path, 1)


def test_sixteen_bit_colour_is_not_cut_to_eight(tmp_path: Path) -> None:
    pixels = (numbered((3, 4, 3), "uint16") * 1000).astype(np.uint16)
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(tmp_path / "x.png"))
    volume = read_image(tmp_path / "x.png", 3)
    np.testing.assert_array_equal(volume.array[..., 0], pixels.transpose(2, 1, 0))


def test_palette_pictures_give_their_indices(tmp_path: Path) -> None:
    picture = Image.fromarray(numbered((3, 4)) % 3)
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "x.png")[0][..., 0], (numbered((3, 4)) % 3).T)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pictures_of_few_bits_give_the_stored_numbers(tmp_path: Path, bits: int) -> None:
    stored = (numbered((4, 8)) % 2**bits).astype(np.uint8)
    path = tmp_path / "x.png"
    path.write_bytes(_grey_png(stored, bits))
    np.testing.assert_array_equal(read_labels(path)[0][..., 0], stored.T)


def _grey_png(pixels: np.ndarray, bits: int) -> bytes:
    """A PNG of 1, 2 or 4 bits, by hand, because Pillow writes none of 2 bits."""
    import zlib

    rows, columns = pixels.shape
    packed = b""
    for row in pixels:
        text = "".join(f"{value:0{bits}b}" for value in row)
        packed += b"\0" + bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", columns, rows, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")


def test_jpeg_is_read_but_never_written(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 90, np.uint8)).save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg").array.shape == (1, 6, 4, 1)
    with pytest.raises(DatasetError, match=r"write \.png instead"):
        write_labels(tmp_path / "y.jpg", numbered((4, 3, 1)), Geometry((4, 3, 1), np.eye(4), is_2d=True))


# --- Cases and labels -----------------------------------------------------------------------------------------------


def test_channels_of_a_case_are_stacked(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", numbered(SHAPE, "int16"), Geometry(SHAPE, OBLIQUE))
    write_image(tmp_path / "b.nii.gz", numbered(SHAPE) / 2, Geometry(SHAPE, OBLIQUE))
    case = Case(id="x", images=(str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz")))
    volume = read_case(case, 2)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, np.stack([numbered(SHAPE), numbered(SHAPE) / 2]))
    with pytest.raises(DatasetError, match="case x: got 2 image files, expected 3"):
        read_case(case, 3)


def test_channels_on_other_grids_are_refused_with_the_difference(tmp_path: Path) -> None:
    shifted = OBLIQUE.copy()
    shifted[0, 3] += 1.5
    write_image(tmp_path / "a.nii.gz", numbered(SHAPE), Geometry(SHAPE, OBLIQUE))
    write_image(tmp_path / "b.nii.gz", numbered(SHAPE), Geometry(SHAPE, shifted))
    write_image(tmp_path / "c.nii.gz", numbered((3, 4, 6)), Geometry((3, 4, 6), OBLIQUE))
    for other, message in (("b", r"case x: channel b\.nii\.gz .* 1\.5 mm apart"), ("c", "3×4×6 against 3×4×5")):
        case = Case(id="x", images=(str(tmp_path / "a.nii.gz"), str(tmp_path / f"{other}.nii.gz")))
        with pytest.raises(GeometryError, match=message):
            read_case(case, 2)
    with pytest.raises(GeometryError, match="does not lie on its image's grid"):
        read_labels(tmp_path / "b.nii.gz", Geometry(SHAPE, OBLIQUE))


def test_rounding_in_headers_is_no_difference(tmp_path: Path) -> None:
    nearly = OBLIQUE + 1e-4
    nearly[3] = OBLIQUE[3]
    write_labels(tmp_path / "a.nii.gz", numbered(SHAPE), Geometry(SHAPE, nearly))
    labels, _ = read_labels(tmp_path / "a.nii.gz", Geometry(SHAPE, OBLIQUE))
    np.testing.assert_array_equal(labels, numbered(SHAPE))


def test_integers_in_disguise_are_labels_and_probabilities_are_not(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    write_image(path, numbered(SHAPE).astype(np.float32) + 1e-5, Geometry(SHAPE, OBLIQUE))
    labels, _ = read_labels(path)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, numbered(SHAPE))
    soft = np.zeros(SHAPE)
    soft[1, 1, 1] = 0.25
    write_image(path, soft, Geometry(SHAPE, OBLIQUE))
    with pytest.raises(DatasetError, match=r"not integers, in 1 of 60 voxels, such as 0\.25 \(range 0 to 0\.25\)"):
        read_labels(path)
    soft[1, 1, 1] = np.nan
    write_image(path, soft, Geometry(SHAPE, OBLIQUE))
    with pytest.raises(DatasetError, match="NaN or infinite values in 1 voxels"):
        read_labels(path)


def test_labels_of_other_types_and_shapes_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="uint8 or uint16"):
        write_labels(tmp_path / "x.nii.gz", numbered(SHAPE, "int32"), Geometry(SHAPE, OBLIQUE))
    with pytest.raises(DatasetError, match="does not fit"):
        write_labels(tmp_path / "x.nii.gz", numbered((3, 4, 6)), Geometry(SHAPE, OBLIQUE))
    with pytest.raises(DatasetError, match="cannot write"):
        write_labels(tmp_path / "x.xyz", numbered(SHAPE), Geometry(SHAPE, OBLIQUE))
    assert not list(tmp_path.iterdir())


# --- Broken files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.nii.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        ("x.nii.gz", b"", "an empty file"),
        ("x.nii", b"", "an empty file"),
        ("x.nii", b"hello, world", "text that begins with 'hello, world'"),
        ("x.nii.gz", gzip.compress(b"hello", mtime=0), "a gzip file"),
        ("x.nrrd", b"not one", "header cannot be read"),
        ("x.mha", b"ObjectType = Image\nNDims = 3\n", "does not say where the voxels are"),
        ("x.mhd", MHD_WITHOUT_DATA, "no.raw"),
        ("x.png", b"<html>", "a web page"),
        ("x.tif", b"II*\0nonsense", "TIFF"),
        ("x.jpg", b"\x89PNG....", "PNG picture"),
        ("x.hdr", b"\x5c\x01\x00\x00", r"an Analyze header, and .* x\.img, is missing"),
        ("x.img", b"..", r"\.hdr\), which stands for both"),
        ("x.mgz", b"..", "MGH header cannot be read"),
        ("x.mgh", bytes(80), "ends after 80 bytes"),
        ("x.mnc", b"CDF\x01....", "MINC file cannot be read"),
        ("x", bytes(128) + b"DICM", "Rows is missing"),
        ("x.npy", b"..", "not supported"),
    ],
)  # fmt: skip
def test_broken_and_foreign_files_are_named_for_what_they_are(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_image, read_header, read_labels):
        with pytest.raises(DatasetError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        read_image(tmp_path / "x.nii.gz")
    (tmp_path / "y.nii.gz").mkdir()
    with pytest.raises(DatasetError, match="is a folder"):
        read_image(tmp_path / "y.nii.gz")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".png", ".tif"])
def test_truncated_files_are_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    shape = (40, 30, 1) if ending in (".png", ".tif") else (40, 30, 10)
    noise = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    write_labels(path, noise, Geometry(shape, np.eye(4), is_2d=shape[2] == 1))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DatasetError, match=str(path)):
        read_image(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("from_end", [2, 40, 900])
def test_a_flipped_bit_in_a_compressed_file_is_noticed(tmp_path: Path, ending: str, from_end: int) -> None:
    """ITK hands out wrong voxels of damaged MetaImage files, and of NRRD files, without a word."""
    path = tmp_path / f"x{ending}"
    noise = np.random.default_rng(0).integers(0, 9, (20, 20, 20)).astype(np.uint8)
    write_labels(path, noise, Geometry(noise.shape, ORTHOGONAL))
    content = bytearray(path.read_bytes())
    content[-from_end] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="damaged"):
        read_image(path)


@pytest.mark.parametrize("ending", [".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("compress", [True, False])
def test_itk_files_packed_or_not_give_the_same_voxels(tmp_path: Path, ending: str, compress: bool) -> None:
    image = sitk.GetImageFromArray(numbered(SHAPE, "int16").transpose())
    sitk.WriteImage(image, str(tmp_path / f"x{ending}"), useCompression=compress)
    np.testing.assert_array_equal(read_image(tmp_path / f"x{ending}").array[0], numbered(SHAPE))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_nifti_header_that_promises_too_much_allocates_nothing(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    write_labels(path, numbered(SHAPE), Geometry(SHAPE, OBLIQUE))
    content = bytearray(gzip.decompress(path.read_bytes()) if ending == ".nii.gz" else path.read_bytes())
    content[42:48] = struct.pack("<3h", 30000, 30000, 30000)
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    for read in (read_header, read_image):
        with pytest.raises(DatasetError, match="promises 27,000,000,000,000 bytes"):
            read(path)


def test_itk_headers_that_promise_too_much_allocate_nothing(tmp_path: Path) -> None:
    nrrd = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 90000 90000 900\nencoding: raw\nendian: little\n\n1234"
    (tmp_path / "x.nrrd").write_text(nrrd)
    meta = (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = False\nDimSize = 90000 90000 900\n"
        "ElementType = MET_UCHAR\nElementDataFile = LOCAL\n1234"
    )
    (tmp_path / "x.mha").write_text(meta)
    for name in ("x.nrrd", "x.mha"):
        with pytest.raises(DatasetError, match="promises 7,290,000,000,000 bytes"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("where", [(0, 0), (1, 3)])
def test_an_affine_that_is_not_finite_is_a_geometry_error(tmp_path: Path, where: tuple[int, int]) -> None:
    path = tmp_path / "x.nii"
    write_labels(path, numbered(SHAPE), Geometry(SHAPE, OBLIQUE, qform_code=0))
    content = bytearray(path.read_bytes())
    start = 280 + 16 * where[0] + 4 * where[1]  # srow_x begins at byte 280
    content[start : start + 4] = struct.pack("<f", np.nan)
    path.write_bytes(content)
    with pytest.raises(GeometryError, match="finite") as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    nib.Nifti1Image(numbered(SHAPE).astype(np.complex64), np.eye(4)).to_filename(tmp_path / "x.nii")
    with pytest.raises(DatasetError, match="complex64"):
        read_image(tmp_path / "x.nii")
