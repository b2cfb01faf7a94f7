"""What a repair did and what it left: the ledger that lies in the repaired copy."""

from __future__ import annotations

from typing import Literal

from autoseg.domain.values import Value

RepairKind = Literal[
    "orientation", "channels", "header", "resampled", "label-type", "label-values", "not-finite", "format"
]


class RepairSettings(Value):
    """What a repair may do.

    Attributes:
        resample_labels: Label maps on another grid are carried onto their image's. Off, because it changes labels.
        replace_non_finite: NaN and infinities become the channel's lowest finite value. Off, because it is a guess.
        keep_orientation: Voxels stay in the order of the file.
        keep_values: Label values stay as they are, gaps included.
        keep_empty: Cases with nothing but background stay.
    """

    resample_labels: bool = False
    replace_non_finite: bool = False
    keep_orientation: bool = False
    keep_values: bool = False
    keep_empty: bool = False


class Repair(Value):
    """One change.

    Attributes:
        case: Case id.
        file: The written file, relative to the copy.
        kind: A short, stable name.
        what: What was changed.
        before: How it was.
        after: How it is.
        why: What it is good for.
    """

    case: str
    file: str
    kind: RepairKind
    what: str
    before: str
    after: str
    why: str


class SetAside(Value):
    """A case that is not in the copy; its files, where there are any, are in `set_aside`.

    Attributes:
        case: Case id; "" for a file that belongs to no case.
        files: Relative to the copy.
        reason: In words.
    """

    case: str
    files: tuple[str, ...]
    reason: str


class LeftWrong(Value):
    """Something wrong that was not repaired; it is in the copy as it was.

    Attributes:
        case: Case id; "" when it is about the whole data set.
        file: Relative to the copy; "" when it is about no single one.
        what: What is wrong, and why it was left.
        hint: What to do.
    """

    case: str
    file: str
    what: str
    hint: str


class LabelValue(Value):
    """A label value and what it became.

    Attributes:
        name: Of the classes it belongs to.
        original: The value in the original files.
        now: The value in the copy.
    """

    name: str
    original: int
    now: int


class Ledger(Value):
    """Everything that distinguishes a repaired copy from its original.

    Attributes:
        source: The original data set.
        settings: What was asked for.
        num_cases: Training cases in the copy.
        num_test_cases: Test cases in the copy.
        num_linked: Unchanged files that are hard links to the original's.
        num_copied: Unchanged files that were copied, because links were not possible.
        num_written: Files that were changed.
        label_values: How label values were mapped; empty when they were not.
        repairs: Every change.
        set_aside: What is not in the copy.
        left_wrong: What is wrong still.
    """

    schema_version: int = 1
    source: str
    settings: RepairSettings
    num_cases: int
    num_test_cases: int
    num_linked: int
    num_copied: int
    num_written: int
    label_values: tuple[LabelValue, ...] = ()
    repairs: tuple[Repair, ...] = ()
    set_aside: tuple[SetAside, ...] = ()
    left_wrong: tuple[LeftWrong, ...] = ()

    def headline(self) -> str:
        """One sentence on the whole."""
        tests = f" and {_count(self.num_test_cases, 'test case')}" if self.num_test_cases else ""
        kept = [f"{_count(self.num_linked, 'file')} unchanged (hard links)"]
        if self.num_copied:
            kept.append(f"{_count(self.num_copied, 'file')} unchanged (copies)")
        kept.append(f"{_count(self.num_written, 'file')} repaired")
        return (
            f"{_count(self.num_cases, 'case')}{tests}: {', '.join(kept)}; {len(self.set_aside)} set aside, "
            f"{len(self.left_wrong)} left as wrong as they were."
        )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
