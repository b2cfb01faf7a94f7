"""Settings written by people: YAML files and `--set KEY=VALUE`, checked before anything runs.

Order of precedence: defaults, then `--config-file`, then options and `--set`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from autoseg.domain.values import Value
from autoseg.errors import ConfigError

DEFAULT_SEED = 20240229
"""Any fixed number would do; recorded with every run."""

DEFAULT_PRESET, CPU_PRESET = "default", "cpu"
"""The planning presets of GPUs and of machines without one. Source: decision 23."""

AUTO = "auto"
"""What a machine has or does best, found out there."""

YAML_ENDINGS = (".yaml", ".yml")

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS_GB = {"gb": 1.0, "g": 1.0, "mb": 1e-3, "m": 1e-3, "gib": 2**30 / 1e9, "mib": 2**20 / 1e9}


class PlanSettings(Value):
    """The section `plan` of a settings file.

    Attributes:
        preset: Rules to plan by: a shipped preset, or a YAML file of the same keys; "auto": `cpu` on a machine without
            a GPU, else `default`.
        vram_gb: Memory for one training step in GB; "auto": what this machine has; None means the preset's own.
        step_seconds: Longest training step, for presets that plan for time; None means the preset's own.
        configurations: Further configurations by name, each with the planned one that it is a copy of.
        overrides: Plan keys set by hand, such as ``3d_fullres.network.patch_size``.
        patients: Whether cases of one patient are recognised by their names where no case names its patient ("names"),
            or only given patients count ("given").
    """

    preset: str = AUTO
    vram_gb: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None
    step_seconds: float | None = Field(default=None, gt=0)
    configurations: dict[str, str] = Field(default_factory=dict)
    overrides: dict[str, Any] = Field(default_factory=dict)
    patients: Literal["names", "given"] = "names"

    @field_validator("vram_gb", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> Any:
        return parse_memory_gb(value) if isinstance(value, str) and value != AUTO else value

    @field_validator("step_seconds", mode="before")
    @classmethod
    def _seconds_with_unit(cls, value: Any) -> Any:
        return parse_duration_s(value) if isinstance(value, str) else value


class TrainSettings(Value):
    """The section `train` of a settings file.

    Attributes:
        epochs: Epochs of `steps_per_epoch` steps (excludes `time_budget_s`).
        time_budget_s: Seconds for a fold, the whole learning-rate schedule included.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "auto" takes what the device does well.
        compile: Whether the network is compiled; "auto": where a long training on a GPU gains by it.
        seed: The run's seed.
        checkpoint_interval_s: Longest time between checkpoints.
        log: Where the learning curve is logged besides metrics.jsonl.
        pretrained: A fold folder or a run; training begins with its weights where they fit.
    """

    epochs: int | None = Field(default=None, ge=1)
    time_budget_s: float | None = Field(default=None, gt=0)
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"
    seed: int = Field(default=DEFAULT_SEED, ge=0)
    checkpoint_interval_s: float = Field(default=60.0, gt=0, le=60.0)
    log: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    pretrained: str | None = None

    @field_validator("time_budget_s", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> Any:
        return parse_duration_s(value) if isinstance(value, str) else value


class Settings(Value):
    """A whole settings file."""

    plan: PlanSettings = PlanSettings()
    train: TrainSettings = TrainSettings()


def configs_folder() -> Path:
    """The shipped settings: inside the package in a wheel, beside it in a source tree."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def preset_names() -> tuple[str, ...]:
    """The shipped planning presets, by name."""
    return tuple(sorted(path.stem for path in (configs_folder() / "presets").glob("*.yaml")))


def preset_file(name: str) -> Path:
    """Where the rules of a shipped preset are."""
    return configs_folder() / "presets" / f"{name}.yaml"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = sorted({str(key) for key in keys if keys.count(key) > 1})
        if doubled:
            raise ConfigError(f"{node.start_mark}: keys given twice: {', '.join(doubled)}")
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads 6e-4 as text, because its floats need a dot. People mean the number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        ConfigError: Missing, not YAML, not a mapping, or a key given twice.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"the settings file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise ConfigError(f"{path} cannot be read as YAML: {problem}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(data).__name__}")
    return data


def load_settings(path: Path | None) -> Settings:
    """The settings of a file, or the defaults.

    Raises:
        ConfigError: The file is unreadable, or keys are unknown or wrong; all of them listed.
    """
    if path is None:
        return Settings()
    import json

    return Settings.from_json(json.dumps(read_yaml(path)), path, ConfigError)


def parse_assignments(items: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """KEY=VALUE items to keys and typed values (YAML scalars and lists; `40,56,40` is a list too).

    Raises:
        ConfigError: An item has no `=`, no key, or a value that is not YAML.
    """
    out = []
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set needs KEY=VALUE, got {item!r}", hint="Example: --set 2d.training.batch_size=16")
        if re.fullmatch(r"\s*[-+.\deE]+(\s*,\s*[-+.\deE]+)+\s*", text):
            text = f"[{text}]"
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as problem:
            raise ConfigError(f"the value of {key.strip()} is not valid YAML: {text!r} ({problem})") from None
        out.append((key.strip(), value))
    return tuple(out)


def parse_additions(items: Sequence[str]) -> dict[str, str]:
    """NAME=CONFIGURATION items to new names with the configurations that they are copies of.

    Raises:
        ConfigError: An item has no `=`, or nothing on one side of it.
    """
    out = {}
    for item in items:
        name, _, source = (part.strip() for part in item.partition("="))
        if not name or not source:
            raise ConfigError(f"--add needs NAME=CONFIG, got {item!r}", hint="Example: --add 3d_small=3d_fullres")
        out[name] = source
    return out


def parse_duration_s(text: str) -> float:
    """Seconds of a duration such as "25m", "90s", "1h30m" or "0.5h".

    Raises:
        ConfigError: Not a duration above 0.
    """
    compact = text.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise ConfigError(f"{text!r} is not a duration", hint="Write 90s, 25m, 1.5h or 1h30m.")
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    if seconds <= 0:
        raise ConfigError(f"a duration must be above 0, got {text!r}")
    return seconds


def parse_memory_gb(text: str) -> float:
    """GB (10^9 bytes) of a size such as "8GB", "500MB" or "24".

    Raises:
        ConfigError: Not a size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = (match.group(2) or "gb").lower() if match else ""
    if match is None or unit not in _UNITS_GB or float(match.group(1)) <= 0:
        raise ConfigError(f"{text!r} is not an amount of memory", hint="Write 8GB or 500MB.")
    return float(match.group(1)) * _UNITS_GB[unit]
