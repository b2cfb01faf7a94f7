"""What a file really is, told from its first bytes: for messages about files that are not what their name says."""

from __future__ import annotations

from pathlib import Path

from autoseg.domain.endings import IMAGE_ENDINGS, PAIR_ENDING, split_ending
from autoseg.errors import DatasetError

SNIFF_BYTES = 512
"""Enough for every mark below; DICOM's stands at byte 128, TAR's at 257."""

DEFLATE_MAX_RATIO = 1032
"""Deflate cannot blow a file up more than this. Source: zlib's technical details, "maximum compression factor"."""

SUPPORTED = (
    "NIfTI (.nii, .nii.gz, .hdr), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd), FreeSurfer (.mgz, .mgh), MINC (.mnc), "
    "TIFF stacks (.tif), pictures (.png, .tif, .jpg, .bmp) and DICOM series"
)

_MARKS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer (text that stands for the image)"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"PK\x03\x04", "a zip archive"),
    (257, b"ustar", "a tar archive"),
    (128, b"DICM", "a DICOM file"),
    (344, b"n+1\x00", "an uncompressed NIfTI-1 file"),
    (344, b"ni1\x00", "the header of a NIfTI-1 pair (.hdr and .img)"),
    (4, b"n+2\x00", "an uncompressed NIfTI-2 file"),
    (0, b"NRRD", "a NRRD file"),
    (0, b"ObjectType", "a MetaImage file"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"II*\x00", "a TIFF picture"),
    (0, b"MM\x00*", "a TIFF picture"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"CDF\x01", "a NetCDF file (MINC 1)"),
    (0, b"\x00\x00\x00\x01\x00\x00", "an MGH file"),
    (0, b"<!DOCTYPE", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"\\\x01\x00\x00", "an Analyze header"),
    (0, b"\x00\x00\x01\x5c", "an Analyze header"),
)

_OTHER_FORMATS = {
    ".b2nd": "blosc2",
    ".npz": "NumPy",
    ".npy": "NumPy",
    ".gz": "gzip, but not .nii.gz",
}


def describe_content(path: Path) -> str:
    """Say what a file really is, from its first bytes, in words that complete "it is ..."."""
    try:
        with path.open("rb") as stream:
            head = stream.read(SNIFF_BYTES)
    except OSError as problem:
        return f"not readable ({problem.strerror or problem})"
    if not head:
        return "an empty file"
    for offset, mark, meaning in _MARKS:
        if head[offset : offset + len(mark)] == mark:
            return meaning
    if not head.strip(b"\x00"):
        return "a file that begins with zeros only"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return f"text that begins with {head[:40].decode('ascii').splitlines()[0]!r}"
    return "of an unknown kind"


def broken(path: Path, what: str) -> DatasetError:
    """The error for a file that cannot be read as its ending promises.

    Args:
        path: The file.
        what: What went wrong, in words, without the file name.
    """
    hint = "Fetch or export this file again, or take the case out of the data set."
    return DatasetError(f"{path}: {what}; it is {describe_content(path)}", hint=hint)


def pair_voxels(path: Path) -> Path:
    """The file with the voxels of a NIfTI pair, whose header `path` is."""
    return path.with_suffix(".IMG" if path.suffix.isupper() else ".img")


def require_supported(path: Path) -> str:
    """The lower-case ending of an existing file that is read.

    Raises:
        DatasetError: There is no such file, it is a folder, or its format is not supported.
    """
    ending = split_ending(path)[1].lower()
    if ending not in IMAGE_ENDINGS:
        kind = _OTHER_FORMATS.get(ending, "")
        named = f"{kind} files ({ending})" if kind else f"files that end in {ending or 'nothing'}"
        missing = "" if kind or not path.is_file() else f"; it is {describe_content(path)}"
        if ending == ".img":
            named, missing = "the voxels of a NIfTI pair (.img)", ": name their header (.hdr), which stands for both"
        raise DatasetError(
            f"{path}: {named} are not supported{missing}",
            hint=f"Supported are {SUPPORTED}. Convert it, for example to .nii.gz.",
        )
    if path.is_dir():
        raise DatasetError(f"{path} is a folder, not an image file")
    if not path.is_file():
        raise DatasetError(f"{path}: there is no such file")
    if ending == PAIR_ENDING and not (voxels := pair_voxels(path)).is_file():
        raise DatasetError(
            f"{path}: it is {describe_content(path)}, and the file with its voxels, {voxels.name}, is missing",
            hint="Put both files of the pair side by side, or take the case out of the data set.",
        )
    return ending


def require_room(path: Path, promised_bytes: int, *, offset: int = 0, compressed: bool) -> None:
    """Refuse a header that promises more voxels than the file can hold, before anything is allocated.

    Args:
        path: The file that holds the voxels.
        promised_bytes: Bytes of voxels by the header.
        offset: Bytes before the voxels, where they are not compressed.
        compressed: Whether the voxels are deflated; then only the greatest possible ratio is held against the header.

    Raises:
        DatasetError: The file is too small.
    """
    size = path.stat().st_size
    room = size * DEFLATE_MAX_RATIO if compressed else size - offset
    if promised_bytes > room:
        raise broken(
            path,
            f"the header promises {promised_bytes:,} bytes of voxels, but the file of {size:,} bytes cannot hold them",
        )
