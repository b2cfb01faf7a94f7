"""What the benchmarks of whole command lines share: running `autoseg`, and their tables."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence


def autoseg(*words: str) -> float:
    """Run one command of the command line, stop when it fails; its seconds."""
    print("$ autoseg", *words, flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "autoseg", *words], check=True)
    return time.monotonic() - started


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
