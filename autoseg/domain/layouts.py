"""From what lies on disk to a `Dataset`: the MSD layout, the nnU-Net raw layout, BIDS derivatives, and manifests.

Which layout it is follows from the description itself: a `training` list is MSD, a `cases` list is a manifest, a
`dataset_description.json` or a `bids` entry is BIDS (see `bids.py`), anything else with labels and channels is nnU-Net
raw. Keys that are not known in somebody else's `dataset.json` are ignored;
in a manifest, which is autoseg's own format, they are errors. `manifests.py` reads the manifests.

Nothing here opens an image. All problems are collected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoseg.domain.bids import BIDS_DESCRIPTION, Selection, parse_selection, read_bids
from autoseg.domain.claims import channel_files, label_maps, with_another_ending
from autoseg.domain.dataset import Case, Channel, Dataset, LabelSchema, Splits
from autoseg.domain.descriptions import DescriptionProblem, parse_channels, parse_labels
from autoseg.domain.endings import is_image_name, list_images, split_ending, written_ending
from autoseg.domain.findings import Finding, Findings
from autoseg.domain.grouping import with_groups
from autoseg.domain.manifests import ManifestCase, read_csv_manifest, read_json_manifest
from autoseg.domain.missing import files_by_channel, parse_missing, present_files, with_missing, with_optional
from autoseg.domain.partial import parse_annotated, with_annotated
from autoseg.domain.splits import parse_splits, splits_problems
from autoseg.errors import DatasetError

DESCRIPTION_FILE = "dataset.json"
SPLIT_FILES = ("splits.json", "splits_final.json")
"""Folds that come with a data set: ours first, then nnU-Net's."""

_LAYOUT_HINT = (
    f"A data set is a folder with a {DESCRIPTION_FILE} in the layout of the Medical Segmentation Decathlon or of "
    f"nnU-Net, a BIDS derivative (with a {BIDS_DESCRIPTION}), or a .json or .csv manifest."
)


def load_dataset(path: str | Path, *, need_files: bool = True) -> Dataset:
    """Resolve a data set: its channels, labels, and the files of every case.

    Args:
        path: A folder with a `dataset.json`; such a file itself, under any name; a BIDS derivative, or a selection of
            one; or a .json or .csv manifest.
        need_files: Whether images and labels must be there. Without (for planning from a fingerprint), cases that are
            not whole are left out silently, and no cases at all are allowed.

    Raises:
        DatasetError: Anything stops training; every problem is in `problems`.
    """
    dataset, findings = resolve_dataset(path, need_files=need_files)
    errors = [item for item in findings if item.severity == "error"]
    if dataset is not None and not errors:
        return dataset
    count = f"{len(errors)} problem{'s' if len(errors) != 1 else ''}"
    raise DatasetError(
        f"The data set {path} cannot be used as it is: {count}",
        hint=next((item.hint for item in errors if item.hint), ""),
        problems=[str(item) for item in errors],
    )


def resolve_dataset(path: str | Path, *, need_files: bool = True) -> tuple[Dataset | None, tuple[Finding, ...]]:
    """Resolve a data set as far as it goes, with everything that is wrong with its layout.

    Args:
        path: As for `load_dataset`.
        need_files: As for `load_dataset`.

    Returns:
        The data set with those cases that are whole (None when not even labels and channels are known), and the
        findings.
    """
    found = Findings()
    source = _description_file(Path(path).absolute(), found)
    if source is None:
        return None, tuple(found.items)
    try:
        dataset = _resolve(source, found, need_files=need_files)
    except DescriptionProblem as problem:
        for message in problem.messages:
            found.add("bad-description", message, file=source, hint=problem.hint)
        return None, tuple(found.items)
    if not need_files:
        return dataset, tuple(item for item in found.items if item.code in ("bad-description", "bad-splits"))
    return dataset, tuple(found.items)


