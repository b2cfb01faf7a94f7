"""How each channel's intensities are scaled, from its name and the data set's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from autoseg.domain.dataset import Channel
from autoseg.domain.fingerprint import ChannelIntensity, Fingerprint
from autoseg.domain.plan import ChannelNormalization, NormalizationScheme
from autoseg.errors import PlanError
from autoseg.planning.presets import PlannerRules

SCHEMES_BY_NAME: Mapping[str, NormalizationScheme] = MappingProxyType(
    {"ct": "ct", "nonorm": "none", "zscore": "zscore", "rescale_to_0_1": "rescale", "rgb_to_0_1": "rgb"}
)
"""Channel names, in lower case, that choose a scheme; any other name means "zscore". Source: nnU-Net 2.8."""


def uses_mask(fingerprint: Fingerprint, rules: PlannerRules) -> bool:
    """Whether cropping takes away so much that the background must not count in means and deviations.

    Source: nnU-Net (Isensee et al. 2021, supplement 2.2).
    """
    return fingerprint.median_relative_size_fraction < rules.mask_below_fraction


def _one(channel: Channel, stats: ChannelIntensity | None, use_mask: bool) -> ChannelNormalization:
    scheme = SCHEMES_BY_NAME.get(channel.name.casefold(), "zscore")
    if scheme == "ct":
        if stats is None:
            raise PlanError(
                f"the fingerprint does not tell the intensities of {channel.name}, by which CT images are scaled",
                hint="Measure the data set anew, without --fingerprint.",
            )
        return ChannelNormalization(
            scheme=scheme,
            mean=stats.mean,
            std=stats.std,
            lower=stats.percentile_00_5,
            upper=stats.percentile_99_5,
        )
    return ChannelNormalization(scheme=scheme, use_mask=use_mask and scheme == "zscore")


def choose_normalization(
    fingerprint: Fingerprint, channels: Sequence[Channel], rules: PlannerRules
) -> tuple[ChannelNormalization, ...]:
    """One scheme a channel.

    Raises:
        PlanError: A CT channel whose intensities are not known.
    """
    use_mask = uses_mask(fingerprint, rules)
    return tuple(
        _one(channel, stats, use_mask) for channel, stats in zip(channels, fingerprint.intensities, strict=True)
    )
