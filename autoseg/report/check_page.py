"""The page of a check: what was found, the classes in numbers, and a picture of every case, the odd ones first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg.checking.catalogue import SEVERITIES, title_of
from autoseg.checking.doctor import Examination
from autoseg.checking.facts import Picture
from autoseg.checking.findings import CaseSummary, CheckReport, Finding
from autoseg.checking.wording import by
from autoseg.io.files import write_text
from autoseg.report.templating import environment_of_pages, trusted_part

PICTURES_BYTES = 4_200_000
"""Pictures of all cases together: with them the page stays below 5 MB. Cases beyond are listed without pictures."""

MAX_ROWS_A_KIND = 100
"""Findings of one kind that the page lists; all of them are in the JSON."""

NUM_COLOURS = 10
"""Of outlines; further classes begin anew."""


@dataclass(frozen=True, slots=True)
class Card:
    """A case on the page.

    Attributes:
        case: In numbers.
        findings: What concerns it, the worst first.
        pictures: Its slices; () without any, or where the page would become too large.
    """

    case: CaseSummary
    findings: tuple[Finding, ...]
    pictures: tuple[Picture, ...]

    @property
    def severities(self) -> str:
        """Of its findings, each once."""
        return " ".join(dict.fromkeys(item.severity for item in self.findings))

    @property
    def codes(self) -> tuple[str, ...]:
        """Of its findings, each once."""
        return tuple(dict.fromkeys(item.code for item in self.findings))


def write_check_page(path: Path, examination: Examination) -> None:
    """Write the page of a check, whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    write_text(path, render_check(examination))


def render_check(examination: Examination) -> str:
    """The page: one self-contained document that asks the network for nothing."""
    report = examination.report
    environment = environment_of_pages()
    environment.filters |= {"by": by, "count": "{:,.0f}".format}
    cards = _cards(report, examination.pictures)
    rows, hidden = _rows(report)
    return environment.get_template("check.html.j2").render(
        report=report,
        cards=cards,
        num_bare=sum(bool(examination.pictures.get(card.case.id)) and not card.pictures for card in cards),
        rows=rows,
        num_hidden=hidden,
        titles={item.code: title_of(item.code) for item in report.findings},
        severities=[(name, report.count(name)) for name in SEVERITIES],
        anchors={card.case.id: number for number, card in enumerate(cards)},
        class_names=() if examination.labels is None else examination.labels.names,
        num_colours=NUM_COLOURS,
        style=trusted_part("page.css") + trusted_part("check.css"),
        script=trusted_part("check.js"),
    )


def _cards(report: CheckReport, pictures: Mapping[str, Sequence[Picture]]) -> list[Card]:
    """The cases, those with the worst and the most findings first; pictures as long as there is room."""
    found: dict[str, list[Finding]] = defaultdict(list)
    for item in report.findings:
        for name in item.all_cases:
            found[name].append(item)

    def oddness(case: CaseSummary) -> tuple[int, ...]:
        counts = [sum(item.severity == name for item in found[case.id]) for name in SEVERITIES]
        return tuple(-count for count in counts)

    cards, room = [], PICTURES_BYTES
    for case in sorted(report.cases, key=oddness):
        shown = tuple(pictures.get(case.id, ()))
        size = sum(len(picture.image) + sum(len(path) for _, path in picture.contours) for picture in shown)
        room -= size
        cards.append(Card(case, tuple(found[case.id]), shown if room >= 0 else ()))
    return cards


def _rows(report: CheckReport) -> tuple[list[Finding], int]:
    """The findings that the table lists, and how many are left out."""
    taken: dict[tuple[str, str], int] = defaultdict(int)
    rows = []
    for item in report.findings:
        taken[item.severity, item.code] += 1
        if taken[item.severity, item.code] <= MAX_ROWS_A_KIND:
            rows.append(item)
    return rows, len(report.findings) - len(rows)
