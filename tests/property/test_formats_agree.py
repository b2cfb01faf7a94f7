"""Volumes of random geometry, written by nibabel or SimpleITK, are read as these libraries read them themselves."""

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoseg.io.images import read_header, read_image

ORIENTATIONS = [
    np.array([sign * (np.arange(3) == axis) for sign, axis in zip(signs, axes, strict=True)], float).T
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
assert len({matrix.tobytes() for matrix in ORIENTATIONS}) == 48

NIFTI_TYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
ITK_TYPES = ["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8"]
shapes = st.tuples(*[st.integers(1, 5)] * 3)
spacings = st.tuples(*[st.floats(0.05, 8)] * 3)
origins = st.tuples(*[st.floats(-300, 300)] * 3)
angles = st.one_of(st.just((0.0, 0.0, 0.0)), st.tuples(*[st.floats(-0.7, 0.7)] * 3))
run = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rotation(turns: tuple[float, float, float]) -> np.ndarray:
    out = np.eye(3)
    for axis, angle in enumerate(turns):
        first, second = [other for other in range(3) if other != axis]
        turn = np.eye(3)
        turn[[first, first, second, second], [first, second, first, second]] = [
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        ]
        out = out @ turn
    return out


def voxels(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.normal(scale=1e3, size=shape).astype(kind)
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)


@run
@given(
    orientation=st.sampled_from(range(48)),
    shape=shapes,
    spacing=spacings,
    origin=origins,
    turns=angles,
    shear=st.sampled_from([0.0, 0.0, 0.1]),
    dtype=st.sampled_from(NIFTI_TYPES),
    order=st.sampled_from("<>"),
    second=st.booleans(),
    frames=st.integers(1, 3),
    scaling=st.sampled_from([None, (0.001, 0.0), (2.5, -1024.0), (-1.0, 3.0)]),
    codes=st.sampled_from([(1, 0), (0, 1), (2, 1), (0, 0)]),
    ending=st.sampled_from([".nii", ".nii.gz", ".hdr"]),
    seed=st.integers(0, 99),
)
def test_nifti_is_read_as_nibabel_reads_it(
    tmp_path: Path,
    orientation: int,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    turns: tuple[float, float, float],
    shear: float,
    dtype: str,
    order: str,
    second: bool,
    frames: int,
    scaling: tuple[float, float] | None,
    codes: tuple[int, int],
    ending: str,
    seed: int,
) -> None:
    matrix = rotation(turns) @ ORIENTATIONS[orientation] @ np.diag(spacing)
    matrix[0, 1] += shear * spacing[1] * (codes[1] == 0)  # a qform knows no shear
    affine = nib.affines.from_matvec(matrix, origin)
    kinds = (nib.Nifti2Image, nib.Nifti2Pair) if second else (nib.Nifti1Image, nib.Nifti1Pair)
    kind = kinds[ending == ".hdr"]
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    image = kind(voxels((*shape, frames) if frames > 1 else shape, dtype, seed), None, header)
    image.header.set_zooms([*spacing, 1.0][: len(image.shape)])
    image.header.set_sform(affine if codes[0] else None, codes[0])
    image.header.set_qform(affine if codes[1] else None, codes[1])
    path = tmp_path / f"x{ending}"
    write_with_scaling(image, path, *(scaling or (1.0, 0.0)))
    oracle = nib.load(path)
    assert oracle.header.endianness == order
    volume = read_image(path, frames)
    truth = np.asanyarray(oracle.dataobj).reshape(*shape, frames)
    got = np.moveaxis(volume.array, 0, 3)
    assert got.dtype == (np.float32 if scaling or dtype[0] == "f" else np.dtype(dtype))
    np.testing.assert_array_equal(got, truth.astype(got.dtype))
    np.testing.assert_array_equal(volume.geometry.affine, oracle.affine)
    np.testing.assert_array_equal(read_header(path).geometry.affine, oracle.affine)
    if codes != (0, 0):
        np.testing.assert_allclose(oracle.affine, affine, atol=2e-3)


def write_with_scaling(image: nib.spatialimages.SpatialImage, path: Path, slope: float, inter: float) -> None:
    """As stored, with slope and intercept set by hand: nibabel would choose its own when it writes."""
    image.header.set_slope_inter(1, 0)
    image.to_filename(path)
    content = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    code = image.header.endianness
    if int(image.header["sizeof_hdr"]) == 348:
        content[112:120] = np.array([slope, inter], f"{code}f4").tobytes()
    else:
        content[176:192] = np.array([slope, inter], f"{code}f8").tobytes()
    path.write_bytes(gzip.compress(bytes(content), 1) if path.suffix == ".gz" else bytes(content))


@run
@given(
    orientation=st.sampled_from(range(48)),
    shape=shapes,
    spacing=spacings,
    origin=origins,
    turns=angles,
    dtype=st.sampled_from(ITK_TYPES),
    components=st.integers(1, 3),
    packed=st.booleans(),
    ending=st.sampled_from([".nrrd", ".nhdr", ".mha", ".mhd"]),
    seed=st.integers(0, 99),
)
def test_nrrd_and_metaimage_are_read_as_simpleitk_reads_them(
    tmp_path: Path,
    orientation: int,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    turns: tuple[float, float, float],
    dtype: str,
    components: int,
    packed: bool,
    ending: str,
    seed: int,
) -> None:
    array = voxels((*shape[::-1], components), dtype, seed)
    many = components > 1
    image = sitk.GetImageFromArray(array if many else array[..., 0], isVector=many)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection((rotation(turns) @ ORIENTATIONS[orientation]).flatten().tolist())
    path = tmp_path / f"x{ending}"
    sitk.WriteImage(image, str(path), useCompression=packed)
    oracle = sitk.ReadImage(str(path))
    volume = read_image(path, components)
    truth = sitk.GetArrayFromImage(oracle).reshape(*shape[::-1], components)
    got = volume.array.transpose(3, 2, 1, 0)
    assert got.dtype == (np.float32 if dtype[0] == "f" else np.dtype(dtype))
    np.testing.assert_array_equal(got, truth.astype(got.dtype))
    np.testing.assert_array_equal(truth, array)
    for index in itertools.product(*[(0, size - 1) for size in shape]):
        x, y, z = oracle.TransformIndexToPhysicalPoint([int(item) for item in index])
        np.testing.assert_allclose((volume.geometry.affine @ [*index, 1])[:3], [-x, -y, z], atol=1e-5)
    np.testing.assert_allclose(volume.geometry.spacing_mm, spacing, rtol=1e-5)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("detached", [False, True])
def test_nrrd_and_metaimage_of_either_byte_order(tmp_path: Path, order: str, detached: bool) -> None:
    """SimpleITK writes the machine's order only, so these headers are written by hand."""
    stored = np.arange(60, dtype=np.int16).reshape(5, 4, 3).astype(f"{'<' if order == 'little' else '>'}i2")
    nrrd = (
        f"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 3 4 5\n"
        f"space directions: (0.5,0,0) (0,0.75,0) (0,0,3)\nkinds: domain domain domain\nendian: {order}\nencoding: raw\n"
        f"space origin: (1,2,3)\n" + ("data file: x.raw\n" if detached else "") + "\n"
    )
    meta = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = {order == 'big'}\n"
        f"Offset = 1 2 3\nElementSpacing = 0.5 0.75 3\nDimSize = 3 4 5\nElementType = MET_SHORT\n"
        f"ElementDataFile = {'x.raw' if detached else 'LOCAL'}\n"
    )
    (tmp_path / "x.raw").write_bytes(stored.tobytes())
    for name, text in ((".nhdr" if detached else ".nrrd", nrrd), (".mhd" if detached else ".mha", meta)):
        path = tmp_path / f"x{name}"
        path.write_bytes(text.encode() + (b"" if detached else stored.tobytes()))
        volume = read_image(path)
        np.testing.assert_array_equal(volume.array[0], np.arange(60).reshape(5, 4, 3).transpose())
        np.testing.assert_allclose(
            volume.geometry.affine, np.array([[-0.5, 0, 0, -1], [0, -0.75, 0, -2], [0, 0, 3, 3], [0, 0, 0, 1]])
        )
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), stored)


@pytest.mark.parametrize("number", range(48))
def test_every_orientation_puts_a_marked_voxel_at_its_place(tmp_path: Path, number: int) -> None:
    """All 48, through both libraries: the world position of one voxel does not depend on the format."""
    affine = nib.affines.from_matvec(ORIENTATIONS[number] @ np.diag([0.5, 0.75, 3.0]), (7, -8, 9))
    marked = np.zeros((3, 4, 5), np.uint8)
    marked[2, 1, 3] = 1
    nib.Nifti1Image(marked, affine).to_filename(tmp_path / "x.nii")
    image = sitk.GetImageFromArray(marked.T)
    image.SetSpacing((0.5, 0.75, 3.0))
    to_lps = np.diag([-1.0, -1.0, 1.0])
    image.SetDirection((to_lps @ ORIENTATIONS[number]).flatten().tolist())
    image.SetOrigin((-7, 8, 9))
    for name in ("x.nrrd", "x.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
    for name in ("x.nii", "x.nrrd", "x.mha"):
        volume = read_image(tmp_path / name)
        (place,) = np.argwhere(volume.array[0])
        np.testing.assert_allclose(volume.geometry.affine @ [*place, 1], affine @ [2, 1, 3, 1], atol=1e-5)
