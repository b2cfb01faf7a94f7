"""How images are predicted, as people ask for it: what decides about labels, and nothing of the machine."""

from __future__ import annotations

from typing import ClassVar

from autoseg.domain.inference import DEFAULT_TTA, Tta
from autoseg.domain.values import GrownValue, digest_of
from autoseg.inference.engines.base import WantedEngine


class PredictionSettings(GrownValue):
    """Settings that may change labels; see `Predictor` for what they mean.

    Attributes:
        precision: As asked for: "auto" is the device's own.
        tta: Test-time mirroring.
        overlap: Of tiles; None is the plan's.
        skip_empty: Whether tiles that show nothing are skipped.
        engine: As asked for: "auto" is one that is found.
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = ("engine",)

    precision: str = "auto"
    tta: Tta = DEFAULT_TTA
    overlap: float | None = None
    skip_empty: bool = False
    engine: WantedEngine = "auto"

    def digest(self) -> str:
        """Names the settings."""
        return digest_of(self.model_dump(mode="json"))
