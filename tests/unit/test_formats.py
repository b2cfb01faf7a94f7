"""FreeSurfer, MINC, NIfTI pairs and TIFF stacks: voxels, grid and spacing as their own libraries read them."""

import gzip
import importlib.util
import json
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.io import netcdf_file

from autoseg.checking.contents import check_case
from autoseg.checking.repair import repair_dataset
from autoseg.checking.repairs import RepairSettings
from autoseg.domain.dataset import Case, Channel, Dataset, LabelClass, LabelSchema
from autoseg.domain.geometry import Geometry
from autoseg.domain.layouts import load_dataset
from autoseg.errors import DatasetError, GeometryError
from autoseg.inference.inputs import find_cases, output_ending, warn_of_cubes
from autoseg.io.images import read_header, read_image, read_labels, write_image, write_labels
from autoseg.io.store import Source
from autoseg.runtime import NoProgress

SHEARED = np.array([[0.5, 0.1, -0.3, 10.0], [-0.1, 0.8, 0.2, -20.0], [0.1, -0.2, 2.9, 30.0], [0, 0, 0, 1]])
SHAPE = (3, 4, 5)
ROWS, COLUMNS, PAGES = 4, 5, 3


def numbered(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


STACK = numbered((PAGES, ROWS, COLUMNS))


# --- FreeSurfer, MINC, pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".mgz", ".mgh"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_mgh_is_read_as_nibabel_reads_it(tmp_path: Path, ending: str, dtype: str) -> None:
    path = tmp_path / f"x{ending}"
    content = nib.MGHImage(numbered((*SHAPE, 2), dtype), SHEARED).to_bytes()
    path.write_bytes(gzip.compress(content) if ending == ".mgz" else content)
    oracle = nib.MGHImage.from_bytes(content)
    header, volume = read_header(path), read_image(path, 2)
    np.testing.assert_array_equal(np.moveaxis(volume.array, 0, 3), np.asanyarray(oracle.dataobj))
    np.testing.assert_array_equal(volume.geometry.affine, oracle.affine)
    np.testing.assert_allclose(volume.geometry.affine, SHEARED, atol=1e-5)
    assert volume.array.dtype == dtype
    assert (header.shape, header.components) == (SHAPE, 2)
    with pytest.raises(DatasetError, match="expected 1 channel in this file, got 2"):
        read_image(path)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("ending", [".mgz", ".mgh"])
def test_mgz_label_maps_lie_on_their_image(tmp_path: Path, ending: str, dtype: str) -> None:
    labels = numbered(SHAPE, dtype) * (1 if dtype == "uint8" else 1000)
    geometry = Geometry(SHAPE, SHEARED)
    for name in (f"a{ending}", f"b{ending}"):
        write_labels(tmp_path / name, labels, geometry)
    again, _ = read_labels(tmp_path / f"a{ending}", geometry)
    np.testing.assert_array_equal(again, labels)
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()
    with pytest.raises(DatasetError, match="cannot hold int64"):
        write_image(tmp_path / f"c{ending}", labels.astype(np.int64), geometry)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, 2_000_000_000, "promises 160,000,000,000 bytes"),
        (8, -1, "holds no voxels"),
        (20, 77, "MGH header cannot be read"),
        (0, 2, "MGH header cannot be read"),
    ],
)
def test_damaged_mgh_headers_are_refused(tmp_path: Path, at: int, value: int, message: str) -> None:
    path = tmp_path / "x.mgh"
    content = bytearray(nib.MGHImage(numbered(SHAPE, "float32"), SHEARED).to_bytes())
    content[at : at + 4] = struct.pack(">i", value)
    path.write_bytes(content)
    for read in (read_header, read_image):
        with pytest.raises(DatasetError, match=message):
            read(path)


