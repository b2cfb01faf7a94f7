"""What a check of a data set reports."""

from __future__ import annotations

from autoseg.domain.findings import Finding, Severity
from autoseg.domain.values import Value

__all__ = ["CheckReport", "Finding", "Severity"]


class CheckReport(Value):
    """Everything a check found.

    Attributes:
        dataset: The data set's path as given.
        name: Its name; "" when its description could not be read.
        num_cases: Cases whose files are all there.
        num_files: Files that were opened.
        findings: The worst first, then by case and file.
    """

    schema_version: int = 1
    dataset: str
    name: str = ""
    num_cases: int = 0
    num_files: int = 0
    findings: tuple[Finding, ...] = ()

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
