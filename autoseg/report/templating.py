"""What all pages share: how templates are filled, and the parts that go in as they are."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def environment_of_pages() -> Environment:
    """Templates of this package; what is filled in is escaped, and a name that is not there is an error."""
    return Environment(
        loader=PackageLoader("autoseg.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def trusted_part(name: str) -> Markup:
    """One of our own style sheets or scripts, to be put in without escaping."""
    return Markup((resources.files("autoseg.report") / "templates" / name).read_text("utf-8"))