def write_minc1(path: Path, data: np.ndarray, slices: np.ndarray) -> None:
    """A MINC 1 file (z, y, x) whose slices have ranges of their own."""
    with netcdf_file(str(path), "w") as file:
        for name, size in zip(("zspace", "yspace", "xspace"), data.shape, strict=True):
            file.createDimension(name, size)
        for name, step, start in (("zspace", 3.0, 30.0), ("yspace", -0.8, -20.0), ("xspace", 0.5, 10.0)):
            axis = file.createVariable(name, "i", ())
            axis.spacing, axis.step, axis.start = b"regular__", step, start
        image = file.createVariable("image", "b", ("zspace", "yspace", "xspace"))
        image.signtype, image.valid_range = b"unsigned", np.array([0.0, 255.0])
        image[:] = data.view(np.int8)
        for name, values in (("image-min", 0 * slices), ("image-max", slices)):
            file.createVariable(name, "d", ("zspace",))[:] = values


def test_minc1_is_read_and_scaled_as_nibabel_does(tmp_path: Path) -> None:
    path = tmp_path / "x.mnc"
    write_minc1(path, numbered((3, 4, 5)), np.array([255.0, 510.0, 100.0]))
    volume, header = read_image(path), read_header(path)
    np.testing.assert_allclose(volume.array[0, 1], 2.0 * numbered((3, 4, 5))[1], rtol=1e-6)
    np.testing.assert_allclose(
        volume.geometry.affine, [[0, 0, 0.5, 10], [0, -0.8, 0, -20], [3, 0, 0, 30], [0, 0, 0, 1]], atol=1e-12
    )
    assert (header.shape, header.components) == ((3, 4, 5), 1)
    assert output_ending(Case(id="x", images=(str(path),))) == ".nii.gz"
    with pytest.raises(DatasetError, match=r"Write \.nii\.gz instead"):
        write_labels(path, numbered((3, 4, 5)), volume.geometry)


def test_minc_label_maps_come_back_as_integers(tmp_path: Path) -> None:
    write_minc1(tmp_path / "x.mnc", numbered((3, 4, 5)), np.full(3, 255.0))
    np.testing.assert_array_equal(read_labels(tmp_path / "x.mnc")[0], numbered((3, 4, 5)))


def test_minc2_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "x.mnc").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(DatasetError, match="h5py, which is not installed") as caught:
        read_image(tmp_path / "x.mnc")
    assert "Install h5py" in caught.value.hint


def test_minc2_is_read_as_nibabel_reads_it() -> None:
    pytest.importorskip("h5py")
    path = Path(nib.__file__).parent / "tests/data/small.mnc"
    if not path.is_file():
        pytest.skip("nibabel came without its test files")
    volume, oracle = read_image(path), nib.load(path)
    np.testing.assert_allclose(volume.array[0], oracle.get_fdata(), rtol=1e-6)
    np.testing.assert_array_equal(volume.geometry.affine, oracle.affine)


def test_a_nifti_pair_is_one_image_and_its_outputs_are_single_files(tmp_path: Path) -> None:
    path = tmp_path / "x.hdr"
    nib.Nifti1Pair(numbered(SHAPE, "int16"), SHEARED).to_filename(path)
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array[0], numbered(SHAPE))
    np.testing.assert_allclose(volume.geometry.affine, SHEARED, atol=1e-5)
    (case,) = find_cases([tmp_path], 1)
    assert case.images == (str(path),)
    assert output_ending(case) == ".nii.gz"
    (tmp_path / "x.img").write_bytes((tmp_path / "x.img").read_bytes()[:-4])
    with pytest.raises(DatasetError, match=r"x\.img: the header promises 120 bytes"):
        read_image(path)
    (tmp_path / "x.img").unlink()
    with pytest.raises(DatasetError, match=r"the header of a NIfTI-1 pair .* x\.img, is missing"):
        read_image(path)


def test_an_analyze_file_is_refused_because_it_has_no_sides(tmp_path: Path) -> None:
    nib.AnalyzeImage(numbered(SHAPE, "int16"), np.eye(4)).to_filename(tmp_path / "x.hdr")
    with pytest.raises(DatasetError, match="does not say where left and right are"):
        read_image(tmp_path / "x.hdr")


