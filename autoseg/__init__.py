"""autoseg: point it at a folder of labelled medical images, and it plans, trains and applies a U-Net."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("autoseg-unet")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
