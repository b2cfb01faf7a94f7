"""What is written beside a label map, and what is told of its image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autoseg.domain.beside import ENTROPY, PROBABILITIES, SEGMENTATION
from autoseg.domain.dataset import Case
from autoseg.domain.endings import split_ending
from autoseg.domain.fingerprint import CaseStats
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.inference import DEFAULT_TTA, Tta
from autoseg.domain.label_table import label_table
from autoseg.domain.outside import LIMIT, Outside, outside
from autoseg.errors import ConfigError
from autoseg.inference.gather import Gathering, SideFile, Wanted
from autoseg.inference.statistics import CaseStatistics, class_statistics
from autoseg.inference.statistics_table import write_part
from autoseg.inference.tta import mirrors_of
from autoseg.io.fractions import LARGEST_ERROR, write_fractions
from autoseg.io.images import read_case
from autoseg.io.label_names import write_bids_table, write_colour_table, write_itksnap
from autoseg.io.model import ModelCard
from autoseg.io.slicer import write_seg_nrrd
from autoseg.preprocessing.measure import measure_image

log = logging.getLogger("autoseg")

_ENDINGS: dict[SideFile, tuple[str, ...]] = {
    "slicer": (SEGMENTATION, ".ctbl"),
    "itksnap": (".label.txt",),
    "bids": ("_dseg.tsv",),
}


class Beside:
    """Writes what is wanted besides label maps; the same for every case of a prediction.

    Args:
        cards: Of the models that give the result, of one plan.
        wanted: What is written.
        tta: Test-time mirroring, for the words about certainty.
    """

    def __init__(self, cards: Sequence[ModelCard], wanted: Wanted, tta: Tta = DEFAULT_TTA) -> None:
        self.wanted = wanted
        self._cards = tuple(cards)
        plan = cards[0].plan
        self._schema = plan.labels
        self._table = label_table(plan.labels)
        self._channels = [channel.name for channel in plan.channels]
        self._certainty = _certainty(cards, tta)
        self._outside: dict[str, tuple[Outside, ...]] = {}

    def gathering(self, geometry: Geometry, folder: Path) -> Gathering | None:
        """What is filled in while an image is segmented; None where nothing is wanted of its logits."""
        if not self.wanted.gathers:
            return None
        return Gathering(geometry.shape, self._schema, self.wanted, folder)

    def notice(self, case: Case, volume: Volume) -> None:
        """Tell of an image that lies outside of what the models have learned from; may run in another thread."""
        known = [card for card in self._cards if card.trained_on is not None]
        if not known:
            return
        measured = measure_image(volume, case.id)
        # What is new to one model is not yet new to all of them.
        found = min((_outside(card, measured, self._channels) for card in known), key=len)
        if self.wanted.has_table:
            self._outside[case.id] = found
        if found:
            told = "; ".join(
                item.message + ("" if item.distance is None else f" ({item.distance:g} spreads beyond)")
                for item in found
            )
            log.warning(
                "%s: the image is unlike those that the model has learned from (more than %g spreads), so its label "
                "map may be wrong: %s",
                case.id,
                LIMIT,
                told,
            )

    def write(
        self,
        case: Case,
        label_map: Path,
        labels: NDArray[np.integer],
        geometry: Geometry,
        gathering: Gathering | None,
    ) -> tuple[Path, ...]:
        """Write all that is wanted of a case; comes before its label map, so that this says that the case is whole.

        Returns:
            The files.

        Raises:
            DatasetError: The image, which statistics read again, cannot be read.
            OSError: The folder cannot be written.
        """
        if gathering is not None:
            self._write_fractions(label_map, geometry, gathering)
        for kind in self.wanted.side_files:
            self._write_side_file(kind, label_map, labels, geometry)
        if not self.wanted.has_table:
            return paths_beside(label_map, self.wanted)
        rows = self._statistics(case, label_map, labels, geometry, gathering)
        return (*paths_beside(label_map, self.wanted), write_part(label_map.parent, rows))

    def _write_fractions(self, label_map: Path, geometry: Geometry, gathering: Gathering) -> None:
        common = {"label_map": label_map.name, "largest_error": LARGEST_ERROR}
        levels, entropy = gathering.levels, gathering.entropy
        if levels is not None:
            names = self._schema.names if self._schema.has_regions else ("background", *self._schema.names)
            kind = "sigmoid of each region" if self._schema.has_regions else "softmax over classes"
            content = common | {"volumes": list(names), "what": kind}
            array = levels.array.transpose(0, 3, 2, 1)
            path = beside(label_map, PROBABILITIES)
            write_fractions(path, array, geometry, "probability", content, levels.written)
        if entropy is not None:
            unit = "0 sure, 1 every class or region as likely as not"
            content = common | {"what": f"entropy of {self._certainty}", "unit": unit}
            write_fractions(beside(label_map, ENTROPY), entropy.transpose(2, 1, 0), geometry, "entropy", content)

    def _write_side_file(
        self, kind: SideFile, label_map: Path, labels: NDArray[np.integer], geometry: Geometry
    ) -> None:
        paths = [beside(label_map, ending) for ending in _ENDINGS[kind]]
        if kind == "slicer":
            write_seg_nrrd(paths[0], labels, geometry, self._table)
            write_colour_table(paths[1], self._table)
        elif kind == "itksnap":
            write_itksnap(paths[0], self._table)
        else:
            write_bids_table(paths[0], self._table)

    def _statistics(
        self,
        case: Case,
        label_map: Path,
        labels: NDArray[np.integer],
        geometry: Geometry,
        gathering: Gathering | None,
    ) -> CaseStatistics:
        # Read once more rather than kept: between reading and writing lie up to two other cases.
        image = read_case(case, len(self._channels)) if self.wanted.statistics else None
        counts = gathering.voxel_counts() if gathering is not None and self.wanted.uncertainty else None
        classes = class_statistics(labels, geometry, self._schema, counts=counts, image=image, channels=self._channels)
        return CaseStatistics(
            case=case.id,
            label_map=label_map.name,
            certainty=None if counts is None else self._certainty,
            outside=self._outside.pop(case.id, ()),
            classes=classes,
        )


def paths_beside(label_map: Path, wanted: Wanted) -> tuple[Path, ...]:
    """The files beside a label map, the rows of its statistics not counted."""
    endings: list[str] = []
    if wanted.probabilities:
        endings.append(PROBABILITIES)
    if wanted.uncertainty:
        endings.append(ENTROPY)
    for kind in wanted.side_files:
        endings += _ENDINGS[kind]
    return tuple(beside(label_map, ending) for ending in endings)


def refuse_clashes(wanted: Wanted, label_maps: Sequence[Path]) -> None:
    """Refuse cases of which one's label map, or a file beside it, has the name of another's.

    Args:
        wanted: What is written.
        label_maps: Of all cases.

    Raises:
        ConfigError: Names them.
    """
    owners = {path: path for path in label_maps}
    clashes = []
    for label_map in label_maps:
        for path in paths_beside(label_map, wanted):
            if owners.setdefault(path, label_map) != label_map:
                clashes.append(f"{path.name}, of {label_map.name} and of {owners[path].name}")
    if clashes:
        raise ConfigError("outputs of different cases would have one name", problems=clashes, hint="Rename the inputs.")


def beside(label_map: Path, ending: str) -> Path:
    """A file beside a label map: OUT/X.nii.gz gives OUT/X and the ending; one is not said twice (sub-01_dseg)."""
    stem = split_ending(label_map)[0]
    first = ending.partition(".")[0]
    return label_map.with_name(f"{stem.removesuffix(first) if first == '_dseg' else stem}{ending}")


def _outside(card: ModelCard, measured: CaseStats, channels: Sequence[str]) -> tuple[Outside, ...]:
    if card.trained_on is None:
        return ()
    return outside(card.trained_on, measured, card.settings.preprocess, channels)


def _certainty(cards: Sequence[ModelCard], tta: Tta) -> str:
    """Whose probabilities say how certain a prediction is."""
    configurations = {card.configuration for card in cards}
    if len(configurations) > 1:
        return f"the weighted mean probabilities of {len(configurations)} configurations"
    num_models, tta = len(cards), tta if mirrors_of(cards[0].settings).axes else "none"
    if num_models == 1 and tta == "none":
        return "the probabilities of one model without mirroring"
    models = "one model" if num_models == 1 else f"{num_models} models"
    return f"the mean probabilities of {models} {'without' if tta == 'none' else f'and of {tta}'} mirroring"
