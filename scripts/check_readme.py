"""Checks that every `autoseg ...` line in Markdown files parses against the command line, without running it.

Usage: python scripts/check_readme.py README.md docs/getting-started.md
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def find_commands(markdown: str) -> list[list[str]]:
    """Returns the arguments of each `autoseg` line in the shell blocks, without the leading `autoseg`."""
    commands = []
    for block in FENCE.findall(markdown):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and Path(words[0]).name == "autoseg":
                commands.append(words[1:])
    return commands


def find_problem(arguments: list[str]) -> str | None:
    """Parses one command line as autoseg would: options, choices and arity; paths need not exist.

    Returns:
        What is wrong, or None.
    """
    from typer.main import get_command

    from autoseg.cli.app import app, fill_optional_files

    group: Any = get_command(app)
    words = fill_optional_files(arguments)
    context = group.make_context("autoseg", list(words), resilient_parsing=True)
    name, rest = (words[0], words[1:]) if words else ("", [])
    command = group.get_command(context, name)
    if command is None:
        return f"autoseg {shlex.join(arguments)}: no such command"
    try:
        command.make_context(name, list(rest), parent=context)
    except Exception as error:  # the parser's exceptions have no public base class in typer
        message = str(getattr(error, "message", error))
        if type(error).__name__ == "Exit" or "does not exist" in message:  # --help; a path of the example
            return None
        return f"autoseg {shlex.join(arguments)}: {type(error).__name__}: {message}"
    return None


def main(paths: list[str]) -> int:
    """Prints every problem in the files; returns the exit status."""
    num_commands, problems = 0, []
    for path in paths:
        for arguments in find_commands(Path(path).read_text(encoding="utf-8")):
            num_commands += 1
            if problem := find_problem(arguments):
                problems.append(f"{path}: {problem}")
    print("\n".join([*problems, f"{num_commands} commands, {len(problems)} problems"]))
    return 1 if problems or not num_commands else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