def _description_file(path: Path, found: Findings) -> Path | None:
    source = path
    if path.is_dir():
        names = [name for name in (DESCRIPTION_FILE, BIDS_DESCRIPTION) if (path / name).is_file()]
        source = path / (names[0] if names else DESCRIPTION_FILE)
    if source.is_file() and source.suffix.lower() in (".json", ".csv"):
        return source
    if not path.exists():
        found.add("no-dataset", f"{path} does not exist")
    elif path.is_dir():
        others = sorted(item.name for item in path.iterdir() if item.suffix.lower() in (".json", ".csv"))
        also = f" (it has {', '.join(others[:5])}; name one of these to use it)" if others else ""
        found.add("no-description", f"{path} has no {DESCRIPTION_FILE}{also}", hint=_LAYOUT_HINT)
    else:
        found.add("no-dataset", f"{path} is neither a folder nor a .json or .csv file", hint=_LAYOUT_HINT)
    return None


def _resolve(source: Path, found: Findings, *, need_files: bool) -> Dataset | None:
    folder = source.parent
    if source.suffix.lower() == ".csv":
        manifest = read_csv_manifest(source)
    else:
        data = _read_object(source)
        if "schema_version" in data and isinstance(data.get("labels"), dict) and "classes" in data["labels"]:
            return _own_dataset(source, data)
        if source.name == BIDS_DESCRIPTION or "bids" in data:
            return _bids(source, data, found)
        if "cases" not in data:
            return _described(source, data, found, need_files=need_files)
        manifest = read_json_manifest(source, data)
    cases = [_manifest_case(folder, item, found) for item in manifest.cases]
    channels = with_optional(manifest.channels, [case.missing for case in cases], len(cases), found)
    whole = _whole_cases(cases, len(channels), found)
    declared = {item.id: item.annotated for item in manifest.cases if item.annotated is not None}
    whole = with_annotated(whole, declared, manifest.labels, {case.id for case in cases}, found)
    labelled = [case for case in whole if case.labels is not None]
    tests = [case for case in whole if case.labels is None]
    return _build(source, manifest.name, channels, manifest.labels, labelled, tests, found)


def _bids(source: Path, data: dict[str, Any], found: Findings) -> Dataset:
    chosen = Selection(bids=".") if source.name == BIDS_DESCRIPTION else parse_selection(data)
    images = None if chosen.images is None else str(_normal(source.parent / chosen.images))
    content = read_bids(_normal(source.parent / chosen.bids), chosen.model_copy(update={"images": images}), found)
    whole = _whole_cases(content.cases, len(content.channels), found)
    return _build(source, content.name, content.channels, content.labels, whole, content.tests, found)


def _own_dataset(source: Path, data: dict[str, Any]) -> Dataset:
    """A data set that autoseg resolved before (a run's `dataset.json`)."""
    return Dataset.from_json(json.dumps(data), source, DatasetError)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise DescriptionProblem([f"it is not readable JSON: {problem}"]) from None
    if not isinstance(data, dict):
        raise DescriptionProblem([f"it must be a JSON object, got a {type(data).__name__}"], hint=_LAYOUT_HINT)
    return data


# --- MSD and nnU-Net raw --------------------------------------------------------------------------------------------


def _described(source: Path, data: dict[str, Any], found: Findings, *, need_files: bool) -> Dataset | None:
    channels, labels, annotated = parse_channels(data), parse_labels(data), parse_annotated(data)
    lacking = parse_missing(data, len(channels))
    name = data["name"] if isinstance(data.get("name"), str) and data["name"] else source.parent.name
    folder = source.parent
    if isinstance(data.get("training"), list):
        cases = _msd_cases(folder, data["training"], found)
        tests = _msd_test_cases(folder, data.get("test"))
    elif isinstance(data.get("dataset"), dict):
        cases = [_listed_case(folder, case_id, item, found) for case_id, item in data["dataset"].items()]
        tests = []
    else:
        ending = data.get("file_ending")
        declared = ending if isinstance(ending, str) else ""
        cases = _raw_cases(folder / "imagesTr", folder / "labelsTr", declared, len(channels), lacking, found)
        silent = Findings()  # test images need no labels, and nothing of theirs stops training
        tests = _raw_cases(folder / "imagesTs", folder / "labelsTs", declared, len(channels), lacking, silent)
    known = {case.id for case in (*cases, *tests)}
    cases = with_missing(cases, lacking, known, found)
    channels = with_optional(channels, lacking.values(), len(cases) + len(tests), found)
    whole = with_groups(_whole_cases(cases, len(channels), found), data, known, found)
    whole = with_annotated(whole, annotated, labels, known, found)
    labelled = [case for case in whole if case.labels is not None]
    _compare_count(source, data, len(labelled), found)
    if not labelled and need_files and not any(item.severity == "error" for item in found.items):
        found.add("no-cases", "the data set has no labelled cases", file=source, hint=_LAYOUT_HINT)
    built = _build(source, name, channels, labels, labelled, [item for item in tests if item.images], found)
    stated = data.get("numTraining")
    return built.model_copy(update={"num_training_stated": stated}) if isinstance(stated, int) else built


