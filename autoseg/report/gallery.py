"""Cases to look at: pictures of the worst, the median and the best, and volumes for the viewer."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from autoseg.errors import AutosegError
from autoseg.io.files import write_text
from autoseg.io.run_folder import RunFolder
from autoseg.report.collect import CaseRow, RunResults
from autoseg.report.overlays import View, views
from autoseg.report.scene import Scene, read_scene
from autoseg.report.uncertainty import uncertainty_of
from autoseg.report.volumes import make_volumes

log = logging.getLogger("autoseg")

NUM_WORST = 6
"""Cases shown in pictures from the bottom of the list; the median and the best one are shown too."""

MAX_READ_VOX = 1_000_000_000
"""Voxels of images and label maps that are read for the viewer, worst cases first: about a minute or two of one core.
Every case of a data set of a few hundred small volumes; of large ones those that matter."""

ELEMENT_BYTES = 1000
"""Of the marks around a picture, a contour or a volume, rather too much."""

SIDE_FOLDER = "volumes"
"""Beside the page: volumes of the cases that do not fit into it."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A case in pictures.

    Attributes:
        rank: Why it is shown: "worst 1", "median", "best".
        problem: Why there are no pictures; empty otherwise.
    """

    rank: str
    row: CaseRow
    views: tuple[View, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Gallery:
    """What there is to see.

    Attributes:
        shown: In pictures, the worst first.
        embedded: JSON of volumes in the page, by key.
        keys: Key of the volumes by case id, of all cases that have any.
    """

    shown: tuple[Shown, ...]
    embedded: Mapping[str, str]
    keys: Mapping[str, str]

    @property
    def num_beside(self) -> int:
        """Cases whose volumes lie in files beside the page."""
        return len(self.keys) - len(self.embedded)


def make_gallery(run: RunFolder, results: RunResults, ranked: Sequence[CaseRow], room_bytes: int) -> Gallery:
    """Read cases, draw their pictures, and put their volumes into the page or beside it.

    Args:
        run: Its report folder gets what has no room in the page.
        results: Of the run.
        ranked: Rows of the best configuration, the worst first.
        room_bytes: For the pictures and volumes in the page.

    Raises:
        OSError: The folder cannot be written.
    """
    ranks = ranks_of(len(ranked))
    folder = run.report_folder
    order = [*sorted(ranks, key=lambda place: ("w" not in ranks[place], place))]
    order += [place for place in range(len(ranked)) if place not in ranks]
    shown: dict[int, Shown] = {}
    embedded: dict[str, str] = {}
    keys: dict[str, str] = {}
    waiting: list[tuple[str, str]] = []
    by_case = _rows_by_case(results)
    num_read = 0
    for place in order:
        if num_read > MAX_READ_VOX and place not in ranks:
            break
        row = ranked[place]
        scene, problem = _scene(run, results, by_case[row.metrics.case])
        if place in ranks:
            found = () if scene is None else views(scene, row.configuration, results.dataset.labels)
            size = sum(_size(view) for view in found)
            if size > room_bytes:
                found, size, problem = (), 0, "the page has no room for more pictures; the viewer has the volumes"
            shown[place] = Shown(ranks[place], row, found, problem)
            room_bytes -= size
        if scene is not None:
            num_read += prod(scene.full_shape) * (len(scene.image) + 1 + len(scene.predicted))
            key = f"case-{place}"
            keys[row.metrics.case] = key
            volumes = make_volumes(row.metrics.case, scene, results.dataset.labels)
            if place in ranks:
                waiting.append((key, volumes.to_json()))
            else:
                _write_beside(folder, key, volumes.to_json())
    # Pictures went first; what is left of the room is for the volumes of the same cases.
    for key, text in waiting:
        room_bytes -= len(text) + ELEMENT_BYTES
        if room_bytes >= 0:
            embedded[key] = text
        else:
            _write_beside(folder, key, text)
            room_bytes += len(text) + ELEMENT_BYTES
    return Gallery(tuple(shown[place] for place in sorted(shown)), embedded, keys)


def ranks_of(count: int) -> dict[int, str]:
    """Why cases are shown, by their place among `count`, the worst first."""
    ranks = {place: f"worst {place + 1}" for place in range(min(NUM_WORST, count))}
    return ({count // 2: "median", count - 1: "best"} | ranks) if count else {}


def _write_beside(folder: Path, key: str, text: str) -> None:
    """A script of one line that hands the volumes to the page under their key."""
    write_text(folder / SIDE_FOLDER / f"{key}.js", f'autosegVolumes("{key}",{text});\n')


def _size(view: View) -> int:
    return ELEMENT_BYTES * (1 + len(view.contours)) + len(view.png) + sum(len(one.path) for one in view.contours)


def _scene(run: RunFolder, results: RunResults, rows: Sequence[CaseRow]) -> tuple[Scene | None, str]:
    """A case with the predictions of every configuration; why not, where that fails."""
    dataset, case_id = results.dataset, rows[0].metrics.case
    try:
        case = dataset.case(case_id)
    except KeyError:
        return None, f"case {case_id} is not in the run's dataset.json"
    labels = dataset.labels
    maps = {row.configuration: uncertainty_of(run, results.summary, row, is_regions=labels.has_regions) for row in rows}
    doubts = {name: found for name, found in maps.items() if found is not None}
    try:
        return read_scene(case, rows, labels, [channel.name for channel in dataset.channels], doubts), ""
    except AutosegError as problem:
        # Images may have moved since the training; the numbers are worth a report without them.
        log.warning("%s is not shown: %s", case_id, problem)
        return None, str(problem)


def _rows_by_case(results: RunResults) -> Mapping[str, tuple[CaseRow, ...]]:
    found: dict[str, list[CaseRow]] = defaultdict(list)
    for row in results.cases:
        found[row.metrics.case].append(row)
    return {case: tuple(rows) for case, rows in found.items()}
