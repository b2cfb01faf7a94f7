"""What autoseg does with odd real files: a Markdown table, for docs/benchmarks/robustness.md.

    python scripts/robustness_table.py ../shared/data/robustness ../shared/data/hippocampus_defects > table.md

Every file, every DICOM folder and every pair of image and label is read in a process of its own, with a limit of time
and memory, so that a crash, a hang and a giant allocation are seen and named. The exit code is 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS, BYTES = 120, 4 << 30
READ, CHECK = "--read-one", "--check-one"

ODD = {
    "bigendian_int16.nii": "big-endian",
    "bigendian_float32.nii": "big-endian",
    "bigendian_float32_with_nan.nii": "big-endian, holds NaN",
    "4d_scl_slope_inter.nii": "4D, slope 0.0754, intercept 3100.76",
    "4d_two_volumes_oblique.nii.gz": "4D, oblique by 9 degrees",
    "nifti2_4d.nii.gz": "NIfTI-2, 4D",
    "tiny_4x5x7.nii.gz": "4×5×7 voxels",
    "ct_rotated_16deg.nii.gz": "rotated by 16.5 degrees",
    "spine_t2_PSR_image.nii.gz": "axes PSR",
    "spine_t2_PSR_label.nii.gz": "axes PSR",
    "spine_t2s_aniso_image.nii.gz": "anisotropy 15, oblique",
    "spine_t2s_label_int64.nii.gz": "a label map of int64",
    "spine_mt1_soft_label.nii.gz": "a “label” that is a probability map",
    "single_slice_4d.nii.gz": "one slice, three components as 4D",
    "dmri_4d_thick_slices.nii.gz": "4D, slices of 17.5 mm",
    "broken_lfs_pointer.nii.gz": "text (a Git LFS pointer) under an image's name",
    "ct_jpeg2000_no_extension": "JPEG 2000, no ending, SliceThickness is not the distance",
    "mr_hippocampus_crop": "sorted by name the slices are shuffled",
    "mr_adc_oblique": "oblique by 18 degrees",
    "mr_dwi_three_b_values": "three b-values in one series",
    "mr_missing_slice": "a slice is missing in the middle",
    "ct_int32_no_qform.nii.gz": "int32, no qform",
    "ct_small_label_sparse_117.nii.gz": "values up to 117, most absent",
    "mr_small_LPS.nii.gz": "LPS, negative intensities",
    "flair.nii.gz": "on another grid than the other channels",
    "dwi.nii.gz": "float64, oblique",
    "adc.nii.gz": "float64, oblique",
    "image.nii.gz": "5×4×4 voxels",
    "CT_mask.nii.gz": "on another grid than the MR image",
    "brain1_image.nrrd": "directions of determinant -1",
    "brain1_label.nrrd": "int32",
    "analyze_header_without_img.hdr": "Analyze header, the voxels are missing",
    "small_4d.mgz": "FreeSurfer, 4D",
    "tiny.mnc": "MINC 1",
    "hippocampus_118.nii.gz": "an image without a label map",
    "hippocampus_010.nii.gz": "a label map without an image",
    "hippocampus_281.nii.gz": "a label map of an abdominal CT among hippocampi",
}

PAIRS: tuple[tuple[str, tuple[str, ...], str, int], ...] = (
    # folder, images (one a channel), label map, largest declared value
    ("nifti", ("spine_t2_PSR_image.nii.gz",), "spine_t2_PSR_label.nii.gz", 1),
    ("nifti", ("spine_t2s_aniso_image.nii.gz",), "spine_t2s_aniso_label.nii.gz", 1),
    ("nifti", ("spine_t2s_aniso_image.nii.gz",), "spine_t2s_label_int64.nii.gz", 1),
    ("nifti", ("spine_mt1_image.nii.gz",), "spine_mt1_soft_label.nii.gz", 1),
    ("nifti", ("bigendian_float32_with_nan.nii",), "bigendian_float32_with_nan.nii", 1),
    ("ct_abdomen", ("ct_small.nii.gz",), "ct_small_label_sparse_117.nii.gz", 117),
    ("ct_abdomen", ("ct_small.nii.gz",), "ct_small_label_T300.nii.gz", 1),
    ("isles22_case0009", ("dwi.nii.gz", "adc.nii.gz"), "msk.nii.gz", 1),
    ("isles22_case0009", ("dwi.nii.gz", "flair.nii.gz"), "msk.nii.gz", 1),
    ("ibsi_phantom_5x4x4", ("image.nii.gz",), "label.nii.gz", 1),
    ("sts_019_grids_disagree", ("MR_T1_image.nii.gz",), "MR_T1_mask.nii.gz", 1),
    ("sts_019_grids_disagree", ("MR_T1_image.nii.gz",), "CT_mask.nii.gz", 1),
    ("nrrd", ("brain1_image.nrrd",), "brain1_label.nrrd", 1),
    ("nrrd", ("breast1_image.nrrd",), "breast1_label.nrrd", 1),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument(READ, type=Path, help=argparse.SUPPRESS)
    parser.add_argument(CHECK, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read_one is not None:
        print(json.dumps(read_one(arguments.read_one)))
        return 0
    if arguments.check_one is not None:
        print(json.dumps(check_one(arguments.check_one)))
        return 0
    failures = 0
    print("| file | what is odd | what autoseg said or did |\n| --- | --- | --- |")
    for folder in arguments.folders:
        for path in targets(folder):
            answer, failed = in_a_process(READ, path, folder)
            failures += failed
            name = path.relative_to(folder.parent)
            print(f"| `{name}{'/' if path.is_dir() else ''}` | {ODD.get(path.name, '')} | {in_a_cell(answer)} |")
    print("\n| image | label map | what `autoseg check` said |\n| --- | --- | --- |")
    for folder in arguments.folders:
        for images, label, answer, failed in checked_pairs(folder):
            failures += failed
            print(f"| `{images}` | `{label}` | {in_a_cell(answer)} |")
    print(f"\nCrashes, hangs and errors that are none of autoseg's: {failures}.")
    return int(failures > 0)


def targets(folder: Path) -> list[Path]:
    """Every file but those of DICOM folders, which are one target each."""
    from autoseg.io.dicom import is_dicom

    series = {path.parent for path in folder.rglob("*") if path.is_file() and is_dicom(path)}
    files = {path for path in folder.rglob("*") if path.is_file() and path.parent not in series}
    return sorted(series | files)


def in_a_process(task: str, path: Path, folder: Path) -> tuple[str, bool]:
    """What a process of its own answers, and whether it failed in a way that is none of autoseg's."""
    command = [sys.executable, __file__, str(folder), task, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"**hangs**: no answer in {SECONDS} s", True
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return f"**crashes**: exit {done.returncode} {last[0]}", True
    answer: str = json.loads(done.stdout.splitlines()[-1])
    return answer.replace(f"{folder.parent}/", ""), False


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))


