"""The command line: frozen names, exit codes, what goes where."""

import subprocess
import sys
from pathlib import Path

import pytest

from autoseg.cli.app import app, fill_optional_files, main

TRAINING = {
    "--config",
    "--fold",
    "--epochs",
    "--time-budget",
    "--device",
    "--precision",
    "--pretrained",
    "--restart",
    "--seed",
    "--log",
    "--set",
}
PLANNING = {"--out", "--preset", "--vram", "--measure", "--step-time", "--add", "--set", "--config-file"}

REPAIRING = {"--repair", "--resample-labels", "--replace-nan", "--keep-orientation", "--keep-values", "--keep-empty"}

PREDICTING = {
    "--out",
    "--config",
    "--fold",
    "--tta",
    "--overlap",
    "--skip-empty",
    "--device",
    "--precision",
    "--engine",
}

FROZEN = {
    "demo": set(),
    "check": {"--json", "--html"} | REPAIRING,
    "plan": PLANNING | {"--why", "--fingerprint", "--device", "--precision", "--json"},
    "train": TRAINING | {"--config-file"},
    "predict": PREDICTING
    | {"--dicom-seg", "--probabilities", "--uncertainty", "--statistics", "--side-files", "--shard", "--restart"},
    "evaluate": {"--json"},
    "report": {"--json", "--select"},
    "run": TRAINING | PLANNING | {"--jobs"},
    "import nnunet": {"--out", "--checkpoint"},
    "export": {"--out", "--format", "--config", "--fold"},
    "info": {"--json"},
}


def declared_options() -> dict[str, set[str]]:
    import typer

    group = typer.main.get_command(app)
    commands = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        commands |= {name: command} if inner is None else {f"{name} {sub}": inner[sub] for sub in inner}
    return {
        name: {word for item in command.params for word in item.opts if word.startswith("--")}
        for name, command in commands.items()
    }


def test_commands_and_options_are_frozen() -> None:
    assert declared_options() == FROZEN


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["train", "-h"]])
def test_help_starts_without_torch(words: list[str]) -> None:
    code = (
        "import sys; from autoseg.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'monai', 'nibabel', 'SimpleITK', 'skimage'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_the_end_of_the_program_does_not_look_through_every_object() -> None:
    """Once a second of work after a stop was asked for, and after every command."""
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0));"
        "from autoseg.cli import main; main(['info', 'nowhere'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("words", "filled"),
    [
        (["check", "D", "--json"], ["check", "D", "--json", "-"]),
        (["check", "--json", "D"], ["check", "--json", "-", "D"]),
        (["check", "--html", "D"], ["check", "--html", "autoseg-check.html", "D"]),
        (["check", "D", "--html", "x.html"], ["check", "D", "--html", "x.html"]),
        (["check", "D", "--html", "--json"], ["check", "D", "--html", "autoseg-check.html", "--json", "-"]),
        (["check", "D", "--json", "x.json"], ["check", "D", "--json", "x.json"]),
        (["plan", "D", "--json", "--out", "R"], ["plan", "D", "--json", "-", "--out", "R"]),
    ],
)
def test_json_takes_a_file_only_when_it_ends_in_json(words: list[str], filled: list[str]) -> None:
    assert fill_optional_files(words) == filled


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["plan", "--no-such-option"], 2, "No such option"),
        (["no-such-command"], 2, "No such command"),
        (["plan", "nowhere", "--out", "run"], 3, "nowhere"),
        (["train", "nowhere"], 2, "not a planned run"),
        (["report", "nowhere"], 2, "not a planned run"),
        (["predict", "nowhere", "x.nii.gz", "--out", "out"], 5, "nowhere"),
        (["info", "nowhere"], 2, "does not exist"),
        (["train", "nowhere", "--epochs", "1", "--time-budget", "1m"], 2, "exclude each other"),
        (["train", "nowhere", "--time-budget", "soon"], 2, "not a duration"),
    ],
)
def test_wrong_usage_is_named_with_its_exit_code(
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    captured = capsys.readouterr()
    assert said in " ".join(captured.err.split())
    assert captured.out == ""


def test_info_names_versions_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    import torch

    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_check_lists_findings_on_stdout_and_exits_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    assert main(["check", "nowhere", "--json"]) == 3
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [item["severity"] for item in findings] == ["error"]
    assert "nowhere" in findings[0]["message"] + findings[0]["file"]


def test_a_preset_that_does_not_exist_is_found_before_any_image_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"), "--preset", "bogus"]
    assert main(words) == 2
    assert "unknown preset 'bogus'" in capsys.readouterr().err
