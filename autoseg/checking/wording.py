"""Numbers and lists in the words of findings."""

from __future__ import annotations

from collections.abc import Sequence

_LISTED = 5


def listed(items: Sequence[str], most: int = _LISTED) -> str:
    """The first few names, and how many there are besides."""
    more = len(items) - most
    if more == 1:  # naming the last one is as short
        most, more = most + 1, 0
    words = [str(item) for item in items[:most]]
    if more > 0:
        return f"{', '.join(words)} and {more} more"
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def num(count: int, word: str) -> str:
    """A count with its word, such as "3 cases"."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def share(part: float, whole: float) -> str:
    """A part in per cent, with as many digits as it takes; "0 %" of nothing."""
    percent = 100 * part / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "less than 0.1 %"
    return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


def by(values: Sequence[float]) -> str:
    """Lengths along axes, such as "0.5 × 0.5 × 3"."""
    return " × ".join(f"{value:.4g}" for value in values)
