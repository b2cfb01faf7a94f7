"""Writes a corrected copy of a data set beside it, with a ledger of every change; the original is never touched.

The copy has nnU-Net's layout. Its `dataset.json` is written last, so a copy that was interrupted is not taken for a
data set; the same command then starts it over.
"""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from autoseg.checking.repair_description import described_content, kept_splits, new_description
from autoseg.checking.repair_rules import (
    CaseDecision,
    Rules,
    consecutive_values,
    decide,
    listed_values,
    mapped_schema,
)
from autoseg.checking.repair_survey import CaseSurvey, survey_case
from autoseg.checking.repair_text import ledger_text
from autoseg.checking.repair_writing import set_aside, write_file
from autoseg.checking.repairs import Ledger, LeftWrong, RepairSettings, SetAside
from autoseg.domain.dataset import Case, Dataset
from autoseg.domain.endings import split_ending
from autoseg.domain.findings import Finding
from autoseg.domain.layouts import DESCRIPTION_FILE, SPLIT_FILES, resolve_dataset
from autoseg.errors import ConfigError, DatasetError
from autoseg.io.files import Lock, read_json, write_json, write_text
from autoseg.runtime import Progress

LEDGER_FILE = "repairs.json"
TEXT_FILE = "repairs.md"
SET_ASIDE_FOLDER = "set_aside"

_MARK_FILE = "repairing.json"
"""There as long as a copy is not whole; says of which data set."""

_LOCK_FILE = ".repair.lock"
_OWN_NAMES = {
    *("imagesTr", "labelsTr", "imagesTs", "labelsTs", SET_ASIDE_FOLDER, _MARK_FILE),
    *(SPLIT_FILES[0], LEDGER_FILE, TEXT_FILE, DESCRIPTION_FILE),
}

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")
R = TypeVar("R")


def repair_dataset(path: Path, out: Path, settings: RepairSettings, *, workers: int, progress: Progress) -> Ledger:
    """Write a corrected copy of a data set.

    Args:
        path: A data set, as for `load_dataset`.
        out: The folder of the copy: absent, empty, or an interrupted copy of the same data set.
        settings: What may be done.
        workers: Cases in memory at a time.
        progress: Told of every case, twice.

    Returns:
        What was done, as it lies in `out`.

    Raises:
        ConfigError: `out` holds something else, lies in the data set, or is being written by another process.
        DatasetError: The data set has no description that can be understood, no case can be kept, or the disk is full.
    """
    dataset, findings = resolve_dataset(path)
    errors = [item for item in findings if item.severity == "error"]
    if dataset is None:
        raise DatasetError(
            f"The data set {path} cannot be repaired, because it is not clear what it is",
            problems=[str(item) for item in errors],
            hint=next((item.hint for item in errors if item.hint), ""),
        )
    description = _description(path)
    _require_apart(description, out, dataset)
    with _disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with Lock(out / _LOCK_FILE, f"the repaired copy {out}"):
            _start_over(out, description)
            ledger = _repair(dataset, description, out, errors, settings, workers, progress)
            (out / _MARK_FILE).unlink()
    return ledger


def _repair(
    dataset: Dataset,
    description: Path,
    out: Path,
    errors: Sequence[Finding],
    settings: RepairSettings,
    workers: int,
    progress: Progress,
) -> Ledger:
    def survey(case: Case) -> CaseSurvey:
        return survey_case(case, len(dataset.channels), settings)

    both = [*dataset.cases, *dataset.test_cases]
    surveys = _each(survey, both, "Reading", workers, progress)
    training, tests = surveys[: len(dataset.cases)], surveys[len(dataset.cases) :]
    rules, left_wrong = _rules(dataset, surveys, settings)
    decisions = [decide(item, rules) for item in training]
    test_decisions = [decide(item, rules, part="Ts") for item in tests]
    kept = [case for case, made in zip(dataset.cases, decisions, strict=True) if not made.reason]
    kept_tests = [case for case, made in zip(dataset.test_cases, test_decisions, strict=True) if not made.reason]
    if not kept:
        reasons = [f"case {made.case}: {made.reason}" for made in decisions] or [str(item) for item in errors]
        raise DatasetError(f"no case of {description} can be kept", problems=reasons)

    def write(made: CaseDecision) -> list[str]:
        return [write_file(file, out) for file in made.files]

    every = [*decisions, *test_decisions]
    counts = Counter(word for words in _each(write, every, "Writing", workers, progress) for word in words)
    aside = [*_left_out(both, every, out), *_left_out_by_layout(errors, dataset, out)]
    ledger = Ledger(
        source=str(description),
        settings=settings,
        num_cases=len(kept),
        num_test_cases=len(kept_tests),
        num_linked=counts["linked"],
        num_copied=counts["copied"],
        num_written=counts["written"],
        label_values=listed_values(dataset.labels, rules.table),
        repairs=tuple(item for made in every for item in made.repairs),
        set_aside=tuple(aside),
        left_wrong=(*left_wrong, *(item for made in every for item in made.left_wrong)),
    )
    _write_descriptions(dataset, description, kept, kept_tests, decisions, rules, ledger, out)
    return ledger


