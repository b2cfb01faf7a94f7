"""autoseg: point it at a folder of labelled medical images, and it plans, trains and applies a U-Net."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("autoseg-unet")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["Predictor", "Segmentation", "__version__"]

_LATER = ("Predictor", "Segmentation")


def __getattr__(name: str) -> object:
    """What needs torch is imported when it is asked for: `import autoseg` takes no time. For types see __init__.pyi."""
    if name in _LATER:
        # By name, so that the parts of autoseg, which import this module for its version, do not depend on each other.
        return getattr(import_module("autoseg.pipeline.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
