"""What is done with each case of a data set, as values, so that threads here and processes of their own do the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from autoseg.domain.dataset import Case, LabelSchema
from autoseg.domain.fingerprint import CaseStats
from autoseg.domain.plan import PreprocessPlan
from autoseg.domain.values import Value
from autoseg.errors import DatasetError
from autoseg.io.images import read_case, read_labels
from autoseg.io.maps import MapStore
from autoseg.io.store import CaseStore
from autoseg.preprocessing.measure import measure_case
from autoseg.preprocessing.prepare import prepare_case
from autoseg.preprocessing.previous import prepare_previous


class Done(Value):
    """What came of putting something into a cache.

    Attributes:
        was_needed: Whether anything had to be done.
    """

    was_needed: bool


class Measuring(Value):
    """Measure a case for the fingerprint.

    Attributes:
        labels: What label values mean.
        num_channels: Of the data set.
    """

    kind: Literal["measuring"] = "measuring"
    labels: LabelSchema
    num_channels: int

    def run(self, case: Case) -> CaseStats:
        """Raises DatasetError: a file cannot be read, or does not fit the others."""
        volume = read_case(case, self.num_channels)
        labels, _ = read_labels(labels_of(case), volume.geometry)
        try:
            indices = self.labels.encode(labels)
        except ValueError as problem:
            raise DatasetError(f"{case.labels}: {problem}") from None
        return measure_case(volume, indices, case.id, self.labels.num_values)


class Preparing(Value):
    """Put a case into the cache.

    Attributes:
        plan: What is done to it.
        labels: What label values mean.
        folder: Of the cache.
    """

    kind: Literal["preparing"] = "preparing"
    plan: PreprocessPlan
    labels: LabelSchema
    folder: str

    def run(self, case: Case) -> Done:
        """Raises DatasetError, and LockHeld while another process is at it; see `prepare_case`."""
        return Done(
            was_needed=prepare_case(case, self.plan, self.labels, CaseStore(Path(self.folder)), wait=False),
        )


class MapSource(Value):
    """Where a cascade's label map comes from and goes to.

    Attributes:
        label_map: What the previous stage predicted, on the file's grid.
        folder: Of the cache.
        weights_sha256: Of the model that predicted it.
    """

    label_map: str
    folder: str
    weights_sha256: str

    @property
    def store(self) -> MapStore:
        """The cache."""
        return MapStore(Path(self.folder), self.weights_sha256)

    def files(self, case: Case) -> tuple[str, ...]:
        """Everything that the cached map is made from."""
        return (*case.images, self.label_map)


class PreparingMaps(Value):
    """Put the label map that a cascade sees of a case into the cache.

    Attributes:
        plan: What is done to the image.
        labels: What label values mean.
        sources: By case id.
    """

    kind: Literal["preparing maps"] = "preparing maps"
    plan: PreprocessPlan
    labels: LabelSchema
    sources: dict[str, MapSource]

    def run(self, case: Case) -> Done:
        """Raises DatasetError, and LockHeld while another process is at it; see `prepare_previous`."""
        source = self.sources[case.id]
        was_needed = prepare_previous(case, Path(source.label_map), self.plan, self.labels, source.store, wait=False)
        return Done(was_needed=was_needed)


AnyTask = Annotated[Measuring | Preparing | PreparingMaps, Field(discriminator="kind")]
TASK: TypeAdapter[Measuring | Preparing | PreparingMaps] = TypeAdapter(AnyTask)


def labels_of(case: Case) -> Path:
    """The case's label map; DatasetError when it has none."""
    if case.labels is None:
        raise DatasetError(f"case {case.id} has no label map")
    return Path(case.labels)