# --- TIFF stacks ----------------------------------------------------------------------------------------------------


def save_imagej(path: Path, axes: str = "ZYX", pixels: np.ndarray = STACK, **metadata: object) -> None:
    resolution = metadata.pop("resolution", (2.0, 4.0))
    tifffile.imwrite(path, pixels, imagej=True, resolution=resolution, metadata={"axes": axes, **metadata})


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("mm", 1.0), ("micron", 1e-3), ("um", 1e-3), ("\\u00B5m", 1e-3), ("nm", 1e-6), ("inch", 25.4)],
)
def test_pages_are_slices_and_imagej_says_how_far_apart(tmp_path: Path, unit: str, factor: float) -> None:
    path = tmp_path / "x.tif"
    save_imagej(path, spacing=3.0, unit=unit)
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array[0], STACK.transpose(2, 1, 0))
    np.testing.assert_allclose(volume.geometry.spacing_mm, (0.5 * factor, 0.25 * factor, 3 * factor), rtol=1e-6)
    assert not volume.geometry.is_2d
    assert output_ending(Case(id="x", images=(str(path),))) == ".tif"


@pytest.mark.parametrize(
    "metadata",
    [{"spacing": 3.0}, {"spacing": 3.0, "unit": "pixel"}, {"spacing": 0.0, "unit": "mm"}],
)
def test_a_stack_that_states_no_size_is_made_of_cubes(tmp_path: Path, metadata: dict[str, object]) -> None:
    save_imagej(tmp_path / "x.tif", **metadata)
    geometry = read_header(tmp_path / "x.tif").geometry
    assert (geometry.spacing_mm, geometry.stated) == ((1.0, 1.0, 1.0), "nothing")


def test_dots_per_inch_of_plain_pages_are_no_voxel_size(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        for page in STACK:
            writer.write(page, metadata=None, resolution=(300, 300), resolutionunit="INCH")
    volume = read_image(tmp_path / "x.tif")
    np.testing.assert_array_equal(volume.array[0], STACK.transpose(2, 1, 0))
    assert volume.geometry.stated == "nothing"


@pytest.mark.parametrize(("unit", "factor"), [({}, 1e-3), (dict.fromkeys("XYZ", "mm"), 1.0)])
def test_ome_sizes(tmp_path: Path, unit: dict[str, str], factor: float) -> None:
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 3.0}
    units = {f"PhysicalSize{axis}Unit": name for axis, name in unit.items()}
    path = tmp_path / "x.ome.tif"
    tifffile.imwrite(path, STACK.astype(np.int16), ome=True, metadata={"axes": "ZYX", **sizes, **units})
    geometry = read_header(path).geometry
    np.testing.assert_allclose(geometry.spacing_mm, (0.5 * factor, 0.25 * factor, 3 * factor), rtol=1e-6)
    del sizes["PhysicalSizeZ"]
    tifffile.imwrite(path, STACK, ome=True, metadata={"axes": "ZYX", **sizes})
    assert read_header(path).geometry.stated == "nothing"


def test_ome_xml_with_entities_is_refused(tmp_path: Path) -> None:
    """Entities can blow up, or name other files."""
    sound = tifffile.TiffFile
    path = tmp_path / "x.ome.tif"
    tifffile.imwrite(path, STACK, ome=True, metadata={"axes": "ZYX"})
    with sound(path) as file:
        text = str(file.ome_metadata)
    bad = text.replace(
        '<?xml version="1.0" encoding="UTF-8"?>', '<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a "b">]>'
    )
    tifffile.imwrite(path, STACK, description=bad.encode(), metadata=None, photometric="minisblack")
    with pytest.raises(DatasetError, match="document type or entities"):
        read_header(path)


