"""Two folders of label maps compared by file name: what `autoseg evaluate PREDICTIONS REFERENCE` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autoseg.domain.beside import without_side_images
from autoseg.domain.dataset import Dataset, LabelClass, LabelSchema
from autoseg.domain.endings import is_image_name, list_images, split_ending
from autoseg.domain.layouts import load_dataset
from autoseg.domain.patients import recognise_patients
from autoseg.domain.splits import patients_of
from autoseg.errors import DatasetError
from autoseg.evaluation.crossval import Evaluation, default_tolerance_mm, evaluate_cases
from autoseg.io.images import read_header, read_labels
from autoseg.runtime import NoProgress, Progress

DATASET_FILE = "dataset.json"

_MANIFEST_ENDINGS = (".json", ".csv")
_MAX_NAMES_SHOWN = 5
# A data set's file lies in the folder of its label maps, or in the one above (imagesTr/labelsTr layouts).
_LEVELS_SEARCHED = 2


@dataclass(frozen=True, slots=True)
class References:
    """Reference label maps and, where there is a data set around them, its labels.

    Attributes:
        files: By case id.
        schema: None when no data set says what the values mean.
        annotated: Names of the classes that were annotated, of the cases in which not all were.
        patients: By case id, as a data set or the names of the files tell.
    """

    files: Mapping[str, Path]
    schema: LabelSchema | None
    annotated: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    patients: Mapping[str, str] = field(default_factory=dict)


def evaluate_folder(
    predictions: Path,
    reference: Path,
    *,
    schema: LabelSchema | None = None,
    tolerance_mm: float | Mapping[str, float] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the label maps of a folder with references of the same name, whatever their endings.

    Args:
        predictions: A folder of label maps; every one needs a reference. Or one file.
        reference: A folder of label maps; or a data set (folder or manifest), whose label maps are then meant. Or, with
            one predicted file, one file.
        schema: The classes; by default those of the data set in, or directly above, `reference`, and without one the
            values found in the references ("label 1", "label 2", ...).
        tolerance_mm: Of the surface Dice; by default from the spacings of the references, see `default_tolerance_mm`.
        workers: Threads.
        progress: Told after each case.

    Raises:
        DatasetError: Nothing to compare, predictions without a reference, or files that cannot be compared, all listed.
    """
    progress = progress or NoProgress()
    found = find_references(reference)
    predicted = _by_stem(_label_maps(predictions))
    if predictions.is_file() and len(found.files) == 1:
        # Two files are meant for each other whatever they are called.
        (stem,), (case_id,) = predicted, found.files
        files: Mapping[str, Path] = {stem: found.files[case_id]}
        annotated: Mapping[str, tuple[str, ...]] = (
            {stem: found.annotated[case_id]} if case_id in found.annotated else {}
        )
    else:
        files, annotated = found.files, found.annotated
    unknown = sorted(set(predicted) - set(files))
    if unknown:
        raise DatasetError(
            f"{len(unknown)} of {len(predicted)} predictions have no reference of the same name in {reference}",
            problems=_shortened(unknown),
            hint="Predictions and references are paired by file name without the ending.",
        )
    used = {stem: files[stem] for stem in predicted}
    schema = schema or found.schema or schema_of_values(used.values(), progress)
    if tolerance_mm is None:
        grids = [read_header(path).geometry for path in used.values()]
        tolerance_mm = default_tolerance_mm([grid.spacing_mm for grid in grids], [grid.shape for grid in grids])
    pairs = [(stem, predicted[stem], used[stem]) for stem in predicted]
    evaluation = evaluate_cases(pairs, schema, tolerance_mm, workers, progress, annotated, found.patients)
    return evaluation.model_copy(update={"not_predicted": tuple(sorted(set(files) - set(predicted)))})


def find_references(reference: Path) -> References:
    """The reference label maps that a path means, and the labels of the data set around them.

    Raises:
        DatasetError: There are none, or the data set's description is not valid.
    """
    if reference.is_file() and reference.suffix.lower() in _MANIFEST_ENDINGS:
        return _of_dataset(load_dataset(reference))
    if reference.is_dir() and not list_images(reference):
        return _of_dataset(load_dataset(reference))
    files = _by_stem(_label_maps(reference))
    folder = reference if reference.is_dir() else reference.parent
    for candidate in (folder, *folder.resolve().parents[: _LEVELS_SEARCHED - 1]):
        if (candidate / DATASET_FILE).is_file():
            dataset = load_dataset(candidate / DATASET_FILE, need_files=False)
            return References(files, dataset.labels, _annotated(dataset), patients_of(dataset.cases))
    return References(files, None, patients=recognise_patients(files))


def _of_dataset(dataset: Dataset) -> References:
    labelled = [case for case in (*dataset.cases, *dataset.test_cases) if case.labels is not None]
    files = {case.id: Path(case.labels) for case in labelled if case.labels is not None}
    return References(files, dataset.labels, _annotated(dataset), patients_of(labelled))


def _annotated(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {case.id: case.annotated for case in dataset.cases if case.annotated is not None}


def _label_maps(path: Path) -> tuple[Path, ...]:
    """The image files in a folder, without what `predict` writes beside them; or the file itself.

    Raises:
        DatasetError: There are none.
    """
    if path.is_file() and is_image_name(path):
        return (path,)
    files = without_side_images(list_images(path))
    if not files:
        what = "holds no label maps" if path.is_dir() else "is neither a label map nor a folder of label maps"
        raise DatasetError(f"{path} {what}" if path.exists() else f"{path} does not exist")
    return files


def _by_stem(files: Sequence[Path]) -> dict[str, Path]:
    """Files by name without ending.

    Raises:
        DatasetError: Two files differ only in their ending.
    """
    stems: dict[str, Path] = {}
    problems = []
    for path in files:
        stem = split_ending(path)[0]
        if stem in stems:
            problems.append(f"{stems[stem].name} and {path.name}")
        stems[stem] = path
    if problems:
        raise DatasetError(f"names in {files[0].parent} differ only in their ending", problems=_shortened(problems))
    return stems


def schema_of_values(files: Iterable[Path], progress: Progress) -> LabelSchema:
    """Classes named after the label values that occur in the files.

    Raises:
        DatasetError: There is nothing but background.
    """
    paths = list(files)
    progress.start("looking for label values", len(paths))
    values: set[int] = set()
    for path in paths:
        values.update(int(value) for value in np.unique(read_labels(path, None)[0]))
        progress.advance()
    progress.finish()
    foreground = sorted(value for value in values if value > 0)
    if not foreground:
        raise DatasetError(
            f"the {len(paths)} references hold no label value above 0",
            hint=f"Put the data set's {DATASET_FILE}, which names the classes, beside or above them.",
        )
    return LabelSchema(classes=tuple(LabelClass(name=f"label {value}", values=(value,)) for value in foreground))


def _shortened(names: Sequence[str]) -> list[str]:
    more = len(names) - _MAX_NAMES_SHOWN
    return [*names[:_MAX_NAMES_SHOWN], *([f"and {more} more"] if more > 0 else [])]
