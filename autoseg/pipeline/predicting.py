"""Predicting as a value: what a process needs to know to segment cases, so that this one and others do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from autoseg import __version__
from autoseg.domain.dataset import Case
from autoseg.domain.values import Value
from autoseg.errors import ModelError
from autoseg.inference.beside import Beside
from autoseg.inference.cases import WriteBeside, segment_cases
from autoseg.inference.export import LabelMap
from autoseg.inference.gather import Wanted
from autoseg.inference.outcome import CaseResult
from autoseg.inference.settings import PredictionSettings
from autoseg.io.dicom_seg import Algorithm, segmentation_path, write_segmentation
from autoseg.io.model import ModelCard
from autoseg.pipeline.finished import Ledger
from autoseg.pipeline.members import choose
from autoseg.runtime import configure_allocator

DICOM_SEG = "dicom_seg"
"""Of `Predicting.extras`: a DICOM segmentation beside each label map."""

_DIGEST_LENGTH = 16
"""Of each model's weights: enough to tell models apart, and a number of several folds stays readable."""


class Predicting(Value):
    """Segment cases and write them.

    Attributes:
        model: Folder of a run, an exported model or a fold.
        configuration: See `choose`.
        folds: See `choose`.
        models_digest: Of what `choose` gave to whoever made this: another process must find the same.
        settings: How.
        out: Folder for the label maps.
        extras: What is written beside each label map: `DICOM_SEG`, and names of `Wanted`.
        num_cases: About how many each process will segment.
    """

    model: str
    configuration: str | None
    folds: str | None
    models_digest: str
    settings: PredictionSettings
    out: str
    extras: tuple[str, ...] = ()
    num_cases: int = 1

    def ledger(self) -> Ledger:
        """The records of the folder."""
        return Ledger(Path(self.out), self.models_digest, self.settings.digest(), self.extras)

    def run(self, cases: Iterable[Case], device: str, note: Callable[[CaseResult], bool]) -> None:
        """Load the models, segment the cases and record each.

        Args:
            cases: Asked for one ahead, in another thread.
            device: See `runtime.pick_device`.
            note: Told what came of each; False stops.

        Raises:
            ModelError: The models are damaged, or have changed since this was made.
            ConfigError: A setting is not possible.
            DeviceMemoryError: The device has too little memory for the networks.
        """
        # What reading and preparing have freed serves the network.
        configure_allocator(share_arena=True)
        chosen = choose(Path(self.model), self.configuration, self.folds)
        if chosen.digest() != self.models_digest:
            raise ModelError(f"the models in {self.model} have changed meanwhile", hint="Start the command again.")
        out, ledger, wanted = Path(self.out), self.ledger(), Wanted.of(self.extras)
        segment_cases(
            chosen.load(self.settings, device, out, uncertainty=wanted.uncertainty, num_volumes=self.num_cases),
            cases,
            out,
            note,
            before=ledger.begin,
            write_beside=_segmentation_writer(chosen.cards) if DICOM_SEG in self.extras else None,
            beside=Beside(chosen.cards, wanted, self.settings.tta),
            keep=ledger.keep,
        )


def _segmentation_writer(cards: Sequence[ModelCard]) -> WriteBeside:
    """Writes each label map as a DICOM segmentation too; of several series, it refers to that of the first channel."""
    algorithm = Algorithm(
        "autoseg",
        __version__,
        {
            "model": "+".join(card.weights_sha256[:_DIGEST_LENGTH] for card in cards),
            "plan": cards[0].digest,
            "configuration": "+".join(dict.fromkeys(card.configuration for card in cards)),
            "folds": "+".join(str(card.fold) for card in cards),
            "dataset": cards[0].plan.dataset,
        },
    )

    def write(case: Case, label_map: Path, labels: LabelMap) -> tuple[Path]:
        path = segmentation_path(label_map)
        write_segmentation(path, labels, case.images[0], cards[0].plan.labels, algorithm)
        return (path,)

    return write
