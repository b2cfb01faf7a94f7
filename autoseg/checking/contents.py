"""Opens the files of one case, each once, and says what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.checking.facts import HIGH, LOW, CaseFacts, ChannelFacts, Picture
from autoseg.checking.intensities import measure_channel
from autoseg.checking.label_content import LabelMap, check_labels
from autoseg.checking.pictures import draw_pictures
from autoseg.checking.structures import count_values
from autoseg.domain.dataset import Case, Dataset
from autoseg.domain.findings import Findings
from autoseg.domain.geometry import (
    GRID_TOLERANCE_FRACTION,
    OBLIQUE_WARNING_DEGREES,
    Geometry,
    Volume,
    degrees_off_axis,
    grid_mismatch,
    grid_shift_mm,
)
from autoseg.errors import DatasetError, GeometryError
from autoseg.io.images import ImageHeader, read_header, read_image

__all__ = ["case_bytes", "check_case", "count_values"]

_COLOURS = 3
_WIDEST_BYTES = 8
_BYTES_A_LABEL, _BYTES_A_VOXEL = 12, 10
"""Memory of a check beyond the stored voxels: labels as 4-byte integers with masks and a table look-up, a float copy
of one channel with its blocks. Source: the peak on `fetal_brain` and `headneck_ct`, rounded up."""


def case_bytes(case: Case) -> int:
    """About how much memory the check of a case takes, by the headers of its files."""
    images = [_stored_bytes(file) for file in case.images]
    labels = 0 if case.labels is None else _stored_bytes(case.labels, _BYTES_A_LABEL)
    return max(images, default=0) + labels


def _stored_bytes(file: str, extra: int = _BYTES_A_VOXEL) -> int:
    try:
        header = read_header(file)
    except (DatasetError, OSError):
        return 0  # the check itself says what is wrong
    return header.num_voxels * (header.components * _item_bytes(header.dtype) + extra)


def _item_bytes(dtype: str) -> int:
    """Bytes of a stored number by its type in NumPy's or ITK's words ("int16", "16-bit signed integer")."""
    bits = re.search(r"(\d+)-bit|(?:int|float)(\d+)$", dtype)
    return int(bits[1] or bits[2]) // 8 if bits else _WIDEST_BYTES


def check_case(case: Case, dataset: Dataset, *, is_test: bool = False, with_pictures: bool = False) -> CaseFacts:
    """Read every file of a case once; problems become findings, each with its file.

    Args:
        case: A case whose files exist.
        dataset: Gives channels and labels.
        is_test: Whether nothing is learnt from it.
        with_pictures: Whether slices are drawn.
    """
    found = Findings()
    try:
        return _check_case(case, dataset, found, is_test=is_test, with_pictures=with_pictures)
    except MemoryError:
        found.add(
            "too-large",
            f"the case does not fit into memory: about {case_bytes(case) / 1e9:.1f} GB are needed to look at it",
            case=case.id,
            hint="Close other programs, use a machine with more memory, or crop the images.",
        )
    return CaseFacts(case.id, len(case.files), is_test, findings=tuple(found.items))


def _check_case(case: Case, dataset: Dataset, found: Findings, *, is_test: bool, with_pictures: bool) -> CaseFacts:
    headers = _read_headers(case, found)
    grid = _check_grids(case, headers, found)
    labels = None
    if case.labels is not None and case.labels in headers:
        labels = check_labels(case, case.labels, headers[case.labels], grid, dataset.labels, found)
    channels, pictures = _check_images(case, dataset, headers, labels, found, with_pictures=with_pictures)
    return CaseFacts(
        case=case.id,
        num_files=len(case.files),
        is_test=is_test,
        geometry=grid,
        channels=channels,
        labels=None if labels is None else labels.facts,
        findings=tuple(found.items),
        pictures=pictures,
    )


def _read_headers(case: Case, found: Findings) -> dict[str, ImageHeader]:
    """The header of every file of the case that has a readable one."""
    headers = {}
    for file in case.files:
        try:
            headers[file] = read_header(file)
        except (DatasetError, OSError) as problem:
            _add_unreadable(problem, case, file, found)
    return headers


def _add_unreadable(problem: DatasetError | OSError, case: Case, file: str, found: Findings) -> None:
    """Turn an error into a finding; the file is a field there, so it need not lead the message."""
    code = "unreadable-labels" if file == case.labels else "unreadable-image"
    if isinstance(problem, OSError):
        found.add(code, f"the file cannot be read: {problem.strerror or problem}", case=case.id, file=file)
        return
    if isinstance(problem, GeometryError):
        code = "bad-affine"
    found.add(code, problem.message.removeprefix(f"{file}: "), case=case.id, file=file, hint=problem.hint)


def _check_grids(case: Case, headers: dict[str, ImageHeader], found: Findings) -> Geometry | None:
    """Compare the grids of the images; returns that of the first which can be read."""
    grid: Geometry | None = None
    for file in case.images:
        if file not in headers:
            continue
        geometry = headers[file].geometry
        _check_second_affine(case.id, file, geometry, found)
        if grid is None:
            grid = geometry
            _check_orientation(case.id, file, grid, found)
            _check_spacing(case.id, file, grid, found)
            continue
        mismatch = grid_mismatch(geometry, grid)
        if mismatch:
            found.add(
                "channel-grid",
                f"the channel does not lie on the grid of {Path(case.images[0]).name}: {mismatch}",
                case=case.id,
                file=file,
                hint="Resample all channels of a case onto one grid.",
            )
    return grid


def _check_orientation(case: str, file: str, grid: Geometry, found: Findings) -> None:
    degrees = degrees_off_axis(grid.affine)
    if degrees > OBLIQUE_WARNING_DEGREES:
        found.add(
            "oblique",
            f"the axes are {degrees:.0f} degrees off the body's, so which axis is which is nearly a coin toss",
            case=case,
            file=file,
            severity="warning",
            hint="Resample the set to axes along the body's, or train with `--set preprocess.orientation=native`.",
        )


def _check_spacing(case: str, file: str, grid: Geometry, found: Findings) -> None:
    if grid.stated == "nothing":
        found.add(
            "no-spacing",
            "the TIFF stack does not state its voxel size along all three axes, so its voxels are taken for cubes",
            case=case,
            file=file,
            severity="warning",
            hint='Save it with its scale (ImageJ, OME-TIFF), or put {"spacing": [between pages, rows, columns]} in '
            "millimetres into a .json file of the case's name beside it.",
        )


def _check_second_affine(case: str, file: str, geometry: Geometry, found: Findings) -> None:
    """NIfTI files may carry two affines; programs differ in which they believe."""
    if geometry.qform is None or geometry.qform_code <= 0 or geometry.sform_code <= 0:
        return
    try:
        second = Geometry(geometry.shape, geometry.qform)
    except GeometryError:
        return
    apart = grid_shift_mm(geometry, second)
    if apart > GRID_TOLERANCE_FRACTION * min(geometry.spacing_mm):
        found.add(
            "two-affines",
            f"the header holds two places for the voxels, up to {apart:.3g} mm apart (sform and qform)",
            case=case,
            file=file,
            severity="note",
            hint="autoseg takes the sform. Other programs may take the other one: compare where labels come to lie.",
        )


def _channel_numbers(case: Case, num_channels: int) -> list[tuple[int, ...]]:
    """For each image file the numbers of the channels it holds; those that the case lacks have no file."""
    if case.channels_in_a_file(num_channels) > 1:
        return [tuple(range(num_channels))]
    return [(number,) for number in range(num_channels) if number not in case.missing]


def _check_images(
    case: Case,
    dataset: Dataset,
    headers: dict[str, ImageHeader],
    labels: LabelMap | None,
    found: Findings,
    *,
    with_pictures: bool,
) -> tuple[tuple[ChannelFacts, ...], tuple[Picture, ...]]:
    """Read the image files one after the other; only one is in memory at a time."""
    channels: list[ChannelFacts] = []
    pictures: tuple[Picture, ...] = ()
    for file, numbers in zip(case.images, _channel_numbers(case, len(dataset.channels)), strict=True):
        if file not in headers:
            continue
        try:
            volume = read_image(file, len(numbers))
        except (DatasetError, OSError) as problem:
            _add_unreadable(problem, case, file, found)
            continue
        on_grid = labels if labels is not None and labels.array.shape == volume.geometry.shape else None
        foreground = None if on_grid is None else _foreground(on_grid.array, dataset.labels.ignore)
        measured = []
        for number, channel in zip(numbers, volume.array, strict=True):
            facts = measure_channel(channel, volume.geometry, foreground, number=number, file=file)
            _check_values(case.id, channel, facts, number if len(numbers) > 1 else None, file, found)
            measured += [] if facts is None else [facts]
        channels += measured
        if with_pictures and not pictures and len(measured) == len(numbers):
            pictures = _draw(volume, measured, None if on_grid is None else on_grid.array, dataset)
    return tuple(channels), pictures


def _foreground(labels: NDArray[np.integer], ignore: int | None) -> NDArray[np.bool_]:
    inside = labels > 0
    return inside if ignore is None else inside & (labels != ignore)


def _draw(
    volume: Volume, channels: list[ChannelFacts], labels: NDArray[np.integer] | None, dataset: Dataset
) -> tuple[Picture, ...]:
    count = _COLOURS if volume.geometry.is_2d and len(channels) == _COLOURS else 1
    limits = [(float(item.quantiles[LOW]), float(item.quantiles[HIGH])) for item in channels[:count]]
    if count == _COLOURS:  # one scale for all three, or the colours would be others
        limits = [(min(low for low, _ in limits), max(high for _, high in limits))] * count
    return draw_pictures(volume.array[:count], limits, labels, volume.geometry, dataset.labels)


def _check_values(
    case: str,
    channel: NDArray[np.generic],
    facts: ChannelFacts | None,
    number: int | None,
    file: str,
    found: Findings,
) -> None:
    """NaN and infinity, and images that are one value."""
    which = "the image" if number is None else f"channel {number}"
    if channel.dtype.kind == "f":
        count = int(channel.size - np.count_nonzero(np.isfinite(channel.astype(np.float32, copy=False))))
        if count:
            found.add(
                "not-finite",
                f"{which} holds NaN or infinite values in {count:,} of {channel.size:,} voxels",
                case=case,
                file=file,
                hint="Replace them, for example by the value of air or background.",
                voxels=count,
            )
    if facts is not None and facts.quantiles[0] == facts.quantiles[-1]:
        found.add(
            "constant-image",
            f"{which} has the value {facts.quantiles[0]:g} everywhere",
            case=case,
            file=file,
            severity="warning",
            hint="There is nothing to learn from it; was it exported in full?",
        )
