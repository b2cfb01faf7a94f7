"""What was found wrong, or worth knowing, in a data set: one record a finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from autoseg.domain.values import Value

Severity = Literal["error", "warning", "note"]


class Finding(Value):
    """One thing found in a data set.

    Attributes:
        severity: "error" stops training; "warning" is probably a mistake; "note" is worth knowing.
        case: Case id; "" when it is about the data set.
        file: The file; "" when it is about no single one.
        code: A short, stable name of the kind, such as "missing-label".
        message: What is wrong, got against expected.
        hint: What to do about it; "" when the message says it.
        cost: What it costs, in words: cases lost, a class not learnt, scores too good; "" when nothing.
        cases: Ids of the cases concerned, where it is about several.
        voxels: Voxels concerned, where they were counted.
    """

    severity: Severity
    case: str = ""
    file: str = ""
    code: str
    message: str
    hint: str = ""
    cost: str = ""
    cases: tuple[str, ...] = ()
    voxels: int | None = None

    @property
    def all_cases(self) -> tuple[str, ...]:
        """The cases concerned, whether it is one or several."""
        return self.cases or ((self.case,) if self.case else ())

    def __str__(self) -> str:
        where = ", ".join(part for part in (f"case {self.case}" if self.case else "", self.file) if part)
        return f"{where}: {self.message}" if where else self.message


@dataclass
class Findings:
    """Findings as they are collected, so that everything is told at once."""

    items: list[Finding] = field(default_factory=list)

    def add(
        self,
        code: str,
        message: str,
        *,
        case: str = "",
        file: str | Path = "",
        hint: str = "",
        severity: Severity = "error",
        cost: str = "",
        cases: Sequence[str] = (),
        voxels: int | None = None,
    ) -> None:
        """Add one finding."""
        self.items.append(
            Finding(
                severity=severity,
                case=case,
                file=str(file),
                code=code,
                message=message,
                hint=hint,
                cost=cost,
                cases=tuple(cases),
                voxels=voxels,
            )
        )
