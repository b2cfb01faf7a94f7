"""What is to be done with each file of a case. Decides by facts alone: nothing is read or written here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np

from autoseg.checking.repair_survey import (
    HARMONISE_TOLERANCE_VOX,
    MIN_OVERLAP_FRACTION,
    CaseSurvey,
    ImageFacts,
    LabelFacts,
    lies_elsewhere,
    same_but_for_header,
)
from autoseg.checking.repairs import LabelValue, LeftWrong, Repair, RepairKind, RepairSettings
from autoseg.domain.dataset import LabelSchema
from autoseg.domain.endings import NIFTI_ENDINGS, split_ending
from autoseg.domain.geometry import IDENTITY_ORIENTATION, Geometry, Orientation, grid_mismatch, orientation_code
from autoseg.domain.grids import voxels_apart

_ATTACHED = {".nhdr": ".nrrd", ".mhd": ".mha", ".hdr": ".nii.gz"}
"""Formats whose voxels lie in a second file become those that hold both, so that one file is one link."""

_WRITABLE = {*NIFTI_ENDINGS, ".nrrd", ".mha"}
_WRITABLE_PICTURES = {".png", ".bmp", ".tif", ".tiff"}
"""Formats that changed files keep; of single pictures also these. JPEG is none of them, because it changes values."""

_WHY_SPLIT = "one file a channel is what every program understands"
_MM3_PER_ML = 1000
_LARGEST_VALUE = int(np.iinfo(np.uint16).max)
_LISTED = 8


@dataclass(frozen=True, slots=True, eq=False)
class ImageFile:
    """An image file of the copy; a hard link unless anything but `source` and `target` is given.

    Attributes:
        source: The original.
        target: Relative to the copy.
        geometry: The grid to write; None for a link.
        orientation: The new order of the voxels.
        component: The channel to take; None takes all.
        fill: Written in place of NaN and infinities; None leaves them.
    """

    source: str
    target: str
    geometry: Geometry | None = None
    orientation: Orientation = IDENTITY_ORIENTATION
    component: int | None = None
    fill: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LabelFile:
    """A label map of the copy whose values or grid are new.

    Attributes:
        source: The original.
        target: Relative to the copy.
        geometry: The grid to write.
        orientation: The new order of the voxels, where they are not resampled.
        table: Original value to new one; values that are not in it stay.
        is_resampled: Whether voxels are carried from grid to grid instead of reordered.
    """

    source: str
    target: str
    geometry: Geometry
    orientation: Orientation
    table: Mapping[int, int]
    is_resampled: bool


@dataclass(slots=True)
class CaseDecision:
    """What becomes of a case.

    Attributes:
        case: Its id.
        files: The files of the copy.
        repairs: Their changes, in words.
        left_wrong: What is wrong and stays.
        reason: Why the case is set aside; "" when it is kept.
    """

    case: str
    files: list[ImageFile | LabelFile] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    left_wrong: list[LeftWrong] = field(default_factory=list)
    reason: str = ""

    def repaired(self, file: str, kind: RepairKind, what: str, before: str, after: str, why: str) -> None:
        """Note a change."""
        self.repairs.append(
            Repair(case=self.case, file=file, kind=kind, what=what, before=before, after=after, why=why)
        )

    def left(self, file: str, what: str, hint: str) -> None:
        """Note what stays wrong."""
        self.left_wrong.append(LeftWrong(case=self.case, file=file, what=what, hint=hint))


def consecutive_values(schema: LabelSchema) -> dict[int, int]:
    """Every label value to 1, 2, 3, ... in ascending order, the ignore value to the one after them.

    Source: nnU-Net's documentation, "dataset format": labels must be consecutive, the ignore label the highest.
    """
    ordinary = sorted(schema.declared_values - {0, schema.ignore})
    ordered = ordinary if schema.ignore is None else [*ordinary, schema.ignore]
    return {value: new for new, value in enumerate(ordered, start=1)}


def listed_values(schema: LabelSchema, table: Mapping[int, int]) -> tuple[LabelValue, ...]:
    """A mapping of label values with the names of their classes, for the ledger."""
    names = {
        value: ", ".join(item.name for item in schema.classes if value in item.values) or "ignore" for value in table
    }
    return tuple(LabelValue(name=names[value], original=value, now=new) for value, new in table.items())


def mapped_schema(schema: LabelSchema, table: Mapping[int, int]) -> LabelSchema:
    """The labels with their new values."""
    classes = tuple(
        item.model_copy(update={"values": tuple(table.get(value, value) for value in item.values)})
        for item in schema.classes
    )
    ignore = None if schema.ignore is None else table.get(schema.ignore, schema.ignore)
    order = schema.regions_class_order
    written = None if order is None else tuple(table.get(value, value) for value in order)
    return schema.model_copy(update={"classes": classes, "ignore": ignore, "regions_class_order": written})


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every case.

    Attributes:
        schema: The labels, with their original values.
        table: Original label value to new one; empty when values stay.
        settings: What may be done.
    """

    schema: LabelSchema
    table: Mapping[int, int]
    settings: RepairSettings


