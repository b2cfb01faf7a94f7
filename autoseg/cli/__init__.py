"""The command line: parse, call the pipeline, render results and errors."""

from autoseg.cli.app import main

__all__ = ["main"]