def _compare_count(source: Path, data: dict[str, Any], count: int, found: Findings) -> None:
    stated = data.get("numTraining")
    if isinstance(stated, int) and stated != count:
        found.add(
            "count-differs",
            f"numTraining says {stated} cases, {count} whole ones were found",
            file=source,
            severity="warning",
        )


def _msd_cases(folder: Path, items: Sequence[Any], found: Findings) -> list[Case]:
    cases = []
    for number, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("image"), str):
            found.add(
                "bad-description", f'entry {number} of "training" must be {{"image": ..., "label": ...}}, got {item!r}'
            )
            continue
        image, label = folder / item["image"], item.get("label")
        case_id = split_ending(image)[0]
        labels = str(_normal(with_another_ending(folder / label))) if isinstance(label, str) and label else None
        cases.append(Case(id=case_id, images=_msd_images(image), labels=labels))
        if labels is None:
            found.add("missing-label", "the case names no label file", case=case_id, file=image)
    return cases


def _msd_images(image: Path) -> tuple[str, ...]:
    """The file as listed; where it is absent, its channels by nnU-Net's names, as nnU-Net v1 sets have them.

    Else the one file of that name with another ending.
    """
    if not image.is_file():
        stem, ending = split_ending(image)
        numbered = sorted(image.parent.glob(f"{_escaped(stem)}_[0-9][0-9][0-9][0-9]{ending}"))
        if numbered:
            return tuple(str(_normal(item)) for item in numbered)
    return (str(_normal(with_another_ending(image))),)


def _escaped(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)


def _normal(path: Path) -> Path:
    """The path without "." parts; symbolic links stay as they are."""
    return Path(*path.parts)


def _msd_test_cases(folder: Path, items: Any) -> list[Case]:
    cases = []
    for item in items if isinstance(items, list) else []:
        image = item.get("image") if isinstance(item, dict) else item
        images = _msd_images(folder / image) if isinstance(image, str) else ()
        if images and all(Path(file).is_file() for file in images):
            cases.append(Case(id=split_ending(str(image))[0], images=images))
    return cases


def _listed_case(folder: Path, case_id: str, item: Any, found: Findings) -> Case:
    """A case of nnU-Net's optional "dataset" object; its paths are relative to the data set's folder."""
    images = item.get("images") if isinstance(item, dict) else None
    label = item.get("label") if isinstance(item, dict) else None
    if not isinstance(images, list) or not images or not isinstance(label, str):
        found.add("bad-description", f'expected {{"images": [...], "label": ...}}, got {item!r}', case=case_id)
        return Case(id=case_id, images=())
    files = tuple(str(_normal(folder / str(file))) for file in images)
    return Case(id=case_id, images=files, labels=str(_normal(folder / label)))


