"""How an image becomes the network's input: a part of the plan.

Every tuple over axes is in the one array-axis order of the plan (see `PreprocessPlan.axis_order`).
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from autoseg.domain.network_plan import Floats
from autoseg.domain.values import GrownValue, Value, digest_of

NEVER_SEPARATE = 1e9
"""A `separate_axis_ratio` that no image reaches: all axes are always resampled alike."""

LabelDecision = Literal["half", "largest"]
"""Which class takes a voxel of a resampled label map: see `PreprocessPlan`."""

NormalizationScheme = Literal["zscore", "ct", "none", "rescale", "rgb"]


class ChannelNormalization(Value):
    """How one channel's intensities are scaled.

    Attributes:
        scheme: "zscore" per image; "ct": clip to [lower, upper], subtract mean, divide by std (all of the data set's
            foreground); "none"; "rescale": per image to 0 ... 1; "rgb": divide by 255.
        use_mask: z-score over the non-zero mask only, the rest stays 0.
    """

    scheme: NormalizationScheme
    use_mask: bool = False
    mean: float | None = None
    std: float | None = None
    lower: float | None = None
    upper: float | None = None

    @model_validator(mode="after")
    def _ct_has_numbers(self) -> Self:
        if self.scheme == "ct" and None in (self.mean, self.std, self.lower, self.upper):
            raise ValueError("scheme 'ct' needs mean, std, lower and upper")
        return self


class PreprocessPlan(GrownValue):
    """How an image becomes the network's input.

    Attributes:
        orientation: "RAS": reorient to closest canonical first; "native": keep the file's axes (imported models).
        axis_order: Network axis a is canonical axis ``axis_order[a]``; (2, 1, 0) is Z, Y, X.
        target_spacing: Millimetres in network axis order; two entries (in-plane) where slices are not resampled (2D).
        normalization: One per channel.
        crop_to_nonzero: Whether the box around non-zero voxels is cut out first.
        image_order: Spline order for images.
        label_order: Spline order for labels, per class.
        label_decision: "half": classes in ascending order take the voxels they fill at least half; "largest": each
            voxel goes to the class that fills most of it, which needs a `label_order` of 0 or 1.
        logits_order: Spline order on the way back.
        separate_axis_ratio: Above this spacing ratio the coarse axis is resampled on its own; 0: whenever there is one.
        image_coarse_order: Spline order for images along the coarse axis.
        logits_coarse_order: The same on the way back.
        label_separate_axis_ratio: `separate_axis_ratio` for labels, where it differs.
        logits_separate_axis_ratio: The same on the way back.
        resamples: Whether anything is resampled; if not, the network sees the file's own voxels.
        trusts_tiff_spacing: Whether the voxel size that a TIFF stack states inside itself counts; if not, only a file
            beside it says anything (nnU-Net reads such stacks so).
    """

    LATER_FIELDS: ClassVar[tuple[str, ...]] = (
        "image_coarse_order",
        "logits_coarse_order",
        "label_separate_axis_ratio",
        "logits_separate_axis_ratio",
        "resamples",
        "trusts_tiff_spacing",
        "label_decision",
    )

    orientation: Literal["RAS", "native"] = "RAS"
    axis_order: tuple[int, int, int] = (2, 1, 0)
    target_spacing: Floats
    normalization: tuple[ChannelNormalization, ...]
    crop_to_nonzero: bool = True
    image_order: int = 3
    label_order: int = 1
    logits_order: int = 1
    separate_axis_ratio: float = 3.0
    image_coarse_order: int = 0
    logits_coarse_order: int = 0
    label_separate_axis_ratio: float | None = None
    logits_separate_axis_ratio: float | None = None
    resamples: bool = True
    trusts_tiff_spacing: bool = True
    label_decision: LabelDecision = "half"

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if sorted(self.axis_order) != [0, 1, 2]:
            raise ValueError(f"axis_order must be a permutation of 0, 1, 2, got {self.axis_order}")
        if len(self.target_spacing) not in (2, 3) or any(not value > 0 for value in self.target_spacing):
            raise ValueError(f"target_spacing needs 2 or 3 positive entries, got {self.target_spacing}")
        if self.label_decision == "largest" and self.label_order not in (0, 1):
            raise ValueError(f"label_decision 'largest' needs a label_order of 0 or 1, got {self.label_order}")
        return self

    @property
    def is_in_slices(self) -> bool:
        """Whether networks see slices across the first axis, which is not resampled (2D)."""
        return len(self.target_spacing) == 2

    def digest(self) -> str:
        """Name of this preprocessing."""
        return digest_of(self.model_dump(mode="json"))
