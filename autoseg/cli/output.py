"""What the command line prints: messages and progress to stderr, results to stdout."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichBars

from autoseg.errors import AutosegError
from autoseg.io.files import write_json

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)

LINE_INTERVAL_S = 15.0
"""Without a terminal a line now and then: often enough to see life, rare enough for a log file."""

STDOUT = "-"


def configure_logging(level: int = logging.INFO) -> None:
    """Send the library's log to stderr, once."""
    logger = logging.getLogger("autoseg")
    if logger.handlers:
        return
    logger.setLevel(level)
    logger.addHandler(RichHandler(console=stderr, show_time=False, show_path=False, show_level=True, markup=False))
    logging.captureWarnings(True)


def quieten() -> None:
    """From now on only warnings and errors."""
    logging.getLogger("autoseg").setLevel(logging.WARNING)


def render_error(error: AutosegError) -> None:
    """Print an error as a person should see it."""
    stderr.print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)
    for problem in error.problems:
        stderr.print(f"  - {escape(problem)}", soft_wrap=True)
    if error.hint:
        stderr.print(escape(error.hint), soft_wrap=True)


def emit_json(data: Any, target: str) -> None:
    """Write a result as JSON to stdout (`-`) or to a file."""
    if target == STDOUT:
        sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
    else:
        write_json(Path(target), data)


class TerminalProgress:
    """A bar on a terminal; elsewhere a line at the start, every few seconds, and at the end."""

    _active: ClassVar[TerminalProgress | None] = None

    @classmethod
    def close_active(cls) -> None:
        """Take a running bar off the terminal and give the cursor back; before messages about errors."""
        if cls._active is not None:
            cls._active._close()

    def __init__(self) -> None:
        self._bars: RichBars | None = None
        self._task: Any = None
        self._description = ""
        self._total: int | None = None
        self._done = 0
        self._started_s = 0.0
        self._printed_s = 0.0

    def start(self, description: str, total: int | None) -> None:
        """Begin a task of `total` steps (None: unknown)."""
        self._close()
        self._description, self._total, self._done = description, total, 0
        self._started_s = self._printed_s = time.monotonic()
        if not stderr.is_terminal:
            stderr.print(f"{escape(description)} ...", soft_wrap=True)
            return
        self._bars = RichBars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=stderr,
        )
        self._bars.start()
        TerminalProgress._active = self
        self._task = self._bars.add_task(escape(description), total=total, note="")

    def advance(self, step: int = 1, note: str = "") -> None:
        """Some steps are done; the note says how it goes."""
        self._done += step
        if self._bars is not None:
            if note:
                self._bars.update(self._task, note=escape(note))
            self._bars.advance(self._task, step)
            return
        if time.monotonic() - self._printed_s >= LINE_INTERVAL_S:
            self._printed_s = time.monotonic()
            of = f"/{self._total}" if self._total else ""
            stderr.print(f"  {escape(self._description)}: {self._done}{of} {escape(note)}", soft_wrap=True)

    def finish(self, note: str = "") -> None:
        """The task is over."""
        self._close()
        seconds = time.monotonic() - self._started_s
        stderr.print(f"{escape(self._description)}: {escape(note or 'done')} ({seconds:.1f} s)", soft_wrap=True)

    def _close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            TerminalProgress._active = None
