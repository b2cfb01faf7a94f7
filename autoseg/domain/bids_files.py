"""Files of BIDS data sets: their names taken apart, and which image belongs to which segmentation.

Source: Brain Imaging Data Structure 1.10, "Common principles" (entities, inheritance) and "Derivatives".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autoseg.domain.endings import is_image_name, split_ending

SEGMENTATION_SUFFIX = "dseg"
MASK_SUFFIX = "mask"
_NO_IMAGES = (SEGMENTATION_SUFFIX, MASK_SUFFIX, "probseg", "defacemask", "xfm", "boldref", "sbref")
_FILE_DEPTHS = ("sub-*/*/*", "sub-*/ses-*/*/*")
_OME = ".ome"

_SOURCE_ENTITIES = (
    *("sub", "ses", "sample", "task", "acq", "nuc", "voi", "ce", "trc", "stain", "rec", "dir", "run", "mod", "echo"),
    *("flip", "inv", "mt", "part", "proc", "split", "chunk"),
)
"""What tells scans apart; all other entities (space, res, desc, seg, label ...) say how a file was derived from one."""

_OWN_SPACES = ("", "orig")
"""Spaces that are the scan's own. Source: BIDS, "Standard template identifiers"; "orig" is a non-standard space."""


@dataclass(frozen=True)
class BidsFile:
    """A file with its name taken apart.

    Attributes:
        path: The file.
        entities: "sub" to "01" and so on, in the order of the name.
        suffix: The last part of the name, such as "T1w" or "dseg".
        datatype: The folder it lies in, such as "anat".
    """

    path: Path
    entities: Mapping[str, str] = field(hash=False)
    suffix: str
    datatype: str

    @property
    def source(self) -> dict[str, str]:
        """The entities that say which scan it is, or was made from."""
        return {key: value for key, value in self.entities.items() if key in _SOURCE_ENTITIES}

    @property
    def kind(self) -> str:
        """How it was derived: the other entities and the suffix, such as "desc-manual_dseg"."""
        return name_of({key: value for key, value in self.entities.items() if key not in _SOURCE_ENTITIES}, self.suffix)

    @property
    def case_id(self) -> str:
        """Subject, session and what else tells the scan apart."""
        return name_of(self.source)

    @property
    def visit(self) -> tuple[str, str]:
        """Subject and session."""
        return self.entities["sub"], self.entities.get("ses", "")


def name_of(entities: Mapping[str, str], suffix: str = "") -> str:
    """A name of entities, and a suffix where there is one."""
    return "_".join([*(f"{key}-{value}" for key, value in entities.items()), *([suffix] if suffix else [])])


def parse_stem(stem: str) -> tuple[dict[str, str], str] | None:
    """Entities and suffix of a name without ending; None when it is none of BIDS."""
    *parts, suffix = stem.removesuffix(_OME).split("_")
    pairs = [part.partition("-") for part in parts]
    if "-" in suffix or not suffix or any(not key or not value for key, _, value in pairs):
        return None
    return {key: value for key, _, value in pairs}, suffix


def list_files(root: Path) -> list[BidsFile]:
    """The image files of all subjects, sorted."""
    files = []
    for path in sorted({path for depth in _FILE_DEPTHS for path in root.glob(depth)}):
        parsed = parse_stem(split_ending(path)[0]) if is_image_name(path) else None
        if parsed is not None and "sub" in parsed[0]:
            files.append(BidsFile(path, parsed[0], parsed[1], path.parent.name))
    return files


def channels_of(scan: Mapping[str, str], space: str, datatypes: set[str], files: list[BidsFile]) -> list[BidsFile]:
    """The images that lie on the grid of a segmentation, by their names.

    Args:
        scan: Entities of the segmentation that say which scan it was made from; an image must carry all of them.
        space: Its space entity, or "".
        datatypes: Folders to look in.
        files: Of the same visit.
    """
    found = []
    for item in files:
        own = item.entities.get("space", "")
        is_same_space = own == space or (own in _OWN_SPACES and space in (*_OWN_SPACES, item.suffix))
        carries_all = all(item.entities.get(key) == value for key, value in scan.items())
        if item.suffix not in _NO_IMAGES and item.datatype in datatypes and is_same_space and carries_all:
            found.append(item)
    return found


def channel_name(item: BidsFile, scan: Mapping[str, str]) -> str:
    """What an image shows, as a channel: its suffix, after the entities that the segmentation's name lacks."""
    return name_of({key: value for key, value in item.source.items() if key not in scan}, item.suffix)


def is_channel(item: BidsFile, scan: Mapping[str, str], wanted: str) -> bool:
    """Whether an image is the channel of a name such as "T1w", "ce-gad_T1w" or "desc-preproc_T1w"."""
    parsed = parse_stem(wanted)
    if parsed is None or parsed[1] != item.suffix:
        return False
    entities = parsed[0]
    extra = {key for key in item.source if key not in scan} - set(entities)
    return not extra and all(item.entities.get(key) == value for key, value in entities.items())
