"""The ledger of a repair as a page for people."""

from __future__ import annotations

from collections.abc import Sequence

from autoseg.checking.repairs import Ledger


def ledger_text(ledger: Ledger) -> str:
    """The ledger in Markdown: what was set aside, what is wrong still, label values, every change.

    Args:
        ledger: What was done.
    """
    lines = ["# Repairs", "", f"A corrected copy of `{ledger.source}`, which was not touched.", "", ledger.headline()]
    if ledger.left_wrong:
        rows = [(item.case, item.file, item.what, item.hint) for item in ledger.left_wrong]
        lines += _section("Not repaired", ("case", "file", "what is wrong", "what to do"), rows)
    if ledger.set_aside:
        aside = [(item.case, ", ".join(item.files), item.reason) for item in ledger.set_aside]
        lines += _section("Set aside", ("case", "files", "reason"), aside)
    if ledger.label_values:
        values = [(item.name, str(item.original), str(item.now)) for item in ledger.label_values]
        lines += _section("Label values", ("class", "original", "now"), values)
    if ledger.repairs:
        changes = [(item.case, item.file, item.what, item.before, item.after, item.why) for item in ledger.repairs]
        lines += _section("Changes", ("case", "file", "what", "before", "after", "why"), changes)
    return "\n".join(lines) + "\n"


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", f"## {title}", "", _row(header), _row(["---"] * len(header)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
