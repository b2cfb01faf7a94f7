"""The `autoseg` command: its subcommands, and how errors become messages and exit codes."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence

import typer

from autoseg.cli import check, demo, evaluate, export, import_, info, plan, predict, report, run, train
from autoseg.cli.output import TerminalProgress, configure_logging, render_error, stderr
from autoseg.errors import AutosegError, ConfigError, LeaderStopped

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

app = typer.Typer(
    name="autoseg",
    help="Plan, train and cross-validate a U-Net on a folder of labelled medical images, and segment new ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (demo, check, plan, train, predict, evaluate, report, run, import_, export, info):
    module.register(app)


_OPTIONAL_FILES = {"--json": (".json", "-"), "--html": (".html", "autoseg-check.html")}
"""Options whose file may be left out: the ending by which the next word is known as their file, and what stands for it
otherwise ("-" is stdout)."""


def fill_optional_files(arguments: Sequence[str]) -> list[str]:
    """Give a bare `--json` or `--html` its file; they take the next word only if it has the right ending."""
    out = []
    for index, word in enumerate(arguments):
        out.append(word)
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        ending, otherwise = _OPTIONAL_FILES.get(word, ("", ""))
        if ending and (not following.endswith(ending) or following.startswith("-")):
            out.append(otherwise)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; by default those of the process.

    Returns:
        The exit code: 0 ok, 2 usage or configuration, 3 data, 4 plan, 5 model, 6 device memory, 130 interrupted.
        Anything else that is raised is a bug and leaves with its traceback and 1.
    """
    configure_logging()
    # Python looks through all objects once more when it ends; torch's are so many that it takes about a second.
    atexit.register(gc.freeze)
    words = fill_optional_files(sys.argv[1:] if arguments is None else arguments)
    try:
        _refuse_several_processes(words)
        app(args=words, prog_name="autoseg")
    except LeaderStopped as error:
        # The first process of several tells why.
        return error.exit_code
    except AutosegError as error:
        TerminalProgress.close_active()
        render_error(error)
        return error.exit_code
    except SystemExit as leave:
        if leave.code == EXIT_INTERRUPTED:
            TerminalProgress.close_active()
            stderr.print("Interrupted. Nothing that was finished is lost; the same command goes on.")
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except OSError as problem:
        # A full disk, a folder that may not be written: the machine's, not a bug of ours.
        TerminalProgress.close_active()
        render_error(ConfigError(f"{problem.filename or 'a file'} cannot be read or written: {problem.strerror}"))
        return ConfigError.exit_code
    finally:
        TerminalProgress.close_active()
    return 0


def _refuse_several_processes(words: Sequence[str]) -> None:
    """Only training is shared by processes that were started together; anything else each would do anew."""
    if "WORLD_SIZE" not in os.environ or "train" in words[:1]:
        return
    from autoseg.compute import is_launched

    if is_launched():
        raise ConfigError(
            f"`autoseg {' '.join(words[:1])}` was started as {os.environ['WORLD_SIZE']} processes",
            hint="Only `autoseg train` shares its work among processes; run everything else without torchrun.",
        )
