"""Work over the cases of a data set: in a few threads, every failure collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.dataset import Case, Dataset
from autoseg.errors import AutosegError, DatasetError
from autoseg.runtime import NoProgress, Progress, num_cpus

R = TypeVar("R")
SILENT = NoProgress()


def map_cases(
    function: Callable[[Case], R],
    cases: Sequence[Case],
    *,
    description: str,
    progress: Progress = SILENT,
    initializer: Callable[[], None] | None = None,
) -> tuple[R, ...]:
    """Apply a function to every case in a few threads; results in the order of the cases.

    Every failing case is collected, so that one run names them all. Ctrl-C stops after the cases in work.

    Args:
        function: What to do with a case; may run in any of the threads.
        cases: All of them.
        description: Of the task, for people.
        progress: One step a case.
        initializer: Called by each thread first.

    Raises:
        DatasetError: Some cases failed; each is a problem of it.
    """
    progress.start(description, len(cases))
    problems: list[str] = []
    results: dict[str, R] = {}
    pool = ThreadPoolExecutor(max_workers=num_cpus(), initializer=initializer)
    try:
        futures = {pool.submit(function, case): case for case in cases}
        for future in as_completed(futures):
            case = futures[future]
            try:
                results[case.id] = future.result()
            except AutosegError as error:
                problems.append(f"{case.id}: {error.message}")
            except (OSError, MemoryError) as error:
                problems.append(f"{case.id}: {str(error) or type(error).__name__}")
            progress.advance()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if problems:
        raise DatasetError(
            f"{len(problems)} of {len(cases)} cases cannot be used",
            problems=sorted(problems),
            hint="Repair or remove them; `autoseg check` lists everything that is wrong with a data set.",
        )
    progress.finish(f"{len(cases)} cases")
    return tuple(results[case.id] for case in cases)


def annotated_names(cases: Iterable[Case]) -> dict[str, tuple[str, ...]]:
    """The classes that were annotated, of the cases in which not all were, by case id."""
    return {case.id: case.annotated for case in cases if case.annotated is not None}


def labels_of(case: Case) -> Path:
    """The case's label map; DatasetError when it has none."""
    if case.labels is None:
        raise DatasetError(f"case {case.id} has no label map")
    return Path(case.labels)


def encode_labels(dataset: Dataset, case: Case, labels: NDArray[np.integer]) -> NDArray[np.int16]:
    """Value indices of a case's label values; DatasetError names the file with undeclared ones."""
    try:
        return dataset.labels.encode(labels)
    except ValueError as problem:
        raise DatasetError(f"{case.labels}: {problem}") from None
