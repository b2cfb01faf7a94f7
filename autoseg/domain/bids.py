"""BIDS derivatives as data sets: `*_dseg` label maps of a derivative with the images of it or of its raw data set.

A folder with a `dataset_description.json` needs nothing else where only one reading is possible. Where several are,
they are told, and a selection chooses: a JSON file such as ::

    {"bids": "derivatives/manual", "channels": ["T1w", "FLAIR"], "segmentation": {"desc": "rater1"}}

"channels" are suffixes with the entities that tell images apart ("ce-gad_T1w"), "segmentation" are entities that label
maps must carry (and "suffix"), "images" is the folder of the images, "labels" names the classes as in a manifest. All
but "bids" are optional; paths are relative to the file.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from autoseg.domain.bids_files import (
    MASK_SUFFIX,
    SEGMENTATION_SUFFIX,
    BidsFile,
    channel_name,
    channels_of,
    is_channel,
    list_files,
    name_of,
)
from autoseg.domain.bids_labels import label_schema
from autoseg.domain.dataset import Case, Channel, LabelSchema
from autoseg.domain.descriptions import DescriptionProblem
from autoseg.domain.findings import Findings
from autoseg.domain.manifests import LabelEntry, schema_of
from autoseg.domain.values import Value, validation_problems

BIDS_DESCRIPTION = "dataset_description.json"
_DERIVATIVES = "derivatives"
_LISTED = 8


class Selection(Value):
    """What is taken of a BIDS data set; see the module."""

    bids: str
    images: str | None = None
    channels: tuple[str, ...] = ()
    segmentation: dict[str, str] = Field(default_factory=dict)
    labels: tuple[LabelEntry, ...] = ()


@dataclass(frozen=True)
class BidsSet:
    """A BIDS data set as understood; cases without a segmentation are for testing."""

    name: str
    channels: tuple[Channel, ...]
    labels: LabelSchema
    cases: tuple[Case, ...]
    tests: tuple[Case, ...]


@dataclass
class _Search:
    """The folders, the files of each visit with those of the derivative first, and what was selected."""

    root: Path
    selection: Selection
    files: dict[tuple[str, str], list[list[BidsFile]]] = field(default_factory=lambda: defaultdict(list))


def parse_selection(data: Mapping[str, Any]) -> Selection:
    """A selection as written.

    Raises:
        DescriptionProblem: Keys are unknown or wrong; all are listed.
    """
    try:
        return Selection.model_validate_json(json.dumps(data))
    except ValidationError as problem:
        raise DescriptionProblem(validation_problems(problem)) from None


def read_bids(folder: Path, selection: Selection, found: Findings) -> BidsSet:
    """Resolve a BIDS data set.

    Args:
        folder: A derivative, or a raw data set with one derivative that holds segmentations.
        selection: What to take of it; its paths are absolute.
        found: Gets what is wrong with single cases.

    Raises:
        DescriptionProblem: There are no segmentations, several readings are possible, or labels have no names.
    """
    root, segmentations = _segmentations(folder, selection)
    search = _Search(root, selection)
    for images_root in dict.fromkeys((root, *_image_roots(root, folder, selection))):
        by_visit: dict[tuple[str, str], list[BidsFile]] = defaultdict(list)
        for item in list_files(images_root):
            by_visit[item.visit].append(item)
        for visit, files in by_visit.items():
            search.files[visit].append(files)
    names = selection.channels or _common_channels(segmentations, search)
    labels = schema_of(selection.labels) if selection.labels else label_schema(root, segmentations)
    cases = [
        Case(
            id=item.case_id,
            images=_images(item, names, search, found),
            labels=str(item.path),
            patient=f"sub-{item.entities['sub']}",
        )
        for item in segmentations
    ]
    tests = _tests(segmentations, names, search)
    return BidsSet(_name(folder), tuple(Channel(name=name) for name in names), labels, tuple(cases), tests)


def _description(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / BIDS_DESCRIPTION).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise DescriptionProblem([f"{folder / BIDS_DESCRIPTION} is not readable JSON: {problem}"]) from None
    return data if isinstance(data, dict) else {}


def _name(folder: Path) -> str:
    name = _description(folder).get("Name")
    return name if isinstance(name, str) and name else folder.name


def _image_roots(root: Path, folder: Path, selection: Selection) -> list[Path]:
    """Where images may lie besides the derivative: as selected, as it names its sources, or as folders are nested."""
    if selection.images is not None:
        return [Path(selection.images)]
    roots = [folder]
    sources = _description(root).get("SourceDatasets")
    for source in sources if isinstance(sources, list) else []:
        url = source.get("URL") if isinstance(source, dict) else None
        if isinstance(url, str) and "://" not in url.removeprefix("file://") and not url.startswith("bids:"):
            roots.append((root / url.removeprefix("file://")).resolve())
    if root.parent.name == _DERIVATIVES:
        roots.append(root.parent.parent)
    return [item for item in roots if item.is_dir()]


# --- Which label maps ------------------------------------------------------------------------------------------------


def _segmentations(folder: Path, selection: Selection) -> tuple[Path, list[BidsFile]]:
    """The folder that holds the segmentations, and those of one kind."""
    own = _label_files(folder, selection)
    if own:
        return folder, _of_one_kind(folder, own)
    nested = sorted(item for item in (folder / _DERIVATIVES).glob("*") if item.is_dir())
    holders = [(item, files) for item in nested if (files := _label_files(item, selection))]
    if len(holders) == 1:
        return holders[0][0], _of_one_kind(*holders[0])
    if holders:
        listed = ", ".join(str(item.relative_to(folder)) for item, _ in holders)
        raise DescriptionProblem(
            [f"several derivatives hold segmentations: {listed}"], hint="Name one of these folders as the data set."
        )
    wanted = f" that carry {name_of(selection.segmentation)}" if selection.segmentation else ""
    raise DescriptionProblem(
        [f"the BIDS data set {folder} holds no segmentations (sub-*/.../*_{SEGMENTATION_SUFFIX}.nii.gz){wanted}"],
        hint="Name the folder of the derivative that holds them.",
    )


def _label_files(root: Path, selection: Selection) -> list[BidsFile]:
    """The segmentations as selected; masks only where there is nothing else."""
    wanted = dict(selection.segmentation)
    suffix = wanted.pop("suffix", "")
    files = [item for item in list_files(root) if all(item.entities.get(key) == value for key, value in wanted.items())]
    for candidate in (suffix,) if suffix else (SEGMENTATION_SUFFIX, MASK_SUFFIX):
        found = [item for item in files if item.suffix == candidate]
        if found:
            return found
    return []


def _of_one_kind(root: Path, files: list[BidsFile]) -> list[BidsFile]:
    """The files if they are one segmentation a scan, all of one kind but for who or what made them ("desc").

    Raises:
        DescriptionProblem: They are not.
    """
    kinds = Counter(item.kind for item in files)
    without_desc = {name_of({**_derived(item), "desc": "*"}, item.suffix) for item in files}
    scans = Counter(item.case_id for item in files)
    doubled = [scan for scan, count in scans.items() if count > 1]
    if not doubled and (len(kinds) == 1 or len(without_desc) == 1):
        return files
    listed = ", ".join(f"{kind} ({count} files)" for kind, count in sorted(kinds.items())[:_LISTED])
    first = next(item for item in files if not doubled or item.case_id in doubled)
    example = {"bids": str(root), "segmentation": _derived(first) | {"suffix": first.suffix}}
    if len(kinds) == 1:
        same = ", ".join(item.path.name for item in files if item.case_id == doubled[0])
        raise DescriptionProblem([f"several files are the segmentation of {doubled[0]}: {same}"])
    raise DescriptionProblem(
        [f"there are segmentations of several kinds: {listed}"], hint=_choose(example) + " Or write a manifest."
    )


def _derived(item: BidsFile) -> dict[str, str]:
    return {key: value for key, value in item.entities.items() if key not in item.source}


def _choose(example: Mapping[str, Any]) -> str:
    return f"Choose one in a JSON file, and name that as the data set, such as {json.dumps(example)}."


# --- Which images ----------------------------------------------------------------------------------------------------


def _candidates(scan: Mapping[str, str], space: str, datatypes: set[str], search: _Search) -> list[list[BidsFile]]:
    """The images of a scan, folder by folder."""
    visit = (scan["sub"], scan.get("ses", ""))
    return [channels_of(scan, space, datatypes, files) for files in search.files[visit]]


def _of(item: BidsFile, search: _Search) -> list[list[BidsFile]]:
    return _candidates(item.source, item.entities.get("space", ""), {item.datatype}, search)


def _common_channels(segmentations: Sequence[BidsFile], search: _Search) -> tuple[str, ...]:
    """The names of the images, if they are the same for all segmentations.

    Raises:
        DescriptionProblem: They differ, there are none, or some are repeats of one scan.
    """
    counts: Counter[str] = Counter()
    for item in segmentations:
        counts.update({channel_name(image, item.source) for files in _of(item, search) for image in files})
    number = len(segmentations)
    listed = ", ".join(f"{name} in {count} of {number}" for name, count in sorted(counts.items())[:_LISTED])
    common = sorted(name for name, count in counts.items() if count == number)
    example = {"bids": str(search.root), "channels": common[:1] or sorted(counts)[:1] or ["T1w"]}
    if not counts:
        first = segmentations[0]
        raise DescriptionProblem(
            [f"no image lies beside {first.path}, nor in the raw data set, whose name begins with {first.case_id}"],
            hint='Say where the images are in a JSON file: {"bids": "' + str(search.root) + '", "images": "..."}.',
        )
    if len(common) < len(counts):
        raise DescriptionProblem([f"the segmentations have different images: {listed}"], hint=_choose(example))
    if any("run-" in name for name in common) and len(common) > 1:
        raise DescriptionProblem([f"some images are repeats of one scan: {listed}"], hint=_choose(example))
    return tuple(common)


def _images(item: BidsFile, names: Sequence[str], search: _Search, found: Findings) -> tuple[str, ...]:
    """One file a channel; () where one is missing or several claim it, with a finding."""
    images = []
    for name in names:
        claimants = _claimants(_of(item, search), item.source, name)
        if len(claimants) == 1:
            images.append(str(claimants[0].path))
        elif claimants:
            listed = " and ".join(claimant.path.name for claimant in claimants)
            found.add(
                "double-file",
                f"{listed} claim to be channel {name}",
                case=item.case_id,
                file=claimants[0].path,
                hint=_choose({"bids": str(search.root), "channels": [claimants[0].kind]}),
            )
        else:
            found.add("missing-channel", f"there is no image {name} of {item.path.name}", case=item.case_id)
    return tuple(images) if len(images) == len(names) else ()


def _claimants(folders: list[list[BidsFile]], scan: Mapping[str, str], name: str) -> list[BidsFile]:
    """The images of a channel in the first folder that has any: the derivative's own lie on its own grid."""
    for files in folders:
        fitting = [item for item in files if is_channel(item, scan, name)]
        if fitting:
            return fitting
    return []


def _tests(segmentations: Sequence[BidsFile], names: Sequence[str], search: _Search) -> tuple[Case, ...]:
    """Visits without a segmentation, whose images are all there."""
    labelled = {item.visit for item in segmentations}
    datatypes = {item.datatype for item in segmentations}
    space = segmentations[0].entities.get("space", "")
    cases = []
    for subject, session in sorted(set(search.files) - labelled):
        scan = {"sub": subject} | ({"ses": session} if session else {})
        folders = _candidates(scan, space, datatypes, search)
        images = [_claimants(folders, scan, name) for name in names]
        if all(len(claimants) == 1 for claimants in images):
            files = tuple(str(claimants[0].path) for claimants in images)
            cases.append(Case(id=name_of(scan), images=files, patient=f"sub-{subject}"))
    return tuple(cases)
