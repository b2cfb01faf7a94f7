"""Reads damaged copies of image files, one after the other, in a process of limited memory.

    python tests/mutated_headers.py ORIGINALS SCRATCH --count 2000 --seed 0

For each copy a line of JSON tells the change before it is read, so that a crash is told too, and then what came of it:
"error" (an AutosegError), "equal" (the volume is what nibabel or SimpleITK make of the same bytes), or what went wrong.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import resource
import shutil
import struct
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from autoseg.domain.endings import ITK_ENDINGS, TIFF_ENDINGS, split_ending
from autoseg.domain.geometry import Volume
from autoseg.errors import AutosegError
from autoseg.io.images import read_header, read_image

ROOM_BYTES = 1 << 29
"""Beyond what the process holds when it starts; far more than the files need, far less than damaged headers ask for."""

PEAK_BYTES = 1 << 27
"""What reading one of these small files may take at most, by Python's count."""

HEADER_BYTES = 560
EXTREMES = (0, 1, 2, 3, -1, 0x7FFF, 0x7FFFFFFF, -0x80000000, 0x7FFFFFFFFFFFFFFF, 10**6)
FLOATS = (float("nan"), float("inf"), 0.0, -1.0, 1e30, 1e-30, 1.5)


def mutate(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """A damaged copy, with the damage in words; most of it is in the header."""
    data = bytearray(content)
    said = []
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(min(len(data), HEADER_BYTES) if rng.random() < 0.9 else len(data)))
        kind = int(rng.integers(7))
        if kind <= 2:
            data[at] = int(rng.integers(256))
        elif kind == 3:
            size = int(rng.choice([2, 4, 8]))
            value = EXTREMES[int(rng.integers(len(EXTREMES)))] % 256**size
            at -= at % size
            data[at : at + size] = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")
        elif kind == 4:
            at -= at % 4
            number = FLOATS[int(rng.integers(len(FLOATS)))]
            data[at : at + 4] = struct.pack("<f" if rng.random() < 0.5 else ">f", number)
        elif kind == 5:
            data[at:at] = [b"9", b"0000", b"-", b" ", b"\n", b"1e9"][int(rng.integers(6))]
        elif rng.random() < 0.5:
            del data[at:]
        else:
            del data[at : at + int(rng.integers(1, 9))]
        said.append(f"{kind}@{at}")
        data = data or bytearray(b"\0")
    return bytes(data), " ".join(said)


def judge(path: Path) -> str:
    """What reading a file came to; "error" and "equal" are right."""
    try:
        components = read_header(path).components
        volume = read_image(path, components)
    except AutosegError as problem:
        return "error" if "lloc" not in str(problem) else f"too much memory: {problem}"
    ending = split_ending(path)[1]
    if ending in TIFF_ENDINGS:
        return "equal" if volume.array.shape[1:] == volume.geometry.shape else "shapes differ"
    try:
        return _against_itk(path, volume) if ending in ITK_ENDINGS else _against_nibabel(path, volume)
    except Exception as problem:  # an oracle that refuses what we read is a finding, whatever it raises
        return f"read, but refused by the oracle: {problem!r}"


def _load(path: Path) -> nib.spatialimages.SpatialImage:
    """The image as nibabel reads it; where an extension of its header is damaged, which we pass over, without it."""
    try:
        return nib.load(path)
    except nib.spatialimages.HeaderDataError as problem:
        if "extension" not in str(problem):
            raise
        content = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        is_first = nib.Nifti1Header.may_contain_header(bytes(content))
        content[348 if is_first else 540] = 0
        return (nib.Nifti1Image if is_first else nib.Nifti2Image).from_bytes(bytes(content))


def _against_nibabel(path: Path, volume: Volume) -> str:
    image = _load(path)
    affine = np.array(image.affine, np.float64)
    if not affine[:3, 2].any():
        affine[:3, 2] = volume.geometry.affine[:3, 2]  # a single slice without a third axis gets one
    truth = np.asanyarray(image.dataobj)
    if truth.dtype.fields:
        truth = truth.view(np.uint8).reshape(*truth.shape, -1)
    ours = volume.array.reshape(truth.shape) if path.suffix == ".mnc" else np.moveaxis(volume.array, 0, 3)
    with np.errstate(all="ignore"):
        same = np.array_equal(
            ours.reshape(truth.shape).astype(np.float32), truth.astype(np.float64).astype(np.float32), equal_nan=True
        )
    if not same:
        return "voxels differ"
    return "equal" if np.array_equal(affine, volume.geometry.affine) else "affines differ"


def _against_itk(path: Path, volume: Volume) -> str:
    # Told by the ending, as by us: by the content ITK would not know a damaged header for what it is.
    kind = "NrrdImageIO" if path.suffix in (".nrrd", ".nhdr") else "MetaImageIO"
    image = sitk.ReadImage(str(path), imageIO=kind)
    truth = sitk.GetArrayFromImage(image)
    many = image.GetNumberOfComponentsPerPixel() > 1
    ours = volume.array.transpose(3, 2, 1, 0) if many else volume.array.transpose(0, 3, 2, 1)
    if not np.array_equal(ours.reshape(truth.shape), truth, equal_nan=truth.dtype.kind == "f"):
        return "voxels differ"
    dimensions = image.GetDimension()
    corner = [size - 1 for size in volume.geometry.shape]
    point = np.zeros(3)
    point[: min(dimensions, 3)] = image.TransformIndexToPhysicalPoint([*corner, 0][:dimensions])[:3]
    expected = [-point[0], -point[1], point[2]]
    got = (volume.geometry.affine @ [*corner, 1])[:3]
    return (
        "equal" if np.allclose(got, expected, rtol=1e-6, atol=1e-6 * max(1.0, abs(point).max())) else "affines differ"
    )


def copies(originals: list[Path], scratch: Path, count: int, seed: int) -> Iterator[tuple[Path, str]]:
    """Damaged copies, one at a time under the name of the original, with the damage in words."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        original = originals[number % len(originals)]
        for beside in original.parent.glob(f"{original.name.split('.')[0]}.*"):
            shutil.copy(beside, scratch / beside.name)
        content = original.read_bytes()
        packed = original.name.endswith((".gz", ".mgz"))
        inside = packed and rng.random() < 0.8
        damaged, said = mutate(gzip.decompress(content) if inside else content, rng)
        path = scratch / original.name
        path.write_bytes(gzip.compress(damaged, 1, mtime=0) if inside else damaged)
        yield path, f"{number} {original.name} {said}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("originals", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    originals = [
        path
        for path in sorted(arguments.originals.iterdir())
        if path.name.endswith((".nii", ".nii.gz", ".hdr", *ITK_ENDINGS, ".mgh", ".mgz", ".mnc", ".tif"))
    ]
    for path in originals:
        if (verdict := judge(path)) != "equal":
            sys.exit(f"{path} itself is not read rightly: {verdict}")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, used + ROOM_BYTES))
    tracemalloc.start()
    for path, said in copies(originals, arguments.scratch, arguments.count, arguments.seed):
        print(json.dumps({"mutation": said}), flush=True)
        tracemalloc.reset_peak()
        try:
            verdict = judge(path)
        except Exception as problem:
            verdict = f"{type(problem).__name__}: {problem}"
        peak = tracemalloc.get_traced_memory()[1]
        print(json.dumps({"verdict": verdict if peak < PEAK_BYTES else f"{peak:,} bytes at once"}), flush=True)


if __name__ == "__main__":
    main()
