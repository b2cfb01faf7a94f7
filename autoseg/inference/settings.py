"""How images are predicted, as people ask for it: what decides about labels, and nothing of the machine."""

from __future__ import annotations

from autoseg.domain.values import Value, digest_of
from autoseg.inference.tta import Tta


class PredictionSettings(Value):
    """Settings that may change labels; see `Predictor` for what they mean.

    Attributes:
        precision: As asked for: "auto" is the device's own.
        tta: Test-time mirroring.
        overlap: Of tiles; None is the plan's.
        skip_empty: Whether tiles that show nothing are skipped.
    """

    precision: str = "auto"
    tta: Tta = "none"
    overlap: float | None = None
    skip_empty: bool = False

    def digest(self) -> str:
        """Names the settings."""
        return digest_of(self.model_dump(mode="json"))
