"""Which file is which channel or label map of which case, where the files of a set may end in different ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from autoseg.domain.endings import list_images, split_ending
from autoseg.domain.findings import Findings

_CHANNEL_NUMBER = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
"""nnU-Net's file names: case id, underscore, four digits. Source: nnU-Net's documentation, "dataset format"."""

_HINT = "Take all but one of them away."


def label_maps(folder: Path, ending: str, found: Findings) -> dict[str, Path]:
    """The label map of each case, by its name without ending.

    Args:
        folder: Where they lie.
        ending: As the data set's description declares it, or "".
        found: Gets what is wrong.
    """
    claims: dict[str, list[Path]] = {}
    for item in list_images(folder):
        claims.setdefault(split_ending(item)[0], []).append(item)
    return {case: _one_of(files, ending, case, "the label map", found) for case, files in claims.items()}


def channel_files(files: Sequence[Path], ending: str, found: Findings) -> dict[str, dict[int, Path]]:
    """The files of each case by channel number; where no file has a number each is channel 0 of a case of its own.

    Args:
        files: Image files, sorted.
        ending: As the data set's description declares it, or "".
        found: Gets what is wrong.
    """
    matches = [(item, _CHANNEL_NUMBER.match(split_ending(item)[0])) for item in files]
    numbered = any(match is not None for _, match in matches)
    claims: dict[tuple[str, int], list[Path]] = {}
    for item, match in matches:
        if match is not None:
            claims.setdefault((match["case"], int(match["channel"])), []).append(item)
        elif not numbered:
            claims.setdefault((split_ending(item)[0], 0), []).append(item)
        else:
            found.add(
                "no-channel-number",
                "the file is left out: its name has no channel number such as _0000",
                file=item,
                severity="warning",
            )
    cases: dict[str, dict[int, Path]] = {}
    for (case, number), claimants in sorted(claims.items()):
        cases.setdefault(case, {})[number] = _one_of(claimants, ending, case, f"channel {number}", found)
    return cases


def with_another_ending(path: Path) -> Path:
    """The file, or where it is absent the only image of that name with another ending; else `path` itself."""
    if path.exists():
        return path
    others = [item for item in list_images(path.parent) if split_ending(item)[0] == split_ending(path)[0]]
    return others[0] if len(others) == 1 else path


def _one_of(files: Iterable[Path], ending: str, case: str, what: str, found: Findings) -> Path:
    """The file of the declared ending; if none or several have it, nobody can tell, and that is an error."""
    claimants = list(files)
    if len(claimants) == 1:
        return claimants[0]
    names = " and ".join(item.name for item in claimants)
    declared = [item for item in claimants if split_ending(item)[1].lower() == ending.lower()]
    if len(declared) == 1:
        message = f"{names} both claim to be {what}; {declared[0].name} is taken, which has the declared ending"
        found.add("double-file", message, case=case, file=declared[0], hint=_HINT, severity="warning")
        return declared[0]
    found.add("double-file", f"{names} claim to be {what}", case=case, file=claimants[0], hint=_HINT)
    return claimants[0]
