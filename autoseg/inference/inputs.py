"""Which files are which case, and what the outputs are called."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from autoseg.domain.dataset import Case, Channel
from autoseg.domain.endings import (
    PICTURE_ENDINGS,
    TIFF_ENDINGS,
    is_image_name,
    list_images,
    split_ending,
    written_ending,
)
from autoseg.domain.geometry import Geometry, Volume
from autoseg.errors import AutosegError, ConfigError, DatasetError
from autoseg.inference.dicom_inputs import name_files, name_series
from autoseg.io.dicom import is_dicom
from autoseg.io.images import read_header

log = logging.getLogger("autoseg")

PICTURE_OUTPUT_ENDING = ".png"
"""Label maps of pictures: lossless, whatever the picture's format. Source: design, section 3."""

DICOM_OUTPUT_ENDING = ".nii.gz"
"""Label maps of DICOM series. Source: design, section 3."""

_ALPHA_COMPONENTS = (2, 4)
"""Grey and alpha, colour and alpha: reading drops an alpha that says nothing."""

_HINT = (
    "Name the channels of case X as X_0000.ext, X_0001.ext ... or give the files of one case. Of files with more "
    "channels than the model takes, name those to use, such as imagesTr/*_0000.nii.gz; where each file is a case of "
    "its own, rename them so that no name ends in _0000, _0001 ..."
)

_CHANNEL_NAME = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")

Files = dict[Path, str]
"""Files, or DICOM series, with their names without ending, in the order given."""


def find_cases(inputs: Sequence[Path], num_channels: int, optional: Collection[int] = ()) -> tuple[Case, ...]:
    """Sort files into cases.

    Files named X_0000.ext, X_0001.ext and so on are the channels of case X, exactly as many as the model's (a lone
    X_0000.ext holds every channel itself). Of the others, for a model of one channel each file is a case. For a model
    of C channels each file is a case if some of them hold C channels themselves; otherwise exactly C files of one
    channel each are the channels, in the order given, of one case named by the first. A file that cannot be read stops
    nothing here: its case fails when it is read.

    A DICOM series counts as one file of one channel.

    Args:
        inputs: Image files, DICOM files that stand for their series, and folders: their image files are all taken
            (those of subfolders are not); of a folder without any, the DICOM series in it and its subfolders.
        num_channels: Of the model.
        optional: Channels that files with channel numbers may lack.

    Returns:
        The cases, sorted by id.

    Raises:
        ConfigError: An input does not exist or is no image, there are none, files cannot be sorted into cases, or two
            cases have the same id; all problems are listed.
    """
    files, problems = _collect(inputs, num_channels)
    groups, others = _group_by_channel(files, range(num_channels) if 0 in optional else range(1), problems)
    cases: list[Case] = []
    for name, channels in groups.items():
        case = _case_of_channels(name, channels, num_channels, optional, problems)
        cases += [] if case is None else [case]
    cases += _cases_of_plain_files(others, num_channels, problems)
    doubled = sorted(name for name, count in Counter(case.id for case in cases).items() if count > 1)
    problems += [f"several inputs give the case {name}" for name in doubled]
    if problems:
        raise ConfigError(
            f"inputs do not make cases for a model with {num_channels} channel{'' if num_channels == 1 else 's'}",
            problems=problems,
            hint=_HINT,
        )
    return tuple(sorted(cases, key=lambda case: case.id))


def output_ending(case: Case) -> str:
    """The ending of a case's label map: that of its image, TIFF stacks included; PNG for pictures.

    .nii.gz for DICOM and for what is not written (NIfTI pairs, MINC).
    """
    if is_dicom(case.images[0]):
        return DICOM_OUTPUT_ENDING
    ending = split_ending(case.images[0])[1]
    is_picture = ending.lower() in PICTURE_ENDINGS and not _is_stack(Path(case.images[0]))
    return PICTURE_OUTPUT_ENDING if is_picture else written_ending(ending)


def _is_stack(file: Path) -> bool:
    """Whether a TIFF file has slices; one that cannot be read has none, and fails when its case is read."""
    if split_ending(file)[1].lower() not in TIFF_ENDINGS:
        return False
    try:
        return not read_header(file).geometry.is_2d
    except (AutosegError, OSError):
        return False


def require_channels(volume: Volume, channels: Sequence[Channel]) -> None:
    """Refuse a volume that lacks a channel which may not be missing.

    Args:
        volume: Of a case.
        channels: Of the model.

    Raises:
        DatasetError: Names the channels.
    """
    needed = [number for number in volume.missing if not channels[number].may_be_missing]
    if needed:
        names = ", ".join(f"{number} ({channels[number].name})" for number in needed)
        raise DatasetError(
            f"the channel {names} is missing, and the model has not learned to do without it",
            hint="A model learns that from training cases that lack the channel, or where the data set declares "
            'it with "may_be_missing": true.',
        )


def warn_of_cubes(case: Case, geometry: Geometry) -> None:
    """Tell of an image that does not state its voxel size: the model takes its voxels for cubes of 1 mm."""
    if geometry.stated == "nothing":
        log.warning(
            "case %s: the TIFF stack does not state its voxel size and is read with 1 mm; if that is wrong, write it "
            'into a file %s.json beside it: {"spacing": [between pages, rows, columns]} in millimetres',
            case.id,
            case.id,
        )


