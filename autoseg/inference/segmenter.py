"""From a volume to its label map: the members of an ensemble, their weights, and the rules for afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from autoseg.domain.dataset import Case, Channel, LabelSchema
from autoseg.domain.geometry import Geometry, Volume
from autoseg.domain.inference import Rule, Temperature, Threshold
from autoseg.errors import ModelError
from autoseg.evaluation.postprocess import apply_rules
from autoseg.inference.deciding import Criteria, Deciding
from autoseg.inference.export import LabelMap
from autoseg.inference.gather import Gathering
from autoseg.inference.inputs import warn_of_cubes
from autoseg.inference.outcome import MEMORY_HINT
from autoseg.inference.stages import Ready, Stages
from autoseg.inference.votes import Ballot, Votes
from autoseg.io.images import read_case
from autoseg.runtime import device_memory_errors


@dataclass(frozen=True, slots=True, eq=False)
class WeightedStages:
    """One configuration in an ensemble; see `domain.inference.Member`."""

    stages: Stages
    weight: float = 1.0
    temperature: Temperature = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class ReadyCase:
    """A case that is ready for the networks of every member.

    Attributes:
        geometry: Of the file.
        members: One a member.
    """

    geometry: Geometry
    members: tuple[Ready, ...]


class Segmenter:
    """Everything between a volume and its label map, resident in memory.

    One member decides by its logits, or by its probabilities where a rule asks for these. Several vote: see `Votes`.

    Args:
        members: At least one.
        rules: Thresholds decide labels; the others are applied to the label map, in order.
        scratch: Folder for what does not fit into memory while several members vote; made when missing. None is the
            system's folder for temporary files.

    Raises:
        ModelError: The members differ in labels or channels.
    """

    def __init__(
        self, members: Sequence[WeightedStages], rules: Sequence[Rule] = (), scratch: Path | None = None
    ) -> None:
        if not members:
            raise ModelError("there is no model to predict with")
        self._members = tuple(members)
        self._component_rules = tuple(rule for rule in rules if not isinstance(rule, Threshold))
        self._scratch = scratch
        predictors = [member.stages.last for member in members]
        self.labels: LabelSchema = predictors[0].labels
        self.channels: tuple[Channel, ...] = predictors[0].channels
        self._criteria = Criteria.of(rules, self.labels)
        if any((one.labels, one.channels) != (self.labels, self.channels) for one in predictors):
            raise ModelError(
                "the members of the ensemble have other labels or channels", hint="Use configurations of one plan."
            )

    def read(self, case: Case, notice: Callable[[Case, Volume], None] | None = None) -> ReadyCase:
        """Read and prepare a case, without the networks: may run in another thread.

        Args:
            case: Its labels are not read.
            notice: Shown the image as it was read.

        Raises:
            DatasetError: A file cannot be read or does not fit the model.
        """
        volume = read_case(case, len(self.channels))
        warn_of_cubes(case, volume.geometry)
        if notice is not None:
            notice(case, volume)
        return self.prepare(volume, case.id)

    def prepare(self, volume: Volume, case_id: str = "") -> ReadyCase:
        """Prepare an image, without the networks: may run in another thread.

        Args:
            volume: (C, I, J, K) as read from its file.
            case_id: See `Stages.prepare`.
        """
        return ReadyCase(volume.geometry, tuple(member.stages.prepare(volume, case_id) for member in self._members))

    def deciding(self, geometry: Geometry) -> Deciding | None:
        """What decides the labels of an image, and is shown to `finish` again; None where logits alone do.

        Args:
            geometry: Of the image.
        """
        if self._criteria is None:
            return None
        return Deciding(self._criteria, geometry.shape, self._scratch or Path(tempfile.gettempdir()))

    def segment(
        self, ready: ReadyCase, gathering: Gathering | None = None, deciding: Deciding | None = None
    ) -> LabelMap:
        """Label values (I, J, K) on the file's grid, before the rules about components.

        Args:
            ready: See `read`.
            gathering: Filled in: of several members with the probabilities that they vote with.
            deciding: See `deciding`; one is made where none is given.
        """
        deciding = deciding or self.deciding(ready.geometry)
        if len(self._members) == 1:
            return self._members[0].stages.segment(ready.members[0], gathering, deciding)
        if self._scratch is not None:
            self._scratch.mkdir(parents=True, exist_ok=True)
        # Its file has no name on systems that allow it: it is gone with this process, however that ends.
        with tempfile.TemporaryFile(prefix=".tmp-votes-", dir=self._scratch) as file:
            votes = Votes(self.labels, ready.geometry.shape, file)
            total = sum(member.weight for member in self._members)
            for member, prepared in zip(self._members, ready.members, strict=True):
                ballot = Ballot(
                    trail=prepared.image.trail,
                    plan=member.stages.last.settings.preprocess,
                    weight=member.weight / total,
                    temperature=member.temperature,
                )
                member.stages.each_column(prepared, partial(votes.add, ballot=ballot))
            if gathering is not None:
                votes.gather(gathering)
            return votes.labels(deciding)

    def finish(self, labels: LabelMap, geometry: Geometry, deciding: Deciding | None = None) -> LabelMap:
        """Apply the rules about components, without the networks: may run in another thread.

        Args:
            labels: See `segment`.
            geometry: Of the image.
            deciding: What has decided the labels; without it rules about probabilities cannot be applied.

        Raises:
            DeviceMemoryError: There is not enough memory.
        """
        if not self._component_rules:
            return labels
        with device_memory_errors("memory ran out in post-processing", MEMORY_HINT):
            likelihoods = None if deciding is None else deciding.likelihoods
            # A label map of either type stays of its type.
            return apply_rules(  # type: ignore[return-value]
                labels, self._component_rules, self.labels, geometry.spacing_mm, likelihoods
            )
