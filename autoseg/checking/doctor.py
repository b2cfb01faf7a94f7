"""Reads every file of a data set once and lists everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from autoseg.checking.contents import CaseFacts, check_case
from autoseg.checking.findings import CheckReport
from autoseg.domain.dataset import Dataset
from autoseg.domain.findings import Finding, Findings
from autoseg.domain.layouts import resolve_dataset
from autoseg.domain.splits import NUM_FOLDS
from autoseg.runtime import Progress

_SEVERITY_ORDER = {"error": 0, "warning": 1, "note": 2}


def check_dataset(path: str | Path, *, workers: int, progress: Progress) -> CheckReport:
    """Check the layout of a data set and the content of every labelled case.

    A broken file becomes a finding and never stops the rest. Cases are read side by side by threads (reading and
    unpacking release the interpreter's lock); at most `workers` cases are in memory at a time. An interruption is
    obeyed as soon as the cases being read are done.

    Args:
        path: A data set, as for `load_dataset`.
        workers: Cases read at a time, at least 1.
        progress: Told of every case.
    """
    dataset, layout = resolve_dataset(path)
    if dataset is None:
        return CheckReport(dataset=str(path), findings=_sorted(layout))
    facts = _read_cases(dataset, workers, progress)
    findings = [*layout, *(item for case in facts for item in case.findings), *_across_cases(dataset, facts)]
    return CheckReport(
        dataset=str(path),
        name=dataset.name,
        num_cases=len(dataset.cases),
        num_files=sum(case.num_files for case in facts),
        findings=_sorted(findings),
    )


def _sorted(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda item: (_SEVERITY_ORDER[item.severity], item.case, item.file, item.code)))


def _read_cases(dataset: Dataset, workers: int, progress: Progress) -> list[CaseFacts]:
    progress.start(f"Checking {dataset.name}", len(dataset.cases))
    facts = []
    pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="check")
    try:
        waiting = [pool.submit(check_case, case, dataset) for case in dataset.cases]
        for future in as_completed(waiting):
            facts.append(future.result())
            progress.advance(note=facts[-1].case)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    progress.finish()
    return facts


def _across_cases(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    """What only the whole set shows: classes that never occur, too few cases for folds."""
    found = Findings()
    present = Counter(value for case in facts for value in case.label_values)
    all_read = bool(facts) and all(case.has_labels for case in facts)
    for item in dataset.labels.classes:
        if all_read and not any(present[value] for value in item.values):
            found.add(
                "class-never-occurs",
                f"the class {item.name!r} (value {', '.join(map(str, item.values))}) is in no label map",
                severity="warning",
                hint="A class without examples is never learnt; take it out of the labels, or check their values.",
            )
    if 0 < len(dataset.cases) < NUM_FOLDS:
        found.add(
            "few-cases",
            f"there are {len(dataset.cases)} cases, fewer than the {NUM_FOLDS} folds of a cross-validation",
            severity="warning",
            hint="Folds will leave out one case at a time; a single case can only be trained with --fold all.",
        )
    return found.items
