"""What the documents tell a user to type is what the command line understands."""

import re
import shlex
from pathlib import Path

import pytest

from scripts.check_readme import find_commands, find_problem

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "docs/getting-started.md")
PAGES = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))]
FIRST_COMMANDS = {"demo", "check", "plan", "train", "predict", "evaluate", "report", "run", "info"}

COMMANDS = [
    pytest.param(arguments, id=f"{Path(document).stem}: {shlex.join(arguments)}")
    for document in DOCUMENTS
    for arguments in find_commands((ROOT / document).read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_documented_command_line_parses(arguments):
    assert find_problem(arguments) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "mydata", "--out", "run", "--no-such-option"],
        ["plan", "mydata", "--out"],
        ["train", "run", "too", "many"],
    ],
)
def test_the_check_itself_finds_mistakes(arguments):
    assert find_problem(arguments) is not None


def test_readme_opens_with_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [block.strip() for block in blocks[:2]] == ["make demo", "make test"]


def test_readme_shows_every_command_of_the_first_version():
    shown = {arguments[0] for arguments in find_commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert shown >= FIRST_COMMANDS


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    assert not missing