def decide(survey: CaseSurvey, rules: Rules, *, part: str = "Tr") -> CaseDecision:
    """What becomes of a case.

    Args:
        survey: What its files are.
        rules: What holds for every case.
        part: Of the data set: "Tr" or "Ts".
    """
    made = CaseDecision(survey.case.id, reason=survey.problem)
    if made.reason:
        return made
    grid = survey.images[0].grid
    number = 0
    if survey.label is not None and part == "Tr":
        made.reason = _reason_against(survey.label, rules)
        if made.reason:
            return made
    for facts in survey.images:
        while number in survey.case.missing:
            number += 1
        _decide_image(facts, grid, number, f"images{part}", rules.settings, made)
        number += facts.num_channels
    if survey.label is not None:
        _decide_label(survey.label, grid, f"labels{part}", rules, made)
    return made


def _reason_against(facts: LabelFacts, rules: Rules) -> str:
    """Why a training case with this label map is set aside; "" when it is not."""
    if facts.overlap_fraction is not None and facts.carried_values is None:
        return (
            f"the label map overlaps its image by {facts.overlap_fraction:.0%} only, so it was not resampled; at least "
            f"{MIN_OVERLAP_FRACTION:.0%} is needed"
        )
    values = facts.values if facts.carried_values is None else facts.carried_values
    if rules.settings.keep_empty or set(values) - {0, rules.schema.ignore}:
        return ""
    return "the label map holds background only" + ("" if facts.carried_values is None else ", after resampling")


def _written_grid(own: Geometry, expected: Geometry) -> Geometry:
    """The grid that a file is written on: the expected one where their headers differ by little."""
    return expected if same_but_for_header(own, expected) else own


def _note_grid(own: Geometry, expected: Geometry, target: str, what: str, hint: str, made: CaseDecision) -> None:
    """Note a header that became another one, or a grid that is too far off for that."""
    if lies_elsewhere(own, expected):
        made.left(target, f"{what} lies on another grid: {grid_mismatch(own, expected)}", hint)
    elif same_but_for_header(own, expected):
        before = f"up to {voxels_apart(own, expected):.3g} voxels off"
        why = f"below {HARMONISE_TOLERANCE_VOX:g} voxels no voxel gets another nearest neighbour"
        made.repaired(target, "header", f"{what} got the header of the image", before, "the same grid", why)


def _ending(path: str, *, is_written: bool, is_picture: bool) -> str:
    """The ending of the copy: the original's, unless a changed file's format is not written, or is two files."""
    ending = split_ending(path)[1]
    lower = ending.lower()
    if not is_written or lower in _WRITABLE or (is_picture and lower in _WRITABLE_PICTURES):
        return ending
    return _ATTACHED.get(lower, ".png" if is_picture else ".nii.gz")


def _is_detached(path: str) -> bool:
    return split_ending(path)[1].lower() in _ATTACHED


def _decide_image(
    facts: ImageFacts, first: Geometry, number: int, folder: str, settings: RepairSettings, made: CaseDecision
) -> None:
    is_split = facts.num_channels > 1 and not facts.is_picture
    fills = settings.replace_non_finite and sum(facts.not_finite) > 0
    geometry = _written_grid(facts.grid, first)
    is_written = is_split or fills or _is_detached(facts.path) or geometry is not facts.geometry
    ending = _ending(facts.path, is_written=is_written, is_picture=facts.is_picture)
    for component in range(facts.num_channels if is_split else 1):
        target = f"{folder}/{made.case}_{number + component:04d}{ending}"
        fill = facts.lowest[component] if fills and facts.not_finite[component] else None
        made.files.append(
            ImageFile(
                source=facts.path,
                target=target,
                geometry=geometry if is_written else None,
                orientation=facts.orientation,
                component=component if is_split else None,
                fill=fill,
            )
        )
        if is_split:
            before, why = f"{PurePath(facts.path).name}, {facts.num_channels} channels", _WHY_SPLIT
            made.repaired(target, "channels", f"channel {component} in a file of its own", before, "1 channel", why)
        _note_format(facts.path, target, made)
        _note_orientation(facts.geometry, facts.orientation, target, made)
        _note_grid(facts.grid, first, target, "the channel", "Resample all channels of a case onto one grid.", made)
        _note_not_finite(facts, component, fill, target, made)


