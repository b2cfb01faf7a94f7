"""The part of `autoseg check` that writes a corrected copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from autoseg.checking.repairs import Ledger, Repair, RepairSettings

RepairTo = Annotated[
    Path | None,
    typer.Option(
        "--repair",
        metavar="OUT",
        help="Write a corrected copy to the folder OUT and check that: labels as integers without gaps, axes in one "
        "order, headers that differ by less than half a voxel made equal, one file a channel; unreadable and empty "
        "cases are set aside. Unchanged files are hard links; the original is never touched; OUT/repairs.md says all.",
    ),
]
ResampleLabels = Annotated[
    bool, typer.Option("--resample-labels", help="With --repair: carry label maps onto their image's grid.")
]
ReplaceNan = Annotated[
    bool, typer.Option("--replace-nan", help="With --repair: NaN becomes the channel's lowest finite value.")
]
KeepOrientation = Annotated[
    bool, typer.Option("--keep-orientation", help="With --repair: leave voxels in the order of the file.")
]
KeepValues = Annotated[
    bool, typer.Option("--keep-values", help="With --repair: leave label values as they are, gaps included.")
]
KeepEmpty = Annotated[bool, typer.Option("--keep-empty", help="With --repair: keep cases with background only.")]


_FEW_STATES = ("orientation", "label-type", "format")
"""Changes of these kinds are told apart by how the file was; of others each file differs."""


def repair(dataset: Path, out: Path | None, settings: RepairSettings, *, is_quiet: bool) -> Path:
    """Repair, where that is asked for, and say what was done; the data set to check.

    Args:
        dataset: The original.
        out: The copy's folder; None when nothing is to be repaired.
        settings: What may be done.
        is_quiet: Whether stdout belongs to JSON.
    """
    from autoseg.cli.output import TerminalProgress, stdout
    from autoseg.errors import ConfigError
    from autoseg.pipeline import repairing

    asked = [name for name, value in settings if value]
    if out is None:
        if asked:
            raise ConfigError("what a repair may do is said, but not where to", hint="Add --repair OUT.")
        return dataset
    ledger = repairing.repair(dataset, out, settings, progress=TerminalProgress())
    if not is_quiet:
        for table in repair_tables(ledger):
            stdout.print(table)
        stdout.print(ledger.headline(), markup=False, soft_wrap=True)
        stdout.print(f"Every change is listed in {out / 'repairs.md'}. Checking {out}:", markup=False, soft_wrap=True)
    return out


def repair_tables(ledger: Ledger) -> list[Table]:
    """Changes by their kind, what was set aside, and what is wrong still; tables without rows are left out."""
    from rich.table import Table
    from rich.text import Text

    kinds: dict[tuple[str, ...], list[Repair]] = {}
    for item in ledger.repairs:
        same = (item.before, item.after) if item.kind in _FEW_STATES else ()
        kinds.setdefault((item.kind, item.what, *same), []).append(item)
    changes = [
        (str(len(items)), items[0].what, items[0].before, items[0].after, items[0].file) for items in kinds.values()
    ]
    out = []
    for title, header, rows in (
        ("Repaired", ("files", "what", "before", "after", "first file"), changes),
        ("Set aside", ("case", "reason"), [(item.case, item.reason) for item in ledger.set_aside]),
        (
            "Not repaired",
            ("case", "file", "what", "what to do"),
            [(item.case, item.file, item.what, item.hint) for item in ledger.left_wrong],
        ),
    ):
        if rows:
            table = Table(title=title)
            for name in header:
                table.add_column(name, overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            out.append(table)
    return out
