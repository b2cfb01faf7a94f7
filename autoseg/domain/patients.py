"""Which cases are of one patient, told by their names, where nobody says so.

A patient on both sides of a split makes every score too good, and names often tell: `sub-01_ses-2`,
`patient_007_left`, `knee_12_visit_3`. Wrong guesses cost little (folds that are less even), but they must be rare and
visible: a name counts only when several cases share the part that would be the patient, and when the name follows a
published convention, has a word for a patient, or ends in a word for a session, a side, a time or a scan.
`hippocampus_003`, `case_1` and `img_1_2` say nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_CONVENTIONS = (
    # BIDS specification, "Entities": sub-<label>, letters and digits, then further entities after underscores.
    re.compile(r"^(?P<patient>(?:.*[_-])?sub-[A-Za-z0-9]+)(?:_.*)?$", re.IGNORECASE),
    # BraTS 2023 and later: BraTS-<task>-<patient, 5 digits>-<time point, 3 digits>.
    re.compile(r"^(?P<patient>BraTS-[A-Za-z]+-\d{5})-\d{3}$", re.IGNORECASE),
    # TCGA barcode: project, tissue source site, participant; then sample and so on.
    re.compile(r"^(?P<patient>TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(?:[-_.].*)?$", re.IGNORECASE),
    # PI-CAI: patient (5 digits), study (7 digits).
    re.compile(r"^(?P<patient>\d{5})_\d{7}$"),
)
"""Names that a published convention defines. Source: the specification named at each."""

_PATIENT_WORDS = frozenset({"patient", "pat", "subject", "subj", "participant"})
_JOINED_PATIENT = re.compile(r"^(?:patient|pat|subject|subj|sub|participant)\d+$")

_SIDES = {"left", "right", "l", "r", "lh", "rh", "lt", "rt", "od", "os"}
_TIMES = {"t", "tp", "time", "timepoint", "v", "visit", "ses", "sess", "session", "bl", "baseline", "fu", "followup"}
_TIMES |= {"week", "month", "day", "year", "pre", "post", "preop", "postop"}
_SCANS = {"scan", "run", "acq", "rep", "series", "slice", "frame", "phase", "ed", "es", "view", "cc", "mlo", "study"}
_SCANS |= {"exam", "acquisition"}
_LONE_NUMBERED = {"t", "v"}
"""Letters that mean a time or a visit only with a number: t1, v02."""

_REST_WORDS = frozenset(_SIDES | _TIMES | _SCANS)
_GROUP_WORDS = frozenset(
    {"site", "center", "centre", "hospital", "scanner", "batch", "dataset", "set", "fold", "group", "part", "train"}
    | {"test", "val", "cohort", "class", "run"}
    | _TIMES
)
"""Numbered, these name many patients at once, or a time, so what they begin is no patient."""

_TOKEN = re.compile(r"[^_\-. ]+")
_NUMBERED = re.compile(r"^([a-z]+)(\d+)$")
_YEAR = re.compile(r"^(?:19|20)\d{2}$")


def recognise_patients(case_ids: Iterable[str]) -> dict[str, str]:
    """The patients of those cases whose names tell that several are of one.

    Args:
        case_ids: Of all cases.

    Returns:
        Case id to patient; only cases that share a patient with another one. Empty when the names say nothing, or when
        all cases would be of one patient, since no folds could be made of that.
    """
    ids = sorted(case_ids)
    parts = {case_id: part for case_id in ids if (part := _patient_part(case_id))}
    sizes = Counter(parts.values())
    found = {case_id: part for case_id, part in parts.items() if sizes[part] > 1}
    num_others = len(ids) - len(found)
    return found if len(set(found.values())) + num_others > 1 else {}


def _patient_part(case_id: str) -> str:
    """The beginning of a name that would be the patient; "" when the name says nothing."""
    for convention in _CONVENTIONS:
        match = convention.match(case_id)
        if match is not None:
            return match["patient"]
    tokens = [(match.group().lower(), match.end()) for match in _TOKEN.finditer(case_id)]
    words = [word for word, _ in tokens]
    count = _named_patient(words) or _without_rest(words)
    return case_id[: tokens[count - 1][1]] if count else ""


def _named_patient(words: list[str]) -> int:
    """How many words end with one that calls itself a patient, its number included; 0 when none does."""
    for place, word in enumerate(words):
        if _JOINED_PATIENT.match(word):
            return place + 1
        if word in _PATIENT_WORDS and place + 1 < len(words) and any(map(str.isdigit, words[place + 1])):
            # A year and a number are together the patient's number.
            is_dated = _YEAR.match(words[place + 1]) and "".join(words[place + 2 : place + 3]).isdigit()
            return place + (3 if is_dated else 2)
    return 0


def _without_rest(words: list[str]) -> int:
    """How many words are left without the session, side, time or scan at the end; 0 when that is no patient."""
    count = len(words)
    while step := _rest_length(words[:count]):
        if not _holds_number(words[: count - step]):
            break
        count -= step
    if count == len(words) or not _holds_number(words[:count]):
        return 0
    return 0 if _is_group(words[:count]) else count


def _rest_length(words: list[str]) -> int:
    """How many words at the end are a session, side, time or scan: `left`, `ses2`, `visit 3`; 0 when they are not."""
    if not words:
        return 0
    last = words[-1]
    numbered = _NUMBERED.match(last)
    if (last in _REST_WORDS and last not in _LONE_NUMBERED) or (numbered and numbered[1] in _TIMES | _SCANS):
        return 1
    return 2 if last.isdigit() and len(words) > 1 and words[-2] in (_TIMES | _SCANS) else 0


def _holds_number(words: list[str]) -> bool:
    return any(character.isdigit() for word in words for character in word)


def _is_group(words: list[str]) -> bool:
    """Whether the last number of these words counts sites, batches, years or times."""
    last = words[-1]
    if _YEAR.match(last):
        return True
    numbered = _NUMBERED.match(last)
    name = numbered[1] if numbered else words[-2] if last.isdigit() and len(words) > 1 else ""
    return name in _GROUP_WORDS