def test_the_file_beside_a_stack_goes_before_the_stack_itself(tmp_path: Path) -> None:
    path = tmp_path / "case_0000.tif"
    save_imagej(path, spacing=3.0, unit="mm")
    beside = tmp_path / "case.json"
    beside.write_text('{"spacing": [7.6, 0.5, 0.25]}')
    assert read_header(path).geometry.spacing_mm == (0.25, 0.5, 7.6)
    beside.write_text('{"Manufacturer": "somebody"}')
    assert read_header(path).geometry.spacing_mm == (0.5, 0.25, 3.0)
    for wrong in ('{"spacing": [1, 2]}', '{"spacing": [1, 2, 0]}', '{"spacing": "1"}', "{"):
        beside.write_text(wrong)
        with pytest.raises(DatasetError, match=r"case\.json"):
            read_header(path)


def test_channels_in_pages_are_channels(tmp_path: Path) -> None:
    both = np.stack([STACK, STACK + 60], axis=1)
    save_imagej(tmp_path / "x.tif", "ZCYX", both, spacing=3.0, unit="mm")
    tifffile.imwrite(tmp_path / "y.tif", np.moveaxis(both, 1, 0), ome=True, metadata={"axes": "CZYX"})
    for name in ("x.tif", "y.tif"):
        array = read_image(tmp_path / name, 2).array
        np.testing.assert_array_equal(array, both.transpose(1, 3, 2, 0))
        with pytest.raises(DatasetError, match="expected 1 channel in this file, got 2"):
            read_image(tmp_path / name)
    save_imagej(tmp_path / "flat.tif", "CYX", both[0])
    volume = read_image(tmp_path / "flat.tif", 2)
    assert volume.geometry.is_2d
    np.testing.assert_array_equal(volume.array[..., 0], both[0].transpose(0, 2, 1))


def test_a_constant_channel_in_pages_is_no_alpha(tmp_path: Path) -> None:
    four = np.stack([STACK, STACK + 1, STACK + 2, 0 * STACK], axis=1)
    save_imagej(tmp_path / "x.tif", "ZCYX", four)
    with pytest.raises(DatasetError, match="expected 3 channels in this file, got 4"):
        read_image(tmp_path / "x.tif", 3)


def test_stacks_of_colours_are_three_channels_and_grey_ones_are_grey(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "x.tif", np.stack([STACK, STACK + 1, STACK + 2], -1), photometric="rgb")
    assert read_image(tmp_path / "x.tif", 3).array.shape == (3, COLUMNS, ROWS, PAGES)
    tifffile.imwrite(tmp_path / "y.tif", np.stack([STACK] * 3, -1), photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "y.tif").array[0], STACK.transpose(2, 1, 0))


def test_what_is_no_stack_of_slices_is_refused(tmp_path: Path) -> None:
    save_imagej(tmp_path / "time.tif", "TYX")
    with pytest.raises(DatasetError, match="time series") as caught:
        read_image(tmp_path / "time.tif")
    assert "ImageJ" in caught.value.hint
    save_imagej(tmp_path / "both.tif", "TZYX", np.stack([STACK, STACK]))
    with pytest.raises(DatasetError, match="time series"):
        read_image(tmp_path / "both.tif")
    with tifffile.TiffWriter(tmp_path / "mixed.tif") as writer:
        writer.write(STACK[0])
        writer.write(STACK[1, :2])
    with pytest.raises(DatasetError, match=r"2 pictures of different kinds \(4×5, 2×5\)"):
        read_image(tmp_path / "mixed.tif")


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits", "tiff_deflate"])
def test_compressions(tmp_path: Path, compression: str) -> None:
    plane = np.kron(STACK, np.full((8, 8), 3, np.uint8)).reshape(PAGES, ROWS * 8, COLUMNS * 8)
    pages = [Image.fromarray(page) for page in plane]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:], compression=compression)
    array = read_image(tmp_path / "x.tif").array[0].transpose(2, 1, 0)
    np.testing.assert_allclose(array, plane, atol=4 if compression == "jpeg" else 0)