def _note_not_finite(facts: ImageFacts, component: int, fill: float | None, target: str, made: CaseDecision) -> None:
    count = facts.not_finite[component]
    if not count:
        return
    if fill is None:
        known = facts.lowest[component] is not None
        hint = "Ask for the channel's lowest finite value with --replace-nan." if known else "Take the case out."
        made.left(target, f"{count:,} voxels are NaN or infinite; what they should be is not known", hint)
        return
    why = "asked for; one such voxel spoils every mean, and training"
    before = f"{count:,} voxels NaN or infinite"
    made.repaired(target, "not-finite", "replaced by the lowest finite value", before, f"{fill:g}", why)


def _note_format(source: str, target: str, made: CaseDecision) -> None:
    before, after = split_ending(source)[1], split_ending(target)[1]
    if before != after:
        why = "changed files are written in formats that hold header and voxels in one file, without loss"
        made.repaired(target, "format", "stored in another format", before, after, why)


def _note_orientation(geometry: Geometry, orientation: Orientation, target: str, made: CaseDecision) -> None:
    if orientation != IDENTITY_ORIENTATION:
        why = "one order of axes for all; no voxel changes its value or its place in the world"
        made.repaired(target, "orientation", "voxels reordered", orientation_code(geometry.affine), "RAS", why)


def _decide_label(facts: LabelFacts, image: Geometry, folder: str, rules: Rules, made: CaseDecision) -> None:
    changes = {value: new for value, new in rules.table.items() if value in facts.values and value != new}
    highest = max(changes.get(value, value) for value in facts.values)
    is_storable = min(facts.values) >= 0 and highest <= _LARGEST_VALUE
    is_resampled = is_storable and facts.carried_values is not None
    has_new_voxels = is_storable and (facts.is_disguised or bool(changes) or is_resampled)
    geometry = image if is_resampled else _written_grid(facts.grid, image)
    is_written = has_new_voxels or _is_detached(facts.path) or geometry is not facts.geometry
    ending = _ending(facts.path, is_written=is_written, is_picture=facts.geometry.is_2d)
    target = f"{folder}/{made.case}{ending}"
    if has_new_voxels:
        made.files.append(LabelFile(facts.path, target, geometry, facts.orientation, changes, is_resampled))
    else:
        written = geometry if is_written else None
        made.files.append(ImageFile(facts.path, target, written, facts.orientation))
    _note_format(facts.path, target, made)
    if is_resampled:
        _note_resampling(facts, image, target, made)
    else:
        _note_orientation(facts.geometry, facts.orientation, target, made)
        hint = "Ask for it with --resample-labels, or export image and labels from one grid."
        _note_grid(facts.grid, image, target, "the label map", hint, made)
    if has_new_voxels:
        _note_values(facts, changes, highest, target, made)
    undeclared = sorted(set(facts.values) - rules.schema.declared_values)
    if undeclared:
        listed = ", ".join(map(str, undeclared[:_LISTED])) + (", ..." if len(undeclared) > _LISTED else "")
        hint = "Name them in the labels of the data set's description, or correct the label map."
        made.left(target, f"label values that are not declared: {listed}; what they mean is not guessed", hint)


def _note_resampling(facts: LabelFacts, image: Geometry, target: str, made: CaseDecision) -> None:
    before = f"{_size(facts.geometry)}, {_foreground(facts.values, facts.geometry)}"
    after = f"{_size(image)}, {_foreground(facts.carried_values or {}, image)}"
    why = f"asked for; the extents overlap by {facts.overlap_fraction or 0:.0%}"
    made.repaired(target, "resampled", "carried to the nearest voxels of the image's grid", before, after, why)


def _size(grid: Geometry) -> str:
    return "×".join(map(str, grid.shape)) + " at " + "×".join(f"{size:.3g}" for size in grid.spacing_mm) + " mm"


def _foreground(values: Mapping[int, int], grid: Geometry) -> str:
    voxels = sum(count for value, count in values.items() if value)
    ml = voxels * abs(float(np.linalg.det(grid.affine[:3, :3]))) / _MM3_PER_ML
    return f"{voxels:,} labelled voxels ({ml:.3g} ml)"


def _note_values(facts: LabelFacts, changes: Mapping[int, int], highest: int, target: str, made: CaseDecision) -> None:
    if facts.is_disguised:
        after = "uint8" if highest <= np.iinfo(np.uint8).max else "uint16"
        why = "labels are integers; other programs refuse or round floats"
        made.repaired(target, "label-type", "whole numbers stored as integers", facts.dtype, after, why)
    if changes:
        before, after = (", ".join(map(str, values)) for values in (changes, changes.values()))
        why = "values without gaps; the whole table is under label_values"
        made.repaired(target, "label-values", "values mapped to consecutive ones", before, after, why)
