"""What a labelled data set is: channels, labels, cases. How the layouts on disk become one is in `layouts.py`."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from autoseg.domain import regions
from autoseg.domain.laterality import left_right_pairs, pairs_problems
from autoseg.domain.values import GrownValue, Value

IGNORE_INDEX = -1
"""Index of voxels that nobody annotated and that take part in nothing. Negative, so that it can never be a class."""

SCHEMA_VERSION = 1

_UNDECLARED = -2
"""Marks label values that the schema does not know, while encoding."""


class Channel(GrownValue):
    """One input channel.

    Attributes:
        name: In the data set ("T1", "CT", ...).
        may_be_missing: Whether cases may lack it. A network that was trained so does without it.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("may_be_missing",)

    name: str
    may_be_missing: bool = False


class LabelClass(Value):
    """A foreground class: its name and the label values in the files that belong to it.

    One value is an ordinary class; several values make a region (regions may overlap).
    """

    name: str
    values: tuple[int, ...]

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        if not self.values or any(value <= 0 for value in self.values):
            raise ValueError(f"class {self.name!r} needs label values above 0, got {self.values}")
        return self


class LabelSchema(GrownValue):
    """The foreground classes in the order of the network's outputs.

    Ordinary classes exclude each other: output 0 is background, output i + 1 is ``classes[i]``. As soon as one class
    joins several values all are regions, which may overlap: output i is ``classes[i]``, and there is no background.

    Inside autoseg a label map holds, instead of values, their places in `label_values` (value indices), so that it is
    one number a voxel in both cases; of ordinary classes they are the class indices.

    Attributes:
        classes: Foreground classes, or regions.
        ignore: Label value of voxels that nobody annotated, or None.
        regions_class_order: The label value that each region is written with, later ones over earlier ones; None where
            autoseg chooses (see `domain.regions`) and for ordinary classes.
        pairs: Names (left, right) of classes that a mirror image turns into each other; () where there are none; None
            where they are to be told by their names.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("regions_class_order", "pairs")

    classes: tuple[LabelClass, ...]
    ignore: int | None = None
    regions_class_order: tuple[int, ...] | None = None
    pairs: tuple[tuple[str, str], ...] | None = None

    @model_validator(mode="after")
    def _values_are_distinct(self) -> Self:
        if not self.classes:
            raise ValueError("at least one foreground class is needed")
        names = [item.name for item in self.classes]
        if len(set(names)) != len(names):
            raise ValueError(f"class names must differ, got {names}")
        if not self.has_regions:
            values = [item.values[0] for item in self.classes]
            if len(set(values)) != len(values):
                raise ValueError(f"label values must differ, got {values}")
            if self.regions_class_order is not None:
                raise ValueError("regions_class_order is for regions, and no class joins several label values")
        else:
            problems = regions.regions_problems([item.values for item in self.classes], names, self.regions_class_order)
            if problems:
                raise ValueError("; ".join(problems))
        if self.ignore is not None and any(self.ignore in item.values for item in self.classes):
            raise ValueError(f"the ignore value {self.ignore} is also the value of a class")
        problems = pairs_problems(self.pairs or (), names)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def sided_pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs (left, right) of class names: as declared, else as the names tell."""
        return left_right_pairs(self.names) if self.pairs is None else self.pairs

    @property
    def has_regions(self) -> bool:
        """Whether any class joins several label values; then all classes are regions."""
        return any(len(item.values) > 1 for item in self.classes)

    @property
    def num_classes(self) -> int:
        """Background and every foreground class or region."""
        return len(self.classes) + 1

    @property
    def num_outputs(self) -> int:
        """Outputs of the network: of ordinary classes the background is one of them, of regions not."""
        return len(self.classes) if self.has_regions else self.num_classes

    @property
    def label_values(self) -> tuple[int, ...]:
        """The label value of each value index: 0, then those of the classes in order, or of regions all, ascending."""
        if self.has_regions:
            return (0, *sorted({value for item in self.classes for value in item.values}))
        return (0, *(item.values[0] for item in self.classes))

    @property
    def num_values(self) -> int:
        """Value indices, background included."""
        return len(self.label_values)

    def region_table(self) -> NDArray[np.bool_]:
        """Which value indices belong to which class: (classes, num_values)."""
        return np.array([[value in item.values for value in self.label_values] for item in self.classes], np.bool_)

    def annotated_row(self, names: Collection[str] | None) -> tuple[bool, ...]:
        """For each class whether it is among the names; None names all."""
        return tuple(names is None or name in names for name in self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Foreground class names in order."""
        return tuple(item.name for item in self.classes)

    @property
    def declared_values(self) -> frozenset[int]:
        """Every value a label file may hold, 0 and the ignore value included."""
        values = {0} | {value for item in self.classes for value in item.values}
        return frozenset(values if self.ignore is None else values | {self.ignore})

    def encode(self, labels: NDArray[np.integer]) -> NDArray[np.int16]:
        """Label values of the file to value indices 0 ... num_values - 1, the ignore value to IGNORE_INDEX.

        Args:
            labels: Any shape, integer, every value declared.

        Raises:
            ValueError: A value is not declared.
        """
        if not labels.size:
            return np.zeros(labels.shape, np.int16)
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > max(self.declared_values):
            found = {int(value) for value in np.unique(labels)}
            raise ValueError(self._undeclared(found - self.declared_values))
        table = np.full(high + 1, _UNDECLARED, np.int16)
        for index, value in enumerate(self.label_values):
            if value <= high:
                table[value] = index
        if self.ignore is not None and self.ignore <= high:
            table[self.ignore] = IGNORE_INDEX
        # A table look-up passes over the voxels once, however many classes there are.
        out: NDArray[np.int16] = table[labels]
        if int(out.min()) == _UNDECLARED:
            raise ValueError(self._undeclared({int(value) for value in np.unique(labels[out == _UNDECLARED])}))
        return out

    def _undeclared(self, values: set[int]) -> str:
        return f"undeclared label values {sorted(values)}; declared are {sorted(self.declared_values)}"

    def decode_table(self) -> NDArray[np.uint16] | NDArray[np.uint8]:
        """The label value of every value index, as a table to index with: uint8 where all values fit, else uint16."""
        if max(self.label_values) <= np.iinfo(np.uint8).max:
            return np.asarray(self.label_values, np.uint8)
        return np.asarray(self.label_values, np.uint16)

    def decode_regions(self, codes: NDArray[np.integer]) -> NDArray[np.unsignedinteger]:
        """Combinations of regions to the label values that they are written with.

        Args:
            codes: Any shape; bit i is set where the voxel is in ``classes[i]``.

        Returns:
            The dtype of `decode_table`.
        """
        values = [item.values for item in self.classes]
        return regions.values_of_codes(codes, values, self.regions_class_order, self.decode_table().dtype)


class Case(Value):
    """One labelled (or unlabelled) image.

    Attributes:
        id: Unique in the data set; outputs are named by it.
        images: Absolute paths, one for each channel that is there; or a single file that holds every channel.
        labels: Absolute path of the label map, None when there is none.
        patient: Cases of one patient stay in one fold; None when unknown.
        annotated: Names of the classes that were annotated in this case; None when all were. Elsewhere the case says
            nothing about a class: its voxels may be labelled as background.
        strata: What folds should have alike, by the column's name, such as {"site": "Lyon"}.
        missing: Numbers of the channels that the case lacks, ascending.
    """

    id: str
    images: tuple[str, ...]
    labels: str | None = None
    patient: str | None = None
    annotated: tuple[str, ...] | None = None
    strata: dict[str, str] = Field(default_factory=dict)
    missing: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _missing_channels_are_counted(self) -> Self:
        if list(self.missing) != sorted(set(self.missing)) or any(number < 0 for number in self.missing):
            raise ValueError(f"missing channels must be different numbers in ascending order, got {self.missing}")
        return self

    def channels_in_a_file(self, num_channels: int) -> int:
        """How many channels each image file holds, of a data set with `num_channels`."""
        return num_channels if len(self.images) == 1 and not self.missing else 1

    @property
    def files(self) -> tuple[str, ...]:
        """Images and labels, in that order."""
        return self.images if self.labels is None else (*self.images, self.labels)


class Dataset(Value):
    """A data set as resolved: every case with its files.

    Attributes:
        cases: Labelled training cases, sorted by id.
        test_cases: Unlabelled (or separately labelled) cases that came with it.
        file_ending: The ending of label files, with the dot, such as ".nii.gz".
        num_training_stated: Training cases as its description says; None where it does not.
        splits: Folds that came with it (case ids of each fold's validation cases with its training cases), if any.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    channels: tuple[Channel, ...]
    labels: LabelSchema
    cases: tuple[Case, ...]
    test_cases: tuple[Case, ...] = ()
    file_ending: str = ".nii.gz"
    num_training_stated: int | None = None
    splits: Splits | None = None

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        ids = [case.id for case in self.cases]
        if len(set(ids)) != len(ids):
            doubled = sorted({item for item in ids if ids.count(item) > 1})
            raise ValueError(f"case ids must differ, these occur more than once: {doubled}")
        if not self.channels:
            raise ValueError("at least one channel is needed")
        strange = sorted({name for case in self.cases for name in case.annotated or ()} - set(self.labels.names))
        if strange:
            raise ValueError(f"annotated names classes that the labels do not have: {strange}")
        lacking = {number for case in (*self.cases, *self.test_cases) for number in case.missing}
        for number in sorted(lacking):
            if number >= len(self.channels) or not self.channels[number].may_be_missing:
                raise ValueError(f"cases lack channel {number}, which is not one that may be missing")
        return self

    @property
    def annotated_rows(self) -> dict[str, tuple[bool, ...]]:
        """Of the cases in which not every class was annotated: for each class whether it was."""
        return {case.id: self.labels.annotated_row(case.annotated) for case in self.cases if case.annotated is not None}

    def case(self, case_id: str) -> Case:
        """The case of that id; KeyError when there is none."""
        for case in self.cases:
            if case.id == case_id:
                return case
        raise KeyError(case_id)


class Fold(Value):
    """Case ids of one fold."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


class Splits(Value):
    """The folds of a cross-validation.

    Attributes:
        rule: How they were made, in words, for people.
    """

    schema_version: int = SCHEMA_VERSION
    rule: str
    folds: tuple[Fold, ...]

    @model_validator(mode="after")
    def _no_leak(self) -> Self:
        for number, fold in enumerate(self.folds):
            both = sorted(set(fold.train) & set(fold.validation))
            if both:
                raise ValueError(f"fold {number} trains and validates on the same cases: {both[:5]}")
        return self


Dataset.model_rebuild()