@pytest.mark.parametrize("compression", [None, "group4", "tiff_lzw"])
def test_pages_of_one_bit(tmp_path: Path, compression: str | None) -> None:
    """Uncompressed they were refused: eight pixels a byte were taken for one."""
    mask = np.random.default_rng(0).random((200, 300)) > 0.5
    Image.fromarray(mask).save(tmp_path / "x.tif", compression=compression)
    labels, _ = read_labels(tmp_path / "x.tif")
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        is_inverted = file.pages.first.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    np.testing.assert_array_equal(labels[..., 0].T, mask != is_inverted)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16", "float64"])
@pytest.mark.parametrize("spacing", [(0.5, 0.25, 3.0), (2e-4, 2e-4, 1e-3)])
def test_stacks_come_back_with_their_spacing(tmp_path: Path, dtype: str, spacing: tuple[float, ...]) -> None:
    array = numbered((COLUMNS, ROWS, PAGES), dtype)
    geometry = Geometry(array.shape, np.diag([*spacing, 1.0]), stated="spacing")
    write_image(tmp_path / "x.tif", array, geometry)
    volume = read_image(tmp_path / "x.tif")
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.geometry.spacing_mm, spacing, rtol=1e-6)
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("states", ["image", "labels", "neither"])
def test_label_stacks_take_the_spacing_that_one_of_both_states(tmp_path: Path, states: str) -> None:
    for name in ("image", "labels"):
        save_imagej(tmp_path / f"{name}.tif", **({"spacing": 3.0, "unit": "mm"} if states == name else {}))
    image = read_header(tmp_path / "image.tif").geometry
    labels, _ = read_labels(tmp_path / "labels.tif", image)
    write_labels(tmp_path / "out.tif", labels, image)
    assert read_header(tmp_path / "out.tif").geometry.spacing_mm == image.spacing_mm
    assert read_header(tmp_path / "out.tif").geometry.stated == image.stated


def test_label_stacks_of_another_spacing_are_refused(tmp_path: Path) -> None:
    for name, spacing in (("image", 3.0), ("labels", 2.0)):
        save_imagej(tmp_path / f"{name}.tif", spacing=spacing, unit="mm")
    with pytest.raises(GeometryError, match="does not lie on its image's grid"):
        read_labels(tmp_path / "labels.tif", read_header(tmp_path / "image.tif").geometry)
    # A stack has no place in the world: beside other formats its shape and spacing count.
    write_image(tmp_path / "image.nii.gz", STACK.T, Geometry(STACK.T.shape, np.diag([0.5, 0.25, 2.0, 1])))
    read_labels(tmp_path / "labels.tif", read_header(tmp_path / "image.nii.gz").geometry)


def test_check_warns_of_stacks_without_a_spacing(tmp_path: Path) -> None:
    save_imagej(tmp_path / "x.tif")
    save_imagej(tmp_path / "y.tif", pixels=STACK % 2)
    case = Case(id="x", images=(str(tmp_path / "x.tif"),), labels=str(tmp_path / "y.tif"))
    schema = LabelSchema(classes=(LabelClass(name="a", values=(1,)),))
    dataset = Dataset(name="d", channels=(Channel(name="c"),), labels=schema, cases=(case,))
    assert [(item.code, item.severity) for item in check_case(case, dataset).findings] == [("no-spacing", "warning")]


