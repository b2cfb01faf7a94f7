"""What each value of a label map is called and which colour it is shown in: one table for every file that names labels.

Source of the first ten colours: the page of `autoseg check`, bright on grey images and told apart with most defects of
colour vision.
"""

from __future__ import annotations

import colorsys

from autoseg.domain import regions
from autoseg.domain.dataset import LabelSchema
from autoseg.domain.values import Value

Colour = tuple[int, int, int]
"""Red, green, blue, each 0 ... 255."""

PALETTE: tuple[Colour, ...] = (
    (0x35, 0xC4, 0xFF),
    (0xFF, 0x8F, 0x1F),
    (0x6F, 0xE0, 0x6F),
    (0xFF, 0x6F, 0xAE),
    (0xFF, 0xE1, 0x4D),
    (0xB4, 0x8C, 0xFF),
    (0x3F, 0xE0, 0xCF),
    (0xFF, 0x6B, 0x5E),
    (0xC3, 0xD9, 0x4A),
    (0xE6, 0xA8, 0xFF),
)
"""The colours of the first ten labels."""

GOLDEN_FRACTION = 0.618033988749895
"""Hues a golden section apart never come close to the ones before. Source: the theorem of three gaps."""

_SATURATIONS = (0.75, 0.5)
_BRIGHTNESSES = (1.0, 0.8)


class Label(Value):
    """A value of a label map.

    Attributes:
        value: As in the file, above 0.
        name: Of the class; of a value that several regions share, theirs with " + " between.
        colour: Red, green, blue, 0 ... 255.
    """

    value: int
    name: str
    colour: Colour

    @property
    def hexadecimal(self) -> str:
        """The colour as "#rrggbb"."""
        return "#{:02x}{:02x}{:02x}".format(*self.colour)

    @property
    def fractions(self) -> tuple[float, float, float]:
        """The colour as numbers from 0 to 1."""
        red, green, blue = (level / 255 for level in self.colour)
        return (red, green, blue)


def colour_of(number: int) -> Colour:
    """The colour of a label by its place in the table; the same for ever.

    Args:
        number: From 0.
    """
    if number < len(PALETTE):
        return PALETTE[number]
    further = number - len(PALETTE)
    saturation = _SATURATIONS[further % 2]
    brightness = _BRIGHTNESSES[further // 2 % 2]
    red, green, blue = colorsys.hsv_to_rgb(further * GOLDEN_FRACTION % 1, saturation, brightness)
    return (round(red * 255), round(green * 255), round(blue * 255))


def label_table(schema: LabelSchema) -> tuple[Label, ...]:
    """Every value that a label map of this schema may hold but 0, ascending; colours by the order of values.

    Args:
        schema: Classes or regions. The name of a value is that of its class. Of regions it is the region that the value
            is written for; a value that is written where regions meet has the names of all of them.
    """
    names = _names_of_regions(schema) if schema.has_regions else {c.values[0]: c.name for c in schema.classes}
    return tuple(
        Label(value=value, name=names[value], colour=colour_of(number)) for number, value in enumerate(sorted(names))
    )


def _names_of_regions(schema: LabelSchema) -> dict[int, str]:
    values = [item.values for item in schema.classes]
    if schema.regions_class_order is not None:
        # Those of later regions are painted over those of earlier ones.
        return dict(zip(schema.regions_class_order, schema.names, strict=True))
    names = {
        value: " + ".join(schema.names[number] for number in sorted(members))
        for value, members in regions.memberships(values).items()
    }
    for number in reversed(range(len(values))):
        names[regions.own_value(values, number)] = schema.names[number]
    return names