def read_one(path: Path) -> str:
    """Read a file as an image and, where its name says so, as a label map."""
    from autoseg.errors import AutosegError
    from autoseg.io.images import read_header, read_image, read_labels

    limit_memory()
    try:
        components = read_header(path).components
        volume = read_image(path, components)
    except AutosegError as problem:
        return f"refused: {one_line(problem, path)}"
    said = "read: " + described(volume, components)
    if any(word in str(path.parent.name + path.name).lower() for word in ("label", "mask", "msk")):
        try:
            values = sorted({int(value) for value in read_labels(path)[0].ravel()})
            listed = ", ".join(map(str, values[:6])) + (f" … {values[-1]}" if len(values) > 6 else "")
            said += f"; as a label map: values {listed}"
        except AutosegError as problem:
            said += f"; as a label map refused: {one_line(problem, path)}"
    return said


def described(volume: Any, components: int) -> str:
    import numpy as np

    from autoseg.domain.geometry import degrees_off_axis, orientation_code

    geometry = volume.geometry
    finite = volume.array[np.isfinite(volume.array)]
    spacing = "×".join(f"{size:.3g}" for size in geometry.spacing_mm)
    degrees = degrees_off_axis(geometry.affine)
    return ", ".join(
        [
            "×".join(map(str, geometry.shape)) + (f" of {components} channels" if components > 1 else ""),
            f"{spacing} mm",
            orientation_code(geometry.affine) + (f" {degrees:.1f}° oblique" if degrees > 0.05 else ""),
            str(volume.array.dtype),
            f"values {finite.min():.6g} to {finite.max():.6g}"
            + (f", {volume.array.size - finite.size} not finite" if finite.size < volume.array.size else ""),
        ]
    )


def checked_pairs(folder: Path) -> list[tuple[str, str, str, bool]]:
    """Every pair of a folder, checked as a data set of one case; and what has only one half, as one data set."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, images, label, largest) in enumerate(PAIRS):
            files = [folder / name / image for image in images]
            if not all(file.is_file() for file in (*files, folder / name / label)):
                continue
            manifest = {
                "channels": [f"channel {index}" for index in range(len(files))],
                "labels": [{"name": f"class {value}", "value": value} for value in range(1, largest + 1)],
                "cases": [{"id": "x", "images": [str(file) for file in files], "labels": str(folder / name / label)}],
            }
            target = Path(scratch) / f"{number}.json"
            target.write_text(json.dumps(manifest))
            rows.append((" + ".join(images), label, *in_a_process(CHECK, target, folder)))
        if (folder / "images").is_dir() and (folder / "labels").is_dir():
            rows.append(("images/*", "labels/*", *in_a_process(CHECK, halves(folder, Path(scratch)), folder)))
    return rows


def halves(folder: Path, scratch: Path) -> Path:
    """The images and label maps of a folder as a data set in nnU-Net's layout."""
    root = scratch / "halves"
    for kind, number in (("images", "_0000"), ("labels", "")):
        (root / f"{kind}Tr").mkdir(parents=True)
        for file in (folder / kind).iterdir():
            stem, _, ending = file.name.partition(".")
            (root / f"{kind}Tr" / f"{stem}{number}.{ending}").symlink_to(file.absolute())
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def check_one(path: Path) -> str:
    from autoseg.checking.doctor import check_dataset
    from autoseg.runtime import NoProgress

    limit_memory()
    report = check_dataset(path, workers=1, progress=NoProgress())
    kinds: dict[str, list[str]] = {}
    for item in report.findings:
        where = item.case if item.case != "x" else ""
        kinds.setdefault(f"{item.severity} `{item.code}`", []).append(f"{where}: {item.message}".removeprefix(": "))
    kinds.pop("warning `few-cases`", None)  # each is a set of one case
    listed = [
        f"{kind}: {messages[0]}" + (f" (and {len(messages) - 1} more like it)" if len(messages) > 1 else "")
        for kind, messages in kinds.items()
    ]
    return "; ".join(listed) or "nothing is wrong"


def one_line(problem: Exception, path: Path) -> str:
    return str(problem).splitlines()[0].removeprefix(f"{path}: ").removeprefix(f"{path} ")


def in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
