"""Many files: each case is read, segmented and written, and what fails stops nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from autoseg.domain.dataset import Case
from autoseg.domain.geometry import Geometry
from autoseg.domain.inference import DEFAULT_TTA, Tta
from autoseg.domain.label_table import label_table
from autoseg.errors import ConfigError
from autoseg.inference.beside import Beside
from autoseg.inference.deciding import Deciding
from autoseg.inference.engines.base import WantedEngine
from autoseg.inference.export import LabelMap
from autoseg.inference.gather import Gathering
from autoseg.inference.inputs import output_ending
from autoseg.inference.line import run_line
from autoseg.inference.outcome import CaseResult, PredictionOutcome, Tally
from autoseg.inference.segmenter import ReadyCase, Segmenter, WeightedStages
from autoseg.inference.settings import PredictionSettings
from autoseg.inference.stages import load_stages
from autoseg.io.images import write_labels
from autoseg.io.model import Model
from autoseg.runtime import NoProgress, Progress, configure_allocator

WriteBeside = Callable[[Case, Path, LabelMap], Sequence[Path]]
"""Gets a case, where its label map was written, and the label map; gives what it wrote."""

Found = tuple[LabelMap, Geometry, Gathering | None, Deciding | None]
"""A label map before the rules, its grid, what was gathered besides, and what has decided by probabilities."""

Keep = Callable[[Case, Sequence[Path]], None]
"""Gets a case and its files, the label map first, when all are written."""


def target(case: Case, out: Path, ending: str | None = None) -> Path:
    """Where a case's label map is written.

    Args:
        case: The case.
        out: Folder.
        ending: None takes the image's own (PNG for pictures).
    """
    return Path(out) / f"{case.id}{ending or output_ending(case)}"


def segment_cases(
    segmenter: Segmenter,
    cases: Iterable[Case],
    out: Path,
    note: Callable[[CaseResult], bool],
    *,
    ending: str | None = None,
    before: Callable[[Case], None] | None = None,
    write_beside: WriteBeside | None = None,
    beside: Beside | None = None,
    keep: Keep | None = None,
) -> None:
    """Segment cases and write one label map each; a failing case does not stop the others.

    While the network works on one case, the next is read and prepared and the last one is written: at most three cases
    are in memory.

    Args:
        segmenter: Resident in memory.
        cases: What to segment; their labels are not read.
        out: Folder for OUT/ID.ending, made when missing.
        note: Told what came of each case; False stops.
        ending: See `target`.
        before: Called before a case is read, in the thread that reads.
        write_beside: Writes what else is made of a label map, after it.
        beside: Writes what is wanted besides, before the label map, and is shown every image.
        keep: Called when all of a case is written, in the thread that writes.
    """
    names = label_table(segmenter.labels)

    def read(case: Case) -> ReadyCase:
        if before is not None:
            before(case)
        return segmenter.read(case, None if beside is None else beside.notice)

    def segment(ready: ReadyCase) -> Found:
        gathering = None if beside is None else beside.gathering(ready.geometry, out)
        deciding = segmenter.deciding(ready.geometry)
        return segmenter.segment(ready, gathering, deciding), ready.geometry, gathering, deciding

    def write(case: Case, found: Found) -> Sequence[Path]:
        decided, geometry, gathering, deciding = found
        path, labels = target(case, out, ending), segmenter.finish(decided, geometry, deciding)
        files = [path, *(() if beside is None else beside.write(case, path, labels, geometry, gathering))]
        write_labels(path, labels, geometry, names)
        files += () if write_beside is None else write_beside(case, path, labels)
        if keep is not None:
            keep(case, files)
        return files

    run_line(cases, read, segment, write, note)


def predict_cases(
    models: Sequence[Model],
    cases: Sequence[Case],
    out: Path,
    ending: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    *,
    tta: Tta = DEFAULT_TTA,
    overlap: float | None = None,
    skip_empty: bool = False,
    engine: WantedEngine = "auto",
    previous: Sequence[Model] | Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> PredictionOutcome:
    """Segment cases by the models of one configuration.

    Args:
        models: See `Predictor`.
        cases: See `segment_cases`.
        out: See `segment_cases`.
        ending: See `target`.
        device: See `runtime.pick_device`.
        precision: See `Predictor`.
        tta: See `Predictor`.
        overlap: See `Predictor`; of a cascade, of both stages.
        skip_empty: See `Predictor`.
        engine: See `Predictor`.
        previous: See `load_stages`.
        progress: One step a case.

    Raises:
        ConfigError: An output would overwrite an input, or a setting is not possible.
        ModelError: See `load_stages`.
        DeviceMemoryError: See `load_stages`; where memory ran out for single cases the outcome says so.
    """
    refuse_overwriting(cases, [target(case, out, ending) for case in cases])
    # What reading and preparing have freed serves the network.
    configure_allocator(share_arena=True)
    settings = PredictionSettings(precision=precision, tta=tta, overlap=overlap, skip_empty=skip_empty, engine=engine)
    stages = load_stages(models, previous, settings, device, num_volumes=len(cases))
    segmenter = Segmenter([WeightedStages(stages)])
    tally = Tally(cases, progress or NoProgress())
    segment_cases(segmenter, cases, out, tally.add, ending=ending)
    return tally.outcome()


def refuse_overwriting(cases: Sequence[Case], targets: Sequence[Path]) -> None:
    """Refuse outputs that are inputs.

    Raises:
        ConfigError: Names them all.
    """
    sources = {Path(file).resolve() for case in cases for file in case.files}
    clashes = sorted(str(path) for path in targets if path.resolve() in sources)
    if clashes:
        raise ConfigError(
            "label maps would overwrite their images", problems=clashes, hint="Choose another folder for --out."
        )
