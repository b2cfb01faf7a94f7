"""What a channel's name says of its intensities."""

from __future__ import annotations

import re

from autoseg.domain.dataset import Channel
from autoseg.planning.normalization import SCHEMES_BY_NAME

_FIXED_SCHEMES = ("ct", "none", "rgb")
"""Normalisations that treat the values of all images alike."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def _words(channel: Channel) -> set[str]:
    return {word.lower() for word in _WORD.findall(channel.name)}


def is_fixed_scale(channel: Channel) -> bool:
    """Whether the same value means the same in every image of the channel, as its normalisation takes it."""
    return SCHEMES_BY_NAME.get(channel.name.casefold(), "zscore") in _FIXED_SCHEMES


def is_ct(channel: Channel) -> bool:
    """Whether the channel's values should be Hounsfield units."""
    return bool(_words(channel) & {"ct", "cect", "ncct", "cta", "ldct"})


def is_pet(channel: Channel) -> bool:
    """Whether the channel's values should be standardised uptake values."""
    return bool(_words(channel) & {"pet", "suv", "fdg"})