def _collect(inputs: Sequence[Path], num_channels: int) -> tuple[Files, list[str]]:
    files: Files = {}
    problems: list[str] = []
    named_folders: set[Path] = set()  # all DICOM files of a folder are sorted into series at once
    for path in inputs:
        found = list_images(path) if path.is_dir() else (path,)
        if not path.exists():
            problems.append(f"{path} does not exist")
        elif path.is_file() and is_dicom(path):
            if path.parent not in named_folders:
                named_folders.add(path.parent)
                files |= name_files([other for other in inputs if other.parent == path.parent and is_dicom(other)])
        elif not found:
            files |= _named_series(path, num_channels, problems)
        elif path.is_file() and not is_image_name(path):
            problems.append(f"{path} is not an image of a supported format")
        else:
            files |= {file.absolute(): split_ending(file)[0] for file in found}
    if not inputs:
        problems.append("no inputs were given")
    return files, problems


def _named_series(path: Path, num_channels: int, problems: list[str]) -> Files:
    """The DICOM series of a folder; what channel each is must be said by names or by the order given."""
    named = name_series(path)
    if not named:
        problems.append(f"{path} holds no image files")
    if num_channels > 1 and len(named) > 1 and not all(map(_CHANNEL_NAME.fullmatch, named.values())):
        problems.append(
            f"{path} holds {len(named)} series, and nothing says which of them is which channel: name a folder or "
            "file for each channel, in the model's order"
        )
        return {}
    return named


def _group_by_channel(
    files: Files, first_numbers: range, problems: list[str]
) -> tuple[dict[str, dict[int, Path]], Files]:
    """Files with channel numbers by case, and the others; numbers that do not begin as they may count no channels.

    The channels of a case may have different endings, but no two of them one number.
    """
    numbered: dict[tuple[Path, str], dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    others: Files = {}
    for file, stem in files.items():
        match = _CHANNEL_NAME.fullmatch(stem)
        if match:
            numbered[file.parent, match["case"]][int(match["channel"])].append(file)
        else:
            others[file] = stem
    groups: dict[str, dict[int, Path]] = {}
    for (_, name), channels in numbered.items():
        doubled = [
            " and ".join(file.name for file in claimants) for claimants in channels.values() if len(claimants) > 1
        ]
        if min(channels) in first_numbers and name not in groups:
            problems += [f"case {name}: {names} claim to be one channel" for names in doubled]
            groups[name] = {number: claimants[0] for number, claimants in channels.items()}
        else:
            others |= {file: files[file] for claimants in channels.values() for file in claimants}
    return groups, others


def _case_of_channels(
    name: str, channels: Mapping[int, Path], num_channels: int, optional: Collection[int], problems: list[str]
) -> Case | None:
    missing = sorted(set(range(num_channels)) - set(channels))
    may_be_missing = set(missing) <= set(optional)
    if set(channels) == {0} and not (missing and may_be_missing and _channel_counts(channels[0]) == {1}):
        return Case(id=name, images=(str(channels[0]),))
    if not may_be_missing:
        needed = [number for number in missing if number not in optional]
        problems.append(f"case {name} lacks the channels {', '.join(f'{number:04d}' for number in needed)}")
        return None
    surplus = sorted(set(channels) - set(range(num_channels)))
    if surplus:
        names = ", ".join(channels[number].name for number in surplus)
        problems.append(f"case {name} has more channels than the model's {num_channels}: {names} would be left out")
        return None
    images = tuple(str(channels[number]) for number in sorted(channels))
    return Case(id=name, images=images, missing=tuple(missing))


def _cases_of_plain_files(files: Files, num_channels: int, problems: list[str]) -> list[Case]:
    each = [Case(id=stem, images=(str(file),)) for file, stem in files.items()]
    if num_channels == 1 or not files:
        return each
    readable = [counts for file in files if (counts := _channel_counts(file))]
    # Where no file can be read there is nothing to tell them apart by, and each fails alone.
    if not readable or any(num_channels in counts for counts in readable):
        return each
    if len(files) == num_channels and all(counts == {1} for counts in readable):
        return [Case(id=each[0].id, images=tuple(str(file) for file in files))]
    problems.append(
        f"{len(files)} files without channel numbers, expected exactly {num_channels} of one channel each (one case), "
        f"or {num_channels} channels in each file; they hold {_in_words(readable)}"
    )
    return []


def _channel_counts(file: Path) -> frozenset[int]:
    """How many channels a file may turn out to hold when it is read; none if it cannot be read."""
    try:
        header = read_header(file)
    except (AutosegError, OSError):
        return frozenset()
    components = header.components
    if header.is_colour and components in _ALPHA_COMPONENTS:
        return frozenset({components, components - 1})
    return frozenset({components})


def _in_words(readable: Iterable[frozenset[int]]) -> str:
    """The different numbers of components, the alpha counted: "1 or 4 components"."""
    numbers = sorted({max(counts) for counts in readable})
    return f"{' or '.join(map(str, numbers))} component{'' if numbers == [1] else 's'}"
