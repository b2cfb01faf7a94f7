"""SimpleITK, loaded when a file needs it: most are NIfTI, which do not, and loading takes a sixth of a second."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def simpleitk() -> Any:
    """The package; it writes no warnings to stderr, errors still come."""
    import SimpleITK

    package: Any = SimpleITK
    package.ProcessObject.SetGlobalWarningDisplay(False)
    return package
