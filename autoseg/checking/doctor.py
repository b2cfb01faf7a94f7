"""Reads every file of a data set once and lists everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from autoseg.checking.catalogue import SEVERITIES, Costs
from autoseg.checking.classes import check_classes, class_presence, summarise_classes
from autoseg.checking.contents import case_bytes, check_case
from autoseg.checking.facts import CaseFacts, Picture
from autoseg.checking.findings import CaseSummary, CheckReport
from autoseg.checking.outliers import find_outliers
from autoseg.checking.plausibility import find_implausible
from autoseg.checking.sides import check_sides
from autoseg.checking.twins import find_twins
from autoseg.checking.wording import listed, num
from autoseg.config import DEFAULT_PRESET, DEFAULT_SEED
from autoseg.domain.dataset import Case, Dataset, LabelSchema, Splits
from autoseg.domain.findings import Finding, Findings
from autoseg.domain.fingerprint import Fingerprint
from autoseg.domain.layouts import resolve_dataset
from autoseg.domain.splits import NUM_FOLDS, both_sides, dataset_splits, patients_of
from autoseg.errors import DatasetError
from autoseg.machine import MemoryGate, host_memory_bytes
from autoseg.planning.presets import preset_rules
from autoseg.planning.spacing import choose_spacing
from autoseg.runtime import Progress

_MEMORY_FRACTION = 0.5
"""Of the free memory the cases being read may take: the estimate is rough, and others need some too."""


@dataclass(frozen=True, slots=True)
class Examination:
    """A check with its pictures.

    Attributes:
        report: What was found.
        pictures: By case id; empty where none were asked for.
        labels: The classes, whose outlines are in the pictures; None where the description could not be read.
    """

    report: CheckReport
    pictures: Mapping[str, tuple[Picture, ...]] = field(default_factory=dict)
    labels: LabelSchema | None = None


def check_dataset(path: str | Path, *, workers: int, progress: Progress) -> CheckReport:
    """Check a data set; see `examine_dataset`."""
    return examine_dataset(path, workers=workers, progress=progress).report


def examine_dataset(path: str | Path, *, workers: int, progress: Progress, with_pictures: bool = False) -> Examination:
    """Check the layout of a data set, the content of every case, and what cases show side by side.

    A broken file becomes a finding and never stops the rest. Cases are read side by side by threads (reading and
    unpacking release the interpreter's lock), as many at a time as there are workers and memory for. Test cases are
    read too; nothing that is wrong with them stops training. An interruption is obeyed as soon as the cases being read
    are done.

    Args:
        path: A data set, as for `load_dataset`.
        workers: Cases read at a time, at least 1.
        progress: Told of every case.
        with_pictures: Whether slices of every case are drawn.
    """
    dataset, layout = resolve_dataset(path)
    if dataset is None:
        costs = Costs((), 0)
        findings = costs.told(_sorted(layout))
        return Examination(CheckReport(dataset=str(path), findings=findings, kinds=costs.kinds(findings)))
    facts = _read_cases(dataset, workers, progress, with_pictures=with_pictures)
    learnt = [item for item in facts if not item.is_test]
    spacing = _planned_spacing_mm(learnt)
    classes = summarise_classes(learnt, dataset, spacing)
    across = Findings()
    _check_set(dataset, across)
    splits = _splits(dataset, learnt)
    find_twins(facts, dataset.channels, splits, across)
    find_outliers(learnt, dataset.channels, across)
    find_implausible(learnt, dataset.channels, across)
    check_classes(learnt, dataset, classes, splits, across)
    check_sides(learnt, dataset.labels, across)
    everything = [*layout, *(item for case in facts for item in _of_case(case)), *across.items]
    costs = Costs(learnt, len({case.id for case in dataset.cases} | {item.case for item in layout if item.case}))
    findings = costs.told(_sorted(everything))
    report = CheckReport(
        dataset=str(path),
        name=dataset.name,
        num_cases=len(dataset.cases),
        num_files=sum(case.num_files for case in facts),
        findings=findings,
        kinds=costs.kinds(findings),
        classes=classes,
        cases=tuple(_summary(case) for case in facts),
    )
    return Examination(report, {item.case: item.pictures for item in facts}, dataset.labels)


def _sorted(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda item: (SEVERITIES.index(item.severity), item.case, item.file, item.code)))


def _of_case(facts: CaseFacts) -> Sequence[Finding]:
    """The findings of a case; those of a test case stop nothing."""
    if not facts.is_test:
        return facts.findings
    return [
        item.model_copy(update={"severity": "warning"}) if item.severity == "error" else item for item in facts.findings
    ]


def _read_cases(dataset: Dataset, workers: int, progress: Progress, *, with_pictures: bool) -> list[CaseFacts]:
    known = {case.id for case in dataset.cases}
    tests = [case for case in dataset.test_cases if case.id not in known]
    progress.start(f"Checking {dataset.name}", len(dataset.cases) + len(tests))
    memory = host_memory_bytes()
    gate = MemoryGate(None if memory is None else int(memory[0] * _MEMORY_FRACTION))

    def read(case: Case, *, is_test: bool) -> CaseFacts:
        with gate.room(case_bytes(case)):
            return check_case(case, dataset, is_test=is_test, with_pictures=with_pictures)

    facts = {}
    pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="check")
    try:
        waiting = [pool.submit(read, case, is_test=False) for case in dataset.cases]
        waiting += [pool.submit(read, case, is_test=True) for case in tests]
        for future in as_completed(waiting):
            one = future.result()
            facts[one.case] = one
            progress.advance(note=one.case)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    progress.finish()
    return [facts[case.id] for case in (*dataset.cases, *tests)]


def _planned_spacing_mm(facts: Sequence[CaseFacts]) -> tuple[float, ...] | None:
    """The voxel size that the default preset would resample to, from left to right, back to front, feet to head."""
    solid = [item for item in facts if item.geometry is not None and not item.geometry.is_2d]
    if not solid:
        return None
    measured = Fingerprint(
        channels=(),
        num_classes=1,
        num_training_cases=len(solid),
        spacings_mm=tuple((z, y, x) for x, y, z in (item.spacing_mm for item in solid)),
        shapes=tuple((z, y, x) for x, y, z in (item.shape for item in solid)),
        median_relative_size_fraction=1.0,
        intensities=(),
    )
    return choose_spacing(measured, preset_rules(DEFAULT_PRESET)).target[::-1]


def _splits(dataset: Dataset, facts: Sequence[CaseFacts]) -> Splits | None:
    """The folds that planning would make; None where it could not."""
    try:
        return dataset_splits(dataset, class_presence(facts, dataset), DEFAULT_SEED)
    except DatasetError:
        return None


def _check_set(dataset: Dataset, found: Findings) -> None:
    """Too few cases for folds; patients with several."""
    if 0 < len(dataset.cases) < NUM_FOLDS:
        found.add(
            "few-cases",
            f"there are {len(dataset.cases)} cases, fewer than the {NUM_FOLDS} folds of a cross-validation",
            severity="warning",
            hint="Folds will leave out one case at a time; a single case can only be trained with --fold all.",
            cost=f"a score from {num(len(dataset.cases), 'case')} says little about others",
        )
    _check_patients(dataset, found)


def _check_patients(dataset: Dataset, found: Findings) -> None:
    """Patients with several cases, and whether folds that came with the data set keep them together."""
    patients = patients_of(dataset.cases)
    counts = Counter(patients.values())
    several = [case for case, patient in patients.items() if counts[patient] > 1]
    if not several:
        return
    first = patients[several[0]]
    how = "" if any(case.patient for case in dataset.cases) else ", recognised by their names"
    found.add(
        "several-cases-a-patient",
        f"{num(sum(count > 1 for count in counts.values()), 'patient')} of {len(counts)} with several cases{how}, such "
        f"as {first} ({listed([case for case in several if patients[case] == first])})",
        severity="note",
        cases=several,
        hint="Folds keep the cases of a patient together."
        + (" To take every case for a patient: plan with --set splits.patients=given." if how else ""),
        cost=f"scores are over {num(len(counts) + len(dataset.cases) - len(patients), 'patient')}, not over "
        f"{len(dataset.cases)} cases",
    )
    leaks = [both_sides(fold, patients) for fold in dataset.splits.folds] if dataset.splits is not None else []
    if any(leaks):
        found.add(
            "patient-on-both-sides",
            f"{sum(map(bool, leaks))} of {len(leaks)} folds that came with the data set have cases of one patient on "
            f"both sides, such as {next(leak[0] for leak in leaks if leak)}",
            severity="warning",
            hint="Correct the folds, or take their file away to have folds made.",
            cost=f"scores of {sum(map(bool, leaks))} of {len(leaks)} folds are too good",
        )


def _summary(facts: CaseFacts) -> CaseSummary:
    is_flat = facts.geometry is not None and facts.geometry.is_2d
    return CaseSummary(
        id=facts.case,
        is_test=facts.is_test,
        shape=facts.shape,
        spacing_mm=() if is_flat else facts.spacing_mm,
        intensities=tuple((float(item.quantiles[0]), float(item.quantiles[-1])) for item in facts.channels),
        class_voxels={}
        if facts.labels is None
        else {name: item.voxels for name, item in facts.labels.structures.items()},
    )
