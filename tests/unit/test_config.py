"""Settings written by people."""

from pathlib import Path

import pytest

from autoseg.config import Settings, load_settings, parse_assignments, parse_duration_s, parse_memory_gb
from autoseg.errors import ConfigError
from autoseg.pipeline.settings import resolve_settings

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_parses(path: Path) -> None:
    assert isinstance(load_settings(path), Settings)


def test_the_default_file_holds_every_key_with_its_default() -> None:
    path = PROJECT / "configs" / "default.yaml"
    assert load_settings(path) == Settings()
    text = path.read_text()
    for section, value in Settings().model_dump().items():
        assert f"{section}:" in text
        for key in value:
            assert f"  {key}:" in text


def test_all_wrong_keys_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("plan:\n  presett: x\ntrain:\n  epochs: 0\n  seeed: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        "plan.presett",
        "train.epochs",
        "train.seeed",
    }


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("train:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match="seed"):
        load_settings(path)


def test_values_are_what_people_mean() -> None:
    pairs = dict(parse_assignments(["a.b=6e-4", "c=40,56,40", "d=[1, 2]", "e=true", "f=text"]))
    assert pairs == {"a.b": 6e-4, "c": [40, 56, 40], "d": [1, 2], "e": True, "f": "text"}


@pytest.mark.parametrize("item", ["novalue", "=3", "k=[1,"])
def test_a_broken_assignment_is_refused(item: str) -> None:
    with pytest.raises(ConfigError):
        parse_assignments([item])


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("25m", 1500), ("1.5h", 5400), ("1h30m", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["25", "m", "-5m", "0s", "5 minutes"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_duration_s(text)


@pytest.mark.parametrize(("text", "gigabytes"), [("8GB", 8), ("500MB", 0.5), ("24", 24), ("1GiB", 2**30 / 1e9)])
def test_memory(text: str, gigabytes: float) -> None:
    assert parse_memory_gb(text) == pytest.approx(gigabytes)


@pytest.mark.parametrize("text", ["auto?", "0GB", "-1GB", "8 parsecs"])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_memory_gb(text)


def test_a_seed_of_the_command_line_goes_before_that_of_the_settings(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("train:\n  seed: 5\n")
    assert resolve_settings(file).train.seed == 5
    assert resolve_settings(file, seed=0).train.seed == 0