def test_tiff_stacks_that_promise_too_much_are_refused(tmp_path: Path) -> None:
    save_imagej(tmp_path / "x.tif")
    content = (tmp_path / "x.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        entry = file.pages.first.tags["ImageLength"].offset + 8
        order = file.byteorder
    broken = content[:entry] + struct.pack(f"{order}I", 2_000_000_000) + content[entry + 4 :]
    (tmp_path / "x.tif").write_bytes(broken)
    with pytest.raises(DatasetError):
        read_header(tmp_path / "x.tif")


def test_colours_that_are_not_red_green_blue_are_refused(tmp_path: Path) -> None:
    """Cyan, magenta, yellow and a constant black were taken for RGB and an alpha."""
    Image.new("CMYK", (4, 3), (10, 20, 30, 0)).save(tmp_path / "x.jpg")
    with pytest.raises(DatasetError, match="colours C, M, Y, K"):
        read_image(tmp_path / "x.jpg", 3)


def test_grey_in_the_colours_of_a_jpeg_is_grey(tmp_path: Path) -> None:
    grey = np.kron(numbered((4, 5)), np.full((8, 8), 12, np.uint8))
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "x.jpg", quality=95)
    array = read_image(tmp_path / "x.jpg").array
    assert array.shape == (1, 40, 32, 1)
    np.testing.assert_allclose(array[0, ..., 0].T.astype(int), grey, atol=6)


# --- Which files belong together ------------------------------------------------------------------------------------


def test_channels_of_one_case_may_end_in_different_ways(tmp_path: Path) -> None:
    for name in ("a_0000.nii.gz", "a_0001.nrrd"):
        write_image(tmp_path / name, numbered(SHAPE), Geometry(SHAPE, np.eye(4)))
    (case,) = find_cases([tmp_path], 2)
    assert [Path(file).name for file in case.images] == ["a_0000.nii.gz", "a_0001.nrrd"]


def test_a_cached_case_is_stale_when_a_file_beside_its_image_changes(tmp_path: Path) -> None:
    """Only the header counted: voxels of detached files and the spacing beside a stack could change unseen."""
    nib.Nifti1Pair(numbered(SHAPE, "int16"), SHEARED).to_filename(tmp_path / "x.hdr")
    write_image(tmp_path / "x.mhd", numbered(SHAPE), Geometry(SHAPE, np.eye(4)))
    write_image(tmp_path / "x.nhdr", numbered(SHAPE), Geometry(SHAPE, np.eye(4)))
    save_imagej(tmp_path / "t_0000.tif")
    (tmp_path / "t.json").write_text('{"spacing": [1, 1, 1]}')
    others = {"x.hdr": "x.img", "x.mhd": "x.zraw", "x.nhdr": "x.raw.gz", "t_0000.tif": "t.json"}
    for name, other in others.items():
        source = Source.of(tmp_path / name)
        assert source.is_current(tmp_path / name)
        content = (tmp_path / other).read_bytes()
        (tmp_path / other).write_bytes(content.replace(content[-2:], b"9" + content[-1:]))
        assert not source.is_current(tmp_path / name), name


# --- Bugs that damaged headers found --------------------------------------------------------------------------------


def edited_mha(path: Path, old: bytes, new: bytes) -> Path:
    write_image(path, numbered(SHAPE, "int16"), Geometry(SHAPE, np.diag([0.5, 0.75, 3, 1])))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"NDims = 3", b"NDims = 93", "NDims = 93, expected 2, 3 or 4"),
        (b"NDims = 3", b"NDims = 2", "expected 2 numbers"),
        (b"NDims = 3", b"NDims = 3\nNDims = 3", "NDims twice"),
        (b"DimSize = 3 4 5", b"DimSize = 3 4 5 6", "expected 3 numbers"),
        (b"ElementType = MET_SHORT", b"ElementType = SHORT", "ElementType = SHORT"),
        (b"BinaryData", b"Binary\xffData", "line 3 of the header is not of the form"),
        (b"ElementDataFile = LOCAL", b"ElementData = LOCAL", "not of the form|does not say where the voxels are"),
    ],
)
def test_metaimage_headers_are_checked_before_metaio_trusts_them(
    tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    """More axes than MetaIO has room for made it write over other memory, and the process died."""
    path = edited_mha(tmp_path / "x.mha", old, new)
    for read in (read_header, read_image):
        with pytest.raises(DatasetError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (b"Remark = ", "does not say how many bytes are compressed"),
        (b"CompressedDataSize = 9", r"says 9\d+ compressed bytes|says 9,\d+|says 9\d\d"),
        (b"CompressedDataSize = x", "is no number of bytes"),
    ],
)
def test_metaimages_that_cannot_be_unpacked_are_refused(tmp_path: Path, new: bytes, message: str) -> None:
    """MetaIO says on stderr that it failed, and hands out what lay in memory."""
    path = edited_mha(tmp_path / "x.mha", b"CompressedDataSize = ", new)
    with pytest.raises(DatasetError, match=message):
        read_image(path)