def _raw_cases(
    images: Path, labels: Path, ending: str, num_channels: int, lacking: Mapping[str, tuple[int, ...]], found: Findings
) -> list[Case]:
    """Cases of the nnU-Net raw layout: `imagesTr/CASE_CCCC.ext`, `labelsTr/CASE.ext`.

    Where no file has a channel number, each file is a case that holds every channel. Of some cases channels may be
    declared as lacking.
    """
    files = list_images(images)
    if not files:
        present = images.is_dir() and any(images.iterdir())
        what = "holds no image files" if present else "is empty" if images.is_dir() else "does not exist"
        found.add("no-images", f"the folder {what}", file=images, hint=_LAYOUT_HINT)
        return []
    channels = channel_files(files, ending, found)
    label_files = label_maps(labels, ending, found)
    for case_id in sorted(set(label_files) - set(channels)):
        found.add(
            "missing-image",
            "there is no image for this label map",
            case=case_id,
            file=label_files[case_id],
            severity="warning",
        )
    only_first = all(set(numbers) == {0} for numbers in channels.values())
    cases = []
    for case_id, numbers in channels.items():
        label = label_files.get(case_id)
        if label is None:
            found.add(
                "missing-label",
                f"there is no label map {labels.name}/{case_id}{ending or '.*'}",
                case=case_id,
                file=numbers[min(numbers)],
            )
        missing = lacking.get(case_id, ())
        files_of_case = files_by_channel(case_id, numbers, num_channels, missing, found, may_hold_all=only_first)
        label_file = None if label is None else str(label)
        cases.append(Case(id=case_id, images=files_of_case, labels=label_file, missing=missing))
    return cases


# --- Manifests, and what all layouts share --------------------------------------------------------------------------


def _manifest_case(folder: Path, item: ManifestCase, found: Findings) -> Case:
    files, missing = present_files(item.images)
    images = tuple(str(_normal(folder / file)) for file in files)
    case = Case(id=item.id, images=images, patient=item.patient, missing=missing, strata=item.strata)
    if item.labels is None:
        found.add(
            "no-label-named",
            "the manifest names no label map; the case is set aside for testing",
            case=item.id,
            severity="warning",
        )
        return case
    return case.model_copy(update={"labels": str(_normal(folder / item.labels))})


def _whole_cases(cases: Sequence[Case], num_channels: int, found: Findings) -> list[Case]:
    """The cases whose files are all there, sorted by id; the others become findings."""
    whole: dict[str, Case] = {}
    for case in sorted(cases, key=lambda item: item.id):
        if not re.fullmatch(r"[^/\\\x00]+", case.id) or case.id in (".", ".."):
            found.add("bad-id", f"{case.id!r} cannot be a case id, because files are named by it", case=case.id)
            continue
        if case.id in whole:
            found.add("double-id", "the case id occurs more than once", case=case.id, hint="Case ids must differ.")
            continue
        if _is_whole(case, num_channels, found):
            whole[case.id] = case
    return list(whole.values())


def _is_whole(case: Case, num_channels: int, found: Findings) -> bool:
    if not case.images:
        return False  # its finding was made where the files were looked for
    before = len(found.items)
    if len(case.images) * case.channels_in_a_file(num_channels) + len(case.missing) != num_channels:
        lacking = f", {len(case.missing)} declared as missing" if case.missing else ""
        message = f"{len(case.images)} image files{lacking} for {num_channels} channels"
        found.add("wrong-channels", message, case=case.id)
    for file in case.images:
        if not Path(file).exists():  # a folder stands for a DICOM series
            found.add("missing-image", "the image file does not exist", case=case.id, file=file)
    if case.labels is not None and not Path(case.labels).is_file():
        found.add("missing-label", "the label file does not exist", case=case.id, file=case.labels)
    return len(found.items) == before


def _build(
    source: Path,
    name: str,
    channels: tuple[Channel, ...],
    labels: LabelSchema,
    cases: Sequence[Case],
    tests: Sequence[Case],
    found: Findings,
) -> Dataset:
    first = next((case.labels for case in cases if case.labels is not None), None)
    return Dataset(
        name=name,
        channels=channels,
        labels=labels,
        cases=tuple(cases),
        test_cases=tuple(sorted(tests, key=lambda item: item.id)),
        file_ending=written_ending(split_ending(first)[1]) if first and is_image_name(first) else ".nii.gz",
        splits=_splits_beside(source.parent, cases, found),
    )


def _splits_beside(folder: Path, cases: Sequence[Case], found: Findings) -> Splits | None:
    for name in SPLIT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            splits = parse_splits(path.read_text(encoding="utf-8-sig"), path)
        except (DatasetError, OSError, UnicodeDecodeError) as problem:
            found.add("bad-splits", str(problem), file=path)
            return None
        problems = splits_problems(splits, cases) if cases else ()
        for message in problems:
            found.add("bad-splits", message, file=path, hint=f"Correct {name}, or take it away to have folds made.")
        return None if problems else splits
    return None