def _rules(dataset: Dataset, surveys: Sequence[CaseSurvey], settings: RepairSettings) -> tuple[Rules, list[LeftWrong]]:
    """What holds for every case; values are mapped in all label maps or in none."""
    table = consecutive_values(dataset.labels)
    if settings.keep_values or all(value == new for value, new in table.items()):
        return Rules(dataset.labels, {}, settings), []
    known = dataset.labels.declared_values
    strange = [item.case.id for item in surveys if item.label is not None and set(item.label.values) - known]
    if not strange:
        return Rules(dataset.labels, table, settings), []
    what = (
        f"label values were not mapped to consecutive ones, because {len(strange)} label maps (first {strange[0]}) "
        "hold values that are not declared, which the new values could be mistaken for"
    )
    hint = "Declare or correct those values, or take the cases out, and repair again; training takes gaps as they are."
    return Rules(dataset.labels, {}, settings), [LeftWrong(case="", file="", what=what, hint=hint)]


def _write_descriptions(
    dataset: Dataset,
    description: Path,
    kept: Sequence[Case],
    tests: Sequence[Case],
    decisions: Sequence[CaseDecision],
    rules: Rules,
    ledger: Ledger,
    out: Path,
) -> None:
    """Folds, ledger and, last of all, the description that makes a data set of the folder."""
    labels = [file.target for made in decisions for file in made.files if file.target.startswith("labelsTr/")]
    schema = mapped_schema(dataset.labels, rules.table)
    ending = split_ending(labels[0])[1]
    content = new_description(described_content(description), dataset, kept, tests, schema, ending)
    if dataset.splits is not None:
        splits = kept_splits(dataset.splits, {case.id for case in kept})
        if splits is not None:
            write_text(out / SPLIT_FILES[0], splits.to_json())
        else:
            what = "the folds that came with the data set were left out: without the cases set aside a fold is empty"
            wrong = LeftWrong(case="", file="", what=what, hint="Folds will be made anew.")
            ledger = ledger.model_copy(update={"left_wrong": (*ledger.left_wrong, wrong)})
    write_text(out / LEDGER_FILE, ledger.to_json())
    write_text(out / TEXT_FILE, ledger_text(ledger))
    write_json(out / DESCRIPTION_FILE, content)


def _left_out(cases: Sequence[Case], decisions: Sequence[CaseDecision], out: Path) -> Iterator[SetAside]:
    for case, made in zip(cases, decisions, strict=True):
        if made.reason:
            files = set_aside(case.id, case.files, out, SET_ASIDE_FOLDER)
            yield SetAside(case=case.id, files=files, reason=made.reason)


def _left_out_by_layout(errors: Sequence[Finding], dataset: Dataset, out: Path) -> Iterator[SetAside]:
    """What never became a case: images without labels, missing channels, folds that do not fit."""
    known = {case.id for case in dataset.cases}
    for item in errors:
        is_name = item.case not in ("", ".", "..") and not set(item.case) & set("/\\\0")
        folder = item.case if is_name and item.case not in known else f"{item.case if is_name else ''}_"
        files = set_aside(folder, [item.file], out, SET_ASIDE_FOLDER) if item.file else ()
        yield SetAside(case=item.case, files=files, reason=item.message)


def _each(function: Callable[[T], R], items: Sequence[T], what: str, workers: int, progress: Progress) -> list[R]:
    """Results in the order of the items; after a failure nothing new is begun."""
    progress.start(what, len(items))
    out = []
    pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="repair")
    try:
        for result in pool.map(function, items):
            out.append(result)
            progress.advance()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    progress.finish()
    return out


# --- The folder of the copy -----------------------------------------------------------------------------------------


def _description(path: Path) -> Path:
    return (path / DESCRIPTION_FILE if path.is_dir() else path).resolve()


def _require_apart(description: Path, out: Path, dataset: Dataset) -> None:
    """Refuse a copy inside its original, or around it.

    Raises:
        ConfigError: It is one of these.
    """
    target = out.resolve()
    files = [Path(file).resolve() for case in (*dataset.cases, *dataset.test_cases) for file in case.files]
    is_manifest = description.suffix.lower() == ".csv" or "cases" in described_content(description)
    # Beside a manifest there may lie anything; the folder of the other layouts is the data set.
    is_inside = not is_manifest and description.parent in (target, *target.parents)
    if is_inside or any(target in file.parents for file in (description, *files)):
        raise ConfigError(
            f"the repaired copy {out} must lie outside the data set {description.parent}",
            hint="Name a folder beside it.",
        )


def _start_over(out: Path, description: Path) -> None:
    """Empty the folder of an interrupted copy of this data set, and mark it as unfinished.

    Raises:
        ConfigError: The folder holds anything else.
    """
    names = {item.name for item in out.iterdir()} - {_LOCK_FILE}
    mark = out / _MARK_FILE
    if names:
        is_interrupted = mark.is_file() and read_json(mark) == {"source": str(description)}
        strangers = sorted(name for name in names - _OWN_NAMES if not name.startswith(".tmp-"))
        if not is_interrupted or strangers:
            held = ", ".join((strangers if is_interrupted else sorted(names))[:5])
            raise ConfigError(
                f"{out} is not empty (it holds {held}), and repairs go into a folder of their own",
                hint="Name a new folder, or delete this one.",
            )
    for name in sorted(names - {_MARK_FILE}):
        item = out / name
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()
    write_json(mark, {"source": str(description)})


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into an error with a way out.

    Raises:
        DatasetError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno not in _FULL_DISK:
            raise DatasetError(f"{out} cannot be written: {problem}") from None
        where = next((folder for folder in (out, *out.resolve().parents) if folder.exists()), Path("/"))
        free = shutil.disk_usage(where).free / 1e6
        raise DatasetError(
            f"the disk of {out} is full ({free:,.0f} MB free), so the repaired copy is not whole",
            hint="Make room, or name a folder on the data set's own disk, where unchanged files take no room; then "
            "give the same command again.",
        ) from None
