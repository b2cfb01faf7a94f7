"""What is finished in a folder of predictions: a small record of each case, so that nothing is done twice.

OUT/.autoseg/CASE.json says what a case's files were made from and what they are. Each case has a file of its own,
written whole or not at all: several processes write into one folder without waiting for each other.

Source: docs/decisions/0039.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from autoseg import __version__
from autoseg.domain.dataset import Case
from autoseg.domain.values import Value
from autoseg.errors import ConfigError
from autoseg.io.companions import companions, look
from autoseg.io.files import file_digest, read_text, remove_leftovers, write_text

log = logging.getLogger("autoseg")

FOLDER = ".autoseg"

SCHEMA_VERSION = 1

State = Literal["finished", "new", "model", "settings", "input", "damaged"]

_REASONS: dict[State, str] = {
    "model": "of another model",
    "settings": "of other settings",
    "input": "of an input that has changed",
    "damaged": "missing or damaged",
}


class InputFile(Value):
    """An image as it was read, with all files that belong to it, or a DICOM series.

    Attributes:
        name: Without its folder.
        size: Bytes.
        modified_ns: When its content was last changed.
    """

    name: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: str | Path) -> InputFile:
        """The image as it is now.

        Raises:
            OSError: It is not there.
        """
        size, stamp = look(path)
        return cls(name=Path(path).name, size=size, modified_ns=stamp[0])


class OutputFile(Value):
    """A file as it was written.

    Attributes:
        name: Relative to the folder of predictions.
        size: Bytes.
        sha256: Of its content.
    """

    name: str
    size: int
    sha256: str

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is still what was written, read to its end."""
        path = folder / self.name
        try:
            return path.stat().st_size == self.size and file_digest(path) == self.sha256
        except OSError:
            return False


class PredictionRecord(Value):
    """What a case's files were made from, and what they are.

    Attributes:
        case: Its id.
        models: Digest of what predicted.
        settings: Digest of how.
        extras: What was written besides the label map.
        inputs: Images, in order.
        missing: Channels that the case lacked.
        outputs: The label map first.
        autoseg: The version; for people.
    """

    schema_version: int = SCHEMA_VERSION
    case: str
    models: str
    settings: str
    extras: tuple[str, ...] = ()
    inputs: tuple[InputFile, ...]
    missing: tuple[int, ...] = ()
    outputs: tuple[OutputFile, ...]
    autoseg: str = __version__


class Ledger:
    """The records of a folder.

    Args:
        out: The folder of predictions; need not exist.
        models: Digest of what predicts now.
        settings: Digest of how.
        extras: What is written besides the label map.
    """

    def __init__(self, out: Path, models: str, settings: str, extras: Sequence[str] = ()) -> None:
        self._out = Path(out)
        self._models = models
        self._settings = settings
        self._extras = tuple(extras)
        self._read: dict[str, tuple[InputFile, ...]] = {}

    def begin(self, case: Case) -> None:
        """Look at the images before they are read: one that changes meanwhile counts as changed.

        Raises:
            OSError: One is not there.
        """
        self._read[case.id] = _inputs(case)

    def keep(self, case: Case, files: Sequence[Path]) -> None:
        """Record that a case is finished.

        Args:
            case: After `begin`.
            files: Everything that was written of it, the label map first.

        Raises:
            OSError: The record cannot be written.
        """
        outputs = tuple(
            OutputFile(name=path.relative_to(self._out).as_posix(), size=path.stat().st_size, sha256=file_digest(path))
            # Detached headers have their voxels in a file beside them.
            for path in (*files, *companions(files[0]))
        )
        record = PredictionRecord(
            case=case.id,
            models=self._models,
            settings=self._settings,
            extras=self._extras,
            inputs=self._read.pop(case.id),
            missing=case.missing,
            outputs=outputs,
        )
        write_text(self._path(case), record.to_json())

    def state(self, case: Case, label_map: Path) -> State:
        """Whether a case is finished, else why it is not.

        Args:
            case: The case.
            label_map: Where its label map belongs.
        """
        try:
            text = read_text(self._path(case))
            record = PredictionRecord.from_json(text, self._path(case))
        except ConfigError:
            # Not there, or of another version: it says nothing.
            return "new"
        if record.models != self._models:
            return "model"
        if record.settings != self._settings or not set(self._extras) <= set(record.extras):
            return "settings"
        try:
            is_same = record.inputs == _inputs(case) and record.missing == case.missing
        except OSError:
            return "input"
        if not is_same:
            return "input"
        is_whole = self._out / record.outputs[0].name == label_map and all(
            output.is_whole(self._out) for output in record.outputs
        )
        return "finished" if is_whole else "damaged"

    def _path(self, case: Case) -> Path:
        # Names that begin with a dot are those of files being written.
        name = quote(case.id, safe=" ")
        return self._out / FOLDER / f"{name.replace('.', '%2E', 1) if name.startswith('.') else name}.json"


def _inputs(case: Case) -> tuple[InputFile, ...]:
    return tuple(InputFile.of(file) for file in case.images)


def unfinished(
    ledger: Ledger, cases: Sequence[Case], label_maps: Sequence[Path], out: Path
) -> tuple[tuple[Case, ...], tuple[Path, ...]]:
    """The cases that are still to be done, and the label maps of the others; what is skipped is told.

    What dead processes have left half written is removed.

    Args:
        ledger: Of the folder.
        cases: All that are asked for.
        label_maps: Where their label maps belong.
        out: The folder.
    """
    for folder in (out, out / FOLDER):
        remove_leftovers(folder)
    if not (out / FOLDER).is_dir():
        return tuple(cases), ()
    states = [ledger.state(case, path) for case, path in zip(cases, label_maps, strict=True)]
    skipped = tuple(path for path, state in zip(label_maps, states, strict=True) if state == "finished")
    again = [f"{count} {_REASONS[state]}" for state, count in sorted(Counter(states).items()) if state in _REASONS]
    if skipped or again:
        log.info(
            "%d of %d cases are finished in %s and skipped (--restart does them again)%s",
            len(skipped),
            len(cases),
            out,
            f"; done again: {', '.join(again)}" if again else "",
        )
    return tuple(case for case, state in zip(cases, states, strict=True) if state != "finished"), skipped
