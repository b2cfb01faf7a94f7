"""Numbers as the page writes them; what is not known is a dash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsFloat

DASH = "–"

_BYTES_PER_GB = 1e9
_SECONDS_PER_MINUTE = 60.0
_TWO_DIGITS = 10.0


def number(value: float | None, digits: int = 3) -> str:
    """With so many decimals."""
    return DASH if value is None else f"{value:.{digits}f}"


def minutes(seconds: float | None) -> str:
    """Seconds as minutes."""
    return DASH if seconds is None else f"{seconds / _SECONDS_PER_MINUTE:.1f}"


def seconds(value: float | None) -> str:
    """Seconds, with two digits or more that say something."""
    if value is None:
        return DASH
    if value >= _TWO_DIGITS:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def gain(value: float) -> str:
    """A difference of two Dice, small ones too."""
    return f"{value:+.6f}"


def gigabytes(count: int | None) -> str:
    """Bytes as GB (10^9)."""
    return DASH if not count else f"{count / _BYTES_PER_GB:.2f}"


def times(values: Sequence[SupportsFloat]) -> str:
    """Lengths along axes."""
    return " × ".join(f"{float(value):.4g}" for value in values)


def tolerance_in_words(tolerance_mm: dict[str, float]) -> str:
    """One value, or one for each class."""
    if len(set(tolerance_mm.values())) == 1:
        return f"{next(iter(tolerance_mm.values())):.4g} mm"
    return ", ".join(f"{name} {value:.4g} mm" for name, value in tolerance_mm.items())


def p_value(value: float | None) -> str:
    """As papers write it."""
    smallest = 0.001
    return DASH if value is None else (f"< {smallest}" if value < smallest else f"{value:.3f}")