def test_truth_values_are_read_as_metaio_reads_them(tmp_path: Path) -> None:
    """A header with `CompressedData = Tru` was taken for one of plain voxels."""
    path = edited_mha(tmp_path / "x.mha", b"CompressedData = True", b"CompressedData = Tru")
    np.testing.assert_array_equal(read_image(path).array[0], numbered(SHAPE))


def test_nifti_voxels_never_begin_inside_the_header(tmp_path: Path) -> None:
    """With an offset of 0 the header itself was handed out as voxels."""
    path = tmp_path / "x.nii"
    write_labels(path, numbered(SHAPE), Geometry(SHAPE, SHEARED))
    content = bytearray(path.read_bytes())
    content[108:112] = struct.pack("<f", 0)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="begin at byte 0, inside itself"):
        read_image(path)


def test_lengths_of_nifti_extensions_allocate_nothing(tmp_path: Path) -> None:
    """A damaged length of an extension asked for gigabytes before anything was compared with the file."""
    path = tmp_path / "x.nii"
    write_labels(path, numbered(SHAPE), Geometry(SHAPE, SHEARED))
    content = path.read_bytes()
    offset = struct.pack("<f", 368.0)
    extension = b"\1\0\0\0" + struct.pack("<ii", 0x7FFFFFF0, 6) + bytes(8)
    path.write_bytes(content[:108] + offset + content[112:348] + extension + content[352:])
    np.testing.assert_array_equal(read_image(path).array[0], numbered(SHAPE))


# --- Repaired copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".hdr", ".tif", ".mgz"])
def test_repaired_copies_keep_grid_and_voxels(tmp_path: Path, ending: str) -> None:
    """A linked pair came without its voxels, and a linked stack without the spacing beside it."""
    root, out = tmp_path / "set", tmp_path / "fixed"
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    labels = (numbered(SHAPE) % 2).astype(np.uint8)
    for file, voxels in ((root / f"imagesTr/a_0000{ending}", numbered(SHAPE)), (root / f"labelsTr/a{ending}", labels)):
        if ending == ".hdr":
            nib.Nifti1Pair(voxels, SHEARED).to_filename(file)
        elif ending == ".mgz":
            write_image(file, voxels, Geometry(SHAPE, SHEARED))
        else:
            save_imagej(file, pixels=voxels.T)
    (root / "imagesTr/a.json").write_text('{"spacing": [7.6, 0.5, 0.25]}')
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}, "file_ending": ending}
    (root / "dataset.json").write_text(json.dumps(description))
    repair_dataset(root, out, RepairSettings(), workers=1, progress=NoProgress())
    (before,), (after,) = load_dataset(root).cases, load_dataset(out).cases
    first, second = read_image(before.images[0]), read_image(after.images[0])
    assert before.labels is not None
    assert after.labels is not None
    np.testing.assert_array_equal(first.array, second.array)
    np.testing.assert_allclose(first.geometry.affine, second.geometry.affine, atol=1e-6)
    np.testing.assert_array_equal(read_labels(after.labels, second.geometry)[0], labels)
    if ending == ".tif":
        assert second.geometry.spacing_mm == (0.25, 0.5, 7.6)


def test_prediction_tells_of_stacks_read_as_cubes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_imagej(tmp_path / "x.tif")
    (case,) = find_cases([tmp_path], 1)
    with caplog.at_level("WARNING", logger="autoseg"):
        warn_of_cubes(case, read_header(case.images[0]).geometry)
    assert "case x: the TIFF stack does not state its voxel size" in caplog.text
