"""What a check of a data set reports."""

from __future__ import annotations

from pydantic import Field

from autoseg.domain.findings import Finding, Severity
from autoseg.domain.values import Value

__all__ = ["CaseSummary", "CheckReport", "ClassSummary", "Finding", "FindingKind", "Severity"]


class FindingKind(Value):
    """All findings of one kind and severity together.

    Attributes:
        code: Of the kind.
        title: The kind in words.
        count: Findings of it.
        cases: Ids of the cases concerned, each once.
        message: Of the first finding.
        hint: What to do; "" where that is another thing for each of them.
        cost: What all of them together cost, in words; "" for nothing.
    """

    severity: Severity
    code: str
    title: str
    count: int
    cases: tuple[str, ...] = ()
    message: str
    hint: str = ""
    cost: str = ""


class CaseSummary(Value):
    """A case in numbers.

    Attributes:
        id: Its id.
        is_test: Whether nothing is learnt from it.
        shape: Voxels from left to right, back to front, feet to head; () where no image could be read.
        spacing_mm: Voxel size in the same order; () for pictures.
        intensities: For each channel that could be read the smallest and the largest value.
        class_voxels: Voxels of each class in it, by name.
    """

    id: str
    is_test: bool = False
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    intensities: tuple[tuple[float, float], ...] = ()
    class_voxels: dict[str, int] = Field(default_factory=dict)


class ClassSummary(Value):
    """A class in numbers; of the cases that are learnt from.

    Attributes:
        name: Its name.
        values: Its label values.
        num_cases: Cases that contain it.
        median_voxels: Median volume over those.
        least_voxels: The smallest.
        most_voxels: The largest.
        median_planned_voxels: Median volume in voxels of the planned spacing.
        median_pieces: Median number of connected pieces.
        foreground_fraction: Its part of all labelled voxels.
    """

    name: str
    values: tuple[int, ...]
    num_cases: int
    median_voxels: float
    least_voxels: int
    most_voxels: int
    median_planned_voxels: float
    median_pieces: float
    foreground_fraction: float


class CheckReport(Value):
    """Everything a check found.

    Attributes:
        dataset: The data set's path as given.
        name: Its name; "" when its description could not be read.
        num_cases: Cases whose files are all there.
        num_files: Files that were opened.
        findings: The worst first, then by case and file.
        kinds: The same, those of one kind together; the worst first.
        classes: The classes in numbers.
        cases: The cases in numbers.
    """

    schema_version: int = 1
    dataset: str
    name: str = ""
    num_cases: int = 0
    num_files: int = 0
    findings: tuple[Finding, ...] = ()
    kinds: tuple[FindingKind, ...] = ()
    classes: tuple[ClassSummary, ...] = ()
    cases: tuple[CaseSummary, ...] = ()

    @property
    def stops_training(self) -> bool:
        """Whether anything found must be put right before training."""
        return any(item.severity == "error" for item in self.findings)

    def count(self, severity: Severity) -> int:
        """How many findings are of that severity."""
        return sum(item.severity == severity for item in self.findings)

    def headline(self) -> str:
        """One sentence on the whole."""
        read = f"{self.name or self.dataset}: {self.num_cases} cases, {self.num_files} files read"
        counts = [
            f"{number} {word}{'s' if number > 1 else ''}"
            for word, number in (
                ("error", self.count("error")),
                ("warning", self.count("warning")),
                ("note", self.count("note")),
            )
            if number
        ]
        if not counts:
            return f"{read}; nothing wrong was found."
        verdict = "Training is stopped by the errors." if self.stops_training else "Nothing stops training."
        return f"{read}; {', '.join(counts)}. {verdict}"
