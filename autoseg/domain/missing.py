"""Channels that cases lack, as descriptions of data sets declare it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.domain.dataset import Case, Channel
from autoseg.domain.descriptions import DescriptionProblem
from autoseg.domain.endings import PICTURE_ENDINGS, split_ending
from autoseg.domain.findings import Findings

KEY = "missing_channels"
"""In a `dataset.json`: {"missing_channels": {CASE: [NUMBER, ...]}}; in a manifest null, or an empty cell."""


def parse_missing(data: Mapping[str, Any], num_channels: int) -> dict[str, tuple[int, ...]]:
    """The numbers of the channels that cases lack, of the cases that a `dataset.json` lists.

    Raises:
        DescriptionProblem: The key is there but is no object of lists of channel numbers, or a case would have none.
    """
    declared = data.get(KEY, {})
    is_sound = isinstance(declared, dict) and all(
        isinstance(numbers, list)
        and all(type(number) is int and 0 <= number < num_channels for number in numbers)
        and len(set(numbers)) < num_channels
        for numbers in declared.values()
    )
    if not is_sound:
        raise DescriptionProblem(
            [
                f"{KEY!r} must list the channels that a case lacks, by their numbers from 0 to {num_channels - 1} and "
                f'never all of them: {{"case_1": [1]}}, got {declared!r}'
            ]
        )
    return {case_id: tuple(sorted(set(numbers))) for case_id, numbers in declared.items()}


def with_missing(
    cases: Sequence[Case], declared: Mapping[str, tuple[int, ...]], known_ids: Collection[str], found: Findings
) -> list[Case]:
    """The cases with the channels that they lack; declared cases that are not there are found.

    Args:
        cases: Some may have theirs already.
        declared: Channel numbers by case id.
        known_ids: Ids of all cases.
        found: Gets the problems.
    """
    for case_id in sorted(set(declared) - set(known_ids)):
        found.add("unknown-case", f"{KEY!r} lists channels of a case that is not there", case=case_id)
    return [case.model_copy(update={"missing": declared.get(case.id, case.missing)}) for case in cases]


def present_files(entries: Sequence[str | None]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The files of a case and the numbers of the channels that it lacks, from one entry a channel."""
    files = tuple(entry for entry in entries if entry)
    return files, tuple(number for number, entry in enumerate(entries) if not entry)


def with_optional(
    channels: Sequence[Channel], missing: Collection[tuple[int, ...]], num_cases: int, found: Findings
) -> tuple[Channel, ...]:
    """The channels, those that some case lacks marked as such; how many lack each is noted.

    Args:
        channels: Of the data set.
        missing: Numbers of the channels that cases lack, for each case that lacks any; their files need not be there.
        num_cases: All of them.
        found: Gets the notes.
    """
    out = []
    for number, channel in enumerate(channels):
        count = sum(number in numbers for numbers in missing)
        if count:
            found.add(
                "missing-channel",
                f"{count} of {num_cases} cases lack the channel {number} ({channel.name}), as declared",
                severity="note",
            )
        out.append(channel.model_copy(update={"may_be_missing": channel.may_be_missing or count > 0}))
    return tuple(out)


def files_by_channel(
    case_id: str,
    numbers: dict[int, Path],
    num_channels: int,
    lacking: tuple[int, ...],
    found: Findings,
    *,
    may_hold_all: bool,
) -> tuple[str, ...]:
    """The files of channels 0 ... num_channels - 1 (further ones are left out), or the one file that holds all.

    Args:
        case_id: For messages.
        numbers: Files by channel number.
        num_channels: Of the data set.
        lacking: Channels that are declared as missing.
        found: Gets the problems; then nothing is returned.
        may_hold_all: Whether a file that is alone holds every channel; a picture always may.
    """
    is_picture = set(numbers) == {0} and split_ending(numbers[0])[1].lower() in PICTURE_ENDINGS
    if set(numbers) == {0} and not lacking and (may_hold_all or is_picture):
        return (str(numbers[0]),)
    for number in sorted(set(lacking) & set(numbers)):
        found.add("channel-not-missing", "the channel is declared as missing", case=case_id, file=numbers[number])
    expected = [number for number in range(num_channels) if number not in lacking]
    missing = [number for number in expected if number not in numbers]
    if missing:
        names = ", ".join(f"_{number:04d}" for number in missing)
        found.add("missing-channel", f"channel {names} is missing; {num_channels} channels are named", case=case_id)
        return ()
    return tuple(str(numbers[number]) for number in expected)
