"""How numbers are written in reasons."""

from __future__ import annotations

from collections.abc import Sequence

MILLION = 1e6


def number(value: float) -> str:
    """Four significant digits, no exponent where it can be avoided."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def millions(count: float) -> str:
    """A count in millions."""
    return f"{count / MILLION:,.3g} million" if count < 1000 * MILLION else f"{count / MILLION:,.0f} million"


def shape(sizes: Sequence[float]) -> str:
    """Sizes joined by a multiplication sign."""
    return "×".join(number(size) if size % 1 else str(int(size)) for size in sizes)


def per_axis(names: Sequence[str], values: Sequence[float], unit: str = "") -> str:
    """Values with the names of their axes."""
    listed = ", ".join(f"{name} {number(value)}" for name, value in zip(names, values, strict=True))
    return f"{listed} {unit}".rstrip()


def span(low: float, high: float) -> str:
    """A range, or that there is none."""
    return "in every case" if number(low) == number(high) else f"{number(low)} to {number(high)}"


def several(count: int, noun: str) -> str:
    """A count with its noun."""
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def part(fraction: float) -> str:
    """A part of a whole; a patch may be larger than the image it sees."""
    return "all" if fraction >= 1 else f"{fraction:.1%}"


def gigabytes(amount: float) -> str:
    """A memory budget, three significant digits."""
    return f"{amount:.3g} GB" if amount < 1000 else f"{amount:,.0f} GB"


def seconds(amount: float) -> str:
    """A time, three significant digits."""
    return f"{amount:.3g} s" if amount < 1000 else f"{amount:,.0f} s"


def operations(per_second: float) -> str:
    """A speed, in thousand millions of operations a second."""
    return f"{per_second / (1000 * MILLION):,.3g} thousand million operations a second"
